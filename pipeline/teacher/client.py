"""One request to a teacher, tried until it is settled. Retries are ours: no library repeats a request on its own."""

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp

from pipeline.core.config_teacher import Retry, Sampling
from pipeline.core.errors import Incomplete
from pipeline.teacher.complaints import abort_error, refused_error
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.recorder import Recorder, now_ms
from pipeline.teacher.request import Request
from pipeline.teacher.segment import Stored
from pipeline.teacher.transport import Raw, send
from pipeline.teacher.verdict import (
    BAD_PAYLOAD,
    FORBIDDEN,
    Abort,
    Action,
    Verdict,
    about_this_row,
    judge,
    judge_transport,
    snippet,
    why_unconnected,
)
from pipeline.teacher.wire import Ask

log = logging.getLogger(__name__)

STRIKES = 3
"""Completions without content after which a row is rejected."""
REFUSALS_IN_A_ROW = 20
"""Refused requests, without an answer in between, that show a wrong config or key."""
RESTART_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Settled:
    """How a request ended for this run.

    Attributes:
        rejected: the reason, if the row is refused.
        gave_up: class of the last failure, if it stays pending.
        tokens: completion tokens of an answer.
    """

    rejected: str | None = None
    gave_up: str | None = None
    tokens: int = 0


@dataclass(slots=True)
class Tries:
    """What one request went through so far.

    Attributes:
        answered_before: how many requests had been answered when this one first failed.
        first_failure: monotonic time.
        asked_to_wait: seconds that do not count against the time budget.
    """

    answered_before: int = 0
    failures: int = 0
    strikes: int = 0
    first_failure: float | None = None
    asked_to_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Held:
    """A refusal that is not believed yet."""

    attempt: int
    reason: str
    stored: Stored


@dataclass(slots=True)
class Client:
    """Sends requests to endpoints and stores what comes back before anybody reads it.

    Attributes:
        session: see `open_session`.
        endpoints: where to send; the least loaded gets the next request.
        teacher: identity of the teacher, stored with each answer.
        sampling, retry: from the config.
        room: most tokens of prompt and completion together, stored with each answer.
        proven: whether this teacher has answered anything yet, in this run or before.
        retries: class of failure -> how often something was tried again.
        in_flight: tasks whose request has left and is not stored yet.
        cancel: set by a signal that asks us to stop: no request leaves after it.
        draining: no request may leave any more, for whatever reason.
    """

    session: aiohttp.ClientSession
    endpoints: Sequence[Endpoint]
    recorder: Recorder
    teacher: str
    sampling: Sampling
    retry: Retry
    room: int | None = None
    proven: bool = False
    retries: Counter[str] = field(default_factory=Counter)
    in_flight: set[asyncio.Task[None]] = field(default_factory=set)
    cancel: threading.Event = field(default_factory=threading.Event)
    draining: bool = False
    _held: list[Held] = field(default_factory=list)
    _answered: int = 0

    async def settle(self, request: Request) -> Settled:
        """Ask until there is an answer, a refusal, or no time left.

        Raises:
            UsageError, Incomplete: every further request would fail in the same way.
        """
        tries = Tries()
        while True:
            endpoint = await self._pick(tries)
            async with endpoint.limit.slot() as window:
                if self.is_closed:
                    return Settled(gave_up="stopped")
                with self._noting_flight():
                    raw, verdict, attempt = await self._attempt(endpoint, request)
                    self._adapt(endpoint, window, verdict)
                    settled = await self._conclude(endpoint, request, raw, verdict, attempt, tries)
            if settled is not None:
                return settled
            wait = self._time_to_wait(endpoint, tries, verdict)
            if wait is None:
                return await self._give_up(endpoint, request, raw, verdict, tries)
            self.retries[verdict.reason] += 1
            await asyncio.sleep(wait)  # no slot is held meanwhile

    @property
    def is_closed(self) -> bool:
        """Whether no request may leave any more."""
        return self.draining or self.cancel.is_set()

    async def check_refusals(self) -> None:
        """Call it when nothing is left to ask.

        Raises:
            UsageError: every request was refused, so it is the config that is refused and not the rows.
        """
        if self._held and not self.proven:
            raise refused_error(self.endpoints[0], len(self._held), snippet(self._held[0].stored.body))
        await self._believe(self._held)

    def silent_s(self) -> float:
        """Seconds for which no endpoint has answered although asked; 0 while any does, or all are restarting."""
        return min((endpoint.limit.silent_s for endpoint in self.endpoints if endpoint.up), default=0.0)

    async def _pick(self, tries: Tries) -> Endpoint:
        """The least loaded endpoint; waits while all of them are being restarted, which costs no budget."""
        while not (up := [endpoint for endpoint in self.endpoints if endpoint.up]):
            await asyncio.sleep(RESTART_POLL_S)
            tries.asked_to_wait += RESTART_POLL_S
        return up[0] if len(up) == 1 else min(up, key=lambda endpoint: endpoint.limit.load)

    async def _attempt(self, endpoint: Endpoint, request: Request) -> tuple[Raw | None, Verdict, int]:
        key = endpoint.read_key()
        attempt = await self.recorder.intend(bytes.fromhex(request.key), self.sampling.max_tokens)
        ask = Ask(endpoint.model, request.messages, self.sampling, endpoint.max_tokens_field)
        try:
            raw = await send(self.session, endpoint.url, endpoint.wire.headers(key), key, endpoint.wire.body(ask))
        except TimeoutError:
            return None, judge_transport("timeout", f"no answer within {self.retry.timeout_s:g} s"), attempt
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
            return None, judge_transport("cut_body", "the connection ended before the answer did"), attempt
        except (aiohttp.ClientError, OSError) as error:
            return None, judge_transport("connection", why_unconnected(error)), attempt
        if raw is None:
            return None, Verdict(Action.REJECT, "oversize"), attempt
        verdict = judge(endpoint.wire.read, raw.status, raw.headers, raw.body)
        return raw, about_this_row(verdict) if self.proven else verdict, attempt

    def _adapt(self, endpoint: Endpoint, window: int, verdict: Verdict) -> None:
        """Let the outcome change how much this endpoint gets."""
        if verdict.action in (Action.ANSWER, Action.REJECT):
            endpoint.limit.succeeded()
            self._answered += 1
        elif verdict.overload:
            endpoint.limit.overloaded(window)
        else:
            # The first failure since an answer, not each of hundreds; what stops everything has an error of its own.
            if endpoint.limit.silent_s == 0.0 and verdict.action is not Action.ABORT:
                what, budget = f"{verdict.reason}: {verdict.detail}", self.retry.budget_s
                log.warning("%s does not answer (%s); trying again for up to %g s", endpoint.url, what, budget)
            endpoint.limit.failed()
        if verdict.retry_after is not None:
            endpoint.limit.pause(min(verdict.retry_after, self.retry.budget_s))  # for all rows, not only this one

    async def _conclude(
        self, endpoint: Endpoint, request: Request, raw: Raw | None, verdict: Verdict, attempt: int, tries: Tries
    ) -> Settled | None:
        """Store what ends a request; None if it is to be tried again."""
        match verdict.action:
            case Action.ANSWER:
                await self.recorder.settle(attempt, "answer", self._stored(endpoint, request, raw, None))
                self.proven = True
                await self._believe([held for held in self._held if held.reason != FORBIDDEN or held.attempt < attempt])
                return Settled(tokens=0 if verdict.reply is None else verdict.reply.completion_tokens or 0)
            case Action.REJECT:
                explicit = verdict.reason if raw is None or verdict.reason == FORBIDDEN else None
                await self._refuse(attempt, self._stored(endpoint, request, raw, explicit), verdict, endpoint)
                log.warning("%s refused: %s %s", request.prompt_id, verdict.reason, verdict.detail)
                return Settled(rejected=verdict.reason)
            case Action.ABORT:
                self.draining = True  # before those that wait for our slot are let in
                await self.recorder.settle(attempt, "abort")
                raise abort_error(endpoint, verdict)
            case Action.STRIKE if tries.strikes + 1 >= STRIKES:
                stored = self._stored(endpoint, request, raw, verdict.reason)
                await self.recorder.settle(attempt, "reject", stored)
                log.warning("%s has no usable answer: %s %s", request.prompt_id, verdict.reason, verdict.detail)
                return Settled(rejected=verdict.reason)
            case _:
                tries.strikes += verdict.action is Action.STRIKE
                await self.recorder.settle(attempt, f"retry:{verdict.reason}")
                return None

    async def _refuse(self, attempt: int, stored: Stored, verdict: Verdict, endpoint: Endpoint) -> None:
        """Store a refused row. `bad_request` is held back until the teacher has answered anything at all: before that
        the fault may be the config's, and a stored refusal would outlive its correction. `forbidden` is held back
        until a request that left later is answered: a key that was withdrawn meanwhile looks the same."""
        if verdict.reason != FORBIDDEN and (verdict.reason != "bad_request" or self.proven):
            await self.recorder.settle(attempt, "reject", stored)
            return
        self._held.append(Held(attempt, verdict.reason, stored))
        await self.recorder.settle(attempt, "reject")
        if len(self._held) < REFUSALS_IN_A_ROW:
            return
        if verdict.reason == FORBIDDEN:
            raise abort_error(endpoint, Verdict(Action.ABORT, "status:403", abort=Abort.KEY))
        raise refused_error(endpoint, len(self._held), verdict.detail)

    async def _believe(self, believed: list[Held]) -> None:
        self._held = [held for held in self._held if held not in believed]
        for held in believed:
            await self.recorder.keep(held.stored)

    @contextmanager
    def _noting_flight(self) -> Iterator[None]:
        """While the request of this task is out; such tasks are waited for when everything else stops."""
        task = asyncio.current_task()
        assert task is not None
        self.in_flight.add(task)
        try:
            yield
        finally:
            self.in_flight.discard(task)

    async def _give_up(
        self, endpoint: Endpoint, request: Request, raw: Raw | None, verdict: Verdict, tries: Tries
    ) -> Settled:
        """The time budget is used up: the row stays pending, unless others were answered while it got nonsense."""
        if verdict.reason != BAD_PAYLOAD or self._answered == tries.answered_before:
            return Settled(gave_up=verdict.reason)
        await self.recorder.keep(self._stored(endpoint, request, raw, BAD_PAYLOAD))
        log.warning("%s has no usable answer: %s", request.prompt_id, verdict.detail)
        return Settled(rejected=BAD_PAYLOAD)

    def _time_to_wait(self, endpoint: Endpoint, tries: Tries, verdict: Verdict) -> float | None:
        """Seconds until the next try (what the server asked for, plus full jitter), None when the budget is used up.

        Waits that the server asked for do not count against the row's budget.

        Raises:
            Incomplete: the server asks for a longer wait than the whole budget.
        """
        now = time.monotonic()
        if tries.first_failure is None:
            tries.first_failure, tries.answered_before = now, self._answered
        asked = 0.0 if verdict.retry_after is None else verdict.retry_after
        if asked > self.retry.budget_s:
            what = f"the API asks us to wait {asked:.0f} s ({verdict.reason}), longer than `retry.budget_s`"
            raise Incomplete(what, where=endpoint.host, todo="run again later; answers received so far are kept")
        tries.asked_to_wait += asked
        bound = min(self.retry.max_wait_s, self.retry.first_wait_s * 2 ** min(tries.failures, 30))
        wait = asked + random.uniform(0, bound)
        tries.failures += 1
        return None if now + wait - tries.first_failure - tries.asked_to_wait > self.retry.budget_s else wait

    def _stored(self, endpoint: Endpoint, request: Request, raw: Raw | None, rejected: str | None) -> Stored:
        return Stored(
            key=bytes.fromhex(request.key),
            cap=self.sampling.max_tokens,
            stored_ms=now_ms(),
            teacher=self.teacher,
            model=endpoint.model,
            engine=endpoint.engine,
            wire=endpoint.wire.name,
            status=0 if raw is None else raw.status,
            rejected=rejected,
            body=b"" if raw is None else raw.body,
            room=self.room,
        )
