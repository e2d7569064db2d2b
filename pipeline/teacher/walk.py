"""Every stored answer once, in the order of its key, whichever files of the response store hold it.

Answers are streamed, some per file at a time, so that memory does not grow with the store. Nothing is written.
Not covered: more folded files than a process may open at once; it is said what to do.
"""

import errno
import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DISK_ERRORS, CorruptArtefact, Incomplete, disk_errors
from pipeline.core.lineage import file_sha256
from pipeline.teacher.segment import Stored, read_answers, segment_paths

BATCH_ROWS: Final = 32
"""Answers in memory at a time, for each folded file."""
BUFFER_BYTES: Final = 64 * 1024
SALVAGE: Final = "start a run in this data folder: what is intact in the file is kept, the rest is asked for again"
REPLACE: Final = "put a sound copy in its place, or move it away: what only it held is then asked for again"

Check = Callable[[], None]


def never() -> None:
    """The check of somebody who cannot be interrupted."""


class Found(NamedTuple):
    """A stored answer and the file that holds it."""

    stored: Stored
    source: Path


def answers_by_key(folder: Path, check: Check = never) -> Iterator[tuple[bytes, list[Found]]]:
    """Every key with its answers, sorted by key; of a key the oldest first, and each once, however many files hold it.

    Args:
        folder: `data/responses`; it may be missing.
        check: called between keys; what it raises ends the iteration.

    Raises:
        CorruptArtefact: a file is damaged.
        Incomplete: the disk fails, a file disappears meanwhile, or there are too many to open.
    """
    with readable(folder):
        # Segments are opened before folded files are listed: what is folded in between is then found in both.
        streams = [_opened(_of_segment(path)) for path in segment_paths(folder / "segments")]
        streams += [_of_folded(path) for path in folded_files(folder)]
        merged = heapq.merge(*streams, key=lambda found: (found.stored.key, found.stored.stored_ms))
        for key, group in groupby(merged, key=lambda found: found.stored.key):
            check()
            yield key, sorted({found.stored: found for found in group}.values(), key=_age)


def _age(found: Found) -> tuple[int, int, bytes]:
    return found.stored.stored_ms, found.stored.cap, found.stored.body


def folded_files(folder: Path) -> list[Path]:
    """The folded files with answers, sorted."""
    return sorted((folder / "answers").glob("*.parquet"))


def read_folded(path: Path) -> Iterator[Stored]:
    """The answers of a folded file, sorted by (key, time).

    Raises:
        CorruptArtefact: it is damaged: its sha256 is not its name, or it cannot be read.
        OSError: the disk fails, or the file is gone.
    """
    with folded_errors(path), pq.ParquetFile(path, buffer_size=BUFFER_BYTES, page_checksum_verification=True) as file:
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            yield from (Stored(**row) for row in batch.to_pylist())


@contextmanager
def folded_errors(path: Path) -> Iterator[None]:
    """Check that a folded file is as it was written, and name what is wrong with it if the block cannot read it.

    Raises:
        CorruptArtefact: it is damaged: its sha256 is not its name, or it cannot be read.
        OSError: the disk fails, or the file is gone.
    """
    if file_sha256(path) != path.stem:
        raise _damaged(path, "its sha256 is not its name", REPLACE)
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in {*DISK_ERRORS, errno.ENOENT, errno.EMFILE}:
            raise  # not the file's fault
        raise _damaged(path, str(error), REPLACE) from error


def _of_folded(path: Path) -> Iterator[Found]:
    return (Found(stored, path) for stored in read_folded(path))


def _of_segment(path: Path) -> Iterator[Found]:
    try:
        for stored in read_answers(path):
            yield Found(stored, path)
    except CorruptArtefact as error:
        raise CorruptArtefact(error.what, where=error.where, todo=SALVAGE) from error


def _opened(stream: Iterator[Found]) -> Iterator[Found]:
    return chain([*_first(stream)], stream)


def _first(stream: Iterator[Found]) -> Iterator[Found]:
    for found in stream:
        yield found
        return


def _damaged(path: Path, why: str, todo: str) -> CorruptArtefact:
    return CorruptArtefact(f"a file of stored answers is damaged: {why}", where=str(path), todo=todo)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn what the disk says while the store is read into an error for a person.

    Raises:
        Incomplete: the disk fails, a file disappears, or there are too many to open.
    """
    todo = "see to the disk or give read access, then run the same command again"
    try:
        with disk_errors(str(folder), todo):
            yield
    except FileNotFoundError as error:
        what, todo = "a file of stored answers was removed while it was being read", "run the same command again"
        raise Incomplete(what, where=str(error.filename or folder), todo=todo) from error
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        todo = "let the shell open more (ulimit -n 65536), then run the same command again"
        raise Incomplete("too many files of stored answers to open at once", where=str(folder), todo=todo) from error
