"""A folder that is replaced as a whole: written aside, synced, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.runs import hold_lock
from pipeline.core.store import make_folder, sync_folder


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `path` at the end of the block.

    An error in the block leaves what was there. A process that is killed leaves the old folder, or for a moment none,
    and beside it what it had written, which the next call removes.

    Raises:
        RunLocked: another process writes it.
        OSError: the disk does not take it.
    """
    make_folder(path.parent)
    partial, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "old"))
    with hold_lock(path.with_name(f".{path.name}.lock")):
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
