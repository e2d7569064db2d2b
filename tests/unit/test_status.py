"""`status`: what is there, what the config has left behind and why, how the last run ended; and that it only looks."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.core.lineage import DigestCache
from pipeline.core.runs import hold_lock
from pipeline.core.store import MANIFEST
from pipeline.runner.steps import step_names
from tests.support import cli_env, logger_is_restored, probe_command, read_events, wait_for, write_project

ROW_STEPS = ["prompts", "generate", "filter", "dedup", "dataset"]
FOLDER = Path("data/runs/small")


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    with logger_is_restored():
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project as current folder; its config is run.yaml."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def done(project: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The project after a run up to `dataset`."""
    assert cli.main(["run", "run.yaml", "--until", "dataset"]) == 0
    capsys.readouterr()
    return project


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str]) -> "Status":
    return Status(capsys)


class Status:
    """The command, read as a script reads it and as people do."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def json(self, *arguments: str) -> dict[str, Any]:
        self._capsys.readouterr()
        assert cli.main(["status", "run.yaml", "--json", *arguments]) == 0
        found: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return found

    def steps(self, *arguments: str) -> dict[str, dict[str, Any]]:
        return {step["step"]: step for step in self.json(*arguments)["steps"]}

    def states(self, *arguments: str) -> dict[str, str]:
        return {name: step["state"] for name, step in self.steps(*arguments).items()}

    def lines(self, *arguments: str) -> list[str]:
        self._capsys.readouterr()
        assert cli.main(["status", "run.yaml", *arguments]) == 0
        return self._capsys.readouterr().out.splitlines()


def edit_config(text: str) -> None:
    with Path("run.yaml").open("a", encoding="utf-8") as file:
        file.write(text)


def tree(folder: Path) -> list[tuple[str, int]]:
    """Every file and folder with its modification time."""
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


class TestStates:
    def test_before_the_first_run_all_are_missing_and_the_next_command_makes_them(
        self, project: Path, status: Status
    ) -> None:
        found = status.json()
        assert [step["state"] for step in found["steps"]] == ["missing"] + ["waiting"] * 7
        assert found["steps"][0]["reasons"] == ["never ran"]
        assert found["last_run"] is None
        assert found["next_command"] == "python -m pipeline run run.yaml --data data"

    def test_what_ran_is_done_and_shows_its_rows(self, done: Path, status: Status) -> None:
        steps = status.steps()
        assert {name for name, step in steps.items() if step["state"] == "done"} == {*ROW_STEPS}
        assert steps["filter"]["rows_in"] == 12
        assert steps["filter"]["rejected"] == {}
        assert Path(steps["filter"]["path"], MANIFEST).is_file()
        assert steps["train"]["state"] == "missing"

    def test_a_changed_setting_is_named_with_old_and_new_value(self, done: Path, status: Status) -> None:
        edit_config("filter: {min_chars: 5}\n")
        steps = status.steps()
        assert steps["filter"]["state"] == "stale"
        assert steps["filter"]["reasons"] == ["filter.min_chars: 1 -> 5"]
        assert steps["filter"]["changes"] == [
            {"kind": "setting", "name": "filter.min_chars", "before": "1", "after": "5"}
        ]
        assert steps["generate"]["state"] == "done"

    def test_steps_after_it_say_what_they_follow(self, done: Path, status: Status) -> None:
        edit_config("filter: {min_chars: 5}\n")
        steps = status.steps()
        assert (steps["dedup"]["state"], steps["dedup"]["reasons"]) == ("stale", ["follows filter"])
        assert (steps["dataset"]["state"], steps["dataset"]["reasons"]) == ("stale", ["follows dedup, filter"])
        assert (steps["train"]["state"], steps["train"]["reasons"]) == ("waiting", ["follows dataset"])

    def test_and_what_changed_in_themselves(self, done: Path, status: Status) -> None:
        assert status.steps("--set", "filter.min_chars=5", "--set", "dedup.normalise=false")["dedup"]["reasons"] == [
            "follows filter",
            "dedup.normalise: true -> false",
        ]

    def test_a_changed_file_is_named_with_old_and_new_digest(self, done: Path, status: Status) -> None:
        before = DigestCache(Path("none")).sha256(done / "rows.jsonl")
        with (done / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"id": "new", "prompt": "New?", "completion": "New."}\n')
        after = DigestCache(Path("none")).sha256(done / "rows.jsonl")
        step = status.steps()["prompts"]
        assert step["reasons"] == [
            f"file prompts.sets.facts.source.path changed: {before[:12]} -> {after[:12]}",
        ]
        assert (step["changes"][0]["before"], step["changes"][0]["after"]) == (before, after)

    def test_a_damaged_result_is_corrupt(self, done: Path, status: Status) -> None:
        next((done / FOLDER / "filter").resolve().glob("rows/*.parquet")).write_bytes(b"")
        step = status.steps()["filter"]
        assert step["state"] == "corrupt"
        assert "0 bytes" in step["reasons"][0]

    def test_a_config_that_went_back_finds_its_old_result_unlinked(self, done: Path, status: Status) -> None:
        cli.main(["run", "run.yaml", "--until", "dataset", "--set", "dataset.title=Other"])
        (other,) = Path("data/runs").glob("small+*")
        (FOLDER / "dataset").unlink()
        (FOLDER / "dataset").symlink_to(os.path.relpath((other / "dataset").resolve(), FOLDER.resolve()))
        step = status.steps()["dataset"]
        assert step["state"] == "done"
        assert step["reasons"] == ["data/runs/small/dataset links another result"]
        assert step["linked_key"] != step["key"]

    def test_a_run_with_overrides_compares_with_its_own_results_first(self, done: Path, status: Status) -> None:
        assert status.steps("--set", "filter.min_chars=16")["filter"]["reasons"] == ["filter.min_chars: 1 -> 16"]
        assert cli.main(["run", "run.yaml", "--until", "filter", "--set", "filter.min_chars=16"]) == 0
        edit_config("filter: {max_chars: 99}\n")
        assert status.steps("--set", "filter.min_chars=16")["filter"]["reasons"] == ["filter.max_chars: 1000000 -> 99"]

    def test_without_a_linked_result_the_lock_file_is_compared_with(self, done: Path, status: Status) -> None:
        shutil.rmtree("data")
        steps = status.steps()
        assert steps["prompts"]["reasons"] == ["its result is not in the store"]
        edit_config("filter: {min_chars: 5}\n")
        assert status.steps()["filter"]["reasons"] == ["follows generate", "filter.min_chars: 1 -> 5"]

    def test_a_complete_run_has_no_next_command(self, project: Path) -> None:
        command = probe_command(project, "return result", "run", "run.yaml")
        assert subprocess.run(command, env=cli_env(), check=False).returncode == 0
        command = probe_command(project, "return result", "status", "run.yaml", "--json")
        out = subprocess.run(command, env=cli_env(), check=True, stdout=subprocess.PIPE).stdout
        assert json.loads(out)["next_command"] is None

    def test_the_next_command_can_be_typed(self, done: Path, status: Status) -> None:
        overrides = ("--set", "filter.refusal_phrases=[I am, it's]")
        command = shlex.split(status.json(*overrides)["next_command"])
        assert command == ["python", "-m", "pipeline", "run", "run.yaml", "--data", "data", *overrides]


class TestForPeople:
    def test_a_line_a_step_the_last_run_and_what_is_next(self, done: Path, status: Status) -> None:
        edit_config("filter: {min_chars: 5}\n")
        lines = status.lines()
        assert [line.split()[0] for line in lines[:8]] == [*step_names()]
        assert lines[2].split(maxsplit=6) == ["filter", "stale", "12", "in", "12", "out", "filter.min_chars: 1 -> 5"]
        assert lines[8].startswith("last run: complete, 20")
        assert lines[9:] == ["next: python -m pipeline run run.yaml --data data"]

    def test_text_that_could_steer_a_terminal_is_shown_escaped(self, done: Path, status: Status) -> None:
        shown = "\n".join(status.lines("--set", 'filter.refusal_phrases=["\\e[2J"]'))
        assert "\x1b" not in shown


WAIT = """
    ctx.events.emit("ready")
    while not Path("go").exists():
        time.sleep(0.01)
    return result
"""


class TestLastRun:
    def start(self, project: Path) -> "subprocess.Popen[str]":
        process = subprocess.Popen(probe_command(project, WAIT, "run", "run.yaml"), env=cli_env(), text=True)
        wait_for(lambda: any(event["event"] == "ready" for event in read_events(FOLDER)), "the stage begins")
        return process

    def probe_status(self, project: Path) -> dict[str, Any]:
        command = probe_command(project, WAIT, "status", "run.yaml", "--json")
        out = subprocess.run(command, env=cli_env(), check=True, stdout=subprocess.PIPE).stdout
        found: dict[str, Any] = json.loads(out)
        return found

    def test_a_run_that_goes_on_is_named_by_process_and_host(self, project: Path) -> None:
        process = self.start(project)
        try:
            found = self.probe_status(project)
            assert found["held_by"].startswith(f"pid {process.pid} on ")
            assert found["last_run"]["state"] == "running"
            assert found["steps"][0]["held_by"] == found["held_by"]
            assert found["next_command"] is None
        finally:
            Path("go").touch()
            assert process.wait(60) == 0

    def test_one_that_was_killed_is_told_from_one_that_ended(self, project: Path) -> None:
        process = self.start(project)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        found = self.probe_status(project)
        assert found["held_by"] is None
        assert (found["last_run"]["state"], found["last_run"]["exit_code"]) == ("killed", None)
        assert found["last_run"]["command"] == "python -m pipeline run run.yaml --data data"
        assert found["steps"][0]["unfinished"]["resumes"] is True
        assert Path(found["steps"][0]["unfinished"]["path"]).is_dir()
        Path("go").touch()
        assert (
            subprocess.run(probe_command(project, WAIT, "run", "run.yaml"), env=cli_env(), check=False).returncode == 0
        )
        found = self.probe_status(project)
        assert (found["last_run"]["state"], found["last_run"]["exit_code"]) == ("ended", 0)
        assert found["steps"][0]["unfinished"] is None

    def test_a_killed_one_after_a_complete_one_is_the_last(self, done: Path, status: Status) -> None:
        with (FOLDER / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"time": "2026-01-02T03:04:05+00:00", "event": "run_started", "command": "x"}\n')
        last = status.json()["last_run"]
        assert (last["state"], last["started"], last["exit_code"]) == ("killed", "2026-01-02T03:04:05+00:00", None)
        assert any(line.startswith("last run: killed") for line in status.lines())

    def test_one_that_failed_keeps_its_code_and_error(self, done: Path, status: Status) -> None:
        assert cli.main(["run", "run.yaml", "--until", "filter", "--set", "filter.min_chars=16"]) == 0
        assert cli.main(["dataset", "run.yaml", "--set", "filter.min_chars=16"]) == 2
        last = status.json("--set", "filter.min_chars=16")["last_run"]
        assert (last["state"], last["exit_code"]) == ("ended", 2)
        assert last["error"] == "dataset needs the rows of dedup"
        assert any("ended with exit code 2" in line for line in status.lines("--set", "filter.min_chars=16"))

    def test_work_begun_for_other_settings_is_not_what_will_be_resumed(self, done: Path, status: Status) -> None:
        old = Path("data/work/train") / ("0" * 64)
        old.mkdir(parents=True)
        (FOLDER / ".work").mkdir()
        (FOLDER / ".work" / "train").symlink_to(os.path.relpath(old, FOLDER / ".work"))
        assert status.steps()["train"]["unfinished"] == {"path": str(old), "resumes": False}
        edit_config("filter: {min_chars: 5}\n")
        assert status.steps()["train"]["unfinished"] == {"path": str(old), "resumes": None}

    def test_a_step_that_another_run_makes_is_named(self, done: Path, status: Status) -> None:
        key = status.steps()["train"]["key"]
        with hold_lock(Path("data/work/train") / f"{key}.lock"):
            assert status.steps()["train"]["held_by"].startswith(f"pid {os.getpid()} on ")
        assert status.steps()["train"]["held_by"] is None


class TestDamage:
    """Whatever lies in the data folder: no traceback, and the steps are told."""

    @pytest.mark.parametrize(
        "lines",
        [
            b"\xff\xfe\x00garbage\n\n\n",
            b'{"event": "run_started"\n"run_ended"',
            b'["run_started"]\n"run_started"\n{"run_started": 1}\n',
            b'{"event": "run_started", "time": 3, "command": null}\n{"event": "run_ended", "exit_code": "x"}\n',
            b'{"event": "run_started"}\n' + b"[" * 100_000 + b'"run_ended"',
            b"",
        ],
    )
    def test_garbage_in_the_event_log(self, done: Path, status: Status, lines: bytes) -> None:
        (FOLDER / "events.jsonl").write_bytes(lines)
        assert status.states()["dataset"] == "done"
        assert status.lines() != []

    def test_a_store_that_was_deleted_by_hand(self, done: Path, status: Status) -> None:
        shutil.rmtree("data/store")
        steps = status.steps()
        assert (steps["prompts"]["state"], steps["prompts"]["linked_key"]) == ("missing", None)
        assert steps["prompts"]["reasons"] == ["data/runs/small/prompts links a result that is gone"]

    def test_a_manifest_that_is_no_manifest(self, done: Path, status: Status) -> None:
        (done / FOLDER / "filter" / MANIFEST).write_text("{}", "utf-8")
        assert status.states()["filter"] == "corrupt"
        edit_config("filter: {min_chars: 5}\n")
        assert "data/runs/small/filter links a result that is damaged" in status.steps()["filter"]["reasons"]

    def test_links_that_point_anywhere(self, done: Path, status: Status) -> None:
        for step, target in (("filter", "filter"), ("dedup", "/"), ("dataset", "../../../run.yaml")):
            (FOLDER / step).unlink()
            (FOLDER / step).symlink_to(target)
        assert status.states()["dataset"] == "done"

    def test_a_lock_file_of_another_config(self, done: Path, status: Status) -> None:
        parts = {"stage": "other", "config": [3], "inputs": 3, "surprise": None}
        Path("run.lock.json").write_text(
            json.dumps(
                {"other": {"key": "", "content": "", "parts": {}}, "train": {"key": "", "content": "", "parts": parts}}
            )
        )
        step = status.steps()["train"]
        assert step["state"] == "missing"
        assert "surprise: null -> absent" in step["reasons"]

    def test_a_lock_file_with_conflict_marks_is_an_error_for_people(
        self, done: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("run.lock.json").write_text("<<<<<<< ours\n", "utf-8")
        assert cli.main(["status", "run.yaml"]) == 2
        assert "Traceback" not in capsys.readouterr().err

    @pytest.mark.parametrize("data", ["run.yaml", "run.yaml/data"])
    def test_a_data_folder_that_is_a_file_is_refused_as_by_run(
        self, project: Path, capsys: pytest.CaptureFixture[str], data: str
    ) -> None:
        said = []
        for command in ("status", "run"):
            assert cli.main([command, "run.yaml", "--data", data]) == 2
            shown = capsys.readouterr()
            assert shown.out == ""
            said.append(shown.err.splitlines()[-3:])
        assert said[0] == said[1]
        assert said[0][0] == "error: not a folder"

    @pytest.mark.parametrize("path", ["data/runs", "data/runs/small", "data/store", "data/work"])
    def test_a_file_where_a_folder_belongs(self, done: Path, status: Status, path: str) -> None:
        shutil.rmtree(path)
        Path(path).write_text("a file", "utf-8")
        assert len(status.states()) == 8


class TestLooking:
    def test_it_writes_nothing_at_all(self, done: Path, status: Status) -> None:
        shutil.rmtree("data/cache")
        before = tree(done)
        status.json()
        status.json("--set", "filter.min_chars=5")
        assert tree(done) == before

    def test_nothing_is_made_where_nothing_ran(self, project: Path, status: Status) -> None:
        status.json()
        assert not (project / "data").exists()
