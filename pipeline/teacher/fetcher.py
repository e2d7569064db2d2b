"""One teacher, asked for what is not stored yet as often as wanted: its servers, its budget and its event loop."""

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import aiohttp

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_batch import BatchConfig
from pipeline.core.config_budget import Spending
from pipeline.core.config_drift import Canaries
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import Retry
from pipeline.core.runs import hold_lock
from pipeline.core.stage import Context, Json, check_cancelled
from pipeline.teacher.accounts import spent_by
from pipeline.teacher.batch.door import holding_jobs, in_flight
from pipeline.teacher.batch.passes import Means, pass_by_jobs
from pipeline.teacher.batch.tracker import held_by_jobs
from pipeline.teacher.budget import Amount
from pipeline.teacher.canary import ask_canaries, canary_requests
from pipeline.teacher.client import Client
from pipeline.teacher.drift import Drift
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.fetch import Counts, Fetch, Work, fetch_hits
from pipeline.teacher.gate import Entrance
from pipeline.teacher.logprobs import started_for
from pipeline.teacher.lookup import look_up_all
from pipeline.teacher.loop import Loop
from pipeline.teacher.prepare import prepare
from pipeline.teacher.prices import Price, price_of
from pipeline.teacher.recorder import Recorder
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.server import Serving, serving
from pipeline.teacher.spending import Purse, check_priced
from pipeline.teacher.temperature import settle_scale
from pipeline.teacher.transport import open_session

log = logging.getLogger(__name__)


class Fetcher:
    """Asks one teacher for what is not stored yet, as often as wanted. A context manager.

    Servers are started, and the budget is held, when the first answer is missing, and until the end; where all answers
    are stored nothing is started.

    Args:
        store: where answers are looked up and kept.
        spending: whose budget the requests count in.
        may_miss: rows that may stay without an answer; one more is an error.
        batch: how jobs are made in batch mode; None: online.
    """

    def __init__(
        self,
        store: ResponseStore,
        teacher: LocalServer | ApiTeacher,
        retry: Retry,
        ctx: Context,
        spending: Spending,
        may_miss: int = 0,
        batch: BatchConfig | None = None,
    ) -> None:
        self.store, self._teacher, self._retry, self._ctx = store, teacher, retry, ctx
        self._spending, self._may_miss, self._batch = spending, may_miss, batch
        self._price = price_of(teacher)
        self._recorder = Recorder(store, spending.run, spending.teacher)  # one: attempts of a segment are numbered
        self._stack = ExitStack()
        self._open: Open | None = None
        self._total = Counts()
        """Since servers and budget were taken."""
        self._given_up: dict[str, str] = {}
        self._missing = 0
        self._is_proven = False
        self._scale_is_settled = False
        self.canaries: tuple[Canaries, list[Request]] | None = None
        """Prompts that are asked anew before anything else is asked, once, and what follows from their answers."""

    def __enter__(self) -> "Fetcher":
        check_priced(self._spending, self._price)
        return self

    def __exit__(self, *raised: object) -> None:
        self.rest()

    def rest(self) -> None:
        """Stop servers and give the budget back until more is asked."""
        self._stack.close()
        self._open, self._total = None, Counts()

    @property
    def given_up(self) -> Mapping[str, str]:
        """Keys of requests that stay without an answer for now -> class of their last failure."""
        return self._given_up

    @property
    def missing(self) -> int:
        """Rows behind them."""
        return self._missing

    def fetch(self, asked: Asked, requests: Iterable[Request], *, is_first: bool = True) -> Counts:
        """Make sure that each request has a stored answer or refusal.

        Args:
            asked: how; the requests' keys come from it.
            requests: iterated once, while the first are asked.
            is_first: False in the rounds after the first, for rows that have an answer already: they do not advance the
                step's progress, and none of them may stay without what the round asks.

        Raises:
            Incomplete: rows stay pending, or the budget is reached; what was answered is stored.
            UsageError: the teacher cannot be asked like this at all, or money is capped and its price unknown.
            Interrupted: a signal asked us to stop; requests in flight had `GRACE_S` seconds to finish.
            RunLocked: another process is spending this budget.
        """
        self._is_proven |= not is_first
        counts, lookup = Counts(), look_up_all(self.store, asked, requests)
        count = self._ctx.progress.advance if is_first else _count_nothing
        try:
            for looked in lookup:
                check_cancelled(self._ctx)
                if looked.misses:
                    may_miss = max(0, self._may_miss - self._missing) if is_first else 0
                    self.ask_for(asked, Work(looked, lookup, counts, count), may_miss)
                    break
                fetch_hits(looked, counts, count)
        finally:
            self._total.add(counts)
            self._given_up |= counts.given_up
            self._missing += counts.pending.total()
            self._is_proven |= counts.is_proven
        return counts

    def ask_for(self, asked: Asked, work: Work, may_miss: int = 0) -> None:
        """Ask for what a look-up misses, from the first chunk that misses anything."""
        opened = self._opened(asked)
        means = replace(opened.means, may_miss=may_miss)
        self._settle_scale(opened, asked, work)
        left = pass_by_jobs(means, opened.loop, asked, work, proven=self._knows_teacher(work))
        if left is None:
            return
        self._ask_canaries(opened, asked, left)
        client = self._client(opened, asked, left)
        opened.loop.run(Fetch(client, left, self._ctx, opened.serving.supervise, may_miss).run())

    def _knows_teacher(self, work: Work) -> bool:
        """Whether the teacher has answered anything, in this run or before."""
        return self._is_proven or work.counts.is_proven or work.looked.answered > 0

    def _ask_canaries(self, opened: "Open", asked: Asked, work: "Work") -> None:
        if self.canaries is None:
            return
        rules, prompts = self.canaries
        how, requests = canary_requests(self._teacher, asked, prompts)
        client = self._client(opened, how, work)
        opened.loop.run(ask_canaries(client, self.store, how, requests, rules, self._ctx))
        self.canaries = None

    def _settle_scale(self, opened: "Open", asked: Asked, work: "Work") -> None:
        if asked.logprobs is None or self._scale_is_settled:
            return

        def client_for(how: Asked, endpoints: Sequence[Endpoint]) -> Client:
            client = self._client(opened, how, work)
            return replace(client, endpoints=endpoints, entrance=Entrance([each.gate for each in endpoints]))

        endpoints = opened.serving.endpoints[: 1 if isinstance(self._teacher, LocalServer) else None]
        opened.loop.run(settle_scale(client_for, self.store, asked, endpoints, self._ctx))
        self._scale_is_settled = True

    def _client(self, opened: "Open", asked: Asked, work: "Work") -> Client:
        return Client(
            session=opened.session,
            endpoints=opened.serving.endpoints,
            entrance=Entrance([endpoint.gate for endpoint in opened.serving.endpoints]),
            recorder=opened.recorder,
            purse=opened.purse,
            quarantine=opened.serving.quarantine,
            drift=Drift.of(self._teacher, asked.identity, self._ctx) if isinstance(self._teacher, ApiTeacher) else None,
            teacher=asked.identity,
            sampling=asked.sampling,
            room=asked.room,
            retry=self._retry,
            proven=self._knows_teacher(work),
            cancel=self._ctx.cancel,
        )

    def _opened(self, asked: Asked) -> "Open":
        """What asking needs, made at first use: it is given back in the opposite order."""
        if self._open is not None:
            return self._open
        stack, ctx, spending = self._stack, self._ctx, self._spending
        stack.enter_context(_holding_budget(spending, ctx.data / "responses"))
        tracker = stack.enter_context(holding_jobs(ctx.data / "responses", asked.identity, self._batch))
        jobs = partial(held_by_jobs, ctx.data / "responses", spending.run)
        purse = Purse(spending, self._price, _spent(spending, self._price, ctx, asked), ctx.resume_command, jobs)
        stack.callback(self._report, purse)
        loop = Loop()
        stack.callback(loop.close)
        served = AsyncExitStack()
        stack.callback(lambda: loop.run(served.aclose()))
        session, serving = loop.run(self._serve(served, asked))
        recorder = self._recorder
        batch = (self._batch, ctx, self.store, recorder, purse, tracker, self._may_miss)
        means = Means(self._teacher, self._retry, spending, *batch)
        self._open = Open(loop, session, serving, recorder, purse, means)
        return self._open

    async def _serve(self, stack: AsyncExitStack, asked: Asked) -> tuple[aiohttp.ClientSession, Serving]:
        session = await stack.enter_async_context(open_session(self._retry.timeout_s))
        teacher = started_for(self._teacher, asked.logprobs)
        served = await stack.enter_async_context(serving(teacher, session, self._ctx, asked))
        for endpoint in served.endpoints:
            prepare(endpoint, asked, teacher.kind)
        return session, served

    def _report(self, purse: Purse) -> None:
        retries: dict[str, Json] = {**dict(sorted(self._total.retries.items()))}
        facts: dict[str, Json] = {"asked": self._total.asked, "hits": self._total.hits, "retries": retries}
        self._ctx.events.emit("teacher_asked", teacher=self._spending.teacher, **facts, **purse.report())
        log.info("%s: %s", self._ctx.step, purse.summary())


@dataclass(frozen=True, slots=True)
class Open:
    """What asking a teacher needs."""

    loop: Loop
    session: aiohttp.ClientSession
    serving: Serving
    recorder: Recorder
    purse: Purse
    means: Means


def _count_nothing(count: int = 1, *, tokens: int = 0, rejected: int = 0) -> None:
    """For rows that were counted before."""


def _holding_budget(spending: Spending, responses: Path) -> AbstractContextManager[None]:
    """Where there are caps, spend alone: two runs of one budget (`--set` makes another run, not another budget) would
    each spend all of it."""
    return hold_lock(responses / f"budget-{spending.run}.lock") if spending.is_capped else contextlib.nullcontext()


def _spent(spending: Spending, price: Price | None, ctx: Context, asked: Asked) -> dict[str | None, Amount]:
    """What the run has spent so far, where that matters, and what jobs that nobody waits for here may still cost."""
    if not spending.is_capped:
        return {}
    responses = ctx.data / "responses"
    prices = {name: Price.of(given) for name, given in spending.prices.items()} | {spending.teacher or "": price}
    spent = spent_by(responses, spending.run, prices, spending.budget)
    jobs = in_flight(responses, spending, asked.identity)
    return {name: spent.get(name, Amount()) + jobs.get(name, Amount()) for name in {*spent, *jobs}}
