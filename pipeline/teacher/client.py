"""One request to a teacher, tried until it is settled. Retries are ours: no library repeats a request on its own."""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

import aiohttp

from pipeline.core.config_teacher import Retry, Sampling
from pipeline.core.errors import Incomplete
from pipeline.teacher.budget import surely_free
from pipeline.teacher.complaints import abort_error, refused_error
from pipeline.teacher.drift import Drift
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.gate import Entrance, Outcome, Ticket, outcome_of_attempt
from pipeline.teacher.logprobs import with_logprobs
from pipeline.teacher.poison import NOTICE_S, Quarantine
from pipeline.teacher.recorder import Recorder, now_ms
from pipeline.teacher.request import Request
from pipeline.teacher.responses import ENGINE_CRASH
from pipeline.teacher.segment import Ended, Stored
from pipeline.teacher.spending import Hold, Purse
from pipeline.teacher.transport import Raw, most_bytes, request_id, send
from pipeline.teacher.trying import Attempted, Held, Tries
from pipeline.teacher.verdict import (
    BAD_PAYLOAD,
    FORBIDDEN,
    Abort,
    Action,
    Verdict,
    about_this_row,
    as_asked,
    judge,
    judge_transport,
    snippet,
    why_unconnected,
)
from pipeline.teacher.wire import Reply

log = logging.getLogger(__name__)

STRIKES = 3
"""Completions without content after which a row is rejected."""
REFUSALS_IN_A_ROW = 20
"""Refused requests, without an answer in between, that show a wrong config or key."""
BYTES_PER_TOKEN = 4
"""A guess, for rates only: what a reply says corrects it."""


@dataclass(frozen=True, slots=True)
class Settled:
    """How a request ended for this run.

    Attributes:
        rejected: the reason, if the row is refused.
        gave_up: class of the last failure, if it stays pending.
        tokens: completion tokens of an answer.
        is_cut: whether it ended at its cap.
    """

    rejected: str | None = None
    gave_up: str | None = None
    tokens: int = 0
    is_cut: bool = False


@dataclass(slots=True)
class Client:
    """Sends requests to endpoints and stores what comes back before anybody reads it.

    Attributes:
        session: see `open_session`.
        endpoints: where to send; all serve one model in one format.
        entrance: the line in front of them; the least loaded that lets somebody in gets the next request.
        teacher: identity of the teacher, stored with each answer.
        sampling, retry: from the config.
        purse: the budget that requests count in.
        quarantine: of requests in whose company an engine died; None: the engines are not ours.
        drift: hears each answer; None: the model is ours and does not change.
        heard: is told each answer once it is stored.
        room: most tokens of prompt and completion together, stored with each answer.
        proven: whether this teacher has answered anything yet, in this run or before.
        retries: class of failure -> how often something was tried again.
        in_flight: tasks whose request has left and is not stored yet.
        cancel: set by a signal that asks us to stop: no request leaves after it.
        draining: no request may leave any more, for whatever reason.
    """

    session: aiohttp.ClientSession
    endpoints: Sequence[Endpoint]
    entrance: Entrance
    recorder: Recorder
    teacher: str
    sampling: Sampling
    retry: Retry
    purse: Purse
    quarantine: Quarantine | None = None
    drift: Drift | None = None
    heard: Callable[[Request, Reply], None] | None = None
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
        try:
            return await self._settle(request)
        finally:
            if self.quarantine is not None:
                self.quarantine.settled(request.key)  # however it ended: nobody waits for it any more

    async def _settle(self, request: Request) -> Settled:
        tries, body = Tries(), self._body(request)
        while True:
            if self.quarantine is not None and self.quarantine.is_poison(request.key):
                return await self._isolate(request, self.quarantine.engine)
            async with self._admit(request, body) as ticket:
                if ticket.is_stale:
                    ticket.settle(Outcome.UNSENT)
                    continue
                endpoint = self.endpoints[ticket.index]
                if tries.first_failure is not None:
                    tries.asked_to_wait += ticket.waited_s  # a place in a line is no failure
                hold = None if self.is_closed else await self._reserve(body, tries)
                if hold is None:
                    ticket.settle(Outcome.UNSENT)
                    return Settled(gave_up="stopped")
                with self._noting_flight():
                    attempt = await self._attempt_at(ticket.index, request, body, hold)
                    self._adapt(endpoint, ticket, attempt)
                    settled = await self._conclude(endpoint, request, attempt, tries)
            if settled is not None:
                return settled
            least_s = 0.0 if self.quarantine is None else NOTICE_S  # the engine may have died of it
            wait = tries.time_to_wait(attempt.verdict, self.retry, self._answered, endpoint.host, least_s)
            if wait is None:
                return await self._give_up(endpoint, request, attempt, tries)
            self.retries[attempt.verdict.reason] += 1
            await asyncio.sleep(wait)  # no slot is held meanwhile

    def _admit(self, request: Request, body: bytes) -> AbstractAsyncContextManager[Ticket]:
        """Wait until a request may leave: in the company it may be in, then for a place at an endpoint."""
        admission = self.entrance.admit(len(body) // BYTES_PER_TOKEN, self.sampling.max_tokens)
        return admission if self.quarantine is None else self._admit_apart(self.quarantine, request, admission)

    @asynccontextmanager
    async def _admit_apart(
        self, quarantine: Quarantine, request: Request, admission: AbstractAsyncContextManager[Ticket]
    ) -> AsyncIterator[Ticket]:
        async with quarantine.admit(request.key) as level, admission as ticket:
            ticket.is_stale = quarantine.is_stale(request.key, level)
            yield ticket

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
        """Seconds for which every endpoint was asked in vain; 0 while any answers, or all are restarting."""
        open_gates = (endpoint.gate for endpoint in self.endpoints if not endpoint.gate.is_shut)
        return min((gate.limit.vain_s for gate in open_gates), default=0.0)

    def _body(self, request: Request) -> bytes:
        """The JSON of a request: one for all endpoints, which serve one model in one format."""
        return self.endpoints[0].body(request, self.sampling)

    async def _reserve(self, body: bytes, tries: Tries) -> Hold | None:
        """Hold the worst case of an attempt; None if no request may leave any more.

        Raises:
            Incomplete: the budget is reached.
        """
        began = time.monotonic()
        try:
            hold = await self.purse.reserve(body, self.sampling.max_tokens)
        except Incomplete:
            self.draining = True  # before those that wait for our slot are let in
            raise
        if tries.first_failure is not None:
            tries.asked_to_wait += time.monotonic() - began
        if not self.is_closed:
            return hold
        self.purse.release(hold)
        return None

    async def _attempt_at(self, index: int, request: Request, body: bytes, hold: Hold) -> Attempted:
        """An attempt at one endpoint, under suspicion while it is not answered in some way."""
        if self.quarantine is None:
            return await self._attempt(self.endpoints[index], request, body, hold)
        is_suspect = self.quarantine.is_suspect(index, request.key)
        self.quarantine.sent(index, request.key)
        attempt = await self._attempt(self.endpoints[index], request, body, hold)
        is_answered = attempt.verdict.action is not Action.RETRY or attempt.verdict.reason == "rate_limited"
        if is_answered or not (attempt.left or is_suspect):
            self.quarantine.unblame(index, request.key)
        return attempt

    async def _isolate(self, request: Request, engine: str) -> Settled:
        """Refuse a request that ends the engine, for as long as the engine is this one."""
        stored = self._stored(self.endpoints[0], request, None, ENGINE_CRASH)
        await self.recorder.keep(replace(stored, engine=engine))
        log.warning("%s ends the engine: it is refused as %s", request.prompt_id, ENGINE_CRASH)
        return Settled(rejected=ENGINE_CRASH)

    async def _attempt(self, endpoint: Endpoint, request: Request, body: bytes, hold: Hold) -> Attempted:
        key = endpoint.read_key()
        wanted, cap = bytes.fromhex(request.key), self.sampling.max_tokens
        number = await self.recorder.intend(wanted, cap, hold.nano, hold.worst.tokens)
        try:
            most = most_bytes(self.sampling.max_tokens, endpoint.logprobs)
            raw = await send(self.session, endpoint.url, endpoint.wire.headers(key), key, body, most)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            is_timeout = isinstance(error, TimeoutError)
            verdict = judge_transport("timeout" if is_timeout else "connection", why_unconnected(error))
            return Attempted(number, hold, None, verdict, left=False)
        except TimeoutError:
            verdict = judge_transport("timeout", f"no answer within {self.retry.timeout_s:g} s")
            return Attempted(number, hold, None, verdict)
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
            verdict = judge_transport("cut_body", "the connection ended before the answer did")
            return Attempted(number, hold, None, verdict)
        except (aiohttp.ClientError, OSError) as error:
            return Attempted(number, hold, None, judge_transport("connection", why_unconnected(error)))
        if raw is None:
            return Attempted(number, hold, None, Verdict(Action.REJECT, "oversize"))
        verdict = judge(endpoint.wire.read, raw.status, raw.headers, raw.body)
        verdict = with_logprobs(verdict, endpoint.wire.name, raw.body, endpoint.logprobs)
        verdict = as_asked(verdict, offers_tools=request.tools is not None)
        verdict = about_this_row(verdict) if self._is_proven(endpoint) else verdict
        return Attempted(number, hold, raw, verdict, request_id=request_id(raw, key))

    def _adapt(self, endpoint: Endpoint, ticket: Ticket, attempt: Attempted) -> None:
        """Let the outcome change how much this endpoint gets."""
        verdict, gate = attempt.verdict, endpoint.gate
        self._answered += verdict.action in (Action.ANSWER, Action.REJECT)
        outcome = outcome_of_attempt(verdict)
        # The first failure since an answer, not each of hundreds; what stops everything has an error of its own.
        is_outage = outcome in (Outcome.FAILED, Outcome.NONSENSE) and verdict.action is not Action.ABORT
        if is_outage and gate.limit.silent_s == 0.0:
            what, budget = f"{verdict.reason}: {verdict.detail}", self.retry.budget_s
            log.warning("%s does not answer (%s); trying again for up to %g s", endpoint.url, what, budget)
        ticket.settle(outcome, *(attempt.used if attempt.left else (0, 0)))
        if not attempt.left:
            gate.take_out()
        if attempt.raw is not None:
            gate.observe(attempt.raw.headers)
        if verdict.retry_after is not None:
            gate.pause(min(verdict.retry_after, self.retry.budget_s))  # for all rows, not only this one

    async def _conclude(self, endpoint: Endpoint, request: Request, attempt: Attempted, tries: Tries) -> Settled | None:
        """Store what ends a request; None if it is to be tried again."""
        raw, verdict = attempt.raw, attempt.verdict
        match verdict.action:
            case Action.ANSWER:
                await self._end(attempt, "answer", self._stored(endpoint, request, raw, None))
                self.proven = endpoint.proven = True
                if self._held:
                    await self._believe([held for held in self._held if held.is_confirmed_by(endpoint, attempt.number)])
                self._hear(endpoint, request, verdict)
                return _answered(verdict.reply)
            case Action.REJECT:
                explicit = verdict.reason if raw is None or verdict.reason == FORBIDDEN else None
                await self._refuse(attempt, self._stored(endpoint, request, raw, explicit), endpoint)
                log.warning("%s refused: %s %s", request.prompt_id, verdict.reason, verdict.detail)
                return Settled(rejected=verdict.reason)
            case Action.ABORT:
                self.draining = True  # before those that wait for our slot are let in
                await self._end(attempt, "abort")
                raise abort_error(endpoint, verdict)
            case Action.STRIKE if tries.strikes + 1 >= STRIKES:
                await self._end(attempt, "reject", self._stored(endpoint, request, raw, verdict.reason))
                log.warning("%s has no usable answer: %s %s", request.prompt_id, verdict.reason, verdict.detail)
                return Settled(rejected=verdict.reason)
            case _:
                tries.strikes += verdict.action is Action.STRIKE
                await self._end(attempt, f"retry:{verdict.reason}")
                return None

    async def _end(self, attempt: Attempted, outcome: str, answer: Stored | None = None) -> None:
        """Note how an attempt ended and what it came to; only then what was held for it is free."""
        status = None if attempt.raw is None else attempt.raw.status
        is_free = not attempt.left or (status is not None and surely_free(status, attempt.verdict.reason))
        used = (0, 0) if is_free else attempt.used
        cost = self.purse.cost(attempt.hold, *used)
        ended = Ended(attempt.number, outcome, status, *used, cost, attempt.request_id)
        await self.recorder.settle(ended, answer)
        self.purse.settle(attempt.hold, ended)

    async def _refuse(self, attempt: Attempted, stored: Stored, endpoint: Endpoint) -> None:
        """Store a refused row. `bad_request` is held back until the same endpoint has answered anything in this run:
        before that the fault may be the config's or the endpoint's, and a stored refusal would outlive its correction.
        `forbidden` is held back until a request that left later is answered: a key that was withdrawn meanwhile looks
        the same."""
        verdict = attempt.verdict
        if verdict.reason != FORBIDDEN and (verdict.reason != "bad_request" or endpoint.proven):
            await self._end(attempt, "reject", stored)
            return
        self._held.append(Held(attempt.number, endpoint.host, verdict.reason, stored))
        await self._end(attempt, "reject")
        if sum(held.host == endpoint.host for held in self._held) < REFUSALS_IN_A_ROW:
            return
        if verdict.reason == FORBIDDEN:
            raise abort_error(endpoint, Verdict(Action.ABORT, "status:403", abort=Abort.KEY))
        raise refused_error(endpoint, len(self._held), verdict.detail)

    def _is_proven(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint's 403 is about a row: the key is good there. Of several each has to show it."""
        return endpoint.proven or (self.proven and len(self.endpoints) == 1)

    def _hear(self, endpoint: Endpoint, request: Request, verdict: Verdict) -> None:
        """An answer is stored: what it says of the engine and of the model.

        Raises:
            Incomplete: another model answers, and the policy is to stop.
        """
        if self.quarantine is not None:
            self.quarantine.settled(request.key)
        if verdict.reply is None:
            return
        if self.heard is not None:
            self.heard(request, verdict.reply)
        if self.drift is None:
            return
        try:
            self.drift.hear(endpoint, verdict.reply)
        except Incomplete:
            self.draining = True  # before those that wait for our slot are let in
            raise

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

    async def _give_up(self, endpoint: Endpoint, request: Request, attempt: Attempted, tries: Tries) -> Settled:
        """The time budget is used up: the row stays pending, unless others were answered while it got nonsense."""
        verdict = attempt.verdict
        if verdict.reason != BAD_PAYLOAD or self._answered == tries.answered_before:
            return Settled(gave_up=verdict.reason)
        await self.recorder.keep(self._stored(endpoint, request, attempt.raw, BAD_PAYLOAD))
        log.warning("%s has no usable answer: %s", request.prompt_id, verdict.detail)
        return Settled(rejected=BAD_PAYLOAD)

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


def _answered(reply: Reply | None) -> Settled:
    if reply is None:
        return Settled()
    return Settled(tokens=reply.completion_tokens or 0, is_cut=reply.finish_reason == "length")
