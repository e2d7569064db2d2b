"""`drop-source`: which rows, data sets and models a source touched, and the command that does without it."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.core.lineage import Manifest, step_key
from pipeline.core.runs import link_artefact
from pipeline.core.stage import Result
from pipeline.core.store import MANIFEST, Store
from tests.support import logger_is_restored, write_project

FOLDER = Path("data/runs/small")
Drop = Callable[..., Any]


def write_lines(path: str, rows: Sequence[Mapping[str, object]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def teacher(name: str, license: str) -> dict[str, str]:
    return {"kind": "replay", "path": f"{name}.jsonl", "origin": f"people {name}", "license": license}


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two prompt sets, two teachers for each prompt. `shared` is in both sets; to `both` the teachers answer alike, so
    that one row leaves for the other."""
    sets = {name: {"source": {"kind": "jsonl", "path": f"{name}.jsonl"}, "card": f"{name}.yaml"} for name in ("a", "b")}
    write_project(
        tmp_path,
        teachers={"first": teacher("first", "MIT"), "second": teacher("second", "Apache-2.0")},
        prompts={"sets": sets, "validation": 0, "test": 0},
        generate={"teacher": "first", "route": {"kind": "all", "teachers": ["first", "second"]}},
    )
    monkeypatch.chdir(tmp_path)
    for name, license in (("a", "CC0-1.0"), ("b", "CC-BY-4.0")):
        Path(f"{name}.yaml").write_text(f"source: hub/{name}\nrevision: '1'\nlicense: {license}\n", "utf-8")
    write_lines("a.jsonl", [{"id": name, "prompt": f"What is {name}?"} for name in ("alone", "both", "shared")])
    write_lines("b.jsonl", [{"id": name, "prompt": f"What is {name}?"} for name in ("shared", "other")])
    for name in ("first", "second"):
        said = {prompt: f"It is {prompt}, says {name}." for prompt in ("alone", "shared", "other")}
        said["both"] = "Both of us say so."
        write_lines(f"{name}.jsonl", [{"id": prompt, "completion": text} for prompt, text in said.items()])
    run("run", "run.yaml", "--until", "dataset")
    return tmp_path


def run(*arguments: str) -> None:
    with logger_is_restored():
        assert cli.main(arguments) == 0


def add_model() -> None:
    parts: Any = {"stage": "train", "inputs": {"dataset": Manifest.read(FOLDER / "dataset" / MANIFEST).content}}
    store = Store(Path("data/store"))
    with store.staging("train") as staged:
        result = Result(7, 7, {}, "c" * 64, {"student": {"model": "tiny/base", "license": "MIT"}})
        artefact = store.commit(staged, Manifest.of("train", step_key(parts), parts, result, {}))
    link_artefact(FOLDER, "train", artefact)


@pytest.fixture
def drop(capsys: pytest.CaptureFixture[str]) -> Drop:
    """The command, read as a script reads it; with `code` its message."""

    def call(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        with logger_is_restored():
            assert cli.main(["drop-source", *arguments, *(["--json"] if code == 0 else [])]) == code
        told = capsys.readouterr()
        return json.loads(told.out) if code == 0 else told.err

    return call


def counts(found: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Stage -> touched rows, all rows, touched rows through a duplicate."""
    return {each["stage"]: (each["rows"], each["of"], each["through_duplicates"]) for each in found["results"]}


class TestRows:
    def test_of_a_teacher_and_those_that_a_row_of_it_left_for(self, done: Path, drop: Drop) -> None:
        assert counts(drop("second")) == {
            "generate": (4, 8, 0),
            "filter": (4, 8, 0),
            "dedup": (4, 7, 1),
            "dataset": (4, 7, 1),
        }
        assert counts(drop("first"))["dataset"] == (4, 7, 0), "its own row stayed for the other"

    def test_of_a_prompt_set_and_those_whose_prompt_is_in_it_too(self, done: Path, drop: Drop) -> None:
        assert counts(drop("b")) == {
            "prompts": (2, 4, 1),
            "generate": (4, 8, 2),
            "filter": (4, 8, 2),
            "dedup": (4, 7, 2),
            "dataset": (4, 7, 2),
        }

    def test_counts_are_those_of_the_rows_themselves(self, done: Path, drop: Drop) -> None:
        import pyarrow.parquet as pq

        rows = pq.read_table(FOLDER / "dataset" / "data").to_pylist()
        with_license = [row for row in rows if "CC-BY-4.0" in row["license_set"]]
        assert counts(drop("CC-BY-4.0"))["dataset"][:2] == (len(with_license), len(rows))
        with_license = [row for row in rows if "MIT" in row["license_set"]]
        assert counts(drop("mit"))["dataset"][:2] == (len(with_license), len(rows))

    @pytest.mark.parametrize(
        ("name", "teachers", "sets"),
        [
            ("second", ["second"], []),
            ("people second", ["second"], []),
            ("hub/b", [], ["b"]),
            ("HUB/B", [], ["b"]),
            ("apache-2.0", ["second"], []),
            ("CC0-1.0", [], ["a"]),
        ],
    )
    def test_a_source_has_several_names(
        self, done: Path, drop: Drop, name: str, teachers: list[str], sets: list[str]
    ) -> None:
        meaning = drop(name)["meaning"]
        assert (meaning["teachers"], meaning["prompt_sets"]) == (teachers, sets)

    def test_one_name_may_be_another_thing_in_another_run(self, done: Path, drop: Drop) -> None:
        config = Path("run.yaml").read_text("utf-8")
        for old, new in {"name: small": "name: other", "people second": "robots", "Apache-2.0": "MIT"}.items():
            config = config.replace(old, new)
        Path("other.yaml").write_text(config, "utf-8")
        run("run", "other.yaml", "--until", "dataset")
        found = drop("robots")
        assert {name for each in found["results"] for name in each["runs"]} == {"other"}
        assert found["clean_runs"] == ["small"]
        assert {each["run"] for each in drop("second")["rebuilds"]} == {"small", "other"}


class TestModels:
    def test_those_that_were_trained_on_touched_rows(self, done: Path, drop: Drop) -> None:
        add_model()
        (model,) = drop("second")["models"]
        assert (model["rows"], model["of"], model["is_base"], model["model"]["runs"]) == (4, 7, False, ["small"])

    def test_those_that_were_trained_from_it(self, done: Path, drop: Drop) -> None:
        add_model()
        found = drop("tiny/base")
        (model,) = found["models"]
        assert (model["is_base"], found["results"]) == (True, [])
        (rebuild,) = found["rebuilds"]
        assert rebuild["command"] is None and "student.model" in rebuild["note"]


class TestRebuilding:
    def test_the_command_does_what_it_says(self, done: Path, drop: Drop) -> None:
        (rebuild,) = drop("b")["rebuilds"]
        words = shlex.split(rebuild["command"])
        assert words[:5] == ["python", "-m", "pipeline", "run", "run.yaml"]
        assert words[-2:] == ["--set", 'dataset.exclude_prompt_sets=["b"]']
        run(*words[3:])
        (folder,) = Path("data/runs").glob("small+*")
        assert Manifest.read(folder / "dataset" / MANIFEST).rows_out == rebuild["rows_left"] == 3
        touched = [each["runs"] for each in drop("b")["results"] if each["stage"] == "dataset"]
        assert touched == [["small"]]

    def test_rows_that_a_duplicate_of_it_was_merged_into_are_told(self, done: Path, drop: Drop) -> None:
        (rebuild,) = drop("second")["rebuilds"]
        assert rebuild["rows_left"] == 4
        assert "1 of these rows are others' into which duplicates of it were merged: they leave too" in rebuild["note"]

    def test_what_is_excluded_already_stays_so(self, done: Path, drop: Drop) -> None:
        run("run", "run.yaml", "--until", "dataset", "--set", 'dataset.exclude_teachers=["first"]')
        (name,) = (path.name for path in Path("data/runs").glob("small+*"))
        (rebuild,) = (each for each in drop("b")["rebuilds"] if each["run"] == name)
        sets = [word for word in shlex.split(rebuild["command"]) if word.startswith("dataset.")]
        assert sets == ['dataset.exclude_teachers=["first"]', 'dataset.exclude_prompt_sets=["b"]']

    def test_no_command_where_nothing_would_be_left(self, done: Path, drop: Drop) -> None:
        (rebuild,) = drop("a")["rebuilds"]
        assert rebuild["rows_left"] == 2
        for name in ("a", "b"):
            Path(f"{name}.yaml").write_text("source: hub/c\nrevision: '1'\nlicense: MIT\n", "utf-8")
        run("run", "run.yaml", "--until", "dataset")
        (rebuild,) = drop("hub/c")["rebuilds"]
        assert (rebuild["rows_left"], rebuild["command"]) == (0, None)
        assert "no row would be left" in rebuild["note"]

    def test_nothing_is_changed(self, done: Path, drop: Drop) -> None:
        before = sorted((str(path), path.lstat().st_mtime_ns) for path in done.rglob("*"))
        drop("second")
        drop("MIT")
        assert sorted((str(path), path.lstat().st_mtime_ns) for path in done.rglob("*")) == before


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["secnd"], "did you mean 'second'?"),
            (["second", "--data", "nowhere"], "no such data folder"),
            (["second", "--data", "student"], "no data folder"),
        ],
    )
    def test_three_lines_that_say_what_to_do(self, done: Path, drop: Drop, arguments: list[str], told: str) -> None:
        lines = drop(*arguments, code=2).splitlines()
        assert len(lines) == 3 and told in lines[0]

    def test_for_people(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        add_model()
        capsys.readouterr()
        run("drop-source", "second")
        told = capsys.readouterr().out
        assert "4 of 7 rows (57.1%), 1 of them by a duplicate, run small" in told
        assert "--set 'dataset.exclude_teachers=[\"second\"]'" in told
        assert told.endswith("nothing was changed\n")
