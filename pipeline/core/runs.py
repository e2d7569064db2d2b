"""A run's folder: held by one process, linked to its artefacts; and the lock file beside the config."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, cast

from pipeline.core.errors import Incomplete, RunLocked, UsageError
from pipeline.core.log import EventLog
from pipeline.core.stage import Json
from pipeline.core.store import Artefact, write_by_rename


class LockEntry(TypedDict):
    """What the lock file says of one step."""

    key: str
    content: str
    parts: dict[str, Json]


@contextmanager
def hold_run(folder: Path) -> Iterator[EventLog]:
    """Hold the run for this process; yields its event log.

    Args:
        folder: the run's folder; made if missing.

    Raises:
        RunLocked: another process holds it.
        Incomplete: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "run.lock").open("a+", encoding="utf-8")
    except OSError as error:
        where = str(error.filename)
        raise Incomplete(f"cannot write: {error.strerror}", where=where, todo="choose another --data folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "a process that has not said its name yet"
            todo = "wait for it to end, or end it; nothing was written"
            raise RunLocked(f"held by {holder}", where=str(folder), todo=todo) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}\n")
        file.flush()
        events = EventLog(folder / "events.jsonl")
        try:
            yield events
        finally:
            events.close()
            file.truncate(0)


def link_artefact(folder: Path, step: str, artefact: Artefact) -> None:
    """Make `<folder>/<step>` a relative link to the artefact, so that people find it without knowing a key."""
    link = folder / step
    target = os.path.relpath(artefact.path, folder)
    if link.is_symlink() and link.readlink() == Path(target):
        return
    temporary = folder / f".{step}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def lock_step(path: Path, step: str, artefact: Artefact) -> None:
    """Write a step's key, content and parts into the lock file; an unchanged entry writes nothing."""
    lock = read_lock(path)
    manifest = artefact.manifest
    entry = LockEntry(key=manifest.key, content=manifest.content, parts=manifest.parts)
    if lock.get(step) != entry:
        lock[step] = entry
        write_by_rename(path, json.dumps(lock, indent=2, sort_keys=True) + "\n")


def read_lock(path: Path | None) -> dict[str, LockEntry]:
    """The entries of a lock file by step; empty without one.

    Raises:
        UsageError: it is not JSON.
    """
    if path is None or not path.is_file():
        return {}
    try:
        return cast(dict[str, LockEntry], json.loads(path.read_text("utf-8")))
    except ValueError as error:
        todo = "restore it from git or delete it: the next run writes it again"
        raise UsageError("the lock file is not JSON", where=str(path), todo=todo) from error
