"""Seeds of sampled requests: which a request carries, and whether an engine honours them.

Samples of one prompt have keys of their own, and a seed is made from its request's key: so samples differ, and an
engine that honours seeds draws the same answer for the same request again, in whatever order requests arrive. Seeds
decide which of the answers that a model may give is drawn, never which stand: stored answers count with or without.

Engines that compute a batch in another order may still differ in a token now and then, whatever they are seeded with.
"""

import logging
from collections.abc import Sequence
from typing import Final, Literal

import aiohttp

from pipeline.core.config_teacher import Sampling
from pipeline.core.record import Message
from pipeline.core.stage import Context
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.request import Asked
from pipeline.teacher.transport import send
from pipeline.teacher.verdict import Action, judge
from pipeline.teacher.wire import Reply

log = logging.getLogger(__name__)

Level = Literal["seeded", "unseeded", "seed_refused", "unknown"]
"""What a trial came to: equal seeds give equal answers and others differ; equal ones do not; a request with a seed
fails; or nothing can be said (the answer is the same whatever the seed, or there was no trial)."""

PROVIDED: Final = frozenset({"vllm", "server"})
KNOWN: Final = PROVIDED | {"openai", "gemini"}
"""Kinds of teachers whose format has a field for a seed; the first are tried before they are seeded."""
TRIAL: Final = (Message("user", "Write any words that come to your mind."),)
TRIAL_SAMPLING: Final = Sampling(temperature=2.0, max_tokens=24)
SEEDS: Final = (1, 1, 2, 3)


def is_sampled(sampling: Sampling) -> bool:
    """Whether tokens are drawn by chance; a temperature that is not told may well do that."""
    return sampling.temperature is None or sampling.temperature > 0


def wants_seeds(asked: Asked | None, kind: str) -> bool:
    """Whether requests to a kind of teacher are to carry seeds, if it takes them."""
    if asked is None or not is_sampled(asked.sampling):
        return False
    return kind in {"auto": PROVIDED, "always": KNOWN, "never": frozenset[str]()}[asked.seeds]


async def settle_seeds(
    asked: Asked | None, kind: str, endpoints: Sequence[Endpoint], session: aiohttp.ClientSession, ctx: Context
) -> None:
    """Decide whether requests to a teacher carry seeds; call it once, when its endpoints answer.

    A server of our own is tried first (once for all servers of a teacher, which run one command), and the level that it
    reaches is an event of the step. One that fails over a seed is asked without.
    """
    if not wants_seeds(asked, kind):
        return
    level: Level = "unknown"
    if not endpoints[0].takes_seeds:
        level = "seed_refused"
    elif kind in PROVIDED:
        level = await probe_seeds(session, endpoints[0])
    ctx.events.emit("seeds_tried", level=level, engine=endpoints[0].engine, sent=level != "seed_refused")
    if level == "seed_refused":
        log.warning("%s fails over a seed: sampled answers cannot be drawn again", endpoints[0].engine)
    elif level == "unseeded":
        log.warning("%s takes seeds and does not honour them", endpoints[0].engine)
    for endpoint in endpoints:
        endpoint.takes_seeds = endpoint.sends_seeds = level != "seed_refused"


async def probe_seeds(session: aiohttp.ClientSession, endpoint: Endpoint) -> Level:
    """Try seeds with four tiny requests. For servers that cost nothing: they are in no account."""
    first, again, *others = [await _drawn(session, endpoint, seed) for seed in SEEDS]
    if None in (first, again, *others):
        return "seed_refused"
    if first != again:
        return "unseeded"
    return "seeded" if any(other != first for other in others) else "unknown"


async def _drawn(session: aiohttp.ClientSession, endpoint: Endpoint, seed: int) -> Reply | None:
    """An answer to the trial's question; None: there is none."""
    body = endpoint.wire.body(endpoint.ask(TRIAL, TRIAL_SAMPLING, seed=seed))
    key = endpoint.read_key()
    try:
        raw = await send(session, endpoint.url, endpoint.wire.headers(key), key, body)
    except (aiohttp.ClientError, OSError):
        return None
    if raw is None:
        return None
    verdict = judge(endpoint.wire.read, raw.status, raw.headers, raw.body)
    return verdict.reply if verdict.action is Action.ANSWER else None
