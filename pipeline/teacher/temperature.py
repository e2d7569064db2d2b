"""Whether a provider's logprobs are the model's own, or scaled by the temperature that is asked: tried, once.

Soft targets are probabilities at temperature 1. Servers differ in what they give: vLLM's raw logprobs are taken before
the temperature, others' after it, and APIs do not say. Two requests for one token at two temperatures tell.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Literal

from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.config_teacher import Sampling
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.record import Message
from pipeline.core.stage import Context
from pipeline.core.targets import TokenLogprobs
from pipeline.teacher.client import Client
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import ResponseStore

log = logging.getLogger(__name__)

Scale = Literal["raw", "scaled", "unknown", "untold", "absent"]
"""`raw`: the temperature changes nothing; `scaled`: it divides them; `unknown`: neither, or too few to tell; `untold`:
the teacher is told no temperature, so that its own default holds; `absent`: it answers without what was asked."""

QUESTION: Final = (Message("user", "Name any colour, animal or town."),)
WARM, COLD = 1.0, 0.5
TOP: Final = 4
"""Logprobs that are asked for at least: of one nothing could be told."""
SPREAD: Final = 0.25
"""How far the compared logprobs must lie apart, in nats, for their ratios to say anything."""
TOLERANCE: Final = 0.15
"""How far the slope may be from what it should be: engines that compute a batch in another order round otherwise."""

ClientFor = Callable[[Asked, Sequence[Endpoint]], Client]


def scale_of(warm: TokenLogprobs, cold: TokenLogprobs) -> Scale:
    """What the temperature does, from the first token's best candidates at two temperatures.

    Differences between tokens are compared, which renormalising does not change: at half the temperature scaled ones
    are twice as far apart.
    """
    one, two = _first(warm), _first(cold)
    shared = [name for name in one if name in two]
    if len(shared) < 2:
        return "unknown"
    pairs = [(one[name] - one[shared[0]], two[name] - two[shared[0]]) for name in shared[1:]]
    if max(abs(before) for before, _ in pairs) < SPREAD:
        return "unknown"
    slope = sum(before * after for before, after in pairs) / sum(before * before for before, _ in pairs)
    if max(abs(after - slope * before) for before, after in pairs) > TOLERANCE * (1 + abs(slope)):
        return "unknown"
    if abs(slope - 1) <= TOLERANCE and max(abs(one[name] - two[name]) for name in shared) <= 2 * TOLERANCE:
        return "raw"
    return "scaled" if abs(slope - WARM / COLD) <= 2 * TOLERANCE else "unknown"


def _first(told: TokenLogprobs) -> dict[object, float]:
    """The best tokens of the first position."""
    if len(told) == 0:
        return {}
    size = int(told.sizes[0])
    names = [None] * size if told.top_texts is None else told.top_texts[:size]
    keys = names if told.top_ids is None else told.top_ids[:size].tolist()
    return dict(zip(keys, told.top_logprobs[:size].tolist(), strict=True))


def trial_requests(asked: Asked, endpoint: int = 0) -> list[tuple[Asked, Request]]:
    """The two requests for one endpoint, and how each is asked: under keys of their own.

    Args:
        endpoint: its place among the teacher's URLs; servers that we start run one command, so that one is enough.
    """
    assert asked.logprobs is not None
    top_k, sent = max(TOP, asked.logprobs.top_k), max(TOP + 1, asked.logprobs.sent)
    wanted = replace(asked.logprobs, top_k=top_k, sent=sent)
    hows = []
    for temperature in (WARM, COLD):
        top_p = asked.sampling.top_p if asked.sampling.top_p is None else 1.0
        sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=1)
        flags = {**asked.flags, "trial": "temperature"}
        how = replace(asked, sampling=sampling, flags=flags, draw=0, response_schema=None, logprobs=wanted)
        hows.append((how, how.request("trial", "temperature", endpoint, QUESTION)))
    return hows


def stored_scale(store: ResponseStore, asked: Asked, endpoint: int = 0) -> Scale | None:
    """What the stored answers of a trial say; None: there was none."""
    if asked.sampling.temperature is None:
        return "untold"
    told = []
    for how, request in trial_requests(asked, endpoint):
        key = bytes.fromhex(request.key)
        found = store.get_many({key: 1}, how.room, how.logprobs, keep_logprobs=True).get(key)
        if found is None:
            return None
        if found.logprobs is None:
            return "absent"
        told.append(found.logprobs)
    return scale_of(*told)


async def settle_scale(
    client_for: ClientFor, store: ResponseStore, asked: Asked, endpoints: Sequence[Endpoint], ctx: Context
) -> None:
    """Try what the temperature does at each endpoint, before anything else is asked; stored trials are not repeated.

    The requests count in the budget; what came out is an event of the step.

    Args:
        client_for: makes a client that asks some endpoints in some way.
        endpoints: of an API its URLs; of servers that we start the first.

    Raises:
        UsageError: the logprobs are not the model's own, or cannot be told to be.
        Incomplete: the trial is not answered; or as `Client.settle`.
    """
    if asked.logprobs is None:
        return
    for index, endpoint in enumerate(endpoints):
        scale = stored_scale(store, asked, index)
        if scale in (None, "absent"):
            settled = await asyncio.gather(
                *(
                    client_for(how, [replace(endpoint, logprobs=how.logprobs)]).settle(request)
                    for how, request in trial_requests(asked, index)
                )
            )
            scale = stored_scale(store, asked, index)
            if scale is None and settled[0].rejected is not None:
                what = f"it refuses to answer with logprobs ({settled[0].rejected}), so there are no soft targets"
                todo = "leave generate.logprobs out, lower its top_k, or see to the server"
                raise UsageError(what, where=f"generate.logprobs (for {endpoint.host})", todo=todo)
        ctx.events.emit("temperature_tried", endpoint=endpoint.host, scale=scale)
        _judge(scale, asked.logprobs, asked.sampling.temperature, endpoint, ctx)


def _judge(
    scale: Scale | None, wanted: LogprobsAsked, temperature: float | None, endpoint: Endpoint, ctx: Context
) -> None:
    where = f"generate.logprobs (for {endpoint.host})"
    if scale is None:
        todo = f"see the events of the step; resume with: {ctx.resume_command}"
        raise Incomplete("the trial of its logprobs was not answered", where=where, todo=todo)
    if scale in ("raw", "untold") or (scale == "scaled" and temperature == WARM):
        return
    if scale == "absent":
        todo = "leave generate.logprobs out, lower its top_k, or see to the server"
        raise UsageError(f"it answers without the {wanted.top_k} logprobs of each token", where=where, todo=todo)
    what = "its logprobs are scaled by the temperature" if scale == "scaled" else "what its logprobs are cannot be told"
    if wanted.accept_scaled:
        log.warning("%s: %s; they are kept as they are", endpoint.host, what)
        return
    todo = "set generate.sampling.temperature: 1, or accept them with generate.logprobs.accept_scaled: true"
    raise UsageError(f"{what}: no soft targets", where=where, todo=todo)
