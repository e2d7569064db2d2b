"""Tools, forms of answers and seeds in each format: what a request says, and the calls that an answer holds."""

import json
from typing import Any

import pytest

from pipeline.core.config_response import ChoiceResponse, JsonSchemaResponse, RegexResponse, ResponseForm
from pipeline.core.config_teacher import Sampling
from pipeline.core.record import Message, ToolCall
from pipeline.teacher.verdict import Action, as_asked, judge
from pipeline.teacher.wire import Ask, Reply, Thinking, Unusable
from pipeline.teacher.wires.anthropic import ANTHROPIC
from pipeline.teacher.wires.gemini import GEMINI
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Weather in a city", "parameters": PARAMETERS}
NOW = {"name": "now"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": NOW}]
ARGUMENTS = '{"city":  "Oslo"}'
TALK = (
    Message("user", "Weather in Oslo, and the time?"),
    Message(
        "assistant", "", None, (ToolCall("weather", ARGUMENTS, "c1"), ToolCall("now", "{}", "c2"))
    ),
    Message("tool", "12:00", tool_call_id="c2"),
    Message("tool", '{"degrees": 3}', tool_call_id="c1"),
    Message("user", "In Fahrenheit."),
)  # fmt: skip
WITHOUT_IDS = (
    Message("user", "Weather?"),
    Message("assistant", "I look.", None, (ToolCall("weather", ARGUMENTS), ToolCall("now", "no JSON"))),
    Message("tool", "cold"),
    Message("tool", "late"),
)
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
JSON = JsonSchemaResponse(kind="json_schema", json_schema=SCHEMA)
CHOICE = ChoiceResponse(kind="choice", choices=("yes", "no"))
REGEX = RegexResponse(kind="regex", pattern="[0-9]+")


def body(wire: Any, messages: tuple[Message, ...] = TALK[:1], **changes: Any) -> Any:
    """A request as JSON."""
    return json.loads(wire.body(Ask("m", messages, Sampling(temperature=1.0), **changes)))


def form(wire: Any, given: ResponseForm, **changes: Any) -> Any:
    """What a request says more when answers must have a form."""
    sent, free = body(wire, form=given, **changes), body(wire)
    return {key: value for key, value in sent.items() if free.get(key) != value}


class TestOpenAIRequest:
    def test_tools_and_messages_go_as_they_are(self) -> None:
        sent = body(OPENAI_CHAT, TALK, tools=json.dumps(TOOLS))
        assert sent["tools"] == TOOLS
        assert sent["messages"][1]["tool_calls"] == [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}},
            {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ]
        assert sent["messages"][2] == {"role": "tool", "content": "12:00", "tool_call_id": "c2"}
        assert "tools" not in body(OPENAI_CHAT)

    def test_a_schema_is_openais_response_format_with_its_properties_in_their_order(self) -> None:
        schema = {"name": "answer", "schema": SCHEMA, "strict": True}
        sent = form(OPENAI_CHAT, JSON)
        assert sent == {"response_format": {"type": "json_schema", "json_schema": schema}}
        assert [*sent["response_format"]["json_schema"]["schema"]["properties"]] == ["b", "a"]

    @pytest.mark.parametrize(
        ("given", "sent"), [(JSON, {"json": SCHEMA}), (REGEX, {"regex": "[0-9]+"}), (CHOICE, {"choice": ["yes", "no"]})]
    )
    def test_vllm_takes_every_form_in_a_field_of_its_own(self, given: ResponseForm, sent: Any) -> None:
        assert form(OPENAI_CHAT, given, structured_outputs="vllm") == {"structured_outputs": sent}
        assert "structured_outputs" not in body(OPENAI_CHAT, structured_outputs="vllm")

    def test_a_seed_is_sent_where_there_is_one(self) -> None:
        assert body(OPENAI_CHAT, seed=0)["seed"] == 0
        assert "seed" not in body(OPENAI_CHAT)

    def test_what_ends_with_the_models_own_words_is_continued(self) -> None:
        sent = body(OPENAI_CHAT, (*TALK[:1], Message("assistant", "It is")))
        assert (sent["add_generation_prompt"], sent["continue_final_message"]) == (False, True)
        assert "continue_final_message" not in body(OPENAI_CHAT)


class TestAnthropicRequest:
    def test_calls_are_blocks_and_their_results_one_turn_of_the_user(self) -> None:
        assert body(ANTHROPIC, TALK)["messages"] == [
            {"role": "user", "content": "Weather in Oslo, and the time?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
                    {"type": "tool_use", "id": "c2", "name": "now", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c2", "content": "12:00"},
                    {"type": "tool_result", "tool_use_id": "c1", "content": '{"degrees": 3}'},
                    {"type": "text", "text": "In Fahrenheit."},
                ],
            },
        ]

    def test_calls_without_ids_get_some_and_results_belong_to_them_in_order(self) -> None:
        _, called, results = body(ANTHROPIC, WITHOUT_IDS)["messages"]
        said, *uses = called["content"]
        assert said == {"type": "text", "text": "I look."}
        assert [use["id"] for use in uses] == [block["tool_use_id"] for block in results["content"]]
        assert len({use["id"] for use in uses}) == 2
        assert uses[1]["input"] == {"arguments": "no JSON"}

    def test_tools_have_their_own_names_and_a_schema_always(self) -> None:
        assert body(ANTHROPIC, tools=json.dumps(TOOLS))["tools"] == [
            {"name": "weather", "description": "Weather in a city", "input_schema": PARAMETERS},
            {"name": "now", "input_schema": {"type": "object", "properties": {}}},
        ]

    def test_a_schema_stands_beside_the_effort_of_thinking(self) -> None:
        expected = {"format": {"type": "json_schema", "schema": SCHEMA}}
        assert form(ANTHROPIC, JSON) == {"output_config": expected}
        assert body(ANTHROPIC, form=JSON, thinking=Thinking(effort="low"))["output_config"] == {
            "effort": "low",
            **expected,
        }

    def test_no_seed_is_sent(self) -> None:
        assert "seed" not in json.dumps(body(ANTHROPIC, seed=5))


class TestGeminiRequest:
    def test_calls_and_results_are_parts_and_results_go_by_the_functions_name(self) -> None:
        _, called, results, last = body(GEMINI, TALK)["contents"]
        assert called == {
            "role": "model",
            "parts": [
                {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}},
                {"functionCall": {"name": "now", "args": {}}},
            ],
        }
        assert results == {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "now", "response": {"result": "12:00"}}},
                {"functionResponse": {"name": "weather", "response": {"degrees": 3}}},
            ],
        }
        assert last == {"role": "user", "parts": [{"text": "In Fahrenheit."}]}

    def test_results_without_ids_belong_to_the_calls_in_order(self) -> None:
        parts = body(GEMINI, WITHOUT_IDS)["contents"][2]["parts"]
        assert [part["functionResponse"]["name"] for part in parts] == ["weather", "now"]

    def test_tools_are_declarations_with_a_json_schema(self) -> None:
        assert body(GEMINI, tools=json.dumps(TOOLS))["tools"] == [
            {
                "functionDeclarations": [
                    {"name": "weather", "description": "Weather in a city", "parametersJsonSchema": PARAMETERS},
                    {"name": "now"},
                ]
            }
        ]

    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            (JSON, {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA}),
            (
                CHOICE,
                {"responseMimeType": "text/x.enum", "responseSchema": {"type": "STRING", "enum": ["yes", "no"]}},
            ),
        ],
    )
    def test_a_form_is_a_type_with_a_schema(self, given: ResponseForm, sent: Any) -> None:
        config = body(GEMINI, form=given)["generationConfig"]
        assert {key: config[key] for key in config if key.startswith("response")} == sent

    def test_a_seed_is_part_of_the_generation_config(self) -> None:
        assert body(GEMINI, seed=7)["generationConfig"]["seed"] == 7


CALL = ToolCall("weather", '{"city":"Oslo"}', "c1")
ANSWERS = {
    "openai": (
        OPENAI_CHAT,
        {
            "choices": [
                {
                    "finish_reason": "tool_calls",
                    "message": {
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "weather", "arguments": CALL.arguments},
                            }
                        ],
                    },
                }
            ]
        },
    ),
    "anthropic": (
        ANTHROPIC,
        {
            "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}}],
            "stop_reason": "tool_use",
        },
    ),
    "gemini": (
        GEMINI,
        {
            "candidates": [
                {
                    "content": {"parts": [{"functionCall": {"id": "c1", "name": "weather", "args": {"city": "Oslo"}}}]},
                    "finishReason": "STOP",
                }
            ]
        },
    ),
}


def verdict(name: str, *, offers_tools: bool) -> Any:
    wire, answer = ANSWERS[name]
    return as_asked(judge(wire.read, 200, {}, json.dumps(answer).encode()), offers_tools=offers_tools)


@pytest.mark.parametrize("name", ANSWERS)
class TestCallsInAnswers:
    def test_they_are_the_answer_where_tools_were_offered(self, name: str) -> None:
        found = verdict(name, offers_tools=True)
        assert found.action is Action.ANSWER
        assert found.reply == Reply("", None, "tool_calls", None, None, (), tool_calls=(CALL,))

    def test_they_say_nothing_where_none_were(self, name: str) -> None:
        found = verdict(name, offers_tools=False)
        assert (found.action, found.reason, found.reply) == (Action.STRIKE, "empty", None)

    def test_surrogates_in_them_are_replaced(self, name: str) -> None:
        wire, answer = ANSWERS[name]
        read = wire.read(
            json.dumps(answer).replace("Oslo", "Os\\\\ud800lo" if name == "openai" else "Os\\ud800lo").encode()
        )
        assert isinstance(read, Reply)
        read.tool_calls[0].arguments.encode("utf-8")


WITH_ARGUMENTS = {
    "openai": (
        OPENAI_CHAT,
        b'{"choices":[{"message":{"content":null,"tool_calls":[{"id":"c","function":{"name":"f","arguments":%b}}]},'
        b'"finish_reason":"tool_calls"}]}',
    ),
    "anthropic": (
        ANTHROPIC,
        b'{"content":[{"type":"tool_use","id":"c","name":"f","input":%b}],"stop_reason":"tool_use"}',
    ),
    "gemini": (
        GEMINI,
        b'{"candidates":[{"content":{"parts":[{"functionCall":{"id":"c","name":"f","args":%b}}]},'
        b'"finishReason":"STOP"}]}',
    ),
}


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
class TestArgumentsGivenAsObjects:
    def read(self, name: str, arguments: bytes) -> Reply | Unusable:
        wire, answer = WITH_ARGUMENTS[name]
        return wire.read(answer % arguments)

    @pytest.mark.parametrize(
        ("given", "kept", "flags"),
        [
            (b'{"b": 1.5}', '{"b":1.5}', ()),
            (b'{"b": -123456789012345678901234567890}', '{"b":-123456789012345678901234567890}', ()),
            (b'{"a": "x\\ud800"}', '{"a":"x\ufffd"}', ("sanitized",)),
            (b'{"\\ud800": 1}', '{"\ufffd":1}', ("sanitized",)),
            (b'{"a": "\\udfff", "b": 18446744073709551616}', '{"a":"\ufffd","b":18446744073709551616}', ("sanitized",)),
            (b'{"a": NaN, "b": 18446744073709551616}', '{"a":null,"b":18446744073709551616}', ()),
            (deep(300), deep(300).decode(), ()),
        ],
        ids=["plain", "integer", "value", "key", "both", "nan", "deep"],
    )
    def test_they_are_kept_whole_and_what_is_replaced_is_flagged(
        self, name: str, given: bytes, kept: str, flags: tuple[str, ...]
    ) -> None:
        found = self.read(name, given)
        assert isinstance(found, Reply)
        assert (found.tool_calls, found.flags) == ((ToolCall("f", kept, "c"),), flags)

    @pytest.mark.parametrize("levels", [900, 985, 5000])
    def test_what_nests_deeper_than_can_be_followed_is_no_completion(self, name: str, levels: int) -> None:
        found = self.read(name, deep(levels))
        assert isinstance(found, Reply) or found.reason in {"bad_payload", "unknown"}

    def test_more_digits_than_python_takes_do_no_harm(self, name: str) -> None:
        assert isinstance(self.read(name, b'{"b": %b}' % (b"1" * 5000)), Reply | Unusable)

    def test_an_answer_that_was_read_can_be_sent_back(self, name: str) -> None:
        for given in (b'{"b": 123456789012345678901234567890}', deep(190), deep(300)):
            found = self.read(name, given)
            assert isinstance(found, Reply)
            turns = (Message("user", "?"), Message("assistant", "", tool_calls=found.tool_calls))
            for wire, _ in WITH_ARGUMENTS.values():
                sent = wire.body(Ask("m", turns, Sampling()))
                assert (b"123456789012345678901234567890" in sent) == (b"b" in given)

    def test_arguments_too_deep_to_be_sent_as_an_object_are_sent_as_text(self, name: str) -> None:
        calls = (ToolCall("f", deep(900).decode()),)
        sent = WITH_ARGUMENTS[name][0].body(
            Ask("m", (Message("user", "?"), Message("assistant", "", tool_calls=calls)), Sampling())
        )
        assert json.dumps(deep(900).decode()).encode() in sent


class TestOpenAIAnswer:
    def read(self, **message: Any) -> Reply | Unusable:
        choice = {"finish_reason": "tool_calls", "message": {"content": None, **message}}
        return OPENAI_CHAT.read(json.dumps({"choices": [choice]}).encode())

    def test_arguments_are_kept_to_the_letter_even_where_they_are_not_json(self) -> None:
        found = self.read(tool_calls=[{"function": {"name": "f", "arguments": '{"a":  1,'}}])
        assert isinstance(found, Reply) and found.tool_calls == (ToolCall("f", '{"a":  1,'),)

    def test_text_beside_calls_is_kept(self) -> None:
        found = self.read(content="I look.", tool_calls=[{"id": "c", "function": {"name": "f", "arguments": {}}}])
        assert isinstance(found, Reply) and (found.text, found.tool_calls) == ("I look.", (ToolCall("f", "{}", "c"),))

    @pytest.mark.parametrize("calls", [[], None, "f", [None], [{}], [{"function": "f"}], [{"function": {"name": ""}}]])
    def test_what_names_no_function_is_no_call(self, calls: Any) -> None:
        found = self.read(tool_calls=calls)
        assert isinstance(found, Unusable) and found.reason == "empty"
