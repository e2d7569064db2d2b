"""The request key over arbitrary messages."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config_teacher import Sampling
from pipeline.core.lineage import canonical_json, canonical_texts, digest_json
from pipeline.core.record import Message, message_dict
from pipeline.teacher.request import Asked, request_key
from pipeline.teacher.wire import Ask, Reply, Unusable, clean, load_json
from pipeline.teacher.wires import ANTHROPIC, GEMINI, WIRES
from pipeline.teacher.wires.openai_chat import request_body

TEXT = st.text(st.characters(), max_size=20)  # lone surrogates included
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=4)
ASKED = Asked("0" * 64, {}, Sampling(), 0)
NUMBERS = st.floats(0, 2, allow_nan=False) | st.integers(0, 2)
FLAGS = st.dictionaries(TEXT, st.none() | TEXT | st.lists(TEXT, max_size=2), max_size=3)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.none() | NUMBERS,
    top_p=st.none() | st.floats(0.001, 1),
    top_k=st.none() | st.integers(1, 10**9),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    stop=st.lists(st.text(max_size=5), max_size=2).map(tuple),
)
SCHEMAS = st.none() | FLAGS
ASKEDS = st.builds(Asked, TEXT, FLAGS, SAMPLINGS, st.integers(), st.none(), st.none() | TEXT, SCHEMAS)


@given(ASKEDS, MESSAGES, st.integers(0, 10**6), st.none() | SCHEMAS)
def test_a_key_is_the_digest_of_one_json_object(asked, messages, sample, tools):
    """Keys name answers that were paid for: the object is pinned here, and no shortcut may change a byte of it."""
    sampling = asked.sampling
    expected = digest_json(
        {
            "messages": [message_dict(message) for message in messages],
            "tools": tools,
            "response_schema": asked.response_schema,
            "teacher": asked.identity,
            "flags": asked.flags,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "stop": list(sampling.stop),
            "reasoning_effort": asked.reasoning_effort,
            "draw": asked.draw,
            "sample": sample,
        }
    )
    encoded = None if tools is None else canonical_json(tools).decode("utf-8", "surrogatepass")
    assert request_key(asked, messages, sample, encoded) == expected


@given(st.recursive(TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8))
def test_texts_have_one_byte_form_whichever_encoder_writes_them(value):
    assert canonical_texts(value) == canonical_json(value)


@given(MESSAGES, MESSAGES, st.integers(0, 3), st.integers(0, 3))
def test_keys_are_equal_exactly_when_messages_and_sample_are(first, second, sample, other_sample):
    same = (first, sample) == (second, other_sample)
    assert (request_key(ASKED, first, sample) == request_key(ASKED, second, other_sample)) is same


@given(MESSAGES)
def test_a_key_is_a_function_of_its_parts(messages):
    key = request_key(ASKED, messages, 0)
    assert key == request_key(ASKED, list(messages), 0)
    assert len(bytes.fromhex(key)) == 32


@given(MESSAGES)
def test_any_prompt_can_be_sent(messages):
    body, repaired = load_json(request_body(Ask("m", messages, Sampling())))
    assert not repaired
    assert [message["content"] for message in body["messages"]] == [clean(message.content) for message in messages]


@given(st.binary(max_size=200))
def test_no_body_breaks_the_parser(body):
    assert all(isinstance(wire.read(body), Reply | Unusable) for wire in WIRES.values())


HUGE = st.integers(min_value=-(10**40), max_value=10**40)
SCALARS = st.none() | st.booleans() | st.integers() | HUGE | st.floats() | TEXT
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=5)
KEYS = st.sampled_from(["choices", "message", "content", "finish_reason", "error", "usage", "refusal", "reasoning"])
NESTED = st.recursive(JSON, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=12)


@given(st.dictionaries(KEYS, NESTED))
def test_no_json_breaks_the_parser_and_a_reply_is_always_storable_text(body):
    for wire in WIRES.values():
        read = wire.read(json.dumps(body).encode())
        if isinstance(read, Reply):
            check_storable(read)


def check_storable(reply: Reply) -> None:
    calls = [part for call in reply.tool_calls for part in (call.name, call.arguments, call.id)]
    for text in (reply.text, reply.reasoning_content, reply.finish_reason, reply.model, reply.fingerprint, *calls):
        (text or "").encode("utf-8")


def in_place_of_arguments(name: str, arguments: Any) -> dict[str, Any]:
    """A completion in one of the formats that calls a function with whatever is given."""
    if name == ANTHROPIC.name:
        uses = [{"type": "tool_use", "id": arguments, "name": "f", "input": arguments}]
        return {"content": [*uses, {"type": "text", "text": arguments}], "stop_reason": "tool_use"}
    if name == GEMINI.name:
        parts = [{"functionCall": {"name": "f", "args": arguments}}, {"text": arguments}]
        return {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}], "modelVersion": arguments}
    calls = [{"function": {"name": "f", "arguments": arguments}}, {"id": arguments, "function": arguments}]
    return {"choices": [{"message": {"content": arguments, "tool_calls": calls}, "finish_reason": "stop"}]}


@given(JSON, st.sampled_from([0, 1, 60, 253, 300, 480, 900]), st.sampled_from(sorted(WIRES)))
def test_no_arguments_of_a_call_break_the_parser_however_deep(value, levels, name):
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    read = WIRES[name].read(json.dumps(in_place_of_arguments(name, value)).encode())
    assert isinstance(read, Reply | Unusable)
    if isinstance(read, Reply):
        check_storable(read)
