"""A run's folder: held by one process, linked to its artefacts; and the lock file beside the config."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypedDict, cast

from pipeline.core.errors import Incomplete, RunLocked, UsageError, disk_errors
from pipeline.core.log import EventLog
from pipeline.core.stage import Json
from pipeline.core.store import Artefact, write_by_rename

DATA_LOCK = ".in-use"
"""Shared by everything that works in a data folder, held alone by what removes from it."""

LOOKS, LOOK_S = 4, 0.05
"""A lock that is held for an instant is one that somebody looks at (`lock_holder`), so look again before refusing."""

WORK = ".work"
"""Folder in a run's folder with links to the work that it has begun and not finished."""


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
    todo = "make room or give write access, then run the same command again"
    with hold_lock(run_lock(folder)), disk_errors(str(folder), todo):
        events = EventLog(folder / "events.jsonl", secrets)
        try:
            yield events
        finally:
            events.close()


def run_lock(folder: Path) -> Path:
    """The lock file of a run's folder."""
    return folder / "run.lock"


@contextmanager
def hold_lock(path: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock file for this process; it says who holds it and is removed at the end. The lock of a process that
    died is free: the system lets it go, whatever the file still says.

    Args:
        wait: called with the holder's name for as long as another process holds it; None: do not wait.

    Raises:
        RunLocked: another process holds it, and `wait` is None.
        Incomplete: its folder cannot be written, or the file system knows no locks.
    """
    with _unlockable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take_lock(path, wait)
    with file:
        try:
            with _unlockable(path):
                file.truncate(0)
                # Not file.write: what a full disk refused would come up again when the file is closed.
                os.write(file.fileno(), f"pid {os.getpid()} on {platform.node()}\n".encode())
            yield
        finally:
            with suppress(OSError):  # what remains is a file that nobody holds
                path.unlink()


@contextmanager
def _unlockable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = str(error.filename or path)
        raise Incomplete(f"cannot lock: {error.strerror}", where=where, todo="choose another --data folder") from error


def _take_lock(path: Path, wait: Callable[[str], None] | None) -> IO[str]:
    looks = 0
    while True:
        looks += 1
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                holder = _holder(file)
            if wait is not None:
                wait(holder)
                continue
            if looks < LOOKS:
                time.sleep(LOOK_S)
                continue
            raise _held_by(holder, path) from error
        except OSError:
            file.close()
            raise
        if os.fstat(file.fileno()).st_nlink > 0:
            return file
        file.close()  # its last holder removed it between our opening and our locking it


def refuse_if_held(path: Path) -> None:
    """Say early what `hold_lock` would say; it has the last word.

    Raises:
        RunLocked: another process holds the lock file.
    """
    holder = lock_holder(path)
    if holder is not None:
        raise _held_by(holder, path)


def _held_by(holder: str, path: Path) -> RunLocked:
    todo = "wait for it to end, or end it; nothing was written"
    return RunLocked(f"held by {holder}", where=str(path), todo=todo)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "a process that has not said its name yet"


def lock_holder(path: Path) -> str | None:
    """Who holds a lock file, for people ("pid 12 on host"); None if nobody does. Holds nothing and makes nothing."""
    try:
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _holder(file)
    except OSError:  # none, or one that we may not look at
        return None
    return None


@contextmanager
def share_data(data: Path) -> Iterator[None]:
    """Keep everybody from removing anything from the data folder; any number of processes may share it.

    Raises:
        RunLocked: a process has it for itself (see `own_data`).
        Incomplete: the folder cannot be written, or the file system knows no locks.
    """
    with _data_lock(data, fcntl.LOCK_SH, "artefacts are being removed from this folder"):
        yield


@contextmanager
def own_data(data: Path) -> Iterator[None]:
    """Have the data folder alone, to remove things from it.

    Raises:
        RunLocked: a run is going on in it.
        Incomplete: the folder cannot be written, or the file system knows no locks.
    """
    with _data_lock(data, fcntl.LOCK_EX, "a run is going on in this folder"):
        yield


@contextmanager
def _data_lock(data: Path, kind: int, refusal: str) -> Iterator[None]:
    path = data / DATA_LOCK
    with _unlockable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            with _unlockable(path):
                fcntl.flock(file, kind | fcntl.LOCK_NB)
        except Incomplete as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise RunLocked(refusal, where=str(path), todo="wait for it to end; nothing was written") from error
            raise
        yield


def link_work(folder: Path, step: str, workdir: Path) -> None:
    """Note in the run's folder that it has unfinished work on a step, so that `gc` keeps it."""
    (folder / WORK).mkdir(exist_ok=True)
    _link(folder / WORK, step, workdir)


def unlink_work(folder: Path, step: str) -> None:
    """The step's work is finished."""
    (folder / WORK / step).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: another step's work is not finished
        (folder / WORK).rmdir()


def link_artefact(folder: Path, step: str, artefact: Artefact) -> None:
    """Make `<folder>/<step>` a relative link to the artefact, so that people find it without knowing a key."""
    _link(folder, step, artefact.path)


def _link(folder: Path, name: str, path: Path) -> None:
    """Make or replace a relative link by one rename.

    Raises:
        UsageError: something else lies there, as after a copy that followed the links.
    """
    link = folder / name
    # Between real folders: one of them may be reached through a link, to a larger disk say.
    target = os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
    if link.exists() and not link.is_symlink():
        todo = "move it away; the folder of a run holds links, and a copy should keep them (cp -a)"
        raise UsageError("something lies where the link to a result belongs", where=str(link), todo=todo)
    if link.is_symlink() and link.readlink() == Path(target):
        return
    temporary = folder / f".{name}.new"  # the folder is held by this process; a killed one may have left it
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
    except (ValueError, RecursionError) as error:
        raise UsageError("the lock file is not JSON", where=str(path), todo=todo) from error
    if not isinstance(lock, dict) or not all(map(_is_lock_entry, lock.values())):
        raise UsageError("not a lock file", where=str(path), todo=todo)
    return cast(dict[str, LockEntry], lock)


def _is_lock_entry(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    texts = (value.get("key"), value.get("content"))
    return isinstance(value.get("parts"), dict) and all(isinstance(text, str) for text in texts)
