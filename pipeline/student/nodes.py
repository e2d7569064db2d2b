"""Whether the machines of a launch share their data folder: asked and answered by small files in it, before any work.

The first process of every machine but the first writes a question, and the first process of all answers it with the
same nonce. Neither clocks nor the launch's name are believed, since files of an earlier launch may still lie there.
Standard library only.
"""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from pipeline.core.errors import Interrupted, UsageError
from pipeline.student.jobs import launch_id
from pipeline.student.process import write_json
from pipeline.student.tokenise import read_json

WAIT_S: Final = 180.0
"""Seconds that the machines wait for each other: they start one after the other, and a network file system may show a
new file a minute late."""
LOOK_S: Final = 0.2


def meet(data: Path, stop: threading.Event, environ: Mapping[str, str] = os.environ, wait_s: float = WAIT_S) -> None:
    """Return when every machine of this launch has seen the data folder of the first one; at once where there is one.

    Called by all processes of a launch. Only the first one of each machine does anything.

    Raises:
        UsageError: a machine did not show up in this folder in time.
        Interrupted: we were asked to stop while waiting.
    """
    machines = int(environ.get("GROUP_WORLD_SIZE", "1"))
    if machines == 1 or environ.get("LOCAL_RANK") != "0":
        return
    folder = data / "nodes" / hashlib.sha256(launch_id(environ).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    machine, end = int(environ["GROUP_RANK"]), time.monotonic() + wait_s
    if machine > 0:
        _ask(folder, machine, stop, end)
    else:
        _answer(folder, set(range(1, machines)), stop, end)
        with suppress(OSError):  # a question of another launch with our name
            folder.rmdir()


def _ask(folder: Path, machine: int, stop: threading.Event, end: float) -> None:
    question, answer = _files(folder, machine)
    nonce = secrets.token_hex(8)
    write_json(question, {"nonce": nonce})
    while not _says(answer, nonce):
        _wait(stop, end, folder, f"the first machine does not answer machine {machine}")
    question.unlink()  # tells the first machine that its answer was seen


def _answer(folder: Path, machines: set[int], stop: threading.Event, end: float) -> None:
    """Answer each question until the one who asked has taken it away. One that was left behind stays."""
    answered: dict[int, str] = {}
    while machines:
        for machine in sorted(machines):
            question, answer = _files(folder, machine)
            nonce = _nonce(question)
            if nonce is None and machine in answered:
                machines.discard(machine)
                answer.unlink(missing_ok=True)
            elif nonce is not None and nonce != answered.get(machine):
                write_json(answer, {"nonce": nonce})
                answered[machine] = nonce
        if machines:
            _wait(stop, end, folder, f"machine {min(machines)} of this launch does not show up")


def _files(folder: Path, machine: int) -> tuple[Path, Path]:
    return folder / f"machine-{machine}.json", folder / f"machine-{machine}.answer.json"


def _nonce(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return str(read_json(path)["nonce"])
    return None


def _says(path: Path, nonce: str) -> bool:
    return _nonce(path) == nonce


def _wait(stop: threading.Event, end: float, folder: Path, missing: str) -> None:
    if stop.wait(LOOK_S):
        raise Interrupted("stopped by a signal", where="step train", todo="run the same command again to go on")
    if time.monotonic() > end:
        todo = "give all machines one data folder (--data on a shared file system), or read the others' errors"
        raise UsageError(f"{missing} in the data folder", where=str(folder.parents[1]), todo=todo)
