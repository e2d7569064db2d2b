"""Worker processes of this room: started by a stage, told what to do by a JSON file, and dead when the stage is.

Beside `<name>.json` lie `<name>.log` (what the worker printed; the one before is `<name>.previous.log`),
`<name>.reports.jsonl` (what it says about its progress), `<name>.error.json` (its error for a person),
`<name>.<hex>.guard`, a file of this one start that the stage keeps locked for as long as it lives, and `<name>.pid`,
which the worker (the first, where there are several) keeps locked likewise. Standard library only: this runs in the
parent, which loads no torch.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from pipeline.core import errors
from pipeline.core.errors import Incomplete, Interrupted, PipelineError
from pipeline.core.log import finite
from pipeline.core.stage import Context, Json, check_cancelled

Report: TypeAlias = dict[str, Json]

POLL_S: Final = 0.2
FINISH_S: Final = 600.0
"""Seconds that a worker gets to finish what it may not lose, once it was asked to stop. The checkpoint of a big model
takes minutes; whoever does not want to wait sends a second signal. Most workers have nothing to lose and end at once.
"""
KILL_S: Final = 10.0
"""Seconds that the system gets to end a killed process."""
TAIL_LINES: Final = 20
GUARD: Final = "PIPELINE_GUARD"
"""Environment variable that tells a worker its guard file."""
FOREIGN: Final = re.compile(
    r"(ACCELERATE|FSDP|TORCHELASTIC|PARALLELISM_CONFIG)_.*|(GROUP_|ROLE_|LOCAL_)?(RANK|WORLD_SIZE)"
)
"""Variables of a launcher around us. A worker has a launcher of its own, or none."""
QUIET: Final = {
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
"""No telemetry, no bars, and no weights of another revision from the hub's converter of pickles. Hugging Face's hub
reads its variables when it is imported, and datasets copies them then, so they are set before either; TRL asks the
hub's, and vLLM reads its own when it reports."""

OFFLINE: Final = {"HF_HUB_OFFLINE": "1"}
"""For workers whose models are all folders: nothing is looked up on the hub."""

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

    def new_guard(self) -> Path:
        """The file that this one start of the worker is to live by; those of earlier starts are removed.

        Were it the same file, a launcher that outlived its killed parent would find it locked by the next one, and
        start a second worker on the same job.
        """
        for stale in self.job.parent.glob(f"{self.job.stem}.*.guard"):
            stale.unlink(missing_ok=True)
        return self.beside(f".{secrets.token_hex(8)}.guard")

    @property
    def pid(self) -> Path:
        """Process id of the worker, not of its launcher; locked while it lives."""
        return self.beside(".pid")


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
    for stale in (files.error, files.reports, files.pid):
        stale.unlink(missing_ok=True)
    if files.log.exists():
        files.log.replace(files.beside(".previous.log"))
    inherited = {name: value for name, value in os.environ.items() if FOREIGN.fullmatch(name) is None}
    reports = _Tail(files.reports)
    guard = files.new_guard()
    env = {**inherited, **QUIET, **env, GUARD: str(guard)}
    with files.log.open("wb") as log, _locked(guard):
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            while not ctx.cancel.is_set() and _is_running(process, files):
                _pass_on(reports, on_report)
                time.sleep(POLL_S)
            if ctx.cancel.is_set():
                _let_finish(process, files)
        finally:
            _kill(process, files)
    _pass_on(reports, on_report)
    if process.returncode == 0:
        return
    check_cancelled(ctx)
    raise _failure(process.returncode, files, ctx)


def _is_running(process: "subprocess.Popen[bytes]", files: Files) -> bool:
    """Whether the launcher or the worker runs: a launcher may end on a signal before the worker that it started."""
    return process.poll() is None or worker_pid(files) is not None


def _let_finish(process: "subprocess.Popen[bytes]", files: Files) -> None:
    """Ask the worker to stop, and wait until it has.

    Its launcher is not asked: one for a single process would end at once, and one for several would kill them 30 s
    later. A worker that is still starting has nothing to lose, and neither have the children that one leaves behind.
    """
    pid = worker_pid(files)
    _signal(os.kill if pid is not None else os.killpg, pid or process.pid, signal.SIGTERM)
    if not _ends(lambda: not _is_running(process, files), FINISH_S):
        logger.warning("the worker did not stop within %d s and is killed", FINISH_S)
        return
    _signal(os.killpg, process.pid, signal.SIGTERM)
    _ends(lambda: not _signal(os.killpg, process.pid, 0), KILL_S)


def _kill(process: "subprocess.Popen[bytes]", files: Files) -> None:
    """End the worker, the launcher and the group it leads by force; nothing happens to what has ended.

    Workers in groups of their own end with our lock on the guard file.
    """
    if (pid := worker_pid(files)) is not None:
        _signal(os.kill, pid, signal.SIGKILL)
    _signal(os.killpg, process.pid, signal.SIGKILL)
    if not _ends(lambda: process.poll() is not None, KILL_S):
        logger.warning("process %d does not end although it was killed", process.pid)


def _signal(send: Callable[[int, int], None], target: int, number: int) -> bool:
    """Send a signal to a process or a group; False if there is no such one."""
    try:
        send(target, number)
    except ProcessLookupError:
        return False
    return True


def _ends(is_over: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is over, at most so many seconds; returns whether it is."""
    end = time.monotonic() + seconds
    while not is_over():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def worker_pid(files: Files) -> int | None:
    """The worker's process id, or None if it does not run (or has not come so far as to say so)."""
    with suppress(FileNotFoundError), files.pid.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # a child that it forked may hold the lock when it has ended
            pid = int(file.read())
            return pid if _signal(os.kill, pid, 0) else None
    return None


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
        todo = f"resume with: {ctx.resume_command}" if issubclass(kind, Interrupted) else told["todo"]
        error: PipelineError = kind(told["what"], where=told["where"], todo=todo)
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
        """Add one line; numbers that are not finite become null."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(report), allow_nan=False) + "\n")


def run_as_worker(main: Callable[[Path], None], argv: Sequence[str]) -> None:
    """The main function of a worker module: run `main(job)`, die with the parent, write errors down for it.

    A full or failing disk is such an error too.
    """
    files = Files(Path(argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _die_with_parent(Path(os.environ[GUARD]))
    todo = "make room or give write access, then run the same command again"
    try:
        with _named(files.pid), errors.disk_errors(str(files.job.parent), todo):
            main(files.job)
    except PipelineError as error:
        told: dict[str, Json] = {"kind": type(error).__name__, "what": error.what, "where": error.where}
        write_json(files.error, {**told, "todo": error.todo})
        logger.error("%s", error)
        sys.exit(int(error.exit_code))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Hold a lock on the file that says our process id; the first of several processes does."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    with mine.open("wb") as file:
        file.write(b"%d" % os.getpid())
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        mine.replace(path)  # locked before anybody can see it
        yield


@contextmanager
def sigterm_asks() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM asks to stop, however often it comes, instead of ending this process at once."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _die_with_parent(guard: Path) -> None:
    """End this process when the one that holds the guard's lock is gone, even if it was killed."""

    def wait() -> None:
        with suppress(FileNotFoundError), guard.open("rb") as file:  # the next start has removed it
            fcntl.flock(file, fcntl.LOCK_SH)
        os._exit(1)

    threading.Thread(target=wait, name="guard", daemon=True).start()
