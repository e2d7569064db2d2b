"""Gets every answer that is not stored yet: a producer looks requests up, workers ask, a watch ends it in time."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import uvloop

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_budget import Spending
from pipeline.core.config_teacher import Retry, VllmTeacher
from pipeline.core.errors import Incomplete, PipelineError
from pipeline.core.runs import hold_lock
from pipeline.core.stage import Context, Json, check_cancelled
from pipeline.teacher.accounts import spent_by
from pipeline.teacher.budget import Amount
from pipeline.teacher.client import Client, Settled
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.gate import Entrance
from pipeline.teacher.prices import Price, price_of
from pipeline.teacher.recorder import Recorder
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.server import serving
from pipeline.teacher.spending import Purse, check_priced
from pipeline.teacher.transport import open_session

log = logging.getLogger(__name__)

LOOKUP_ROWS = 65_536
"""Requests that are looked up at a time. Each look-up reads the whole store: their keys lie anywhere in it."""
QUEUE_ROWS = 2048
"""Requests that wait for a worker."""
GRACE_S = 10.0
"""How long requests in flight may still finish after everything else has stopped."""
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Looked:
    """A chunk of requests after the look-up in the response store."""

    misses: list[Request]
    answered: int
    rejected: int


@dataclass(slots=True)
class Counts:
    """What one fetch did.

    Attributes:
        hits: requests whose answer was stored.
        asked: distinct requests that were sent.
        pending: class of failure -> rows that stay pending.
    """

    hits: int = 0
    asked: int = 0
    pending: Counter[str] = field(default_factory=Counter)


def fetch_missing(
    store: ResponseStore,
    teacher: VllmTeacher | ApiTeacher,
    asked: Asked,
    retry: Retry,
    requests: Iterable[Request],
    ctx: Context,
    spending: Spending,
) -> Counts:
    """Make sure that each request has a stored answer or refusal; starts no server when all of them have.

    Raises:
        Incomplete: rows stay pending, or the budget is reached; what was answered is stored.
        UsageError: the teacher cannot be asked like this at all, or money is capped and its price unknown.
        Interrupted: a signal asked us to stop; requests in flight had `GRACE_S` seconds to finish.
        RunLocked: another process is spending this budget.
    """
    price = price_of(teacher)
    check_priced(spending, price)
    lookup = _look_up(store, asked, requests)
    counts = Counts()
    for looked in lookup:
        check_cancelled(ctx)
        if looked.misses:
            with _holding_budget(spending, ctx.data / "responses"):
                purse = Purse(spending, price, _spent(spending, price, ctx), ctx.resume_command)
                recorder = Recorder(store, spending.run, spending.teacher)
                fetch = Fetch(store, teacher, asked, retry, ctx, counts, lookup, recorder, purse)
                _run_in_loop(fetch.run(looked))
            break
        fetch_hits(looked, counts, ctx)
    return counts


def _holding_budget(spending: Spending, responses: Path) -> AbstractContextManager[None]:
    """Where there are caps, spend alone: two runs of one budget (`--set` makes another run, not another budget) would
    each spend all of it."""
    return hold_lock(responses / f"budget-{spending.run}.lock") if spending.is_capped else contextlib.nullcontext()


def _spent(spending: Spending, price: Price | None, ctx: Context) -> dict[str | None, Amount]:
    """What the run has spent so far, where that matters."""
    return spent_by(ctx.data / "responses", spending.run, spending.teacher, price) if spending.is_capped else {}


def fetch_hits(looked: Looked, counts: Counts, ctx: Context) -> None:
    """Count the requests of a chunk whose answer is stored."""
    hits = looked.answered + looked.rejected
    counts.hits += hits
    if hits > 0:
        ctx.progress.advance(hits, rejected=looked.rejected)


def _look_up(store: ResponseStore, asked: Asked, requests: Iterable[Request]) -> Iterator[Looked]:
    rest = iter(requests)
    while chunk := list(islice(rest, LOOKUP_ROWS)):
        wanted = {bytes.fromhex(request.key): asked.sampling.max_tokens for request in chunk}
        found = store.get_many(wanted, asked.room)
        outcomes = [found.get(bytes.fromhex(request.key)) for request in chunk]
        yield Looked(
            misses=[request for request, outcome in zip(chunk, outcomes, strict=True) if outcome is None],
            answered=sum(outcome is not None and outcome.rejected is None for outcome in outcomes),
            rejected=sum(outcome is not None and outcome.rejected is not None for outcome in outcomes),
        )


class Fetch:
    """One run of the event loop."""

    def __init__(
        self,
        store: ResponseStore,
        teacher: VllmTeacher | ApiTeacher,
        asked: Asked,
        retry: Retry,
        ctx: Context,
        counts: Counts,
        lookup: Iterator[Looked],
        recorder: Recorder,
        purse: Purse,
    ) -> None:
        self._store, self._teacher, self._asked, self._retry = store, teacher, asked, retry
        self._ctx, self._counts, self._lookup = ctx, counts, lookup
        self._recorder, self._purse = recorder, purse
        self._rows_of: Counter[str] = Counter()
        """Rows behind each key that is queued or asked for now."""
        self._settled_lately: dict[str, Settled] = {}
        """How keys ended since the running look-up began: it may not have seen their answers."""

    async def run(self, first: Looked) -> None:
        """Ask for the misses of `first` and of the rest of the look-up."""
        async with open_session(self._retry.timeout_s) as session, serving(self._teacher, session, self._ctx) as served:
            client = Client(
                session=session,
                endpoints=served.endpoints,
                entrance=Entrance([endpoint.gate for endpoint in served.endpoints]),
                recorder=self._recorder,
                purse=self._purse,
                teacher=self._asked.identity,
                sampling=self._asked.sampling,
                room=self._asked.room,
                retry=self._retry,
                proven=self._counts.hits > 0 or first.answered > 0,
                cancel=self._ctx.cancel,
            )
            try:
                await self._work(client, first, served.supervise())
            finally:
                retries: dict[str, Any] = dict(sorted(client.retries.items()))
                facts: dict[str, Json] = {"asked": self._counts.asked, "hits": self._counts.hits, "retries": retries}
                self._ctx.events.emit("teacher_asked", **facts, **self._purse.report())
                log.info("%s: %s", self._ctx.step, self._purse.summary())

    async def _work(self, client: Client, first: Looked, supervise: Coroutine[Any, Any, None]) -> None:
        queue: asyncio.Queue[Request | None] = asyncio.Queue(maxsize=QUEUE_ROWS)
        count = 2 * sum(endpoint.gate.limit.maximum for endpoint in client.endpoints)  # half of them may wait
        workers = [asyncio.create_task(self._ask(client, queue)) for _ in range(count)]
        producer = asyncio.create_task(self._produce(first, queue, count))
        finished = asyncio.gather(producer, *workers)
        watches: list[asyncio.Future[Any]] = [asyncio.create_task(self._watch(client)), asyncio.create_task(supervise)]
        try:
            await asyncio.wait({finished, *watches}, return_when=asyncio.FIRST_COMPLETED)
            failure = next(
                (task.exception() for task in (*watches, finished) if task.done() and task.exception()), None
            )
            if not finished.done() or failure is not None:
                await _drain(client, [producer, *workers])
        finally:
            await _cancel([producer, *workers, *watches])
            with contextlib.suppress(asyncio.CancelledError, PipelineError):
                await finished
        if failure is not None:
            raise failure
        check_cancelled(self._ctx)
        await client.check_refusals()
        self._check_pending(client.endpoints[0])

    async def _produce(self, looked: Looked | None, queue: asyncio.Queue[Request | None], workers: int) -> None:
        """Queue the misses, each key once; look-ups run in a thread while workers ask."""
        while looked is not None:
            fetch_hits(looked, self._counts, self._ctx)
            for request in looked.misses:
                self._rows_of[request.key] += 1
                if self._rows_of[request.key] == 1 and request.key not in self._settled_lately:
                    await queue.put(request)
                elif request.key in self._settled_lately:
                    self._count(request.key, self._settled_lately[request.key])
            self._settled_lately.clear()
            looked = await asyncio.to_thread(next, self._lookup, None)
        for _ in range(workers):
            await queue.put(None)

    async def _ask(self, client: Client, queue: asyncio.Queue[Request | None]) -> None:
        while (request := await queue.get()) is not None and not client.is_closed:
            self._counts.asked += 1
            settled = await client.settle(request)
            self._settled_lately[request.key] = settled
            self._count(request.key, settled)

    def _count(self, key: str, settled: Settled) -> None:
        rows = self._rows_of.pop(key)
        if settled.gave_up is not None:
            self._counts.pending[settled.gave_up] += rows
            return
        rejected = rows if settled.rejected is not None else 0
        self._ctx.progress.advance(rows, tokens=settled.tokens, rejected=rejected)

    async def _watch(self, client: Client) -> None:
        """Return when a signal asks us to stop.

        Raises:
            Incomplete: nobody has answered for the whole time budget of a row that was sent last.
        """
        longest = self._retry.budget_s + min(self._retry.budget_s, self._retry.max_wait_s)
        while not self._ctx.cancel.is_set():
            await asyncio.sleep(POLL_S)
            if client.silent_s() > longest:
                what = f"the teacher has not answered for {longest:g} s, though asked again and again"
                reasons = ", ".join(f"{name} ×{count}" for name, count in client.retries.most_common(3))
                todo = f"when it is back, resume with: {self._ctx.resume_command}"
                raise Incomplete(f"{what} ({reasons})", where=client.endpoints[0].host, todo=todo)

    def _check_pending(self, endpoint: Endpoint) -> None:
        pending = self._counts.pending.total()
        if pending == 0:
            return
        reasons = ", ".join(f"{name} ×{count}" for name, count in self._counts.pending.most_common(3))
        what = f"{pending} rows have no answer yet ({reasons}); all others are stored"
        raise Incomplete(what, where=endpoint.host, todo=f"resume with: {self._ctx.resume_command}")


async def _drain(client: Client, tasks: list[asyncio.Task[None]]) -> None:
    """Let no request leave any more, and give those in flight `GRACE_S` seconds to be stored."""
    client.draining = True
    await _cancel([task for task in tasks if task not in client.in_flight])
    flying = [task for task in tasks if not task.done()]
    log.info("stopping: waiting up to %g s for %d answers in flight", GRACE_S, len(flying))
    deadline = asyncio.get_running_loop().time() + GRACE_S
    while client.in_flight and asyncio.get_running_loop().time() < deadline:
        await asyncio.wait(client.in_flight, timeout=POLL_S)


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _run_in_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run on a fresh loop: in this thread, or in another where this one runs a loop already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(_run_in_loop, work).result()
