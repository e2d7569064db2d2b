"""Rows are read column by column as they were row by row, whatever is null, empty, sliced or in several chunks."""

from dataclasses import fields
from typing import Any

import pyarrow as pa
import pytest

from pipeline.core.columns import field_values, values_of
from pipeline.core.record import (
    PROMPT_SCHEMA,
    RECORD_SCHEMA,
    Message,
    Prompt,
    Record,
    ToolCall,
    message_of,
    prompts_of,
    records_of,
    to_table,
)
from tests.support import a_prompt, a_record

CALL = ToolCall("look_up", '{"word": "été"}', "call-1")
TURNS = (
    Message("system", "Be brief."),
    Message("user", "Which?", name="ann"),
    Message("assistant", "", "thinking", (CALL, ToolCall("count", "{}"))),
    Message("tool", "summer", tool_call_id="call-1"),
)
PROMPTS = [
    a_prompt(prompt_id="a"),
    a_prompt(prompt_id="b", prompt=TURNS, also_in=("x", "y"), tools="[]", answer="5", task="t"),
    a_prompt(prompt_id="c", prompt=(), license_set=()),
    a_prompt(prompt_id="d", prompt=TURNS[:2], also_in=("z",)),
]
RECORDS = [
    a_record(row_id="a"),
    a_record(row_id="b", prompt=TURNS, completion=(), flags=("nul", "sanitized"), verified=True, prompt_tokens=None),
    a_record(row_id="c", completion=(TURNS[2],), returned_model="m-1", fingerprint="fp"),
]


def row_by_row(table: pa.Table, kind: type[Any]) -> list[Any]:
    """What a table holds, read in the plainest way."""
    rows = []
    for row in table.to_pylist():
        values = {field.name: row[field.name] for field in fields(kind)}
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(message_of(item) if isinstance(item, dict) else item for item in value)
        rows.append(kind(**values))
    return rows


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("count", [0, 1, 2, 4])
class TestRows:
    def test_prompts(self, start: int, count: int) -> None:
        table = to_table(PROMPT_SCHEMA, PROMPTS).slice(start, count)
        assert prompts_of(table) == row_by_row(table, Prompt) == PROMPTS[start : start + count]

    def test_records(self, start: int, count: int) -> None:
        table = to_table(RECORD_SCHEMA, RECORDS).slice(start, count)
        assert records_of(table) == row_by_row(table, Record) == RECORDS[start : start + count]

    def test_several_chunks(self, start: int, count: int) -> None:
        whole = to_table(PROMPT_SCHEMA, PROMPTS)
        table = pa.concat_tables([whole.slice(start, count), whole, whole.slice(1, 0), whole.slice(2)])
        assert prompts_of(table) == row_by_row(table, Prompt)

    def test_filtered_rows(self, start: int, count: int) -> None:
        table = to_table(PROMPT_SCHEMA, PROMPTS)
        kept = table.filter(pa.array([start <= at < start + count for at in range(len(PROMPTS))]))
        assert prompts_of(kept) == PROMPTS[start : start + count]


def test_lists_that_are_null_are_none() -> None:
    column = pa.chunked_array([pa.array([["a"], None, [], ["b", "c"]], pa.list_(pa.string()))])
    assert values_of(column, list) == [("a",), None, (), ("b", "c")]


def test_a_field_that_is_null_in_all_structs_is_as_long_as_the_others() -> None:
    structs = pa.array([{"a": 1, "b": None}, {"a": 2, "b": None}], pa.struct([("a", pa.int64()), ("b", pa.string())]))
    assert [*field_values(structs, "b")] == [None, None]
    assert [*field_values(structs.slice(1), "a")] == [2]
