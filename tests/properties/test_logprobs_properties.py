"""Soft targets of any answer arrive as they were told: nothing lost, nothing invented, nothing out of order."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.targets import TargetFacts, TargetWriter, TokenLogprobs, read_targets
from pipeline.teacher.logprobs import BadLogprobs, find_logprobs, read_logprobs
from pipeline.teacher.wires.gemini import GEMINI
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

TOP_K = 4
VALUES = st.floats(-30, 0, width=32)
"""vLLM's numbers are float32."""


@st.composite
def positions(draw: st.DrawFn) -> tuple[int, dict[int, float], int]:
    """A whole distribution over some tokens (id -> logprob), the sampled one, and how many are asked for."""
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=TOP_K + 2, max_size=TOP_K + 5, unique=True))
    weights = draw(st.lists(VALUES, min_size=len(ids), max_size=len(ids)))
    total = math.log(math.fsum(math.exp(weight) for weight in weights))
    logprobs = {id_: float(np.float32(weight - total)) for id_, weight in zip(ids, weights, strict=True)}
    return draw(st.sampled_from(ids)), logprobs, TOP_K + 1


def as_vllm(sampled: int, logprobs: dict[int, float], sent: int) -> dict[str, Any]:
    """A position as vLLM writes it: the sampled token first, then the best, cut to what was asked for."""
    best = sorted(logprobs, key=lambda id_: -logprobs[id_])[:sent]
    listed = [sampled, *(id_ for id_ in best if id_ != sampled)][:sent]
    tokens = [{"token": f"token_id:{id_}", "logprob": logprobs[id_], "bytes": [65]} for id_ in listed]
    return {**tokens[0], "top_logprobs": tokens}


def body_of(told: list[tuple[int, dict[int, float], int]]) -> bytes:
    content = [as_vllm(*each) for each in told]
    choice = {
        "message": {"role": "assistant", "content": "A"},
        "finish_reason": "stop",
        "logprobs": {"content": content},
        "token_ids": [sampled for sampled, _, _ in told],
    }
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": len(told)}}).encode()


def written_and_read(told: TokenLogprobs) -> TokenLogprobs:
    with tempfile.TemporaryDirectory() as folder:
        with TargetWriter(Path(folder), TargetFacts(TOP_K, {}, {})) as writer:
            writer.write(["r"], [told])
        ((_, read),) = read_targets(Path(folder) / "targets")
    return read


@given(st.lists(positions(), min_size=1, max_size=5))
def test_each_position_keeps_its_best_and_its_sampled_token(given_positions):
    asked = LogprobsAsked(TOP_K, TOP_K + 1, True)
    told = written_and_read(read_logprobs(OPENAI_CHAT.name, body_of(given_positions), asked))
    assert told.ids is not None and told.top_ids is not None
    assert told.ids.tolist() == [sampled for sampled, _, _ in given_positions]
    ends = np.cumsum(told.sizes)
    for at, (sampled, logprobs, _) in enumerate(given_positions):
        ids = told.top_ids[ends[at] - told.sizes[at] : ends[at]].tolist()
        values = told.top_logprobs[ends[at] - told.sizes[at] : ends[at]].tolist()
        assert float(told.logprobs[at]) == logprobs[sampled], "exactly what the engine computed"
        assert len(ids) == len(set(ids)) == TOP_K
        assert values == sorted(logprobs.values(), reverse=True)[:TOP_K], "the very best, whatever was sampled"
        assert values == [logprobs[id_] for id_ in ids]
        assert sorted(zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1])) == list(
            zip(values, ids, strict=True)
        )
        rank = int(told.ranks[at])
        better = sum(value > logprobs[sampled] for value in logprobs.values())
        assert rank == 0 or rank > better, "no rank that others' values contradict"
        assert (rank in range(1, TOP_K + 1)) == (sampled in ids)
        assert rank == 0 or rank > TOP_K or ids[rank - 1] == sampled


@given(st.lists(positions(), min_size=2, max_size=4), st.data())
def test_a_body_that_lacks_anything_is_refused(given_positions, data):
    """A position, one of its best, a number: whatever is taken away, nothing is kept instead of something else."""
    asked = LogprobsAsked(TOP_K, TOP_K + 1, True)
    body = json.loads(body_of(given_positions))
    content = body["choices"][0]["logprobs"]["content"]
    at = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["position", "best", "number", "name", "swap"])):
        case "position":
            del content[at]
        case "best":
            del content[at]["top_logprobs"][1:3]
        case "number":
            content[at]["logprob"] = None
        case "name":
            content[at]["token"] = "A"
        case "swap":
            if given_positions[at][0] == given_positions[at - 1][0]:
                return
            content[at], content[at - 1] = content[at - 1], content[at]
    assert find_logprobs(OPENAI_CHAT.name, json.dumps(body).encode(), asked) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["token", "logprob", "bytes", "top_logprobs", "content", "tokenId", "candidates"]), inner
        )
    ),
    max_leaves=10,
)


@given(JSON, st.sampled_from([OPENAI_CHAT.name, GEMINI.name]), st.booleans())
def test_no_body_breaks_the_reader(value, wire, ids):
    for body in (
        {"choices": [{"message": {"content": "A"}, "logprobs": value}]},
        {"choices": [{"message": {"content": "A"}, "logprobs": {"content": value}}]},
        {"candidates": [{"logprobsResult": {"chosenCandidates": value, "topCandidates": value}}]},
        value,
    ):
        try:
            read_logprobs(wire, json.dumps(body).encode(), LogprobsAsked(2, 2, ids))
        except BadLogprobs:
            pass
