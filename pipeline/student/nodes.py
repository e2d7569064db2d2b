"""The processes of a launch meet by small files in the data folder, before any work: do they share it, and which start
of them is this?

Every process but the first writes a question with a nonce of its own, and the first one answers with the same nonce and
a name that it drew for this start. Neither clocks nor what the launcher tells are believed: files of an earlier launch
may still lie there, and a Slurm job that is put back into its queue comes again with its run id, address and port.
Standard library only.
"""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from pipeline.core.errors import Interrupted, UsageError
from pipeline.student.jobs import LAUNCH, launcher_name
from pipeline.student.process import write_json
from pipeline.student.tokenise import read_json

WAIT_S: Final = 180.0
"""Seconds that the processes wait for each other: machines start one after the other, and a network file system may
show a new file a minute late."""
LOOK_S: Final = 0.2


def join_launch(data: Path, stop: threading.Event, environ: MutableMapping[str, str] = os.environ) -> None:
    """`meet` the other processes of this launch, and keep its name where `jobs.launch_id` finds it.

    Raises:
        UsageError, Interrupted: as `meet`.
    """
    name = meet(data, stop, environ)
    if name is not None:
        environ[LAUNCH] = name


def meet(
    data: Path, stop: threading.Event, environ: Mapping[str, str] = os.environ, wait_s: float = WAIT_S
) -> str | None:
    """Return when this process and the first one have seen each other's files; called by all processes of a launch.

    Returns:
        The name of this start of the launch, the same for all of its processes and of no other start; None for a
        process that no launcher started, or the only one.

    Raises:
        UsageError: a process did not show up in this folder in time.
        Interrupted: we were asked to stop while waiting.
    """
    processes = int(environ.get("WORLD_SIZE", "1"))
    if processes == 1 or "LOCAL_RANK" not in environ:
        return None
    folder = data / "nodes" / hashlib.sha256(launcher_name(environ).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    rank, end = int(environ["RANK"]), time.monotonic() + wait_s
    if rank > 0:
        return _ask(folder, rank, stop, end)
    name = secrets.token_hex(8)
    _answer(folder, set(range(1, processes)), name, stop, end)
    with suppress(OSError):  # a question of another launch with our name
        folder.rmdir()
    return name


def _ask(folder: Path, rank: int, stop: threading.Event, end: float) -> str:
    question, answer = _files(folder, rank)
    nonce = secrets.token_hex(8)
    write_json(question, {"nonce": nonce})
    while (told := _read(answer)).get("nonce") != nonce:
        _wait(stop, end, folder, f"the first process does not answer process {rank} of this launch")
    question.unlink()  # tells the first process that its answer was seen
    return told["launch"]


def _answer(folder: Path, ranks: set[int], name: str, stop: threading.Event, end: float) -> None:
    """Answer each question until the one who asked has taken it away. One that was left behind stays."""
    answered: dict[int, str] = {}
    while ranks:
        for rank in sorted(ranks):
            question, answer = _files(folder, rank)
            nonce = _read(question).get("nonce")
            if nonce is None and rank in answered:
                ranks.discard(rank)
                answer.unlink(missing_ok=True)
            elif nonce is not None and nonce != answered.get(rank):
                write_json(answer, {"nonce": nonce, "launch": name})
                answered[rank] = nonce
        if ranks:
            _wait(stop, end, folder, f"process {min(ranks)} of this launch does not show up")


def _files(folder: Path, rank: int) -> tuple[Path, Path]:
    return folder / f"rank-{rank}.json", folder / f"rank-{rank}.answer.json"


def _read(path: Path) -> dict[str, str]:
    """Empty where there is none."""
    with suppress(FileNotFoundError):
        return {name: str(value) for name, value in read_json(path).items()}
    return {}


def _wait(stop: threading.Event, end: float, folder: Path, missing: str) -> None:
    if stop.wait(LOOK_S):
        raise Interrupted("stopped by a signal", where="step train", todo="run the same command again to go on")
    if time.monotonic() > end:
        todo = "give all machines one data folder (--data on a shared file system), or read the others' errors"
        raise UsageError(f"{missing} in the data folder", where=str(folder.parents[1]), todo=todo)
