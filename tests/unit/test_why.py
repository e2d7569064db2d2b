"""`why`: the story of a row that was kept, and of rows that left at every step; who is meant by what one types."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cli
from pipeline.core.lineage import Manifest, step_key
from pipeline.core.record import PROMPT_SCHEMA, ShardWriter, rejects_schema
from pipeline.core.runs import link_artefact
from pipeline.core.stage import Result
from pipeline.core.store import MANIFEST, Store
from pipeline.stages.evaluate.answers import ANSWERS
from pipeline.student.shards import REJECTS
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Attempt, Stored
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, failure
from tests.support import logger_is_restored, run_cli, write_project

FOLDER = Path("data/runs/small")
CARD = "source: made for this test\nrevision: '7'\nlicense: CC0-1.0\ndescription: Questions.\n"


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    with logger_is_restored():
        yield


def write_lines(path: str, rows: Sequence[Mapping[str, object]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run up to `dataset` of six prompts with two answers each, of which some leave at every step."""
    write_project(
        tmp_path,
        teachers={"humans": {"kind": "replay", "path": "answers.jsonl", "origin": "people", "license": "MIT"}},
        prompts={
            "sets": {
                "facts": {
                    "source": {"kind": "jsonl", "path": "rows.jsonl"},
                    "columns": {"answer": "answer"},
                    "card": "card.yaml",
                }
            },
            "validation": 0,
            "test": 0,
        },
        generate={"teacher": "humans", "samples": 2},
        filter={"min_chars": 3},
    )
    monkeypatch.chdir(tmp_path)
    Path("card.yaml").write_text(CARD, "utf-8")
    asked = {"kept": "One?", "same": "One?", "short": "Two?", "twice": "Three?", "silent": "Four?", "a/b": "Five?"}
    write_lines("rows.jsonl", [{"id": name, "prompt": text, "answer": "1"} for name, text in asked.items()])
    answers = {
        "kept": ["It is one.", "One it is."],
        "short": ["2", "It is two."],
        "twice": ["It is three.", "it  is THREE."],
        "a/b": ["It is five.\n" + "five " * 100 + "\n\x1b[2J" + "\nend" * 9, "Five."],
    }
    write_lines("answers.jsonl", [{"id": name, "completion": text} for name, both in answers.items() for text in both])
    assert cli.main(["run", "run.yaml", "--until", "dataset"]) == 0
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def why(capsys: pytest.CaptureFixture[str]) -> "Why":
    return Why(capsys)


class Why:
    """The command, read as a script reads it and as people do."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def json(self, row: str, *arguments: str) -> dict[str, Any]:
        self._capsys.readouterr()
        assert cli.main(["why", "run.yaml", row, "--json", *arguments]) == 0
        found: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return found

    def row(self, row: str) -> dict[str, Any]:
        """The story of the one row that is meant."""
        (found,) = self.json(row)["rows"]
        return dict(found)

    def text(self, row: str) -> str:
        self._capsys.readouterr()
        assert cli.main(["why", "run.yaml", row]) == 0
        return self._capsys.readouterr().out

    def refusal(self, row: str) -> str:
        self._capsys.readouterr()
        assert cli.main(["why", "run.yaml", row]) == 2
        return self._capsys.readouterr().err


def rows(step: str, folder: str = "rows") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(FOLDER / step / folder).to_pylist()
    return found


def id_of(prompt_id: str, sample: int) -> str:
    every = rows("generate") + rows("generate", "rejects")
    (found,) = (row["row_id"] for row in every if (row["prompt_id"], row["sample"]) == (prompt_id, sample))
    return str(found)


def fate(story: Mapping[str, Any]) -> list[tuple[str, str, str | None]]:
    return [(each["step"], each["outcome"], each["reason"]) for each in story["passages"]]


KEPT = [(step, "kept", None) for step in ("generate", "filter", "dedup", "dataset")]


class TestKept:
    def test_every_step_that_it_passed_and_what_is_missing(self, done: Path, why: Why) -> None:
        found = why.json(id_of("kept", 0))
        assert fate(found["rows"][0]) == [*KEPT, ("train", "missing", None)]
        assert fate(found["prompt"]) == [("prompts", "kept", None)]
        assert found["next_command"] == "python -m pipeline run run.yaml --data data"

    def test_its_places_can_be_read(self, done: Path, why: Why) -> None:
        name = id_of("kept", 1)
        for passage in why.row(name)["passages"][:-1]:
            place = passage["place"]
            file = pq.ParquetFile(place["file"])
            assert file.read()["row_id"][place["row"]].as_py() == name
            before = sum(file.metadata.row_group(group).num_rows for group in range(place["row_group"]))
            within = file.read_row_group(place["row_group"])
            assert within["row_id"][place["row"] - before].as_py() == name

    def test_prompt_answer_teacher_source_and_licences(self, done: Path, why: Why) -> None:
        found = why.json(id_of("kept", 0))
        assert found["prompt"]["prompt"]["prompt"][0]["content"] == "One?"
        assert found["prompt"]["prompt"]["split"] == "train"
        source = [found["prompt"][name] for name in ("source", "revision", "license", "description")]
        assert source == ["made for this test", "7", "CC0-1.0", "Questions."]
        assert (found["teachers"]["humans"]["origin"], found["teachers"]["humans"]["license"]) == ("people", "MIT")
        row = found["rows"][0]["row"]
        assert row["completion"][0]["content"] == "It is one."
        assert (row["finish_reason"], row["license_set"]) == ("stop", ["CC0-1.0", "MIT"])

    def test_what_its_licences_are_and_how_the_data_set_was_judged(self, done: Path, why: Why) -> None:
        found = why.json(id_of("kept", 0))
        terms = {each["name"]: (each["id"], each["title"]) for each in found["rows"][0]["terms"]}
        assert terms.keys() == {"CC0-1.0", "MIT"}
        assert terms["MIT"] == ("MIT", "MIT License")
        told: Any = Manifest.read(FOLDER / "dataset" / MANIFEST).metrics["provenance"]
        assert found["judgement"]["outcome"] == told["verdict"]["outcome"]
        assert "verdict    " in why.text(id_of("kept", 0))

    def test_the_whole_dataset_can_be_told_row_by_row(self, done: Path, why: Why) -> None:
        shipped = pq.read_table(FOLDER / "dataset" / "data")["row_id"].to_pylist()
        for name in shipped:
            assert fate(why.row(name))[:-1] == KEPT

    def test_a_row_group_of_its_own(self, done: Path, why: Why) -> None:
        shard = next((FOLDER / "dataset").resolve().glob("data/*.parquet"))
        pq.write_table(pq.read_table(shard), shard, row_group_size=2)
        last = pq.read_table(shard)["row_id"].to_pylist()[-1]
        place = why.row(last)["passages"][3]["place"]
        count = pq.read_metadata(shard).num_rows
        assert (place["row"], place["row_group"]) == (count - 1, (count - 1) // 2)


class TestLeft:
    def test_at_generate(self, done: Path, why: Why) -> None:
        assert fate(why.row(id_of("silent", 0))) == [("generate", "rejected", "no_completion")]

    def test_at_filter(self, done: Path, why: Why) -> None:
        story = why.row(id_of("short", 0))
        assert fate(story) == [("generate", "kept", None), ("filter", "rejected", "too_short")]
        assert story["passages"][1]["place"]["file"].startswith("data/runs/small/filter/rejects/")

    def test_at_dedup_with_the_row_that_stayed_for_it(self, done: Path, why: Why) -> None:
        first, second = id_of("twice", 0), id_of("twice", 1)
        assert fate(why.row(second))[-1] == ("dedup", "rejected", f"duplicate_of:{first}")
        assert why.row(first)["duplicates"] == [second]
        assert why.row(second)["duplicates"] == []
        assert (why.row(first)["cluster"], why.row(second)["cluster"]) == ([], [first, second])

    def test_at_prompts_under_the_prompts_name(self, done: Path, why: Why) -> None:
        found = why.json("facts/same")
        assert fate(found["prompt"]) == [("prompts", "rejected", "duplicate_of:facts/kept")]
        assert (found["rows"], found["next_command"]) == ([], None)

    def test_a_row_of_which_a_step_holds_no_trace_is_lost(self, done: Path, why: Why) -> None:
        shard = next((FOLDER / "dedup").resolve().glob("rows/*.parquet"))
        pq.write_table(pq.read_table(shard).slice(0, 0), shard)
        assert fate(why.row(id_of("kept", 0)))[-1] == ("dedup", "lost", None)


def commit(step: str, inputs: Mapping[str, str], tables: Mapping[str, pa.Table]) -> None:
    """Commit and link a made-up result of a step that would need a model."""
    contents = {name: Manifest.read(FOLDER / name / MANIFEST).content for name in inputs}
    parts = {"stage": step, "inputs": contents}
    store = Store(Path("data/store"))
    with store.staging(step) as staged:
        for folder, table in tables.items():
            with ShardWriter(staged / folder, table.schema) as writer:
                writer.write(table)
        manifest = Manifest.of(step, step_key(parts), parts, Result(0, 0, {}, step[0] * 64), {})
        link_artefact(FOLDER, step, store.commit(staged, manifest))


class TestTraining:
    def test_a_trained_row_and_one_that_was_too_long(self, done: Path, why: Why) -> None:
        name = id_of("short", 1)
        columns = {"row_id": [name], "prompt_set": ["facts"], "prompt_id": ["short"], "reason": ["over_length"]}
        commit("train", {"dataset": ""}, {"rejects": pa.table(columns, schema=REJECTS)})
        assert fate(why.row(id_of("kept", 0)))[-1] == ("train", "kept", None)
        assert fate(why.row(name))[-1] == ("train", "rejected", "over_length")
        assert why.json(name)["next_command"] is None

    def test_the_models_of_all_runs_that_were_trained_on_its_data_set(self, done: Path, why: Why) -> None:
        name = id_of("short", 1)
        columns = {"row_id": [name], "prompt_set": ["facts"], "prompt_id": ["short"], "reason": ["over_length"]}
        commit("train", {"dataset": ""}, {"rejects": pa.table(columns, schema=REJECTS)})
        commit("evaluate", {"train": "", "prompts": ""}, {})
        Path("data/runs/copy").mkdir()
        for link in FOLDER.iterdir():
            if link.is_symlink():
                (Path("data/runs/copy") / link.name).symlink_to(link.readlink())
        (told,) = why.row(id_of("kept", 0))["models"]
        assert (told["model"]["runs"], told["left_out"]) == (["copy", "small"], None)
        assert [each["runs"] for each in told["model"]["evaluations"]] == [["copy", "small"]]
        assert [each["left_out"] for each in why.row(name)["models"]] == ["over_length"]
        assert why.row(id_of("short", 0))["models"] == [], "the filter rejected it"

    def test_a_validation_row_is_not_trained_on(self, done: Path, why: Why) -> None:
        assert cli.main(["run", "run.yaml", "--until", "dataset", "--set", "prompts.validation=0.99"]) == 0
        (folder,) = Path("data/runs").glob("small+*")
        shutil.rmtree(FOLDER)
        folder.rename(FOLDER)
        commit("train", {"dataset": ""}, {"rejects": REJECTS.empty_table()})
        name = next(row["row_id"] for row in rows("dedup") if row["split"] == "validation")
        assert fate(why.row(name))[-1] == ("train", "not concerned", None)


class TestTestPrompts:
    def test_they_are_answered_by_the_three_models(self, done: Path, why: Why) -> None:
        assert cli.main(["run", "run.yaml", "--until", "dataset", "--set", "prompts.test=0.5"]) == 0
        (folder,) = Path("data/runs").glob("small+*")
        shutil.rmtree(FOLDER)
        folder.rename(FOLDER)
        name = next(row["prompt_id"] for row in rows("prompts") if row["split"] == "test")
        assert fate(why.json(f"facts/{name}")["prompt"])[-1] == ("evaluate", "missing", None)
        models = ["teacher", "base", "student"]
        answers = pa.table(
            {
                "prompt_set": ["facts"] * 3,
                "prompt_id": [name] * 3,
                "task": [None] * 3,
                "model": models,
                "answer": ["1", "2", "1"],
                "correct": [True, False, True],
                "finish_reason": ["stop"] * 3,
            },
            schema=ANSWERS,
        )
        commit("train", {"dataset": ""}, {"rejects": REJECTS.empty_table()})
        none = rejects_schema(PROMPT_SCHEMA).empty_table()
        commit("evaluate", {"train": "", "prompts": ""}, {"answers": answers, "rejects": none})
        found = why.json(f"facts/{name}")
        assert fate(found["prompt"]) == [("prompts", "kept", None), ("evaluate", "kept", None)]
        told = [(each["model"], each["correct"]) for each in found["prompt"]["answers"]]
        assert told == [("teacher", True), ("base", False), ("student", True)]
        assert (found["rows"], found["next_command"]) == ([], None)


class TestWhoIsMeant:
    def test_six_digits_do_if_they_are_unique(self, done: Path, why: Why) -> None:
        name = id_of("kept", 0)
        assert why.row(name[:6])["row"]["row_id"] == name

    def test_an_ambiguous_prefix_lists_the_candidates(self, done: Path, why: Why) -> None:
        shard = next((FOLDER / "generate").resolve().glob("rows/*.parquet"))
        table = pq.read_table(shard)
        ids = [f"abcdef{number:026x}" for number in range(table.num_rows)]
        pq.write_table(table.set_column(0, table.schema.field(0), pa.array(ids)), shard)
        told = why.refusal("abcdef")
        assert f"{len(ids)} row ids begin with abcdef" in told
        assert ids[0] in told
        assert why.row(ids[3])["row"]["row_id"] == ids[3]

    def test_a_prompt_means_all_its_answers(self, done: Path, why: Why) -> None:
        found = why.json("facts/short")
        assert [row["row"]["sample"] for row in found["rows"]] == [0, 1]
        assert [fate(row)[-1][1] for row in found["rows"]] == ["rejected", "missing"]

    def test_a_prompts_id_may_hold_a_slash(self, done: Path, why: Why) -> None:
        assert why.json("facts/a/b")["prompt"]["prompt"]["prompt_id"] == "a/b"

    @pytest.mark.parametrize(
        ("typed", "told"),
        [
            ("abc", "neither a row id nor a prompt"),
            ("0" * 33, "neither a row id nor a prompt"),
            ("ABCDEF", "neither a row id nor a prompt"),
            ("", "neither a row id nor a prompt"),
            ("0" * 32, "no row id begins with 000"),
            ("facts/nobody", "the sets are: facts"),
            ("other/kept", "the sets are: facts"),
        ],
    )
    def test_what_means_nothing_is_a_mistake(self, done: Path, why: Why, typed: str, told: str) -> None:
        assert told in why.refusal(typed)

    def test_before_anything_ran_it_names_the_command(self, done: Path, why: Why) -> None:
        shutil.rmtree("data")
        assert "run it first: python -m pipeline run run.yaml --data data --until generate" in why.refusal("0" * 32)
        assert "run it first: python -m pipeline run run.yaml --data data --until prompts" in why.refusal("facts/kept")


class TestRunsThatStoppedHalfWay:
    def test_results_of_other_rows_are_not_mixed_in(self, done: Path, why: Why) -> None:
        with Path("run.yaml").open("a", encoding="utf-8") as file:
            file.write("dedup: {normalise: false}\n")
        assert cli.main(["run", "run.yaml", "--until", "dedup"]) == 0
        found = why.json(id_of("twice", 1))
        assert fate(found["rows"][0]) == [*KEPT[:3], ("dataset", "outdated", None)]
        assert found["next_command"] is not None

    def test_a_prompt_that_was_not_asked_yet(self, done: Path, why: Why) -> None:
        shutil.rmtree("data")
        assert cli.main(["run", "run.yaml", "--until", "prompts"]) == 0
        found = why.json("facts/kept")
        assert fate(found["prompt"]) == [("prompts", "kept", None), ("generate", "missing", None)]
        assert found["next_command"] is not None

    def test_a_store_that_was_deleted_by_hand(self, done: Path, why: Why) -> None:
        name = id_of("kept", 0)
        shutil.rmtree((FOLDER / "dedup").resolve())
        assert fate(why.row(name)) == [*KEPT[:2], ("dedup", "missing", None)]
        shutil.rmtree((FOLDER / "prompts").resolve())
        assert "generate has no result for the prompts that are here" in why.refusal(name)

    @pytest.mark.parametrize("file", ["generate/rows/part-00000.parquet", "prompts/sources.json"])
    def test_a_damaged_file_is_an_error_of_integrity(self, done: Path, file: str) -> None:
        name = id_of("kept", 0)
        (FOLDER / file).write_bytes(b"PAR1")
        assert cli.main(["why", "run.yaml", name]) == 5


class TestForPeople:
    def test_it_is_read_from_prompt_to_dataset(self, done: Path, why: Why) -> None:
        shown = why.text(id_of("kept", 0)).splitlines()
        assert shown[0] == "prompt facts/kept"
        assert f"row {id_of('kept', 0)}, sample 0 of facts/kept" in shown
        assert "  licence    CC0-1.0, MIT" in shown
        assert any(line.startswith("  dataset    kept") and "dataset/data/train-0" in line for line in shown)

    def test_text_is_shown_escaped_and_cut(self, done: Path, why: Why) -> None:
        shown = why.text("facts/a/b")
        assert "\x1b" not in shown
        assert "\\u001b[2J" in shown
        assert max(map(len, shown.splitlines())) <= 250
        text = why.json("facts/a/b")["rows"][0]["row"]["completion"][0]["content"]
        assert text.count("end") == 9
        (cut,) = (line for line in shown.splitlines() if "more characters" in line)
        told = len("It is five.\n") + 200 + len("\n\x1b[2J") + len("\nend")
        assert cut.split() == ["…", f"{len(text) - told}", "more", "characters"]

    def test_it_needs_no_write_and_no_model(self, done: Path) -> None:
        before = sorted((str(path), path.lstat().st_mtime_ns) for path in done.rglob("*"))
        shown = run_cli("why", "run.yaml", "facts/kept", cwd=done)
        assert shown.returncode == 0, shown.stderr
        assert sorted((str(path), path.lstat().st_mtime_ns) for path in done.rglob("*")) == before


class TestRequests:
    def test_attempts_and_stored_answers_are_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: Why
    ) -> None:
        def script(seen: Seen, number: int) -> Act:
            return failure(500) if number == 0 else completion(seen.prompt.upper())

        with ScriptedServer(script) as server:
            teacher = {"kind": "openai", "base_url": server.url, "provider": "here", "model": "m", "concurrency": 1}
            retry = {"first_wait_s": 0.01, "max_wait_s": 0.01}
            write_project(
                tmp_path,
                rows=3,
                teachers={"api": teacher},
                generate={"teacher": "api", "retry": retry},
            )
            monkeypatch.chdir(tmp_path)
            assert cli.main(["run", "run.yaml", "--until", "generate"]) == 0
        assert [*Path("data/responses/answers").glob("*.parquet")] != []
        first = next(prompt for prompt in server.prompts)
        (name,) = (row["row_id"] for row in rows("generate") if row["prompt"][0]["content"] == first)
        request = why.row(name)["request"]
        assert [attempt["outcome"] for attempt in request["attempts"]] == ["retry:status:500", "answer"]
        assert [(answer["status"], answer["model"]) for answer in request["answers"]] == [(200, "m")]
        assert request["attempts"][0]["time"].startswith("20")
        facts = ("run", "teacher", "status", "input_tokens", "output_tokens", "reserved", "cost", "request_id")
        assert [tuple(attempt[name] for name in facts) for attempt in request["attempts"]] == [
            ("small", "api", 500, None, None, None, None, None),
            ("small", "api", 200, 7, 3, None, None, None),
        ]

    def test_so_are_those_that_wait_in_the_segment_of_a_process(self, done: Path, why: Why) -> None:
        name = id_of("kept", 0)
        key = bytes.fromhex(why.row(name)["request"]["key"])
        stored = Stored(key, 9, 5000, "t" * 64, "m", "vLLM 1", "openai-chat", 200, None, b"{}")
        with ResponseStore(Path("data/responses")) as responses:
            responses.put([stored], intents=[Attempt(1, key, 9, 1000), Attempt(2, b"\0" * 32, 9, 1000)])
            request = why.row(name)["request"]
        (attempt,) = request["attempts"]
        assert {name: value for name, value in attempt.items() if value is not None} == {
            "time": "1970-01-01T00:00:01.000+00:00",
            "cap": 9,
        }
        assert [answer["engine"] for answer in request["answers"]] == ["vLLM 1"]
        assert "sent 1970-01-01T00:00:01.000+00:00, at most 9 tokens: the end is not known" in why.text(name)

    def test_a_row_of_other_settings_has_no_request_that_could_be_told(self, done: Path, why: Why) -> None:
        name = id_of("kept", 0)
        assert why.row(name)["request"]["attempts"] == []
        text = Path("run.yaml").read_text("utf-8").replace("samples: 2", "samples: 2\n  draw: 5")
        Path("run.yaml").write_text(text, "utf-8")
        assert why.row(name)["request"] is None
