"""Gets every answer that is not stored yet: a producer looks requests up, workers ask, a watch ends it in time."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.core.errors import Incomplete, PipelineError
from pipeline.core.stage import Context, check_cancelled
from pipeline.teacher.client import Client, Settled
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.lookup import Looked
from pipeline.teacher.request import Request

log = logging.getLogger(__name__)

QUEUE_ROWS = 2048
"""Requests that wait for a worker."""
GRACE_S = 10.0
"""How long requests in flight may still finish after everything else has stopped."""
POLL_S = 0.1


@dataclass(slots=True)
class Counts:
    """What one fetch did.

    Attributes:
        hits: requests whose answer was stored.
        asked: distinct requests that were sent.
        cut: rows whose answer ended at its cap.
        rejected: rows that were refused.
        pending: class of failure -> rows that stay pending.
        given_up: key of each of them -> that class.
        retries: class of failure -> how often something was tried again.
    """

    hits: int = 0
    asked: int = 0
    cut: int = 0
    rejected: int = 0
    pending: Counter[str] = field(default_factory=Counter)
    given_up: dict[str, str] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)

    @property
    def is_proven(self) -> bool:
        """Whether the teacher has answered anything, as far as these counts know."""
        return self.hits > 0 or self.asked > self.pending.total()

    def add(self, other: "Counts") -> None:
        """Add what another pass did."""
        self.hits += other.hits
        self.asked += other.asked
        self.cut += other.cut
        self.rejected += other.rejected
        self.pending += other.pending
        self.given_up |= other.given_up
        self.retries += other.retries


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass of the event loop has to do.

    Attributes:
        looked: the first chunk with a request that misses its answer.
        lookup: the chunks after it.
        counts: what is done so far.
        count: advances the step's progress.
    """

    looked: Looked
    lookup: Iterator[Looked]
    counts: Counts
    count: "Count"


class Count(Protocol):
    """How a pass says how far it is; see `Progress.advance`."""

    def __call__(self, count: int = 1, *, tokens: int = 0, rejected: int = 0) -> None: ...


def fetch_hits(looked: Looked, counts: Counts, count: Count) -> None:
    """Count the requests of a chunk whose answer is stored."""
    hits = looked.answered + looked.rejected
    counts.hits += hits
    counts.cut += looked.cut
    counts.rejected += looked.rejected
    if hits > 0:
        count(hits, rejected=looked.rejected)


class Fetch:
    """One pass of the event loop over the requests that miss their answers."""

    def __init__(
        self,
        client: Client,
        work: Work,
        ctx: Context,
        supervise: Callable[[], Coroutine[Any, Any, None]],
        may_miss: int = 0,
    ) -> None:
        self._client, self._ctx, self._supervise, self._may_miss = client, ctx, supervise, may_miss
        self._first, self._lookup, self._counts, self._advance = work.looked, work.lookup, work.counts, work.count
        self._rows_of: Counter[str] = Counter()
        """Rows behind each key that is queued or asked for now."""
        self._settled_lately: dict[str, Settled] = {}
        """How keys ended since the running look-up began: it may not have seen their answers."""
        self._is_produced = False
        """Whether every miss is known."""

    async def run(self) -> None:
        """Ask for the misses of the first chunk and of the rest of the look-up."""
        client = self._client
        for endpoint in client.endpoints:
            endpoint.gate.limit.forgive()  # how long it was silent in an earlier pass says nothing of this one
        queue: asyncio.Queue[Request | None] = asyncio.Queue(maxsize=QUEUE_ROWS)
        count = 2 * sum(endpoint.gate.limit.maximum for endpoint in client.endpoints)  # half of them may wait
        workers = [asyncio.create_task(self._ask(client, queue)) for _ in range(count)]
        producer = asyncio.create_task(self._produce(self._first, queue, count))
        finished = asyncio.gather(producer, *workers)
        watches: list[asyncio.Future[Any]] = [
            asyncio.create_task(self._watch(client)),
            asyncio.create_task(self._supervise()),
        ]
        try:
            await asyncio.wait({finished, *watches}, return_when=asyncio.FIRST_COMPLETED)
            failure = next(
                (task.exception() for task in (*watches, finished) if task.done() and task.exception()), None
            )
            if not finished.done() or failure is not None:
                await _drain(client, [producer, *workers])
        finally:
            await _cancel([producer, *workers, *watches])
            self._counts.retries.update(client.retries)
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
            fetch_hits(looked, self._counts, self._advance)
            for request in looked.misses:
                self._rows_of[request.key] += 1
                if self._rows_of[request.key] == 1 and request.key not in self._settled_lately:
                    await queue.put(request)
                elif request.key in self._settled_lately:
                    self._count(request.key, self._settled_lately[request.key])
            self._settled_lately.clear()
            looked = await asyncio.to_thread(next, self._lookup, None)
        self._is_produced = True
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
            self._counts.given_up[key] = settled.gave_up
            return
        self._counts.cut += rows * settled.is_cut
        rejected = rows if settled.rejected is not None else 0
        self._counts.rejected += rejected
        self._advance(rows, tokens=settled.tokens, rejected=rejected)

    async def _watch(self, client: Client) -> None:
        """Return when a signal asks us to stop, or when the few rows that are left may stay without an answer.

        Raises:
            Incomplete: nobody has answered for the whole time budget of a row that was sent last.
        """
        longest = client.retry.budget_s + min(client.retry.budget_s, client.retry.max_wait_s)
        while not self._ctx.cancel.is_set():
            await asyncio.sleep(POLL_S)
            if client.silent_s() > longest:
                if self._give_up_rest(client):
                    return
                what = f"the teacher has not answered for {longest:g} s, though asked again and again"
                reasons = ", ".join(f"{name} ×{count}" for name, count in client.retries.most_common(3))
                todo = f"when it is back, resume with: {self._ctx.resume_command}"
                raise Incomplete(f"{what} ({reasons})", where=client.endpoints[0].host, todo=todo)

    def _give_up_rest(self, client: Client) -> bool:
        """Give up what is left where so many rows may miss; otherwise nothing happens."""
        left = sum(self._rows_of.values())
        if not self._is_produced or self._counts.pending.total() + left > self._may_miss:
            return False
        reason = next((name for name, _ in client.retries.most_common(1)), "timeout")
        self._counts.pending[reason] += left
        self._counts.given_up |= dict.fromkeys(self._rows_of, reason)
        self._rows_of.clear()
        return True

    def _check_pending(self, endpoint: Endpoint) -> None:
        pending = self._counts.pending.total()
        if pending <= self._may_miss:
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
