"""`run --locked`: what may differ from the lock file, what may not, and when that is said."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.core.lineage import step_key
from tests.support import logger_is_restored, read_events, write_project

LOCK = Path("run.lock.json")
DATASET = ("--until", "dataset")


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    with logger_is_restored():
        yield


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A small project as current folder that has run up to `dataset`, with its lock file and without its data."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "run.yaml", *DATASET]) == 0
    capsys.readouterr()
    shutil.rmtree("data")
    return tmp_path


def run(*arguments: str) -> int:
    return cli.main(["run", "run.yaml", "--locked", *(arguments or DATASET)])


def edit_config(text: str) -> None:
    with Path("run.yaml").open("a", encoding="utf-8") as file:
        file.write(text)


def edit_lock(step: str, *, content: str | None = None, **parts: Any) -> None:
    """Change an entry of the lock file, and those that follow it, as another machine, or an older version of us, would
    have written them."""
    lock = json.loads(LOCK.read_text("utf-8"))
    lock[step]["parts"] |= parts
    lock[step]["content"] = content or lock[step]["content"]
    for entry in lock.values():
        inputs = entry["parts"]["inputs"]
        inputs.update({name: lock[name]["content"] for name in inputs})
        entry["key"] = step_key(entry["parts"])
    LOCK.write_text(json.dumps(lock), "utf-8")


def started() -> list[str]:
    return [event["step"] for event in read_events(Path("data/runs/small")) if event["event"] == "step_started"]


@pytest.mark.usefixtures("locked")
class TestWhatIsLocked:
    def test_it_is_made_again_elsewhere_and_the_lock_file_is_not_written(self) -> None:
        before = LOCK.stat()
        assert run() == 0
        assert started() == ["prompts", "generate", "filter", "dedup", "dataset"]
        assert (LOCK.stat().st_ino, LOCK.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_a_locked_result_in_the_store_is_used(self, capsys: pytest.CaptureFixture[str]) -> None:
        run()
        capsys.readouterr()
        assert run() == 0
        shown = capsys.readouterr().out
        assert [line.split()[1] for line in shown.splitlines()[:5]] == ["cached"] * 5
        assert shown.splitlines()[-1] == "as run.lock.json says"

    def test_operational_overrides_are_allowed(self, locked: Path) -> None:
        (locked / "rows.jsonl").rename(locked / "moved.jsonl")
        moved = ["prompts.sets.facts.source.path=moved.jsonl", "teachers.humans.path=moved.jsonl", "train.processes=2"]
        assert run(*DATASET, *(word for text in moved for word in ("--set", text))) == 0

    def test_it_says_so_in_its_resume_command(self) -> None:
        run()
        command = read_events(Path("data/runs/small"))[0]["command"]
        assert command == "python -m pipeline run run.yaml --data data --locked --until dataset"

    def test_a_dry_run_compares_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--dry-run", *DATASET) == 0
        edit_config("filter: {min_chars: 5}\n")
        assert run("--dry-run", *DATASET) == 5
        assert not Path("data/store").exists()


@pytest.mark.usefixtures("locked")
class TestAnotherRecipe:
    def test_every_difference_is_listed_and_nothing_runs(
        self, locked: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        edit_config("filter: {min_chars: 5}\ndedup: {normalise: false}\n")
        with (locked / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"id": "new", "prompt": "New?", "completion": "New."}\n')
        assert run() == 5
        error = capsys.readouterr().err
        assert "filter.min_chars: 1 -> 5" in error
        assert "dedup.normalise: true -> false" in error
        assert "file prompts.sets.facts.source.path changed: " in error
        assert "file teachers.humans.path changed: " in error
        assert "at: run.lock.json" in error
        assert not Path("data/store").exists()
        assert not Path("data/runs").exists()

    def test_an_override_that_changes_rows_is_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(*DATASET, "--set", "filter.min_chars=5") == 5
        assert "filter.min_chars: 1 -> 5" in capsys.readouterr().err

    def test_so_is_another_version_of_a_stage(self, capsys: pytest.CaptureFixture[str]) -> None:
        edit_lock("dedup", version=0)
        assert run() == 5
        assert "dedup: version: 0 -> 2" in capsys.readouterr().err

    def test_a_step_after_the_last_one_does_not_count(self) -> None:
        edit_config("filter: {min_chars: 5}\n")
        assert run("--until", "generate") == 0

    def test_a_step_that_is_not_locked_is_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--until", "train") == 5
        assert "train: not in the lock file" in capsys.readouterr().err

    def test_an_entry_that_was_merged_by_hand_is_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        lock = json.loads(LOCK.read_text("utf-8"))
        lock["filter"]["key"] = lock["dedup"]["key"]
        LOCK.write_text(json.dumps(lock), "utf-8")
        assert run() == 5
        assert "filter: its key in the lock file is not made of its parts" in capsys.readouterr().err

    def test_entries_of_two_runs_are_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The recipes are those of the config, but what `dedup` and `dataset` say of their rows is of the old one."""
        edit_config("filter: {min_chars: 16}\n")
        assert cli.main(["run", "run.yaml", "--until", "filter"]) == 0
        shutil.rmtree("data")
        capsys.readouterr()
        assert run() == 5
        assert "dedup: made of another filter than the lock file names: its entries are of two runs" in (
            capsys.readouterr().err
        )
        assert not Path("data/store").exists()
        assert cli.main(["run", "run.yaml", *DATASET]) == 0
        assert run() == 0

    def test_up_to_the_seam_they_are_none(self) -> None:
        edit_config("filter: {min_chars: 16}\n")
        assert cli.main(["run", "run.yaml", "--until", "filter"]) == 0
        assert run("--until", "filter") == 0

    def test_an_input_that_no_entry_explains_is_found_when_the_step_runs(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lock = json.loads(LOCK.read_text("utf-8"))
        lock["dedup"]["parts"]["inputs"] = {}
        lock["dedup"]["key"] = step_key(lock["dedup"]["parts"])
        LOCK.write_text(json.dumps(lock), "utf-8")
        assert run() == 5
        assert "dedup has other inputs than the lock file says, and no step before it drifted" in (
            capsys.readouterr().err
        )
        assert [*Path("data/store").glob("dedup/*")] == []

    def test_without_a_lock_file_there_is_nothing_to_keep_to(self, capsys: pytest.CaptureFixture[str]) -> None:
        LOCK.unlink()
        assert run(*DATASET, "--set", "train.processes=2") == 2
        assert "let a run write it: python -m pipeline run run.yaml --data data\n" in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["<<<<<<< ours", "[" * 100_000, '{"filter": {"parts": {}, "key": 1}}'])
    def test_a_damaged_lock_file_is_a_mistake_of_its_own(self, text: str) -> None:
        LOCK.write_text(text, "utf-8")
        assert run() == 2


@pytest.mark.usefixtures("locked")
class TestAnotherContent:
    @pytest.mark.parametrize("step", ["prompts", "filter", "dedup", "dataset"])
    def test_of_a_stage_that_always_gives_the_same_it_is_refused_and_not_committed(
        self, step: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        edit_lock(step, content="0" * 64)
        assert run() == 5
        assert f"{step} gave other rows than the lock file says" in capsys.readouterr().err
        assert [*Path("data/store").glob(f"{step}/*")] == []
        assert read_events(Path("data/runs/small"))[-1]["exit_code"] == 5

    def test_so_it_is_if_it_lies_in_the_store_already(self, capsys: pytest.CaptureFixture[str]) -> None:
        run()
        edit_lock("dedup", content="0" * 64)
        assert run() == 5
        assert "dedup gave other rows" in capsys.readouterr().err

    def test_of_a_stage_that_samples_it_is_drift(self, capsys: pytest.CaptureFixture[str]) -> None:
        lock = json.loads(LOCK.read_text("utf-8"))
        content = lock["generate"]["content"]
        edit_lock("generate", content="0" * 64)
        edit_lock("filter", content="1" * 64)
        assert run(*DATASET, "--json") == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["locked"] == {
            "drift": [{"step": "generate", "locked": "0" * 64, "content": content}],
            "by_recipe": ["filter", "dedup", "dataset"],
        }
        assert f"generate: drift: the content is {content[:12]}, the lock file says 000000000000" in shown.err
        (event,) = [event for event in read_events(Path("data/runs/small")) if event["event"] == "lock_drift"]
        assert (event["step"], event["locked"], event["content"]) == ("generate", "0" * 64, content)

    def test_drift_is_said_again_when_the_result_is_cached(self, capsys: pytest.CaptureFixture[str]) -> None:
        edit_lock("generate", content="0" * 64)
        run()
        capsys.readouterr()
        assert run() == 0
        assert (
            capsys.readouterr().out.splitlines()[-1].startswith("drift from run.lock.json: generate (000000000000 -> ")
        )
