"""Rows: their Arrow schemas, their dataclasses, and the only way to read and write them. Column names live here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.content import ContentDigest
from pipeline.core.errors import DISK_ERRORS, CorruptArtefact

SHARD_ROWS = 8192
"""Rows per shard between stages: the unit of memory, scheduling and recovery."""

MESSAGE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("reasoning_content", pa.string()),
    ]
)
MESSAGES = pa.list_(pa.field("item", MESSAGE, nullable=False))
STRINGS = pa.list_(pa.field("item", pa.string(), nullable=False))


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


PROMPT_SCHEMA = pa.schema(
    [
        _required("prompt_set", pa.string()),
        _required("prompt_id", pa.string()),
        _required("split", pa.string()),
        _required("group_id", pa.string()),
        pa.field("task", pa.string()),
        _required("prompt", MESSAGES),
        pa.field("answer", pa.string()),
        _required("also_in", STRINGS),
        _required("license_set", STRINGS),
    ]
)
"""Rows of stage `prompts`, sorted by (prompt_set, prompt_id). `also_in` names the other prompt sets that held the same
prompt, sorted; `license_set` is the licences of all of them, sorted."""

RECORD_SCHEMA = pa.schema(
    [
        _required("row_id", pa.string()),
        _required("prompt_set", pa.string()),
        _required("prompt_id", pa.string()),
        _required("sample", pa.int32()),
        _required("split", pa.string()),
        pa.field("task", pa.string()),
        _required("prompt", MESSAGES),
        _required("completion", MESSAGES),
        pa.field("answer", pa.string()),
        _required("also_in", STRINGS),
        _required("teacher", pa.string()),
        _required("license_set", STRINGS),
        _required("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("verified", pa.bool_()),
        _required("flags", STRINGS),
    ]
)
"""Rows from `generate` on, in the order of (prompt_set, prompt_id, sample); `dataset` orders anew. Token counts are
the teacher's, null where it gave none. `verified` is null where nothing was compared. `flags`: what was done to the
text (`sanitized`: a lone surrogate became U+FFFD; `nul`: it holds NUL; `redacted`: see text/outbound.py)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    reasoning_content: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of `PROMPT_SCHEMA`."""

    prompt_set: str
    prompt_id: str
    split: str
    group_id: str
    task: str | None
    prompt: tuple[Message, ...]
    answer: str | None
    also_in: tuple[str, ...]
    license_set: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One row of `RECORD_SCHEMA`."""

    row_id: str
    prompt_set: str
    prompt_id: str
    sample: int
    split: str
    task: str | None
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    answer: str | None
    also_in: tuple[str, ...]
    teacher: str
    license_set: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    verified: bool | None
    flags: tuple[str, ...]


def rejects_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of rejected rows: the same columns and the `reason` they left with."""
    return schema.append(pa.field("reason", pa.string(), nullable=False))


def to_table(schema: pa.Schema, rows: Sequence[Prompt] | Sequence[Record], reasons: Sequence[str] = ()) -> pa.Table:
    """Rows as a table of `schema`, with a `reason` column when `reasons` are given (one a row).

    Raises:
        ValueError: a required value is None, or a row has other fields than the schema.
    """
    columns: dict[str, list[Any]] = {name: [_plain(getattr(row, name)) for row in rows] for name in _names(schema)}
    if "reason" in schema.names:
        columns["reason"] = list(reasons)
    table = pa.table(columns, schema=schema)
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"column {field.name!r} has a null, which its schema forbids")
    return table


def _names(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if name != "reason"]


def _plain(value: Any) -> Any:
    """Message tuples as dicts, everything else as it is."""
    if isinstance(value, tuple) and value and isinstance(value[0], Message):
        return [message_dict(message) for message in value]
    return value


def message_dict(message: Message) -> dict[str, str]:
    """A message as the JSON object that APIs and chat templates take; an absent field is left out."""
    plain = {"role": message.role, "content": message.content}
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    return plain


def prompts_of(table: pa.Table) -> list[Prompt]:
    """The rows of a table of `PROMPT_SCHEMA`."""
    return [Prompt(**_typed(row, Prompt)) for row in table.to_pylist()]


def records_of(table: pa.Table) -> list[Record]:
    """The rows of a table of `RECORD_SCHEMA` (a `reason` column is left out)."""
    return [Record(**_typed(row, Record)) for row in table.to_pylist()]


def _typed(row: dict[str, Any], kind: type[Prompt] | type[Record]) -> dict[str, Any]:
    values = {field.name: row[field.name] for field in fields(kind)}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(Message(**item) if isinstance(item, dict) else item for item in value)
    return values


# ------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True, slots=True)
class Written:
    """What a `ShardWriter` wrote: rows, content digest (64 hex digits), files in order."""

    rows: int
    content: str
    files: tuple[Path, ...]


class ShardWriter:
    """Writes rows into `folder/part-00000.parquet`, … (zstd, page checksums), `shard_rows` a file, as they come.

    Use it as a context manager; `written()` after the block. No rows at all still write one empty shard, so that a
    reader finds the schema. Files are not synced: the store does that when it commits.
    """

    def __init__(self, folder: Path, schema: pa.Schema, *, shard_rows: int = SHARD_ROWS, stem: str = "part") -> None:
        self._folder, self._schema, self._shard_rows, self._stem = folder, schema, shard_rows, stem
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._rows = 0
        self._files: list[Path] = []
        self._digest = ContentDigest(schema)
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._flush(whole=False)

    def write(self, table: pa.Table) -> None:
        """Add rows; the table must have exactly the writer's columns."""
        table = table.cast(self._schema)
        self._digest.update(table)
        self._pending.append(table)
        self._pending_rows += table.num_rows
        self._rows += table.num_rows
        if self._pending_rows >= self._shard_rows:
            self._flush(whole=True)

    def written(self) -> Written:
        """What was written; valid after the `with` block."""
        return Written(self._rows, self._digest.hexdigest(), tuple(self._files))

    def _flush(self, *, whole: bool) -> None:
        """Write the pending rows: only full shards, or everything at the end."""
        table = pa.concat_tables(self._pending) if self._pending else self._schema.empty_table()
        start = 0
        while table.num_rows - start >= self._shard_rows:
            self._write_shard(table.slice(start, self._shard_rows))
            start += self._shard_rows
        rest = table.slice(start)
        if not whole and (rest.num_rows > 0 or not self._files):
            self._write_shard(rest)
            rest = self._schema.empty_table()
        self._pending, self._pending_rows = [rest], rest.num_rows

    def _write_shard(self, table: pa.Table) -> None:
        path = self._folder / f"{self._stem}-{len(self._files):05d}.parquet"
        write_parquet(table, path)
        self._files.append(path)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write one parquet file the way all of ours are written: zstd, page checksums, fixed options."""
    pq.write_table(
        table,
        path,
        compression="zstd",
        write_page_checksum=True,
        row_group_size=SHARD_ROWS,
        version="2.6",
        store_schema=True,
    )


def shard_paths(folder: Path, *, stem: str = "") -> list[Path]:
    """The shards of a folder whose names begin with `stem`, in the order of their names."""
    return sorted(folder.glob(f"{stem}*.parquet"))


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard; page checksums are verified.

    Raises:
        CorruptArtefact: the file is not readable parquet, or a page's checksum does not match.
    """
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise  # the disk fails; what is on it may well be sound
        todo = "run the pipeline again: it will be rebuilt"
        raise CorruptArtefact(f"unreadable parquet: {error}", where=str(path), todo=todo) from error


def read_shards(folder: Path, columns: Sequence[str] | None = None, *, stem: str = "") -> Iterator[pa.Table]:
    """The shards of a folder, one table a file, in order of their names.

    Raises:
        CorruptArtefact: as `read_shard`.
    """
    return (read_shard(path, columns) for path in shard_paths(folder, stem=stem))


def iter_records(folder: Path) -> Iterator[Record]:
    """All records of a folder of shards, one shard in memory at a time."""
    for table in read_shards(folder):
        yield from records_of(table)


def count_rows(paths: Iterable[Path]) -> int:
    """Rows in parquet files, from their footers."""
    return sum(pq.read_metadata(path).num_rows for path in paths)


def uncompressed_bytes(path: Path) -> int:
    """Size of a parquet file's values before compression, from its footer; equal texts count once a shard."""
    footer = pq.read_metadata(path)
    return sum(footer.row_group(at).total_byte_size for at in range(footer.num_row_groups))
