"""Folded files of the response store: parquet sorted by request key, named by the sha256 of the file."""

import fcntl
import hashlib
import os
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import DISK_ERRORS, CorruptArtefact
from pipeline.core.store import sync_folder
from pipeline.teacher.segment import Stored

GROUP_ROWS: Final = 1024
"""Rows per row group: the least that is read to find one answer."""
GROUP_BYTES: Final = 16 * 1024 * 1024
"""Bodies per row group, beside `GROUP_ROWS`: what is in memory at a time, when writing and when reading."""


def find_answers(path: Path, keys: list[bytes]) -> Iterator[Stored]:
    """The answers to `keys` (sorted) in one folded file; row groups that cannot hold any are not read."""
    value_set = pa.array(keys, pa.binary(32))
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                if not _may_hold(file.metadata.row_group(group).column(0).statistics, keys):
                    continue
                mask = pc.is_in(file.read_row_group(group, columns=["key"])["key"], value_set=value_set)
                if pc.any(mask).as_py():
                    for row in file.read_row_group(group).filter(mask).to_pylist():
                        yield Stored(**row)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise  # the disk fails; what is on it may well be sound
        raise damaged_file(path, str(error)) from error


def damaged_file(path: Path, why: str) -> CorruptArtefact:
    todo = "put a sound copy in its place, or move it away: what only it held is then asked for again"
    return CorruptArtefact(f"a file of stored answers is damaged: {why}", where=str(path), todo=todo)


def _may_hold(statistics: pq.Statistics | None, keys: list[bytes]) -> bool:
    if statistics is None or not statistics.has_min_max:
        return True
    first = bisect_left(keys, statistics.min)
    return first < len(keys) and keys[first] <= statistics.max


def write_folded(folder: Path, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> int:
    """Write sorted rows as `<sha256>.parquet` by fsync and rename; no rows write no file. Returns the row count."""
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    groups = _groups(rows, schema.get_field_index("body"))
    first = next(groups, None)
    if first is None:
        return 0
    try:
        return _write_sorted(folder, temporary, schema, chain([first], groups))
    finally:
        temporary.unlink(missing_ok=True)


def _groups(rows: Iterable[Sequence[Any]], body_at: int) -> Iterator[list[Sequence[Any]]]:
    """Rows as row groups: `GROUP_ROWS`, or fewer where their bodies, if they have some, are long (with logprobs they
    are)."""
    group: list[Sequence[Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row[body_at]) if body_at >= 0 else 0
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_sorted(folder: Path, temporary: Path, schema: pa.Schema, groups: Iterable[list[Sequence[Any]]]) -> int:
    count = 0
    with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b") as sink:
        fcntl.flock(sink, fcntl.LOCK_EX)
        with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
            for group in groups:
                columns = [
                    pa.array(column, field.type) for column, field in zip(zip(*group, strict=True), schema, strict=True)
                ]
                writer.write_table(pa.table(columns, schema=schema))
                count += len(group)
        sink.flush()
        os.fsync(sink.fileno())
        sink.seek(0)
        digest = hashlib.file_digest(sink, "sha256").hexdigest()
        temporary.replace(folder / f"{digest}.parquet")
    sync_folder(folder)
    return count
