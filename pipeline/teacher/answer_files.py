"""Parquet files of answers, written in bounded memory: invisible until one rename, which comes after their bytes."""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.store import sync_folder
from pipeline.teacher.folded import GROUP_BYTES, GROUP_ROWS

COMPRESSION_LEVEL: Final = 3


class NewFile:
    """A file that is being written; see `new_file`.

    Attributes:
        rows: rows added so far.
    """

    def __init__(self, sink: BufferedRandom, path: Path, schema: pa.Schema) -> None:
        self._sink, self._path, self._schema = sink, path, schema
        names = [field.name for field in schema if field.type != pa.binary()]  # a body is like no other
        self._writer = pq.ParquetWriter(
            sink,
            schema,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=COMPRESSION_LEVEL,
            use_dictionary=names,
            write_page_checksum=True,
        )
        self._group: list[Sequence[object]] = []
        self._bytes = 0
        self.rows = 0

    def add(self, row: Sequence[object], size: int) -> None:
        """Add a row, its values in the order of the schema, whose body has `size` bytes."""
        self._group.append(row)
        self._bytes += size
        self.rows += 1
        if len(self._group) == GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._group:
            return
        columns = zip(*self._group, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pa.table(arrays, schema=self._schema))
        self._group, self._bytes = [], 0

    def publish(self, name: str | None = None, facts: Mapping[str, str] | None = None) -> Path:
        """Finish the file and make it visible, so that it survives a power loss.

        Args:
            name: its name; None: `<sha256 of the file>.parquet`. A file of that name is replaced.
            facts: metadata for its footer.
        """
        self._flush()
        if facts is not None:
            self._writer.add_key_value_metadata(dict(facts))
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.seek(0)
        digest = hashlib.file_digest(self._sink, "sha256").hexdigest()
        place = self._path.with_name(name or f"{digest}.parquet")
        self._path.replace(place)
        sync_folder(place.parent)
        return place

    def close(self) -> None:
        """Let go of a file that was not published; whatever fails now, it will be removed."""
        with suppress(OSError, pa.ArrowException):
            self._writer.close()


@contextmanager
def new_file(folder: Path, schema: pa.Schema, mode: int = 0o600) -> Iterator[NewFile]:
    """A file in `folder` for the block; what was not published at its end is removed.

    It is locked while it is written, so that whoever folds answers does not take it for what a killed process left.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w+b") as sink:
            fcntl.flock(sink, fcntl.LOCK_EX)
            file = NewFile(sink, path, schema)
            try:
                yield file
            finally:
                file.close()
    finally:
        path.unlink(missing_ok=True)
