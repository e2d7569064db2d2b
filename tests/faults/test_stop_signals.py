"""Ctrl-C, SIGTERM and a closed terminal: what is in flight is finished and kept, and the command that is printed last
resumes."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.cli.call import TOGETHER_S
from tests.faults.processes import Running, obey_signals, running, type_command
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, failure
from tests.faults.shim.project import RUN, Made, attempts, leftovers, unsound, write_api_project
from tests.support import cli_env, probe_command, read_events, wait_for, write_project
from tests.tiny_models import make_tiny_model

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
CONCURRENCY = 2
"""Of `write_api_project`."""
ROWS = 24
ROOT = Path(__file__).resolve().parents[2]
NEVER_S = 3600.0


class Teacher:
    """The script of a server that answers at once, or as late or as badly as it is told to."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.quick = 4
        """Requests, the first ones, that are answered at once whatever the delay."""
        self.down = False

    def __call__(self, seen: Seen, number: int) -> Act:
        if self.down and number >= self.quick:
            return failure(503)
        act = completion(seen.prompt.upper())
        act.delay_s = self.delay_s if number >= self.quick else 0.0
        return act


@pytest.fixture
def teacher() -> Teacher:
    return Teacher()


@pytest.fixture
def server(teacher: Teacher) -> Iterator[ScriptedServer]:
    with ScriptedServer(teacher) as server:
        yield server


@pytest.fixture
def project(tmp_path: Path, server: ScriptedServer) -> Path:
    write_api_project(tmp_path / "project", server, ROWS)
    return tmp_path / "project"


@contextmanager
def waiting_for_answers(project: Path, server: ScriptedServer) -> Iterator[Running]:
    """A run whose requests in flight have all arrived and are not answered yet."""
    with running(*RUN, cwd=project) as run:
        run.await_(lambda: server.in_flight == CONCURRENCY and len(server.seen) > 4, "requests in flight")
        yield run


def resume_command(run: Running) -> str:
    """The command in the last of the three lines that a stopped run ends with."""
    assert [line[:7] for line in run.said[-3:]] == ["error: ", "   at: ", "   do: "], run.said
    last = run.said[-1].removeprefix("   do: ")
    assert last.startswith("resume with: python -m pipeline run run.yaml --data data"), last
    return last.removeprefix("resume with: ")


def has_ended_with(run: Running, code: int) -> bool:
    last = run.look()[-1]
    return (last["event"], last.get("exit_code")) == ("run_ended", code)


def unknown(project: Path) -> int:
    """How many attempts have an unknown outcome; known once a run was complete."""
    return sum(row["outcome"] is None for row in attempts(project))


class TestRequestsInFlight:
    @pytest.mark.parametrize("number", CODES)
    def test_they_are_finished_and_stored_and_no_other_leaves(
        self, project: Path, server: ScriptedServer, teacher: Teacher, number: signal.Signals
    ) -> None:
        teacher.delay_s = 1.0
        with waiting_for_answers(project, server) as run:
            sent = len(server.seen)
            run.process.send_signal(number)
            assert run.end() == CODES[number]
            assert len(server.seen) == sent
            assert has_ended_with(run, CODES[number])
            command = resume_command(run)
        teacher.delay_s = 0.0
        assert type_command(command, project).returncode == 0
        assert len(server.seen) == len(set(server.prompts)) == ROWS, "nothing was asked twice"
        assert unknown(project) == 0
        assert (leftovers(project), unsound(project)) == ([], [])

    def test_a_quick_teacher_gets_no_request_either(
        self, tmp_path: Path, server: ScriptedServer, teacher: Teacher
    ) -> None:
        teacher.delay_s = 0.002
        write_api_project(tmp_path / "project", server, 3000)
        with running(*RUN, cwd=tmp_path / "project") as run:
            run.await_(lambda: len(server.seen) > 50, "answers")
            run.process.send_signal(signal.SIGINT)
            run.await_(lambda: any("stopping:" in line for line in run.said), "the signal is seen")
            sent = len(server.seen)
            assert run.end() == 130
        assert len(server.seen) <= sent + CONCURRENCY

    def test_a_teacher_that_hangs_is_not_waited_for(
        self, project: Path, server: ScriptedServer, teacher: Teacher
    ) -> None:
        teacher.delay_s = NEVER_S
        with waiting_for_answers(project, server) as run:
            run.process.send_signal(signal.SIGTERM)
            assert run.end() == 143
            assert "waiting up to 10 s for 2 answers in flight" in "\n".join(run.said)
            command = resume_command(run)
        teacher.delay_s = 0.0
        assert type_command(command, project).returncode == 0
        assert unknown(project) == CONCURRENCY
        assert len(server.seen) == ROWS + CONCURRENCY

    def test_one_that_is_down_is_not_waited_for(self, project: Path, server: ScriptedServer, teacher: Teacher) -> None:
        teacher.down = True
        with running(*RUN, cwd=project) as run:
            run.await_(lambda: len(server.seen) > 20, "requests that are tried again")
            run.process.send_signal(signal.SIGINT)
            assert run.end() == 130
            command = resume_command(run)
        teacher.down = False
        assert type_command(command, project).returncode == 0
        assert len(set(server.prompts)) == ROWS


class TestSecondSignal:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_ends_the_run_at_once_and_can_be_resumed_as_well(
        self, project: Path, server: ScriptedServer, teacher: Teacher, number: signal.Signals
    ) -> None:
        teacher.delay_s = NEVER_S
        with waiting_for_answers(project, server) as run:
            run.process.send_signal(signal.SIGINT)
            run.await_(lambda: any("waiting up to" in line for line in run.said), "the first signal is seen")
            time.sleep(2 * TOGETHER_S)
            run.process.send_signal(number)
            assert run.end() == CODES[number]
            assert has_ended_with(run, CODES[number])
            assert run.said[-3] == "error: stopped at once; what was committed is kept"
            command = resume_command(run)
        teacher.delay_s = 0.0
        assert type_command(command, project).returncode == 0
        assert len(server.seen) == ROWS + unknown(project)
        assert (leftovers(project), unsound(project)) == ([], [])

    def test_two_that_come_together_are_one(self, tmp_path: Path) -> None:
        """`accelerate launch` and `timeout` pass on a signal that we got as one of the terminal's processes already."""
        write_project(tmp_path)
        body = "import signal\nfor _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\ncheck_cancelled(ctx)"
        command = probe_command(tmp_path, body, "run", "run.yaml")
        done = subprocess.run(command, cwd=tmp_path, env=cli_env(), capture_output=True, text=True, check=False)
        assert done.returncode == 130
        assert "error: stopped by a signal" in done.stderr


class TestClosedTerminal:
    def test_it_is_a_request_to_stop(self, project: Path, server: ScriptedServer, teacher: Teacher) -> None:
        """The progress display of a terminal would fail when it writes to one that is gone."""
        teacher.delay_s = 1.0
        process, terminal = pty.fork()
        if process == 0:
            obey_signals()
            os.chdir(project)
            os.execve(sys.executable, [sys.executable, "-m", "pipeline", *RUN], cli_env({"TERM": "xterm"}))
        wait_for(lambda: server.in_flight == CONCURRENCY and len(server.seen) > 4, "requests in flight")
        sent = len(server.seen)
        os.close(terminal)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 143
        assert len(server.seen) == sent
        assert read_events(project / "data/runs/small")[-1]["exit_code"] == 143
        teacher.delay_s = 0.0
        with running(*RUN, cwd=project) as again:
            assert again.end() == 0
        assert len(server.seen) == ROWS

    def test_the_signal_may_come_twice(self, project: Path, server: ScriptedServer, teacher: Teacher) -> None:
        """The system sends it to the processes of a terminal, and a shell to its jobs."""
        teacher.delay_s = 2.0
        with waiting_for_answers(project, server) as run:
            run.process.send_signal(signal.SIGHUP)
            run.await_(lambda: any("waiting up to" in line for line in run.said), "the first signal is seen")
            run.process.send_signal(signal.SIGHUP)
            assert run.end() == 143
            assert run.said[-3] == "error: stopped by a signal"
            command = resume_command(run)
        teacher.delay_s = 0.0
        assert type_command(command, project).returncode == 0
        assert unknown(project) == 0

    def test_nohup_is_obeyed(self, project: Path, server: ScriptedServer, teacher: Teacher) -> None:
        teacher.delay_s = 0.2
        with running(*RUN, cwd=project, through=["nohup"]) as run:
            run.await_(lambda: len(server.seen) > 4, "requests in flight")
            run.process.send_signal(signal.SIGHUP)
            assert run.end() == 0


# --------------------------------------------------------------------------------------------------- every stage


def write_long_project(folder: Path, rows: int) -> None:
    """A run that imports so many long completions that each stage takes a second or so."""
    write_project(folder, rows=rows)
    lines = []
    for row in range(rows):
        completion = " ".join(f"word-{row}-{word} and then" for word in range(100))
        lines.append(json.dumps({"id": f"p{row}", "prompt": f"Name number {row}.", "completion": completion}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def interrupt(folder: Path, step: str, number: signal.Signals, *arguments: str) -> str:
    """Run until a step has begun, stop it there, and return the command that resumes."""
    with running(*arguments, cwd=folder) as run:
        assert run.await_(lambda: run.has("step_started", step), f"{step} begins")
        run.process.send_signal(number)
        assert run.end() == CODES[number]
        assert run.inside == step, "it stopped inside the step"
        assert f"   at: step {step}" in run.said
        assert has_ended_with(run, CODES[number])
        return resume_command(run)


def test_a_signal_inside_each_stage_that_reads_rows_changes_nothing_in_the_end(tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for folder in (broken, whole):
        write_long_project(folder, 5000)
    for number, step in enumerate(("prompts", "generate", "filter", "dedup", "dataset")):
        command = interrupt(broken, step, (signal.SIGINT, signal.SIGTERM)[number % 2], *RUN)
        assert command == "python -m pipeline run run.yaml --data data --until dataset"
        assert unsound(broken) == []
    done = type_command(command, broken)
    assert done.returncode == 0, done.stderr
    with running(*RUN, cwd=whole) as run:
        assert run.end() == 0
    assert Made.by(broken) == Made.by(whole)
    assert leftovers(broken) == []


def write_trained_project(folder: Path) -> None:
    """A run up to the report with a tiny student, whose training and answers need no teacher."""
    sets = {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}, "columns": {"answer": "completion"}}}
    training = {
        "accelerate": str(ROOT / "configs" / "accelerate" / "cpu.yaml"),
        "precision": "float32",
        "threads": 1,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_length": 64,
        "epochs": 200,
        "max_steps": 800,
        "log_steps": 1,
        "evaluation": {"rows": 0},
    }
    quick = {"max_tokens": 2, "base_prompts": 2, "speed_prompts": 2, "speed_passes": 1, "bootstrap": 100, "threads": 1}
    write_project(
        folder,
        rows=60,
        prompts={"sets": sets, "validation": 0.1, "test": 0.1, "near_test": {"threshold": 1}},
        train=training,
        evaluate=quick,
    )
    make_tiny_model(folder / "student")


def test_a_signal_inside_train_or_evaluate_leaves_no_worker_and_training_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    write_trained_project(folder)
    with running("run", "run.yaml", cwd=folder) as run:
        assert run.await_(lambda: run.has("train_point", count=3), "three optimizer steps")
        run.process.send_signal(signal.SIGTERM)
        assert (run.end(), run.inside) == (143, "train")
        assert has_ended_with(run, 143)
        assert run.family() == []
        assert resume_command(run) == "python -m pipeline run run.yaml --data data"
    with running("run", "run.yaml", cwd=folder) as run:
        assert run.await_(lambda: run.has("step_started", "evaluate"), "evaluate begins")
        assert run.await_(lambda: len(run.family()) > 1, "its worker")
        run.process.send_signal(signal.SIGINT)
        assert (run.end(), run.inside) == (130, "evaluate")
        assert run.family() == []
        command = resume_command(run)
    done = type_command(command, folder)
    assert done.returncode == 0, done.stderr
    starts = [event for event in read_events(folder / "data/runs/small") if event["event"] == "train_started"]
    assert [start["resumed_from"] is None for start in starts] == [True, False]
    assert leftovers(folder) == []
