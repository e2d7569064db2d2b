"""The request key over arbitrary messages."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config_teacher import Sampling
from pipeline.core.lineage import canonical_json, canonical_texts, digest_json
from pipeline.core.record import Message, message_dict
from pipeline.teacher.request import Asked, request_key
from pipeline.teacher.wire import Ask, Reply, Unusable, clean, load_json
from pipeline.teacher.wires.openai_chat import read_body, request_body

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
    assert isinstance(read_body(body), Reply | Unusable)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT, st.lists, max_leaves=5)
KEYS = st.sampled_from(["choices", "message", "content", "finish_reason", "error", "usage", "refusal", "reasoning"])
NESTED = st.recursive(JSON, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=12)


@given(st.dictionaries(KEYS, NESTED))
def test_no_json_breaks_the_parser_and_a_reply_is_always_storable_text(body):
    import json

    read = read_body(json.dumps(body).encode())
    if isinstance(read, Reply):
        read.text.encode("utf-8")
        (read.reasoning_content or "").encode("utf-8")
        read.finish_reason.encode("utf-8")
