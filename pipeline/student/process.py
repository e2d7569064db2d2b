"""Worker processes of this room: started by a stage, told what to do by a JSON file, and dead when the stage is.

Beside `<name>.json` lie `<name>.log` (what the worker printed), `<name>.reports.jsonl` (what it says about its
progress), `<name>.error.json` (its error for a person) and `<name>.guard`, a file that the stage keeps locked for as
long as it lives. Standard library only: this runs in the parent, which loads no torch.
"""

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from pipeline.core import errors
from pipeline.core.errors import Incomplete, PipelineError
from pipeline.core.stage import Context, Json, check_cancelled

Report: TypeAlias = dict[str, Json]

POLL_S: Final = 0.2
STOP_S: Final = 10.0
"""Seconds between SIGTERM and SIGKILL."""
TAIL_LINES: Final = 20
FOREIGN: Final = re.compile(
    r"(ACCELERATE|FSDP|TORCHELASTIC|PARALLELISM_CONFIG)_.*|(GROUP_|ROLE_|LOCAL_)?(RANK|WORLD_SIZE)"
)
"""Variables of a launcher around us. A worker has a launcher of its own, or none."""
QUIET: Final = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}

_ERROR_LINE: Final = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$")
_LAUNCHER_ERROR: Final = ("ChildFailedError", "CalledProcessError")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Files:
    """The files around a worker's job."""

    job: Path

    def beside(self, suffix: str) -> Path:
        """`<name><suffix>` in the job's folder."""
        return self.job.with_name(self.job.stem + suffix)

    @property
    def log(self) -> Path:
        """Standard output and error of the worker and its launcher."""
        return self.beside(".log")

    @property
    def reports(self) -> Path:
        """Progress, one JSON object a line."""
        return self.beside(".reports.jsonl")

    @property
    def error(self) -> Path:
        """The worker's error for a person."""
        return self.beside(".error.json")

    @property
    def guard(self) -> Path:
        """Locked while the parent lives."""
        return self.beside(".guard")


def write_json(path: Path, value: Json) -> None:
    """Write a JSON file by rename, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, ensure_ascii=False), "utf-8", "surrogatepass")
    temporary.replace(path)


# -------------------------------------------------------------------------------------------------- the parent's


def run_process(
    command: Sequence[str], job: Path, ctx: Context, on_report: Callable[[Report], None], env: Mapping[str, str]
) -> None:
    """Run a worker to its end and pass on what it reports.

    Args:
        command: the worker's command line; `job` is expected in it.
        env: variables on top of ours (without a launcher's) and of `QUIET`.

    Raises:
        PipelineError: the error the worker wrote down.
        Incomplete: the worker ended otherwise than well; its log is named.
        Interrupted: `ctx.cancel` was set; the worker and its children are gone.
    """
    files = Files(job)
    for stale in (files.error, files.reports):
        stale.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if FOREIGN.fullmatch(name) is None}
    reports = _Tail(files.reports)
    with files.log.open("wb") as log, _locked(files.guard):
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**inherited, **QUIET, **env}, start_new_session=True
        )
        try:
            while process.poll() is None:
                check_cancelled(ctx)
                _pass_on(reports, on_report)
                time.sleep(POLL_S)
        finally:
            stop_group(process)
    _pass_on(reports, on_report)
    if process.returncode != 0:
        raise _failure(process.returncode, files, ctx)


def stop_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process and the group it leads: politely, then by force. Nothing happens if it has ended."""
    for number, wait in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            logger.warning("process %d does not end on signal %d", process.pid, number)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the system lets go when we die in whatever way."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Tail:
    """Reads the whole lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def lines(self) -> list[bytes]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            added = file.read()
        whole = added.rpartition(b"\n")[0]
        self._at += len(whole) + 1 if whole else 0
        return whole.split(b"\n") if whole else []


def _pass_on(reports: _Tail, on_report: Callable[[Report], None]) -> None:
    for line in reports.lines():
        on_report(json.loads(line))


def _failure(returncode: int, files: Files, ctx: Context) -> PipelineError:
    """The error of a worker that failed: the one it wrote down, else one made of its log."""
    if files.error.is_file():
        told = json.loads(files.error.read_text("utf-8"))
        kind = getattr(errors, told.pop("kind"))
        error: PipelineError = kind(told["what"], where=told["where"], todo=told["todo"])
        return error
    lines = files.log.read_text("utf-8", "replace").splitlines()
    logger.error("last lines of %s:\n%s", files.log, "\n".join(lines[-TAIL_LINES:]))
    ended = f"ended by signal {-returncode}" if returncode < 0 else f"failed with exit code {returncode}"
    todo = f"read the log, mend the cause (out of memory: smaller batches), then: {ctx.resume_command}"
    return Incomplete(f"the worker {ended}: {_last_error(lines)}", where=str(files.log), todo=todo)


def _last_error(lines: Sequence[str]) -> str:
    """The last line that names an exception, not counting the launcher's own complaint about its child."""
    found = [match[1] for line in lines if (match := _ERROR_LINE.match(line)) is not None]
    own = [line for line in found if not any(name in line.split(":")[0] for name in _LAUNCHER_ERROR)]
    return (own or found or [line for line in lines if line.strip()] or ["it printed nothing"])[-1]


# -------------------------------------------------------------------------------------------------- the worker's


class Reporter:
    """Appends reports where the parent reads them; safe to call from one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, report: Report) -> None:
        """Add one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report, allow_nan=True) + "\n")


def run_as_worker(main: Callable[[Path], None], argv: Sequence[str]) -> None:
    """The main function of a worker module: run `main(job)`, die with the parent, write errors down for it."""
    files = Files(Path(argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _die_with_parent(files.guard)
    try:
        main(files.job)
    except PipelineError as error:
        told: dict[str, Json] = {"kind": type(error).__name__, "what": error.what, "where": error.where}
        write_json(files.error, {**told, "todo": error.todo})
        logger.error("%s", error)
        sys.exit(int(error.exit_code))


def _die_with_parent(guard: Path) -> None:
    """End this process when the one that holds the guard's lock is gone, even if it was killed."""

    def wait() -> None:
        with guard.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os._exit(1)

    threading.Thread(target=wait, name="guard", daemon=True).start()
