"""A run's folder: held by one process, linked to its artefacts; and the lock file beside the config."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypedDict, cast

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
def hold_run(folder: Path, secrets: tuple[str, ...]) -> Iterator[EventLog]:
    """Hold the run for this process; yields its event log.

    Args:
        folder: the run's folder; made if missing.
        secrets: values that no event may hold.

    Raises:
        RunLocked: another process holds it.
        Incomplete: the folder cannot be written.
    """
    with hold_lock(folder / "run.lock"):
        events = EventLog(folder / "events.jsonl", secrets)
        try:
            yield events
        finally:
            events.close()


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold a lock file for this process; it says who holds it and is removed at the end.

    Raises:
        RunLocked: another process holds it.
        Incomplete: its folder cannot be written, or the file system knows no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take_lock(path)
    except OSError as error:
        where = str(error.filename or path)
        raise Incomplete(f"cannot lock: {error.strerror}", where=where, todo="choose another --data folder") from error
    with file:
        try:
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


def _take_lock(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read().strip() or "a process that has not said its name yet"
            todo = "wait for it to end, or end it; nothing was written"
            raise RunLocked(f"held by {holder}", where=str(path), todo=todo) from error
        except OSError:
            file.close()
            raise
        if os.fstat(file.fileno()).st_nlink > 0:
            return file
        file.close()  # its last holder removed it between our opening and our locking it


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
        UsageError: it is not a lock file.
    """
    if path is None or not path.is_file():
        return {}
    todo = "restore it from git or delete it: the next run writes it again"
    try:
        lock = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UsageError("the lock file is not JSON", where=str(path), todo=todo) from error
    entries = lock.values() if isinstance(lock, dict) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("parts"), dict) for entry in entries):
        raise UsageError("not a lock file", where=str(path), todo=todo)
    return cast(dict[str, LockEntry], lock)
