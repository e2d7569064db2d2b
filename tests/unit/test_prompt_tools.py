"""Prompts that offer tools or hold calls: what is read, what is refused, what makes two of them different."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import FilterConfig
from pipeline.core.config_outbound import OutboundConfig
from pipeline.core.record import RECORD_SCHEMA, Message, ToolCall, to_table
from pipeline.text.judge import judge
from pipeline.text.outbound import Guard
from tests.support import a_record
from tests.unit.test_dedup_stage import run as dedup
from tests.unit.test_prompts_stage import one_set, refusal, run, write_jsonl
from tests.unit.test_replay import replay, write

KEY = "gh" + "p_aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5"
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CANONICAL = json.dumps(TOOLS, sort_keys=True, separators=(",", ":"))
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":  "Oslo"}'}}
TALK = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "cold", "tool_call_id": "c1", "name": "weather"},
]


def prompts(tmp_path: Path, *rows: dict[str, Any], **columns: Any) -> Any:
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": str(number), **row} for number, row in enumerate(rows)])
    return run(tmp_path, one_set(path, columns={"tools": "tools", **columns}))


def refused(tmp_path: Path, row: dict[str, Any]) -> str:
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x", "tools": None, **row}])
    return refusal(tmp_path, one_set(path, columns={"tools": "tools"}))


class TestTools:
    @pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS, indent=2)])
    def test_a_list_and_its_json_text_are_the_same(self, tmp_path: Path, given: Any) -> None:
        _, (prompt,), _ = prompts(tmp_path, {"prompt": "x", "tools": given})
        assert prompt.tools == CANONICAL

    @pytest.mark.parametrize("given", [None, "", " ", []])
    def test_none_at_all_are_none(self, tmp_path: Path, given: Any) -> None:
        _, (prompt,), _ = prompts(tmp_path, {"prompt": "x", "tools": given})
        assert prompt.tools is None

    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ("{", "not JSON text"),
            ({"name": "f"}, "an object where a list of tools is needed"),
            ([FUNCTION], "no function definition"),
            ([{"type": "retrieval", "function": FUNCTION}], "no function definition"),
            ([{"type": "function", "function": {"name": "a b"}}], "'a b'"),
            ([{"type": "function", "function": {"name": "f", "parameters": "{}"}}], "a text"),
            ([{"type": "function", "function": {"name": "f", "code": "x"}}], "'code'"),
            ([*TOOLS, *TOOLS], "two tools are called 'weather'"),
        ],
    )
    def test_what_is_no_list_of_functions_is_refused_with_its_place(self, tmp_path: Path, given: Any, why: str) -> None:
        message = refused(tmp_path, {"tools": given})
        assert why in message and "p.jsonl:1" in message and len(message.splitlines()) == 3

    def test_equal_texts_with_other_tools_are_no_duplicates(self, tmp_path: Path) -> None:
        other = [{"type": "function", "function": {"name": "now"}}]
        rows = [{"prompt": "x", "tools": tools} for tools in (TOOLS, other, None, TOOLS)]
        _, kept, reasons = prompts(tmp_path, *rows)
        assert [prompt.prompt_id for prompt in kept] == ["0", "1", "2"]
        assert reasons == {"3": "duplicate_of:one/0"}
        (tmp_path / "again").mkdir()
        path = write_jsonl(tmp_path / "again" / "p.jsonl", rows[:3])
        _, named, _ = run(tmp_path / "again", one_set(path, columns={"id": None, "tools": "tools"}))
        assert len({prompt.prompt_id for prompt in named}) == 3


class TestCalls:
    def test_a_conversation_with_calls_is_read_to_the_letter_and_may_end_with_a_result(self, tmp_path: Path) -> None:
        _, (prompt,), _ = prompts(tmp_path, {"prompt": TALK, "tools": None})
        assert prompt.prompt == (
            Message("user", "Weather?"),
            Message("assistant", "", None, (ToolCall("weather", '{"city":  "Oslo"}', "c1"),)),
            Message("tool", "cold", tool_call_id="c1", name="weather"),
        )

    def test_arguments_that_are_an_object_become_text(self, tmp_path: Path) -> None:
        call = {"function": {"name": "f", "arguments": {"b": 1, "a": "ü"}}}
        talk = [*TALK[:1], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}]
        _, (prompt,), _ = prompts(tmp_path, {"prompt": talk, "tools": None})
        assert prompt.prompt[1].tool_calls == (ToolCall("f", '{"b":1,"a":"ü"}'),)

    @pytest.mark.parametrize(
        ("talk", "why"),
        [
            (TALK[:2], "the last message is the assistant's"),
            ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "a part in tool calls"),
            ([{"role": "user", "content": "x", "tool_call_id": "c"}], "a part in tool calls"),
            ([{"role": "assistant", "tool_calls": "f"}, TALK[2]], "a text where a list of tool calls"),
            ([{"role": "assistant", "tool_calls": [{"id": "c"}]}, TALK[2]], "a tool call is not understood"),
            ([{"role": "assistant"}, TALK[2]], "a message has 'role'"),
        ],
    )
    def test_what_is_no_conversation_is_refused(self, tmp_path: Path, talk: Any, why: str) -> None:
        assert why in refused(tmp_path, {"prompt": talk})

    def test_prompts_that_call_otherwise_are_no_duplicates(self, tmp_path: Path) -> None:
        other = json.loads(json.dumps(TALK).replace("Oslo", "Rome"))
        renamed = json.loads(json.dumps(TALK).replace("c1", "c9"))
        _, kept, reasons = prompts(tmp_path, *({"prompt": talk, "tools": None} for talk in (TALK, other, renamed)))
        assert [prompt.prompt_id for prompt in kept] == ["0", "1"]
        assert reasons == {"2": "duplicate_of:one/0"}


def test_rows_that_call_otherwise_are_no_duplicates(tmp_path: Path) -> None:
    def row(row_id: str, arguments: str, tools: str | None = CANONICAL) -> Any:
        said = Message("assistant", "", None, (ToolCall("weather", arguments, row_id),))
        return a_record(row_id=row_id, completion=(said,), tools=tools)

    _, kept, reasons = dedup(tmp_path, [row("a", "{}"), row("b", '{"x": 1}'), row("c", "{}"), row("d", "{}", None)])
    assert [record.row_id for record in kept] == ["a", "b", "d"]
    assert reasons == {"c": "duplicate_of:a"}


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_replayed_completions_keep_their_calls(tmp_path: Path, name: str) -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    path = write(tmp_path / name, [{"id": "p", "completion": [said], "finish": "tool_calls"}])
    (answer,) = replay(path, [("p", "x", 0)], finish_reason="finish")
    assert (answer.rejected, answer.text, answer.finish_reason) == (None, "", "tool_calls")
    assert answer.tool_calls == (ToolCall("weather", '{"city":  "Oslo"}', "c1"),)


class TestOutboundGuard:
    def check(self, policy: str, message: Message, tools: str | None = None) -> Any:
        return Guard(OutboundConfig.model_validate({"secrets": policy})).check([message], tools)

    @pytest.mark.parametrize("arguments", [json.dumps({"key": KEY}), f"no JSON {KEY}", json.dumps({KEY: 1})])
    def test_it_looks_into_the_arguments_of_calls(self, arguments: str) -> None:
        message = Message("assistant", "", None, (ToolCall("f", arguments),))
        assert self.check("block", message).reason == "outbound:github_token"
        redacted = self.check("redact", message).messages[0].tool_calls[0].arguments
        assert KEY not in redacted and "[REDACTED:github_token]" in redacted

    def test_it_looks_into_the_functions_that_are_offered_and_leaves_them_json(self) -> None:
        function = {"name": "f", "description": f'"{KEY}"\n'}
        tools = json.dumps([{"function": function, "type": "function"}])
        assert self.check("block", Message("user", "x"), tools).reason == "outbound:github_token"
        checked = self.check("redact", Message("user", "x"), tools)
        assert json.loads(checked.tools)[0]["function"]["description"] == '"[REDACTED:github_token]"\n'
        assert checked.redacted

    def test_escapes_hide_nothing(self) -> None:
        escaped = '{"k": "' + KEY.replace("_", "\\u005f") + '"}'
        message = Message("assistant", "", None, (ToolCall("f", escaped),))
        assert self.check("block", message).reason == "outbound:github_token"

    def test_where_nothing_is_found_everything_is_as_it_was(self) -> None:
        message = Message("assistant", "", None, (ToolCall("f", '{"a":  1}', "c"),))
        checked = self.check("block", message, CANONICAL)
        assert (checked.messages, checked.tools, checked.kinds) == ((message,), CANONICAL, ())


def test_an_answer_that_calls_and_says_nothing_is_not_empty_for_the_filter() -> None:
    called = Message("assistant", "", None, (ToolCall("f", "{}"),))
    rows = [a_record(row_id="a", completion=(called,)), a_record(row_id="b", completion=(Message("assistant", ""),))]
    assert judge(FilterConfig(), to_table(RECORD_SCHEMA, rows)).reasons == [None, "empty"]
