"""Fixed prompts, asked anew each time that a run asks anything: they show whether the teacher still answers alike."""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from statistics import fmean
from typing import Final

from pipeline.core.config_api import AnthropicTeacher, ApiTeacher, GeminiTeacher
from pipeline.core.config_drift import Canaries
from pipeline.core.config_refusals import takes_temperature
from pipeline.core.config_server import LocalServer
from pipeline.core.errors import Incomplete
from pipeline.core.stage import Context, Json, check_cancelled
from pipeline.teacher.client import Client
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.wire import Reply

log = logging.getLogger(__name__)

MAX_TOKENS: Final = 32
"""Cap of a canary's answer behind its thinking: the first words say enough, and long greedy answers of one model part
sooner or later."""
POLL_S: Final = 0.1
WORD: Final = re.compile(r"\w+")
"""A word of a call's arguments, which is JSON with or without white space."""


def canary_requests(
    teacher: LocalServer | ApiTeacher, asked: Asked, requests: Sequence[Request]
) -> tuple[Asked, list[Request]]:
    """The canaries made of some requests, and how they are asked: at temperature 0 where the API takes one, with a
    small cap, under keys of their own."""
    sampling = asked.sampling
    temperature = 0.0 if takes_temperature(teacher, sampling) else sampling.temperature
    update = {"temperature": temperature, "max_tokens": canary_cap(teacher, sampling.max_tokens)}
    flags: dict[str, Json] = {**asked.flags, "canary": True}
    how = replace(asked, sampling=sampling.model_copy(update=update), flags=flags, draw=0)
    return how, [how.request(each.prompt_set, each.prompt_id, 0, each.messages, each.tools) for each in requests]


def canary_cap(teacher: LocalServer | ApiTeacher, max_tokens: int) -> int:
    """Most completion tokens of a canary, thinking included: beside a budget of thinking as many as of any; where only
    an effort is told, nobody knows how long that is, so as many as of any other answer."""
    if isinstance(teacher, ApiTeacher) and teacher.reasoning_effort is not None:
        return max_tokens
    thinking = teacher.thinking_tokens if isinstance(teacher, AnthropicTeacher | GeminiTeacher) else None
    return MAX_TOKENS + (thinking or 0)


async def ask_canaries(
    client: Client, store: ResponseStore, asked: Asked, requests: Sequence[Request], rules: Canaries, ctx: Context
) -> None:
    """Ask the canaries and compare with what was answered when each was first asked, which the response store keeps.

    They count in the budget. One that is not answered, or says nothing within its cap, is not compared.

    Args:
        client: made with `asked`.
        asked, requests: as `canary_requests` gives them.

    Raises:
        Incomplete: the answers have changed, and the policy is to stop; or as `Client.settle`.
        UsageError: as `Client.settle`.
        Interrupted: a signal asked us to stop.
    """
    cap = asked.sampling.max_tokens
    wanted = {bytes.fromhex(request.key): cap for request in requests}
    first = {key: outcome.reply for key, outcome in store.get_many(wanted, asked.room).items()}
    heard: dict[bytes, Reply] = {}
    client.heard = lambda request, reply: heard.update({bytes.fromhex(request.key): reply})
    await _settle_all(client, requests, ctx)
    pairs = [(before, heard[key]) for key, before in first.items() if before is not None and key in heard]
    alike = [similarity(before, after) for before, after in pairs if words_of(before) or words_of(after)]
    ctx.events.emit("canaries_asked", asked=len(requests), compared=len(alike), equal=alike.count(1.0))
    if not alike and (first or not any(words_of(reply) for reply in heard.values())):
        log.warning("none of %d canaries could be compared: they show nothing of the teacher", len(requests))
    if not alike or fmean(alike) >= rules.min_similarity:
        return
    what = f"the teacher answers {len(alike)} fixed prompts otherwise than at first: {fmean(alike):.0%} alike"
    if rules.on_drift == "warn":
        log.warning("%s", what)
        return
    todo = f"to go on with it, set generate.canaries.on_drift: warn, and resume with: {ctx.resume_command}"
    raise Incomplete(f"{what}; all answers are kept", where=client.endpoints[0].host, todo=todo)


def similarity(one: Reply, other: Reply) -> float:
    """How alike two answers are, 0 to 1: the share of their words that stand in both in one order."""
    return SequenceMatcher(a=words_of(one), b=words_of(other), autojunk=False).ratio()


def words_of(reply: Reply) -> list[str]:
    """What is compared of an answer: its thinking, its text and the functions that it calls, whose identifiers are
    made anew each time."""
    calls = [word for call in reply.tool_calls for word in (call.name, *WORD.findall(call.arguments))]
    return [*(reply.reasoning_content or "").split(), *reply.text.split(), *calls]


async def _settle_all(client: Client, requests: Sequence[Request], ctx: Context) -> None:
    running = [asyncio.create_task(client.settle(request)) for request in requests]
    try:
        while not all(task.done() for task in running):
            await asyncio.wait(running, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in running:
                if task.done():
                    task.result()
            check_cancelled(ctx)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
