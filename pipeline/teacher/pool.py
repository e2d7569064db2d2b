"""Keeps the endpoints of an API teacher: one that fails gets no requests until it is well, and still itself, again."""

import asyncio
import logging
import random
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import aiohttp

from pipeline.core.stage import Context
from pipeline.teacher.breaker import State
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.identity import Look, check_alike, check_same, is_back, later_first, look_at

log = logging.getLogger(__name__)

POLL_S: Final = 0.1
FIRST_PROBE_S: Final = 0.25
LONGEST_PROBE_S: Final = 10.0
"""Bounds of the time between two probes of an endpoint that fails; it doubles in between."""
LEAST_RECHECK_S: Final = 1.0
"""Time between two looks at an endpoint some of whose requests fail."""


async def first_looks(endpoints: Sequence[Endpoint], session: aiohttp.ClientSession) -> dict[str, Look]:
    """URL -> what it says of itself, of the URLs of one teacher that answer, before the first request. A single one is
    not looked at: there is nothing to compare it with yet.

    Raises:
        UsageError: they serve different models.
    """
    if len(endpoints) == 1:
        return {}
    looks = await asyncio.gather(*(look_at(session, endpoint) for endpoint in endpoints))
    firsts = {endpoint.url: look for endpoint, look in zip(endpoints, looks, strict=True)}
    check_alike(endpoints, firsts)
    return firsts


async def keep_endpoints(
    endpoints: Sequence[Endpoint], firsts: dict[str, Look], session: aiohttp.ClientSession, ctx: Context
) -> None:
    """Watch all of them; ends only by raising.

    An endpoint that takes no connection, or whose breaker opens, gets no requests: its list of models, or its health,
    is asked for instead, rarely and then more rarely, until it answers. A single endpoint without a list of models is
    left to its breaker, which tries it with requests.

    Args:
        firsts: URL -> what was seen at the first look that it was there for; filled here.

    Raises:
        Incomplete: an endpoint serves another model than at first.
        UsageError: one that was not there at first serves another model than the others.
    """
    await together([_keep(endpoint, endpoints, firsts, session, ctx) for endpoint in endpoints])


async def together(tasks: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all until the first one raises; the others are cancelled then, and when we are.

    Raises:
        what the first one raised.
    """
    running = [asyncio.create_task(task) for task in tasks]
    try:
        ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
        for task in ended:
            task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _keep(
    endpoint: Endpoint,
    endpoints: Sequence[Endpoint],
    firsts: dict[str, Look],
    session: aiohttp.ClientSession,
    ctx: Context,
) -> None:
    gate = endpoint.gate
    first = firsts.get(endpoint.url) or await look_at(session, endpoint)
    firsts[endpoint.url] = first
    if len(endpoints) == 1 and first.listed is None:
        await asyncio.Event().wait()
    gate.is_watched, looked = True, gate.breaker.period
    while True:
        await asyncio.sleep(POLL_S)
        has_opened = gate.breaker.state is State.OPEN and gate.breaker.period != looked
        if gate.is_out or has_opened:  # once each time that it opens: then its trials say how well it works
            looked = gate.breaker.period
            firsts[endpoint.url] = first = await _await_return(endpoint, first, session, ctx)
            check_alike(endpoints, firsts)
            _let_in(endpoint, ctx)
        elif gate.is_doubtful:
            gate.is_doubtful = False
            now = await look_at(session, endpoint)
            if is_back(first, now):
                check_same(endpoint, first, now, ctx.resume_command)
                firsts[endpoint.url] = first = later_first(first, now)
                check_alike(endpoints, firsts)
            else:
                gate.is_out = True
            await asyncio.sleep(LEAST_RECHECK_S)


async def _await_return(endpoint: Endpoint, first: Look, session: aiohttp.ClientSession, ctx: Context) -> Look:
    """Probe until it is well; gives what to compare with from now on."""
    gate, wait = endpoint.gate, FIRST_PROBE_S
    gate.is_out = True
    log.warning("%s gets no requests until it answers again", endpoint.host)
    ctx.events.emit("endpoint_out", host=endpoint.host)
    while True:
        await asyncio.sleep(random.uniform(wait / 2, wait))
        now = await look_at(session, endpoint)
        if is_back(first, now):
            break
        gate.limit.failed()  # so that a teacher whose endpoints are all out counts as silent
        wait = min(2 * wait, LONGEST_PROBE_S)
    check_same(endpoint, first, now, ctx.resume_command)
    return later_first(first, now)


def _let_in(endpoint: Endpoint, ctx: Context) -> None:
    endpoint.gate.come_back()
    log.info("%s answers again", endpoint.host)
    ctx.events.emit("endpoint_back", host=endpoint.host)
