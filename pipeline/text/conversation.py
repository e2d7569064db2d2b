"""Conversations in Arrow columns, as plain Python values; much faster than a dict for every message."""

from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

Turn: TypeAlias = tuple[str, str, str | None]
"""Role, content, reasoning."""


def conversations(column: pa.ChunkedArray) -> list[list[Turn]]:
    """The conversations of a column of message lists (`core.record.MESSAGES`), one list a row."""
    array = column.combine_chunks()
    fields = dict(zip(array.type.value_type.names, array.flatten().flatten(), strict=True))
    turns = list(zip(*(fields[name].to_pylist() for name in ("role", "content", "reasoning_content")), strict=True))
    rows, start = [], 0
    for length in pc.list_value_length(array).to_pylist():
        rows.append(turns[start : start + length])
        start += length
    return rows


def calls_of(column: pa.ChunkedArray) -> list[list[str]]:
    """Names and arguments of the functions that each conversation of a column calls, one after the other."""
    calls = column.combine_chunks().flatten().field("tool_calls")
    if calls.null_count == len(calls):
        return [[] for _ in range(len(column))]
    return [
        [part for turn in turns for call in turn["tool_calls"] or () for part in call["function"].values()]
        for turns in column.to_pylist()
    ]


def completion_texts(column: pa.ChunkedArray) -> list[str]:
    """What the assistant said in each conversation of a column, without its reasoning; turns apart by a newline."""
    return ["\n".join(content for role, content, _ in turns if role == "assistant") for turns in conversations(column)]
