"""A file of answers: what it is made of, and how a foreign one is read, which may be damaged or made to do harm."""

import hashlib
import json
import resource
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import CorruptArtefact, UsageError, disk_errors
from pipeline.teacher.folded import GROUP_BYTES, GROUP_ROWS
from pipeline.teacher.responses import ANSWER_SCHEMA, outcome_of
from pipeline.teacher.segment import Stored
from pipeline.teacher.transport import LARGEST_BODY_BYTES
from pipeline.teacher.walk import Check

FORMAT: Final = "1"
FACTS: Final = "pipeline.answers"
"""Name of the entry in the footer: a JSON object with `format`, `answers`, `requests`, `rejected` and `content`."""
MAGIC: Final = b"PAR1"
NAMES_BYTES: Final = 4096
"""Longest text in a row: the name of a model, a format, a reason."""
MOST_FOOTER_BYTES: Final = 64 * 1024 * 1024
MOST_GROUP_BYTES: Final = 2 * GROUP_BYTES + LARGEST_BODY_BYTES
"""What the footer may say of a row group; what it says need not be true."""
MEMORY_BYTES: Final = 1024 * 1024 * 1024
"""Address space that reading a foreign file may take beside what we have: a page of zeros is small in the file."""
BATCH_ROWS: Final = 32


def _plain(field: pa.Field) -> pa.Field:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def carried_schema() -> pa.Schema:
    """The columns of a file of answers."""
    return pa.schema([*map(_plain, ANSWER_SCHEMA), pa.field("sha256", pa.binary(32))])


def row_sha256(stored: Stored) -> bytes:
    """sha256 over a row: a JSON list of [name, value] pairs, a line feed, the body. What is null is left out, so that
    a column that comes later changes no older row's."""
    values = {name: getattr(stored, name) for name in ANSWER_SCHEMA.names if name not in ("key", "body")}
    facts = [["key", stored.key.hex()], *([name, value] for name, value in sorted(values.items()) if value is not None)]
    return hashlib.sha256(json.dumps(facts).encode() + b"\n" + stored.body).digest()


LATEST_MS = 253_402_300_799_999
"""The end of the year 9999, in Unix milliseconds: the last that Python's calendar knows."""
MOST_OF_A_KEY = 1000
"""Answers to one request that a file may hold: all of them are in memory at a time."""


class Counts:
    """What a file of answers holds, row by row."""

    def __init__(self) -> None:
        self.answers = self.requests = self.unreadable = 0
        self.rejected: Counter[str] = Counter()
        self._last: bytes | None = None

    def add(self, stored: Stored) -> bool:
        """Count a row; False if it is not understood as an answer."""
        outcome = outcome_of(stored)
        if outcome is None:
            self.unreadable += 1
            return False
        if outcome.rejected is None:
            self.answers += 1
        else:
            self.rejected[outcome.rejected] += 1
        self.requests += stored.key != self._last
        self._last = stored.key
        return True

    def facts(self, content: str) -> dict[str, object]:
        """The entry in the footer."""
        rejected = dict(sorted(self.rejected.items()))
        counts = {"answers": self.answers, "rejected": rejected, "requests": self.requests}
        return {"format": FORMAT, "content": content, **counts}


def _damaged(path: Path, why: str) -> CorruptArtefact:
    todo = "fetch the file again from where it came; nothing was imported"
    return CorruptArtefact(f"a damaged file of answers: {why}", where=str(path), todo=todo)


def _foreign(path: Path, what: str) -> UsageError:
    return UsageError(what, where=str(path), todo="give a file that `responses export` wrote")


def read_facts(path: Path) -> dict[str, object]:
    """The entry in the footer of a file of answers.

    Raises:
        UsageError, CorruptArtefact: as `import_answers`.
    """
    with disk_errors(str(path), "give read access, then run the same command again"):
        _check_ends(path)
    try:
        with _little_memory(path), _opened(path) as file:
            raw = (file.metadata.metadata or {}).get(FACTS.encode())
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, "its footer cannot be read") from error
    if raw is None:
        raise _foreign(path, "a parquet file, but not of answers")
    try:
        facts = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its footer is no JSON") from error
    if not isinstance(facts, dict):
        raise _damaged(path, "its footer is no JSON object")
    if facts.get("format") != FORMAT:
        what = f"a file of answers of format {str(facts.get('format'))[:20]}; this version reads {FORMAT}"
        raise UsageError(what, where=str(path), todo="use the version of this program that wrote it, or a later one")
    return facts


def _check_ends(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _foreign(path, "not a file")
        with path.open("rb") as file:
            start = file.read(4)
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            end = file.read(8)
    except FileNotFoundError as error:
        raise UsageError("no such file", where=str(path), todo="correct the path") from error
    if start != MAGIC:
        raise _foreign(path, "not a parquet file" if size > 0 else "the file is empty")
    if size < 12 or end[4:] != MAGIC:
        raise _damaged(path, "it ends in the middle")
    footer = int.from_bytes(end[:4], "little")
    if footer > min(size - 12, MOST_FOOTER_BYTES):
        raise _damaged(path, f"its footer has {footer:,} bytes")


def _opened(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(
        path,
        page_checksum_verification=True,
        thrift_string_size_limit=MOST_FOOTER_BYTES,
        thrift_container_size_limit=1_000_000,
    )


class Reader:
    """The answers of a file, each compared with its sha256 and parsed; memory is bounded whatever the file says.

    Attributes:
        rows: rows read so far.
        counts: what they are.
    """

    def __init__(self, path: Path, facts: dict[str, object]) -> None:
        self._path, self._facts = path, facts
        self._content = hashlib.sha256()
        self._last = (b"", 0)
        self._of_key = 0
        self.rows = 0
        self.counts = Counts()

    def answers(self, check: Check) -> Iterator[Stored]:
        """Sorted by (key, time).

        Raises:
            CorruptArtefact: it is damaged.
        """
        for row in self._raw_rows():
            check()
            self.rows += 1
            yield self._checked(row)

    def _raw_rows(self) -> Iterator[dict[str, object]]:
        try:
            with self._open() as file:
                for group in range(file.num_row_groups):
                    said = file.metadata.row_group(group)
                    if said.num_rows > GROUP_ROWS or said.total_byte_size > MOST_GROUP_BYTES:
                        raise _damaged(self._path, f"row group {group} is too large")
                    batches = file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False)
                    while rows := self._next(batches):
                        yield from rows
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise _damaged(self._path, str(error).partition("\n")[0]) from error

    def _open(self) -> pq.ParquetFile:
        with _little_memory(self._path):
            file = _opened(self._path)
            if file.schema_arrow.equals(carried_schema()):
                return file
        raise _damaged(self._path, "its columns are not those of answers")

    def _next(self, batches: Iterator[pa.RecordBatch]) -> list[dict[str, object]]:
        with _little_memory(self._path):
            batch = next(batches, None)
            return [] if batch is None else batch.to_pylist()

    def _checked(self, row: dict[str, object]) -> Stored:
        sha256 = row.pop("sha256")
        if any(row[name] is None for name in ANSWER_SCHEMA.names if name not in ("rejected", "room")):
            raise self._wrong("a value is missing")
        stored = Stored(**row)  # type: ignore[arg-type]
        names = (stored.teacher, stored.model, stored.engine, stored.wire, stored.rejected or "")
        if len(stored.body) > LARGEST_BODY_BYTES or max(map(len, names)) > NAMES_BYTES:
            raise self._wrong("it is larger than any answer")
        if not 0 <= stored.stored_ms <= LATEST_MS or stored.cap < 1 or (stored.room is not None and stored.room < 1):
            raise self._wrong("its time or cap is none")
        self._of_key = self._of_key + 1 if stored.key == self._last[0] else 1
        if self._of_key > MOST_OF_A_KEY:
            raise self._wrong(f"it is one of more than {MOST_OF_A_KEY:,} answers to one request")
        if row_sha256(stored) != sha256:
            raise self._wrong("its sha256 differs")
        if (stored.key, stored.stored_ms) < self._last:
            raise self._wrong("it is not in the order of the keys")
        if not self.counts.add(stored):
            raise self._wrong("its body is not understood as an answer")
        self._last = stored.key, stored.stored_ms
        self._content.update(row_sha256(stored))
        return stored

    def _wrong(self, why: str) -> CorruptArtefact:
        return _damaged(self._path, f"row {self.rows:,}: {why}")

    def check_end(self) -> None:
        """Compare what was read with what the footer says.

        Raises:
            CorruptArtefact: rows are missing, or there are others.
        """
        if self.counts.facts(self._content.hexdigest()) != self._facts:
            raise _damaged(self._path, f"its {self.rows:,} rows are not those that its footer counts")


@contextmanager
def _little_memory(path: Path) -> Iterator[None]:
    """Let this process grow by no more than `MEMORY_BYTES` in the block: what a page of a parquet file becomes in
    memory is known only when it is there. Without effect where the system does not say how large a process is.

    Raises:
        CorruptArtefact: it would have grown beyond.
    """
    pa.allocate_buffer(1)  # Arrow's pool reserves its address space at first use, whatever it needs
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:
        yield
        return
    limits = [pages * resource.getpagesize() + MEMORY_BYTES, soft, hard]
    least = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    try:
        yield
    except MemoryError as error:
        raise _damaged(path, f"reading it takes more than {MEMORY_BYTES:,} bytes of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
