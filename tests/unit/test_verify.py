"""`verify`: every byte that was committed is hashed again, all damage is named, and nothing is written."""

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.core.lineage import DigestCache, Manifest, digest_json, file_sha256, path_digest, step_key
from pipeline.core.stage import Result
from pipeline.core.store import MANIFEST, Artefact, Store
from pipeline.runner.contents import CONTENTS, recompute
from pipeline.runner.steps import STAGES
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Segment, Stored
from tests.support import logger_is_restored, write_project

FOLDER = Path("data/runs/small")


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    with logger_is_restored():
        yield


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A small project as current folder that has run up to `dataset`."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "run.yaml", "--until", "dataset"]) == 0
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> "Verify":
    return Verify(capsys)


class Verify:
    """The command, read as a script reads it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int) -> dict[str, Any]:
        self._capsys.readouterr()
        assert cli.main(["verify", "--json", *arguments]) == code
        found: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return found

    def damage(self, *arguments: str) -> list[tuple[str, str, str]]:
        """(kind, where, what) of all damage; the exit code says that there is some."""
        found = self(*arguments, code=5)["damage"]
        return [(each["kind"], each["where"], each["what"]) for each in found]


def path_of(step: str) -> Path:
    return Path(os.path.relpath((FOLDER / step).resolve(), Path.cwd()))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def reseal(step: str, **changes: Any) -> None:
    """Write a manifest anew whose seal fits, as somebody could who means to deceive."""
    path = path_of(step) / MANIFEST
    path.write_text(replace(Manifest.read(path), **changes).to_json(), "utf-8")


class TestWhole:
    def test_what_was_just_made_is_whole(self, done: Path, verify: Verify) -> None:
        found = verify(code=0)
        assert (found["artefacts"], found["contents"], found["links"], found["damage"]) == (5, 5, 5, [])
        stored = [path for path in Path("data/store").glob("*/*/**/*") if path.is_file() and path.name != MANIFEST]
        assert found["files"] == len(stored)
        assert found["bytes"] == sum(path.stat().st_size for path in stored)

    def test_one_run_alone_is_verified_with_its_lock_file(self, done: Path, verify: Verify) -> None:
        cli.main(["run", "run.yaml", "--until", "dataset", "--set", "filter.min_chars=16"])
        assert verify(code=0)["artefacts"] > 5
        found = verify("run.yaml", code=0)
        assert (found["run"], found["artefacts"], found["locked"]) == ("small", 5, 5)

    def test_for_people_it_says_what_it_looked_at(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["verify"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("hashed: 5 results, ")
        assert lines[-1] == "no damage found"

    def test_nothing_is_written(self, done: Path, verify: Verify) -> None:
        before = sorted((str(path), path.lstat().st_mtime_ns) for path in done.rglob("*"))
        verify(code=0)
        verify("run.yaml", code=0)
        assert sorted((str(path), path.lstat().st_mtime_ns) for path in done.rglob("*")) == before

    def test_results_of_another_version_of_a_stage_keep_the_digest_that_it_gave_them(
        self, done: Path, verify: Verify
    ) -> None:
        folder = path_of("filter")
        manifest = Manifest.read(folder / MANIFEST)
        parts = {**manifest.parts, "version": 0}
        old = folder.with_name(step_key(parts))
        shutil.copytree(folder, old)
        changed = replace(manifest, parts=parts, key=old.name, content="0" * 64)
        (old / MANIFEST).write_text(changed.to_json(), "utf-8")
        found = verify(code=0)
        assert (found["artefacts"], found["contents"]) == (6, 5)


class TestDamagedResults:
    def test_all_damage_is_named_not_only_the_first(self, done: Path, verify: Verify) -> None:
        flip(path_of("prompts") / "rows" / "part-00000.parquet", 100)
        shard = path_of("generate") / "rows" / "part-00000.parquet"
        shard.write_bytes(shard.read_bytes()[:-1])
        (path_of("filter") / "rows" / "part-00000.parquet").unlink()
        (path_of("filter") / "surprise.txt").write_text("", "utf-8")
        flip(path_of("dedup") / MANIFEST, 20)
        size = shard.stat().st_size
        rows = Path("rows", "part-00000.parquet")
        assert {where: what for _, where, what in verify.damage()} == {
            str(path_of("prompts") / rows): "the file's sha256 differs from the manifest",
            str(shard): f"the file has {size:,} bytes, not the {size + 1:,} of the manifest",
            str(path_of("filter") / rows): "the file is missing",
            str(path_of("filter") / "surprise.txt"): "the manifest does not know this file",
            str(path_of("dedup") / MANIFEST): "the manifest was changed or is of another format",
        }

    def test_the_exit_code_and_the_list_say_what_to_do(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flip(path_of("filter") / "rows" / "part-00000.parquet", 100)
        assert cli.main(["verify"]) == 5
        shown = capsys.readouterr()
        assert "damaged: data/store/filter/" in shown.out
        assert "do: run the pipeline again: it will be rebuilt" in shown.out
        assert shown.err.splitlines()[-3] == "error: one place is damaged"
        assert cli.main(["run", "run.yaml", "--until", "dataset"]) == 0
        assert cli.main(["verify"]) == 0

    def test_a_missing_manifest(self, done: Path, verify: Verify) -> None:
        (path_of("filter") / MANIFEST).unlink()
        assert verify.damage() == [("artefact", str(path_of("filter")), "the manifest is missing")]

    def test_a_result_under_the_name_of_another(self, done: Path, verify: Verify) -> None:
        shutil.copytree(path_of("filter"), path_of("filter").with_name("0" * 64))
        ((_, where, what),) = verify.damage()
        assert where == str(path_of("filter").with_name("0" * 64))
        assert what == f"the manifest is of filter {path_of('filter').name[:12]}"

    def test_a_manifest_that_was_sealed_again_after_a_change(self, done: Path, verify: Verify) -> None:
        manifest, dedup = (Manifest.read(path_of(step) / MANIFEST) for step in ("filter", "dedup"))
        reseal("filter", parts={**manifest.parts, "version": 99})
        reseal("generate", rows_out=11)
        reseal("dedup", content="0" * 64)
        assert {what for _, _, what in verify.damage()} == {
            "the key is not the sha256 of its parts",
            "rows_in is not rows_out and the rejected rows together",
            "the content digest is not that of its rows",
            f"it was made of rows of dedup (content {dedup.content[:12]}) that are not in the store",
        }

    def test_a_damaged_result_of_another_run_is_not_this_runs(self, done: Path, verify: Verify) -> None:
        cli.main(["run", "run.yaml", "--until", "dataset", "--set", "filter.min_chars=16"])
        (other,) = Path("data/runs").glob("small+*")
        flip((other / "filter").resolve() / "rows" / "part-00000.parquet", 100)
        verify("run.yaml", code=0)
        assert len(verify.damage()) == 1
        assert len(verify.damage("run.yaml", "--set", "filter.min_chars=16")) == 1


class TestStrays:
    """Files that no run made: they are named for what they are, and no rebuilding is promised."""

    def test_what_lies_where_stages_and_results_belong(self, done: Path, verify: Verify) -> None:
        for path in ("data/store/notes.txt", "data/store/filter/.DS_Store"):
            Path(path).write_text("", "utf-8")
        Path("data/store/dedup/mine").mkdir()
        found = verify(code=5)
        assert {(each["kind"], each["where"], each["what"]) for each in found["damage"]} == {
            ("stray", "data/store/notes.txt", "a file where the folders of stages belong"),
            ("stray", "data/store/filter/.DS_Store", "a file where results belong"),
            ("stray", "data/store/dedup/mine", "a folder that is no result: its name is no key"),
        }
        assert {each["todo"].partition(",")[0] for each in found["damage"]} == {"remove it"}
        assert found["artefacts"] == 5
        assert cli.main(["run", "run.yaml", "--until", "dataset"]) == 0

    def test_an_extra_file_in_a_result_is_to_be_removed_before_a_run_rebuilds_the_result(
        self, done: Path, verify: Verify
    ) -> None:
        (path_of("filter") / "notes.txt").write_text("", "utf-8")
        (found,) = verify(code=5)["damage"]
        assert found["todo"].startswith("remove this file: ")

    def test_a_file_in_the_place_of_a_stage_is_refused_by_a_run(
        self, done: Path, verify: Verify, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.rmtree("data/store/prompts")
        Path("data/store/prompts").write_text("", "utf-8")
        assert ("stray", "data/store/prompts", "a file where the folders of stages belong") in verify.damage()
        assert cli.main(["run", "run.yaml", "--until", "dataset"]) == 2
        assert "data/store/prompts\n   do: move it away" in capsys.readouterr().err
        Path("data/store/prompts").unlink()
        assert cli.main(["run", "run.yaml", "--until", "dataset"]) == 0


class TestCopies:
    """A copy of a data folder that followed the links holds results in the folders of its runs."""

    @pytest.fixture
    def copied(self, done: Path) -> Path:
        shutil.copytree("data", "copy")  # follows links
        return Path("copy")

    @pytest.mark.parametrize("arguments", [(), ("run.yaml",)])
    def test_they_are_hashed_too(self, copied: Path, verify: Verify, arguments: tuple[str, ...]) -> None:
        found = verify(*arguments, "--data", "copy", code=0)
        assert (found["artefacts"], found["links"]) == (10, 0)
        shard = copied / "runs/small/filter/rows/part-00000.parquet"
        flip(shard, 100)
        (damage,) = verify(*arguments, "--data", "copy", code=5)["damage"]
        assert (damage["where"], damage["what"]) == (str(shard), "the file's sha256 differs from the manifest")
        assert damage["todo"].startswith("move this copy away")

    def test_one_without_a_manifest_or_of_another_stage_is_damage(self, copied: Path, verify: Verify) -> None:
        folder = copied / "runs/small"
        (folder / "dedup" / MANIFEST).unlink()
        shutil.rmtree(folder / "filter")
        (folder / "dataset").rename(folder / "filter")
        (folder / "notes").mkdir()
        key = path_of("dataset").name
        assert {(where, what) for _, where, what in verify.damage("--data", "copy")} == {
            (str(folder / "dedup"), "the manifest is missing"),
            (str(folder / "filter"), f"the manifest is of dataset {key[:12]}"),
        }


class TestLinksAndLock:
    def test_a_link_to_nothing(self, done: Path, verify: Verify) -> None:
        place = path_of("dedup")
        shutil.rmtree(place)
        what = f"links a result that is not there: dedup/{place.name}"
        assert ("link", str(FOLDER / "dedup"), what) in verify.damage()
        (broken,) = (where for kind, where, _ in verify.damage() if kind == "chain")
        assert broken == str(path_of("dataset") / MANIFEST), "what was made of it"

    def test_a_lock_file_that_the_store_contradicts(self, done: Path, verify: Verify) -> None:
        lock = json.loads(Path("run.lock.json").read_text("utf-8"))
        old = lock["filter"]["content"]
        lock["filter"]["content"] = "0" * 64
        lock["dedup"]["key"] = "1" * 64
        Path("run.lock.json").write_text(json.dumps(lock), "utf-8")
        verify(code=0)
        assert sorted(verify.damage("run.yaml")) == [
            ("lock", "run.lock.json", "dedup: the key is not the sha256 of its parts"),
            ("lock", "run.lock.json", f"filter: the content is {'0' * 12}, in the store {old[:12]}"),
        ]

    def test_a_lock_file_with_entries_of_two_runs_is_no_damage(self, done: Path, verify: Verify) -> None:
        """A run that stopped half-way leaves one; `run --locked` refuses it."""
        config = Path("run.yaml")
        config.write_text(config.read_text("utf-8") + "filter: {min_chars: 16}\n", "utf-8")
        assert cli.main(["run", "run.yaml", "--until", "filter"]) == 0
        verify("run.yaml", code=0)

    def test_a_lock_file_in_a_fresh_checkout_is_no_damage(self, done: Path, verify: Verify) -> None:
        shutil.rmtree("data")
        found = verify("run.yaml", code=0)
        assert (found["artefacts"], found["locked"]) == (0, 5)


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [[], ["--data", "nowhere"], ["--data", ""], ["--set", "filter.min_chars=2"], ["missing.yaml"], ["run.yaml"]],
    )
    def test_nothing_to_verify_is_a_mistake(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
    ) -> None:
        write_project(tmp_path)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        assert cli.main(["verify", *arguments]) == 2

    def test_an_empty_data_folder_is_not_taken_for_the_current_one(
        self, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir("data")
        assert cli.main(["verify", "--data", "."]) == 0
        assert cli.main(["verify", "--data", ""]) == 2
        assert "the folder's name is empty" in capsys.readouterr().err

    def test_a_folder_that_is_no_data_folder_is_named(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["verify", "--data", "data/runs"]) == 2
        assert "no data folder" in capsys.readouterr().err


def stored(number: int) -> Stored:
    key = digest_json(number)
    return Stored(bytes.fromhex(key), 10, number, "t" * 64, "m", "", "openai-chat", 200, None, b'{"a": 1}' * 50)


class TestStoredAnswers:
    def fill(self) -> None:
        with ResponseStore(Path("data/responses")) as responses:
            responses.put([stored(number) for number in range(20)])
            responses.fold()

    def test_a_folded_file_is_named_by_its_sha256(self, done: Path, verify: Verify) -> None:
        self.fill()
        assert verify(code=0)["answer_files"] == 1
        (path,) = Path("data/responses/answers").glob("*.parquet")
        flip(path, 50)
        assert verify.damage() == [("answers", str(path), "the file's sha256 is not its name")]

    @pytest.mark.parametrize("way", ["a bit of an answer", "its header", "cut off"])
    def test_a_segment_of_a_dead_process_is_read_through(self, done: Path, verify: Verify, way: str) -> None:
        with ResponseStore(Path("data/responses")) as responses:
            responses.put([stored(number) for number in range(20)])
        (path,) = Path("data/responses/segments").glob("*.sqlite")
        before = path.read_bytes()
        assert verify(code=0)["answer_files"] == 1
        assert path.read_bytes() == before
        assert sorted(file.suffix for file in path.parent.iterdir()) in ([".lock", ".sqlite"], [".sqlite"])
        if way == "cut off":
            path.write_bytes(before[: len(before) // 2])
        else:
            with sqlite3.connect(path) as db:
                (body,) = db.execute("SELECT body FROM answers WHERE stored_ms = 7").fetchone()
            flip(path, before.index(body) + len(body) // 2 if way == "a bit of an answer" else 5)
        ((kind, where, _),) = verify.damage()
        assert (kind, where) == ("answers", str(path))

    def test_a_segment_that_is_being_written_is_left_alone(self, done: Path, verify: Verify) -> None:
        folder = Path("data/responses/segments")
        folder.mkdir(parents=True)
        segment = Segment(folder)
        segment.write([], [], [stored(1)])
        assert verify(code=0)["answer_files"] == 0
        segment.close()
        assert verify(code=0)["answer_files"] == 1


class TestContents:
    """What `train` and `report` hold is covered as well; `evaluate` tells timings, which no digest covers."""

    def test_every_stage_but_evaluate_is_covered(self) -> None:

        assert {spec.kind for spec in STAGES} - {*CONTENTS} == {"evaluate"}

    def commit(self, folder: Path, stage: str, content: str, files: dict[str, str]) -> Artefact:
        store = Store(folder / "store")
        with store.staging(stage) as staged:
            for name, text in files.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).write_text(text, "utf-8")
            return store.commit(staged, Manifest.of(stage, "k", {}, Result(1, 1, {}, content), {}))

    def test_a_trained_model_is_known_by_the_files_that_a_loader_reads(self, tmp_path: Path) -> None:

        files = {"model/config.json": "{}", "model/model.safetensors": "w", "model/README.md": "x", "loss.json": "[]"}
        made = self.commit(tmp_path, "train", "unknown", files)
        assert recompute(made) == path_digest(made.path / "model", DigestCache(tmp_path / "none"))

    def test_a_report_by_its_one_file(self, tmp_path: Path) -> None:

        made = self.commit(tmp_path, "report", "unknown", {"report.html": "<html>"})
        assert recompute(made) == file_sha256(made.path / "report.html")
