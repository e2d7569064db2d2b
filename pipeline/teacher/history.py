"""What the response store knows of one request: when it was sent, how that ended, which answers are stored."""

import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.columns import one_binary
from pipeline.teacher.audit import has_tables, reading
from pipeline.teacher.segment import attempt_columns, segment_paths

ANSWER_COLUMNS = ("stored_ms", "cap", "model", "engine", "status", "rejected")
SENT_COLUMNS = (
    *("sent_ms", "cap", "outcome", "run", "teacher"),
    *("status", "input_tokens", "output_tokens", "reserved", "cost", "request_id"),
)


@dataclass(frozen=True, slots=True)
class Sent:
    """One attempt.

    Attributes:
        time: UTC, ISO 8601.
        cap: `max_tokens` it was asked with.
        outcome: "answer", "reject", "retry:<class>" or "abort"; None: unknown, since the process died before.
        run, teacher, status, input_tokens, output_tokens, reserved, cost, request_id: as in `segment.Attempt`.
    """

    time: str
    cap: int
    outcome: str | None
    run: str | None = None
    teacher: str | None = None
    status: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    reserved: int | None = None
    cost: int | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """One stored answer.

    Attributes:
        time: UTC, ISO 8601.
        cap: `max_tokens` it was asked with.
        model: name of the model as the endpoint was asked for it.
        engine: the server and its version, where known.
        status: HTTP status.
        rejected: reason for which the row is refused, where the body alone does not tell; else None.
    """

    time: str
    cap: int
    model: str
    engine: str
    status: int
    rejected: str | None


def attempts_of(folder: Path, key: bytes) -> tuple[Sent, ...]:
    """The attempts at a request, in order of time. Damaged files are passed over: `verify` names them."""
    rows = sorted(_rows(folder, "attempts", SENT_COLUMNS, key), key=lambda row: row[0])
    return tuple(Sent(_utc(sent), *rest) for sent, *rest in rows)


def answers_of(folder: Path, key: bytes) -> tuple[Received, ...]:
    """The stored answers to a request, in order of time. Damaged files are passed over, as above."""
    rows = sorted(_rows(folder, "answers", ANSWER_COLUMNS, key), key=lambda row: row[0])
    return tuple(Received(_utc(stored), *rest) for stored, *rest in rows)


def _rows(folder: Path, table: str, columns: tuple[str, ...], key: bytes) -> Iterator[tuple[Any, ...]]:
    """The rows of a key in all files of a table; row groups that cannot hold it are not read."""
    for path in segment_paths(folder / "segments"):
        with suppress(sqlite3.Error), reading(path) as db:
            if has_tables(db):
                selected = ", ".join(columns) if table == "answers" else attempt_columns(db, columns)
                yield from db.execute(f"SELECT {selected} FROM {table} WHERE key = ?", (key,))
    is_it = pc.field("key") == one_binary(key)
    for path in sorted((folder / table).glob("*.parquet")):
        with suppress(OSError, pa.ArrowException):
            there = {*pq.read_schema(path).names}  # older files of attempts lack some
            found = pq.read_table(path, columns=[name for name in columns if name in there], filters=is_it)
            yield from (tuple(map(row.get, columns)) for row in found.to_pylist())


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
