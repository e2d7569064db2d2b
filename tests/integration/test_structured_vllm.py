"""A real vLLM server on this machine's CPU: answers of a form, and samples whose seeds it honours."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pipeline.core.config_response import ResponseForm
from pipeline.core.config_teacher import Sampling, VllmTeacher
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.server import serving
from pipeline.teacher.transport import open_session, send
from pipeline.teacher.wire import Reply
from pipeline.text.structure import Structure
from tests.support import make_context
from tests.tiny_models import make_tiny_model
from tests.unit.test_structure import form

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LONG = "The quick brown fox jumps over the lazy dog. " * 8
"""Forty of these do not fit into one step of the engine."""
PROPERTIES = {"ok": {"type": "boolean"}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["ok"], "additionalProperties": False}
FORMS: tuple[ResponseForm, ...] = (
    form(kind="json_schema", json_schema=SCHEMA),
    form(kind="regex", pattern="[0-9]{3}"),
    form(kind="choice", choices=["yes", "no"]),
)


@dataclass
class Talk:
    """What one server said.

    Attributes:
        samples: request -> its answer, from two passes in opposite order.
        formed: kind of form -> answers.
        events: of the step.
    """

    samples: tuple[dict[str, Any], dict[str, Any]]
    formed: dict[str, list[Any]]
    events: list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    """One server for all tests: it takes long to start."""
    return asyncio.run(hold_talk(tmp_path_factory.mktemp("structured")))


async def hold_talk(folder: Path) -> Talk:
    ctx = make_context(folder)
    teacher = VllmTeacher.model_validate(
        {
            "kind": "vllm",
            "model": str(make_tiny_model(folder / "model")),
            "dtype": "float32",
            "start_timeout_s": 800,
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        }
    )
    asked = Asked.of(teacher, Sampling(temperature=1.0, max_tokens=8), 0, DigestCache(folder / "digests.json"))
    asked = asked.under(None, "auto")
    requests = [
        request
        for number in range(20)
        for request in asked.requests("set", f"p{number}", 2, (Message("user", f"{number} {LONG}"),))
    ]
    async with open_session(300) as session, serving(teacher, session, ctx, asked) as served:
        (endpoint,) = served.endpoints
        samples = [await answers(session, endpoint, asked.sampling, each) for each in (requests, requests[::-1])]
        formed = {}
        for each in FORMS:
            formed[each.kind] = await ask_for(each, asked, session, endpoint)
    return Talk((samples[0], samples[1]), formed, ctx.events.seen)


async def ask_for(given: ResponseForm, asked: Asked, session: aiohttp.ClientSession, endpoint: Endpoint) -> list[Any]:
    formed = asked.under(given, "auto")
    requests = [formed.request("set", str(number), 0, [Message("user", f"Say {number}")]) for number in range(6)]
    return [*(await answers(session, endpoint, Sampling(temperature=1.0, max_tokens=120), requests)).values()]


async def answers(
    session: aiohttp.ClientSession, endpoint: Endpoint, sampling: Sampling, requests: Sequence[Request]
) -> dict[str, Any]:
    """Reply by key of the request, all asked at once."""

    async def one(request: Request) -> Any:
        raw = await send(session, endpoint.url, {}, None, endpoint.body(request, sampling))
        assert raw is not None and raw.status == 200, raw
        return endpoint.wire.read(raw.body)

    replies = await asyncio.gather(*map(one, requests))
    return {request.key: reply for request, reply in zip(requests, replies, strict=True)}


def test_the_engine_is_found_to_honour_seeds(talk: Talk) -> None:
    (tried,) = [fields for name, fields in talk.events if name == "seeds_tried"]
    assert (tried["level"], tried["sent"]) == ("seeded", True)
    assert tried["engine"].startswith("vllm ")


def test_samples_are_drawn_again_in_whatever_order_they_are_asked(talk: Talk) -> None:
    """On a CPU, prompts that are taken in parts would end the engine over their seeds."""
    first, again = ({key: reply.text for key, reply in samples.items()} for samples in talk.samples)
    assert first == again and len(first) == 40


def test_samples_of_one_prompt_differ(talk: Talk) -> None:
    texts = [reply.text for reply in talk.samples[0].values()]
    assert sum(one != other for one, other in zip(texts[::2], texts[1::2], strict=True)) >= 18


@pytest.mark.parametrize("given", FORMS, ids=lambda given: given.kind)
def test_it_keeps_to_every_form(talk: Talk, given: ResponseForm) -> None:
    replies = talk.formed[given.kind]
    ended = [reply for reply in replies if isinstance(reply, Reply) and reply.finish_reason == "stop"]
    assert ended, replies
    assert [Structure.of(given).problem(reply.text) for reply in ended] == [None] * len(ended)
