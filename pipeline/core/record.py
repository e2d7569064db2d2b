"""Rows: their Arrow schemas, their dataclasses, and the only way to read and write them. Column names live here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.columns import field_values, values_of
from pipeline.core.content import ContentDigest
from pipeline.core.errors import DISK_ERRORS, CorruptArtefact

SHARD_ROWS = 8192
"""Rows per shard between stages: the unit of memory, scheduling and recovery."""

TOOL_CALL = pa.struct(
    [
        pa.field("id", pa.string()),
        pa.field("type", pa.string(), nullable=False),
        pa.field(
            "function",
            pa.struct([pa.field("name", pa.string(), nullable=False), pa.field("arguments", pa.string())]),
            nullable=False,
        ),
    ]
)
MESSAGE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("reasoning_content", pa.string()),
        pa.field("tool_calls", pa.list_(pa.field("item", TOOL_CALL, nullable=False))),
        pa.field("tool_call_id", pa.string()),
        pa.field("name", pa.string()),
    ]
)
OPTIONAL_OF_MESSAGE = ("reasoning_content", "tool_calls", "tool_call_id", "name")
"""Fields of a message that most rows do not use: the data set leaves out those that none does."""
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
        pa.field("tools", pa.string()),
    ]
)
"""Rows of stage `prompts`, sorted by (prompt_set, prompt_id). `also_in` names the other prompt sets that held the same
prompt, sorted; `license_set` is the licences of all of them, sorted. `tools` is the canonical JSON of a list of
function definitions in OpenAI's form; null: the prompt offers none."""

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
        pa.field("tools", pa.string()),
        pa.field("returned_model", pa.string()),
        pa.field("fingerprint", pa.string()),
    ]
)
"""Rows from `generate` on, in the order of (prompt_set, prompt_id, sample); `dataset` orders anew. Token counts are
the teacher's, null where it gave none. `verified` is null where nothing was compared. `flags`: what was done to the
text (`sanitized`: a lone surrogate became U+FFFD; `nul`: it holds NUL; `redacted`: see text/outbound.py).
`returned_model` and `fingerprint` name what answered in the provider's words; null where it does not say."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant's turn calls.

    Attributes:
        name: of the function.
        arguments: JSON text, as the model wrote it (it need not be valid).
        id: by which the tool's answer refers to it.
    """

    name: str
    arguments: str
    id: str | None = None


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Message:
    """One turn of a conversation.

    Attributes:
        reasoning_content: the thinking before an assistant's text.
        tool_calls: what an assistant's turn calls; empty: nothing.
        tool_call_id: the call that a turn of role `tool` answers.
        name: of the participant or the tool.
    """

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
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
    tools: str | None = None


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
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
    tools: str | None = None
    returned_model: str | None = None
    fingerprint: str | None = None


def rejects_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of rejected rows: the same columns and the `reason` they left with."""
    return schema.append(pa.field("reason", pa.string(), nullable=False))


def to_table(schema: pa.Schema, rows: Sequence[Prompt] | Sequence[Record], reasons: Sequence[str] = ()) -> pa.Table:
    """Rows as a table of `schema`, with a `reason` column when `reasons` are given (one a row).

    Raises:
        ValueError: a required value is None, or a row has other fields than the schema.
    """
    columns: dict[str, list[Any]] = {
        name: [_message_dicts(getattr(row, name)) for row in rows]
        if schema.field(name).type == MESSAGES
        else [getattr(row, name) for row in rows]
        for name in _names(schema)
    }
    if "reason" in schema.names:
        columns["reason"] = list(reasons)
    table = pa.table(columns, schema=schema)
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"column {field.name!r} has a null, which its schema forbids")
    return table


def _names(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if name != "reason"]


def _message_dicts(messages: Sequence[Message] | None) -> list[dict[str, Any]] | None:
    """None stays None: which columns may hold it is checked for all at once."""
    return None if messages is None else [message_dict(message) for message in messages]


def message_dict(message: Message) -> dict[str, Any]:
    """A message as the JSON object that APIs and chat templates take; an absent field is left out."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [_tool_call_dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _tool_call_dict(call: ToolCall) -> dict[str, Any]:
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def message_of(plain: Mapping[str, Any]) -> Message:
    """The message of an object as `message_dict` gives it or Arrow reads it; fields that are null are absent."""
    calls = plain.get("tool_calls")
    return Message(
        plain["role"],
        plain["content"],
        plain.get("reasoning_content"),
        () if calls is None else tuple(_tool_call_of(call) for call in calls),
        plain.get("tool_call_id"),
        plain.get("name"),
    )


def _tool_call_of(plain: Mapping[str, Any]) -> ToolCall:
    function = plain["function"]
    return ToolCall(function["name"], function["arguments"], plain.get("id"))


def prompts_of(table: pa.Table) -> list[Prompt]:
    """The rows of a table of `PROMPT_SCHEMA`."""
    return [*map(Prompt, *_columns(table, Prompt))]


def records_of(table: pa.Table) -> list[Record]:
    """The rows of a table of `RECORD_SCHEMA` (a `reason` column is left out)."""
    return [*map(Record, *_columns(table, Record))]


def _columns(table: pa.Table, kind: type[Prompt] | type[Record]) -> list[list[Any]]:
    return [values_of(table[field.name], _messages_of) for field in fields(kind)]


def _messages_of(structs: pa.StructArray) -> list[Message]:
    values = {name: field_values(structs, name) for name in MESSAGE.names}
    calls = values.pop("tool_calls")
    if isinstance(calls, list):
        values["tool_calls"] = [tuple(map(_tool_call_of, some or ())) for some in calls]
    columns = [values.get(name, repeat(())) for name in MESSAGE.names]
    return [*map(Message, *columns)]


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
