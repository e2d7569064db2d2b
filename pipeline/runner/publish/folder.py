"""A folder that is replaced as a whole: looked at, written aside, synced, renamed."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.lineage import file_sha256
from pipeline.core.runs import hold_lock
from pipeline.core.store import make_folder, sync_folder

FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
NEW: Final = "name a new folder, or one that an earlier call of this command made and nobody changed"
WRITABLE: Final = "name a folder that can be made and written"


@contextmanager
def target_errors(where: str) -> Iterator[None]:
    """Turn what the system says of a target that cannot be written into an error for a person.

    Raises:
        UsageError: it cannot be written.
        Incomplete: its disk is full or fails.
    """
    try:
        yield
    except (OSError, Incomplete) as error:
        cause = error.__cause__ if isinstance(error, Incomplete) else error  # a lock wraps what the system says
        if not isinstance(cause, OSError):
            raise
        if cause.errno in FULL:
            todo = "make room, then run the same command again"
            raise Incomplete(f"cannot write: {cause.strerror}", where=where, todo=todo) from error
        raise UsageError(f"the target cannot be written: {cause.strerror}", where=where, todo=WRITABLE) from error


def folder_of(path: Path, where: str) -> Path:
    """The folder under a name of its own, beside which something can be written.

    Raises:
        UsageError: it is the root.
    """
    path = path if path.name not in ("", "..") else Path(os.path.realpath(path))
    if path.name == "":
        raise UsageError("the target is empty or the root", where=where, todo=WRITABLE)
    return path


def refuse_inside(path: Path, data: Path, where: str) -> None:
    """Refuse a target that shares files with the data folder, wherever links lead.

    Raises:
        UsageError: one of them lies in the other.
    """
    target, root = (Path(os.path.realpath(each)) for each in (path, data))
    if target.is_relative_to(root) or root.is_relative_to(target):
        todo = "name a folder outside of it: what lies there is never replaced by hand"
        raise UsageError(f"the target and the data folder {data} overlap", where=where, todo=todo)


def refuse_unwritable(path: Path, where: str) -> None:
    """Refuse a target that has no place to be.

    Raises:
        UsageError: what it would lie in is a file, or cannot be written.
    """
    above = next(each for each in path.absolute().parents if os.path.exists(each))  # noqa: PTH110 (never raises)
    if not above.is_dir():
        raise UsageError(f"the target cannot be written: {above.name} is no folder", where=where, todo=WRITABLE)
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"the target cannot be written: no access to {above}", where=where, todo=WRITABLE)


def files_in(path: Path, where: str) -> tuple[str, ...]:
    """Relative names of all files of a folder, sorted; none where it is not there.

    Raises:
        UsageError: it is no folder, or holds a symbolic link.
    """
    with target_errors(where):
        refuse_unwritable(path, where)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UsageError("the target is no folder", where=where, todo=NEW)
        found = []
        for folder, folders, files in os.walk(path, onerror=_raise):
            for each in (Path(folder, name) for name in (*folders, *files)):
                if each.is_symlink():
                    raise UsageError(f"the folder holds a symbolic link: {each.name}", where=where, todo=NEW)
            found += [Path(folder, name).relative_to(path).as_posix() for name in files]
    return tuple(sorted(found))


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def refuse_changed(path: Path, made: Mapping[str, str], where: str) -> None:
    """Refuse a folder that holds anything but what was once written there: all of it would be replaced.

    Args:
        made: name -> sha256 of what was written; empty: nobody knows of anything.

    Raises:
        UsageError: it does.
    """
    for name in files_in(path, where):
        if name not in made:
            raise UsageError(f"the folder holds something else, such as {name}", where=where, todo=NEW)
        with target_errors(where):
            is_same = file_sha256(path / name) == made[name]
        if not is_same:
            raise UsageError(f"{name} was changed since it was written there", where=where, todo=NEW)


@contextmanager
def replaced_folder(path: Path, where: str) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `path` at the end of the block.

    An error in the block leaves what was there. A process that is killed leaves the old folder, or for a moment none,
    and beside it what it had written, which the next call removes.

    Raises:
        RunLocked: another process writes it.
        UsageError: it cannot be written.
        Incomplete, OSError: the disk does not take it.
    """
    partial, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "old"))
    with ExitStack() as stack:
        with target_errors(where):
            make_folder(path.parent)
            stack.enter_context(hold_lock(path.with_name(f".{path.name}.lock")))
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        try:
            yield partial
            _sync(partial)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
