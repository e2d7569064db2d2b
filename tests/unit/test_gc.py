"""`gc`: it lists what nobody refers to, removes it only when told, and never more than that."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.core.runs import hold_lock, share_data
from tests.support import cli_env, logger_is_restored, probe_command, read_events, wait_for, write_project

ROW_STEPS = ["prompts", "generate", "filter", "dedup", "dataset"]
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
def gc(capsys: pytest.CaptureFixture[str]) -> "Gc":
    return Gc(capsys)


class Gc:
    """The command, read as a script reads it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def json(self, *arguments: str) -> dict[str, Any]:
        self._capsys.readouterr()
        assert cli.main(["gc", "--json", *arguments]) == 0
        found: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return found

    def listed(self, *arguments: str) -> list[tuple[str, str]]:
        """(kind, path) of all items."""
        return [(item["kind"], item["path"]) for item in self.json(*arguments)["items"]]


def run(*arguments: str) -> None:
    assert cli.main(["run", "run.yaml", "--until", "dataset", *arguments]) == 0


def run_and_forget(*arguments: str) -> None:
    """A run with overrides whose folder is deleted."""
    run(*arguments)
    (folder,) = Path("data/runs").glob("small+*")
    shutil.rmtree(folder)


def results() -> set[str]:
    return {str(path) for path in Path("data/store").glob("[!.]*/*")}


def cached() -> bool:
    """Whether a run has nothing to do."""
    before = len(read_events(FOLDER))
    run()
    return [event["event"] for event in read_events(FOLDER)[before:]].count("step_cached") == len(ROW_STEPS)


class TestResults:
    def test_after_a_run_there_is_nothing_to_remove(self, done: Path, gc: Gc) -> None:
        found = gc.json()
        assert (found["items"], found["bytes"], found["kept"], found["dangling"]) == ([], 0, 5, [])

    def test_what_a_forgotten_run_alone_needed_is_listed_with_size_and_date(self, done: Path, gc: Gc) -> None:
        before = results()
        run_and_forget("--set", "filter.min_chars=16")
        new = sorted(results() - before)
        assert gc.listed() == [("result", path) for path in new]
        assert [Path(path).parent.name for path in new] == ["dataset", "dedup", "filter"]
        found = gc.json()
        sizes = [sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file()) for path in new]
        assert [item["bytes"] for item in found["items"]] == sizes
        assert found["bytes"] == sum(sizes)
        assert all(item["modified"].endswith("+00:00") for item in found["items"])

    def test_without_the_flag_nothing_is_removed(self, done: Path, gc: Gc) -> None:
        run_and_forget("--set", "filter.min_chars=16")
        before = sorted(Path("data").rglob("*"))
        assert not gc.json()["deleted"]
        assert sorted(Path("data").rglob("*")) == before

    def test_with_it_that_is_removed_and_nothing_else(self, done: Path, gc: Gc) -> None:
        before = results()
        run_and_forget("--set", "filter.min_chars=16")
        found = gc.json("--delete")
        assert found["deleted"]
        assert len(found["items"]) == 3
        assert results() == before
        assert [*Path("data/store").glob(".trash*")] == []
        assert cached()

    def test_results_of_any_run_are_kept(self, done: Path, gc: Gc) -> None:
        run("--set", "filter.min_chars=16")
        before = results()
        assert gc.listed("--delete") == []
        assert results() == before

    def test_an_older_result_of_a_run_is_not(self, done: Path, gc: Gc) -> None:
        with Path("run.yaml").open("a", encoding="utf-8") as file:
            file.write("filter: {min_chars: 16}\n")
        run()
        assert [Path(path).parent.name for _, path in gc.listed("--delete")] == ["dataset", "dedup", "filter"]
        assert cached()

    def test_what_a_linked_result_was_made_of_is_kept(self, done: Path, gc: Gc) -> None:
        """A run that went on to an earlier step only: its data set is linked still, and its lineage stays whole."""
        with Path("run.yaml").open("a", encoding="utf-8") as file:
            file.write("filter: {min_chars: 16}\n")
        assert cli.main(["run", "run.yaml", "--until", "filter"]) == 0
        assert gc.listed("--delete") == []
        assert cli.main(["verify"]) == 0

    def test_what_a_given_lock_file_names_is_kept(self, done: Path, gc: Gc) -> None:
        shutil.rmtree(FOLDER)
        assert len(gc.listed()) == 5
        assert gc.listed("run.yaml") == []
        assert gc.json("run.yaml", "--delete")["kept"] == 5
        run()
        assert "step_started" not in [event["event"] for event in read_events(FOLDER)]

    def test_a_run_folder_that_was_copied_without_links_keeps_its_results(self, done: Path, gc: Gc) -> None:
        shutil.copytree(FOLDER, "copy", symlinks=False)
        shutil.rmtree(FOLDER)
        Path("copy").rename(FOLDER)
        assert gc.listed() == []

    def test_links_to_nothing_are_reported(self, done: Path, gc: Gc) -> None:
        shutil.rmtree((FOLDER / "dedup").resolve())
        assert gc.json()["dangling"] == [str(FOLDER / "dedup")]

    def test_stored_answers_stay_whatever_is_removed(self, done: Path, gc: Gc) -> None:
        answers = Path("data/responses/answers/x.parquet")
        answers.parent.mkdir(parents=True)
        answers.write_text("paid for", "utf-8")
        shutil.rmtree("data/runs")
        assert len(gc.listed("--delete")) == 5
        assert answers.read_text("utf-8") == "paid for"


class TestLeftovers:
    def test_work_that_no_run_links_goes_and_linked_work_stays(self, done: Path, gc: Gc) -> None:
        kept, gone = (Path("data/work/train") / (digit * 64) for digit in "01")
        for path in (kept, gone):
            path.mkdir(parents=True)
            (path / "checkpoint").write_text("x" * 10, "utf-8")
        (FOLDER / ".work").mkdir()
        (FOLDER / ".work" / "train").symlink_to(os.path.relpath(kept, FOLDER / ".work"))
        assert gc.listed() == [("work", str(gone))]
        assert gc.json("--delete")["bytes"] == 10
        assert (kept / "checkpoint").exists()
        assert not gone.exists()

    def test_work_in_which_somebody_works_is_not_listed(self, done: Path, gc: Gc) -> None:
        work = Path("data/work/train") / ("1" * 64)
        work.mkdir(parents=True)
        with hold_lock(work.with_name(f"{work.name}.lock")):
            assert gc.listed() == []
        assert gc.listed() == [("work", str(work))]

    def test_the_lock_file_of_a_killed_process_goes(self, done: Path, gc: Gc) -> None:
        lock = Path("data/work/train") / f"{'1' * 64}.lock"
        lock.parent.mkdir(parents=True)
        lock.write_text("pid 1 on nowhere\n", "utf-8")
        assert gc.listed("--delete") == [("work", str(lock))]
        assert not lock.exists()

    def test_staging_quarantine_and_old_trash_go(self, done: Path, gc: Gc) -> None:
        paths = [
            Path("data/store/.staging/filter-1-abc"),
            Path("data/store/.quarantine/filter-1234-corrupt-abc"),
            Path("data/store/.trash/half"),
            Path("data/work/.trash/half"),
        ]
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
            (path / "file").write_text("x", "utf-8")
        kinds = ["staging", "quarantine", "trash", "trash"]
        assert gc.listed() == [*zip(kinds, map(str, paths), strict=True)]
        gc.json("--delete")
        assert [path for path in paths if path.exists()] == []
        assert gc.listed() == []


KILLED = """
import os, shutil, signal, sys
from pipeline import cli

real, calls = os.rename, [0]

def rename_or_die(*arguments, **options):
    calls[0] += 1
    if calls[0] == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

def rmtree_half(path, *arguments, **options):
    for folder, _, files in os.walk(path):
        for name in files:
            os.unlink(os.path.join(folder, name))
            os.kill(os.getpid(), signal.SIGKILL)

os.rename = rename_or_die
if {number} == 0:
    shutil.rmtree = rmtree_half
sys.exit(cli.main(["gc", "--delete"]))
"""


class TestTogether:
    def test_while_a_run_is_going_on_nothing_is_removed(
        self, done: Path, gc: Gc, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_and_forget("--set", "filter.min_chars=16")
        before = results()
        with share_data(Path("data")):
            assert len(gc.listed()) == 3
            assert cli.main(["gc", "--delete"]) == 6
        assert "a run is going on in this folder" in capsys.readouterr().err
        assert results() == before

    def test_a_real_run_keeps_it_out(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        body = 'ctx.events.emit("ready")\nwhile not Path("go").exists():\n    time.sleep(0.01)\nreturn result'
        process = subprocess.Popen(probe_command(done, body, "run", "run.yaml"), env=cli_env())
        wait_for(lambda: any(event["event"] == "ready" for event in read_events(FOLDER)), "the stage begins")
        assert cli.main(["gc", "--delete"]) == 6
        Path("go").touch()
        assert process.wait(60) == 0
        assert cli.main(["gc", "--delete"]) == 0

    @pytest.mark.parametrize("number", [1, 2, 3, 0])
    def test_killed_in_the_middle_it_leaves_whole_results_or_none(self, done: Path, gc: Gc, number: int) -> None:
        """Killed at the n-th rename, or (0) after the first file of the trash was removed."""
        run_and_forget("--set", "filter.min_chars=16")
        killed = subprocess.run([sys.executable, "-c", KILLED.format(number=number)], env=cli_env(), check=False)
        assert killed.returncode == -signal.SIGKILL
        assert cli.main(["verify"]) == 0, "what lies in the store is whole"
        run("--set", "filter.min_chars=16")
        assert cached()
        gc.json("--delete")
        assert [*Path("data/store").glob(".trash*")] == []


class TestUsage:
    @pytest.mark.parametrize("arguments", [["--data", "nowhere"], ["missing.yaml"], ["other.yaml"]])
    def test_a_wrong_folder_or_config_removes_nothing(self, done: Path, arguments: list[str]) -> None:
        shutil.copy("run.yaml", "other.yaml")  # without a lock file
        shutil.rmtree("data/runs")
        before = results()
        assert cli.main(["gc", "--delete", *arguments]) == 2
        assert results() == before

    def test_for_people_it_says_that_nothing_was_removed_yet(
        self, done: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_and_forget("--set", "filter.min_chars=16")
        capsys.readouterr()
        assert cli.main(["gc"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert lines[0].split()[0] == "result"
        assert lines[-1].startswith("3 can go, ")
        assert lines[-1].endswith("nothing was removed, --delete removes them")
