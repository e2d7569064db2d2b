"""A command of the pipeline as a process of its own, whose events are watched and which is killed or sent signals."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import cli_env

PATIENCE_S = 300.0
MARK = "PIPELINE_TEST_MARK"


@dataclass(slots=True)
class Running:
    """A running command.

    Attributes:
        mark: in the environment of it and of all that it starts.
        stderr: where it writes what it says.
        folder: the run's folder, where its events are.
        events: those of this process, as far as they were read.
    """

    process: "subprocess.Popen[bytes]"
    mark: str
    stderr: Path
    folder: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    _at: int = 0

    def look(self) -> list[dict[str, Any]]:
        """Read what was added to the events; all of this process's so far."""
        with suppress(FileNotFoundError), (self.folder / "events.jsonl").open("rb") as file:
            file.seek(self._at)
            whole = file.read().rpartition(b"\n")[0]
            self._at += len(whole) + 1 if whole else 0
            found = [_parsed(line) for line in whole.splitlines()]
            self.events += [event for event in found if event.get("pid") == self.process.pid]
        return self.events

    def has(self, event: str, step: str | None = None, count: int = 1) -> bool:
        """Whether an event was seen (of a step, where one is given), so many times."""
        seen = [one for one in self.look() if one["event"] == event and (step is None or one.get("step") == step)]
        return len(seen) >= count

    def await_(self, condition: Callable[[], object], what: str) -> bool:
        """Wait until a condition holds; False if the process ended before.

        Raises:
            AssertionError: neither happened in time.
        """
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if self.process.poll() is not None:
                return bool(condition())
            assert time.monotonic() < end, f"waited {PATIENCE_S:g} s for: {what}"
            time.sleep(0.001)
        return True

    @property
    def inside(self) -> str | None:
        """The step that was started last, if it was neither committed nor found: that the process was in."""
        steps: list[str] = []
        for event in self.look():
            if event["event"] == "step_started":
                steps.append(event["step"])
            if event["event"] == "step_committed":
                steps.clear()
        return steps[-1] if steps else None

    def kill(self) -> None:
        """`kill -9`, of this one process."""
        self.process.kill()
        self.process.wait()

    def kill_family(self) -> None:
        """`kill -9` of everything that it started, and of itself."""
        for pid, _ in _living(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def family(self) -> list[str]:
        """Process id and command line of everything that it started and that lives, itself included."""
        return [f"{pid} {command}" for pid, command in _living(self.mark)]

    @property
    def said(self) -> list[str]:
        """The lines of stderr so far that hold anything."""
        return [line for line in self.stderr.read_text("utf-8").splitlines() if line.strip()]

    def end(self) -> int:
        """Wait for the end; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it does not end.
        """
        return self.process.wait(PATIENCE_S)


def _parsed(line: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        event: dict[str, Any] = json.loads(line)
        return event
    return {}  # the torn last line of a process that was killed before


@contextmanager
def running(
    *arguments: str | Path,
    cwd: Path,
    name: str = "small",
    env: Mapping[str, str] | None = None,
    through: Sequence[str] = (),
) -> Iterator[Running]:
    """`python -m pipeline …` for the block, at whose end it and all that it started are killed if they still run.

    Args:
        cwd: the current folder of the command; `data` in it is its data folder.
        name: the run's name.
        through: a program that starts the command in its own place, such as `nohup`.
    """
    command = [*through, sys.executable, "-m", "pipeline", *map(str, arguments)]
    mark = secrets.token_hex(8)
    handle, stderr = tempfile.mkstemp(suffix=".stderr")
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=cli_env({MARK: mark, **(env or {})}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=handle,
        preexec_fn=obey_signals,
    )
    os.close(handle)
    run = Running(process, mark, Path(stderr), cwd / "data" / "runs" / name)
    try:
        yield run
    finally:
        run.kill_family()
        run.kill()
        Path(stderr).unlink()


def _living(mark: str) -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def obey_signals() -> None:
    """A shell that runs the tests in the background may have told its children to ignore these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def type_command(command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command that a person was told to type, through the shell, where `python` is ours."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        command,
        shell=True,
        cwd=cwd,
        env=cli_env({"PATH": path}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
