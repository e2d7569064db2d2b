"""Cuts what is missing into jobs, keeps a few of them open, and sends again what they do not answer."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol

from pipeline.core.config_batch import BatchConfig
from pipeline.core.errors import Interrupted
from pipeline.core.stage import Context
from pipeline.teacher.batch.life import TOO_MUCH, Life
from pipeline.teacher.batch.provider import Look
from pipeline.teacher.batch.settle import EARLIER, Open, Result, hold_of
from pipeline.teacher.batch.tracker import CREATING, INTENDED, Job, Tracker, custom_id, new_token
from pipeline.teacher.recorder import now_ms
from pipeline.teacher.request import Request
from pipeline.teacher.spending import Purse

log = logging.getLogger(__name__)

POLL_S: Final = 0.1
READ_ROWS: Final = 1024
GRACE_S: Final = 10.0
"""How long a job that is being made may still be made after everything else has stopped."""


class Count(Protocol):
    """How rows are counted; see `Progress.advance`."""

    def __call__(self, count: int = 1, *, tokens: int = 0, rejected: int = 0) -> None: ...


@dataclass(frozen=True, slots=True)
class Queued:
    """A request that waits for a job."""

    key: bytes
    body: bytes


@dataclass(slots=True)
class Dispatcher:
    """One run of batch mode.

    Attributes:
        count: advances the step's progress.
        template: a job without lines, as this run makes them.
        body_of: the JSON of a request.
        source: what is missing, in order; read no faster than jobs are made.
        adopted: jobs that were open before.
        online: keys that are to be asked online in the same run.
        pending: class of failure -> rows that stay pending.
        given_up: request key of each of them -> that class.
        cut: rows whose answer ended at its cap.
        rejected: rows that were refused.
        retries: why lines were sent again -> how many.
        lines, jobs: lines that were settled, and jobs that were made.
        left_open: jobs that stay open at the end.
    """

    life: Life
    tracker: Tracker
    purse: Purse
    config: BatchConfig
    ctx: Context
    count: Count
    template: Job
    body_of: Callable[[Request], bytes]
    source: Iterator[Request]
    adopted: list[Open]
    online: list[Request] = field(default_factory=list)
    pending: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    jobs: int = 0
    cut: int = 0
    rejected: int = 0
    given_up: dict[str, str] = field(default_factory=dict)
    left_open: list[Open] = field(default_factory=list)
    _queue: deque[Queued] = field(default_factory=deque)
    _wanted: dict[bytes, list[Request]] = field(default_factory=dict)
    """Rows behind each key that has no answer yet."""
    _settled: dict[bytes, Result] = field(default_factory=dict)
    """Keys that have ended here: the look-up may not have seen that."""
    _again: dict[bytes, str] = field(default_factory=dict)
    """Why a line of a job was not answered, until the job is over."""
    _rounds: Counter[bytes] = field(default_factory=Counter)
    _in_jobs: dict[bytes, str] = field(default_factory=dict)
    """Token of the job that holds a key."""
    _ahead: int = 0
    """Rows that the progress has counted on the provider's word."""
    _is_read: bool = False
    _job_requests: int = 0
    _open_jobs: int = 0

    async def run(self) -> list[Request]:
        """Ask until nothing is left for jobs; returns what is to be asked online.

        Raises:
            Incomplete: the budget is reached, or the provider is down; open jobs stay open.
            UsageError: see `Life.lead`.
            Interrupted: a signal asked us to stop; open jobs stay open.
        """
        self._job_requests, self._open_jobs = self.config.job_requests, self.config.open_jobs
        tasks = {asyncio.create_task(self._care(opened, adopted=True)): opened for opened in self.adopted}
        for opened in self.adopted:
            self._in_jobs.update(dict.fromkeys(opened.sizes, opened.job.token))
        try:
            while True:
                self._check_stop(tasks.values())
                await self._fill(tasks)
                if not self._is_waiting(tasks.values()):
                    break
                done, _ = await asyncio.wait(tasks, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    opened = tasks.pop(task)
                    task.result()
                    self._close(opened, len(self._needed(tasks.values())))
        finally:
            await self._leave(tasks)
        return [*self.online, *(row for rows in self._wanted.values() for row in rows)]

    @property
    def settled(self) -> int:
        """How many requests were answered or refused."""
        return len(self._settled)

    def report(self, opened: Open, result: Result) -> None:
        """What one line came to; called for each."""
        self.lines += 1
        if result.again is not None:
            self._again[result.key] = result.again
            return
        self._settled[result.key] = result
        for request in self._wanted.pop(result.key, []):
            if result.rejected is not None:
                log.warning("%s refused: %s", request.prompt_id, result.rejected)
            self.cut += result.is_cut
            self.rejected += result.rejected is not None
            self._advance(1, tokens=result.tokens, rejected=result.rejected is not None)

    def shown(self, opened: Open, look: Look) -> None:
        """What the provider says of a job."""
        more = min(look.done, opened.job.lines) - opened.shown
        if more > 0 and self._needs(opened):
            opened.shown += more
            self._ahead += more
            self.count(more)

    def _advance(self, rows: int, *, tokens: int = 0, rejected: bool = False) -> None:
        counted = min(self._ahead, rows)
        self._ahead -= counted
        self.count(rows - counted, tokens=tokens, rejected=rows if rejected else 0)

    async def _care(self, opened: Open, *, adopted: bool) -> None:
        if adopted and opened.job.state in (INTENDED, CREATING):
            await self.life.recover(opened)
            if opened.job.state in (INTENDED, CREATING) or not opened.job.is_open:
                return
        await self.life.lead(opened)

    # -------------------------------------------------------------------------------------------- making jobs

    async def _fill(self, tasks: dict[asyncio.Task[None], Open]) -> None:
        """Submit jobs while some may be open and something is missing."""
        while len(self._needed(tasks.values())) < self._open_jobs:
            await self._read()
            if not self._queue:
                return
            taken = self._take(others=bool(self._needed(tasks.values())))
            if not taken:
                return
            opened = self._intend(taken)
            tasks[asyncio.create_task(self._care(opened, adopted=False))] = opened

    async def _read(self) -> None:
        """Queue what is missing until there is enough for a job."""
        waiting = sum(len(queued.body) for queued in self._queue)
        while not self._is_read and len(self._queue) < self._job_requests and waiting < self.config.job_bytes:
            rows = await asyncio.to_thread(lambda: list(islice(self.source, READ_ROWS)))
            self._is_read = not rows
            for request in rows:
                waiting += self._meet(request)

    def _meet(self, request: Request) -> int:
        """Take note of a row that is missing; returns the bytes that it adds to the queue."""
        key = bytes.fromhex(request.key)
        if key in self._settled:
            self.cut += self._settled[key].is_cut
            self.rejected += self._settled[key].rejected is not None
            self._advance(1, rejected=self._settled[key].rejected is not None)
            return 0
        known = self._wanted.setdefault(key, [])
        known.append(request)
        if len(known) > 1 or key in self._in_jobs or self.life.closing:
            return 0
        self._queue.append(Queued(key, self.body_of(request)))
        return len(self._queue[-1].body)

    def _take(self, *, others: bool) -> list[Queued]:
        """Lines for one job from the front of the queue, as many as it and the budget may hold; none while others in
        flight may leave room in the budget.

        Raises:
            Incomplete: the budget is reached.
        """
        taken: list[Queued] = []
        size, reached = 0, None
        while self._queue and len(taken) < self._job_requests:
            queued = self._queue[0]
            size += len(queued.body) + len(self.life.provider.prefix(custom_id(queued.key, "0" * 16))) + 2
            if taken and size > self.config.job_bytes:
                break
            reached = self.purse.take(hold_of(self.template, len(queued.body)))
            if reached is not None:
                break
            taken.append(self._queue.popleft())
        if reached is not None and others:
            for queued in reversed(taken):
                self.purse.release(hold_of(self.template, len(queued.body)))
                self._queue.appendleft(queued)
            return []
        if reached is not None and not taken:
            raise reached
        return taken

    def _intend(self, taken: list[Queued]) -> Open:
        """Put a job on disk, before anything of it leaves."""
        token = new_token()
        sizes = {queued.key: len(queued.body) for queued in taken}
        worst = [hold_of(self.template, size).worst for size in sizes.values()]
        prefix = self.life.provider.prefix
        lines = [prefix(custom_id(queued.key, token)) + queued.body + b"}\n" for queued in taken]
        changes = {
            "token": token,
            "lines": len(taken),
            "worst_nano": sum(one.nano for one in worst),
            "worst_tokens": sum(one.tokens for one in worst),
            "intended_ms": now_ms(),
        }
        self.tracker.write(self.tracker.folder / f"{token}.requests", lines)
        job = self.tracker.save(self.template, **changes)
        self._in_jobs.update(dict.fromkeys(sizes, token))
        self.jobs += 1
        return Open(job, sizes, counts=True)

    # ------------------------------------------------------------------------------------------- jobs that are over

    def _close(self, opened: Open, others: int) -> None:
        """Decide on the lines of a job that is over and were not answered."""
        token = opened.job.token
        keys = [key for key, holder in self._in_jobs.items() if holder == token]
        too_much = False
        for key in keys:
            del self._in_jobs[key]
            reason = self._again.pop(key, None)
            if key in self._wanted and not self.life.closing:
                too_much |= reason == TOO_MUCH
                self._send_again(key, reason, opened)
        if too_much:  # fewer at a time, and less in each
            self._open_jobs = max(1, others)
            self._job_requests = max(1, opened.job.lines // 2) if others == 0 else self._job_requests

    def _send_again(self, key: bytes, reason: str | None, opened: Open) -> None:
        """Into another job, unless this was the last round.

        Args:
            reason: None: it never left.
        """
        rows = self._wanted[key]
        is_earlier = reason in EARLIER and any(opened is one for one in self.adopted)
        counts = reason is not None and not is_earlier and not (reason == TOO_MUCH and opened.job.lines > 1)
        self._rounds[key] += counts
        self.retries[reason or "not_sent"] += 1
        is_late = opened.is_cancelled and self.config.stragglers == "online"
        if not is_late and self._rounds[key] < self.config.rounds:
            self._queue.append(Queued(key, self.body_of(rows[0])))
            return
        del self._wanted[key]
        if self.config.stragglers == "online":
            self.online += rows
        else:
            self.pending[reason or "not_sent"] += len(rows)
            self.given_up[rows[0].key] = reason or "not_sent"

    # ------------------------------------------------------------------------------------------------ the end

    def _needs(self, opened: Open) -> bool:
        """Whether somebody waits for the job: it is to be closed, all of its lines are settled, or it holds a wanted
        key."""
        return self.life.closing or not opened.sizes or any(key in self._wanted for key in opened.sizes)

    def _needed(self, opened: Iterable[Open]) -> list[Open]:
        return [one for one in opened if self._needs(one)]

    def _is_waiting(self, opened: Iterable[Open]) -> bool:
        return bool(self._needed(opened)) or bool(self._queue) or not self._is_read

    def _check_stop(self, opened: Iterable[Open]) -> None:
        if not self.ctx.cancel.is_set():
            return
        count = len([one for one in opened if one.job.job_id is not None])
        what = "stopped by a signal" + (f"; {count} batch jobs stay open at the provider" if count else "")
        todo = f"resume with: {self.ctx.resume_command} (with `generate.mode: online` it cancels them)"
        raise Interrupted(what, where=f"step {self.ctx.step}", todo=todo)

    async def _leave(self, tasks: dict[asyncio.Task[None], Open]) -> None:
        """Stop looking at jobs. One that is being made gets a moment, so that it need not be searched for."""
        making = [task for task, opened in tasks.items() if opened.job.state == CREATING and not task.done()]
        deadline = asyncio.get_running_loop().time() + GRACE_S
        while making and asyncio.get_running_loop().time() < deadline:
            await asyncio.wait(making, timeout=POLL_S)
            making = [task for task in making if not task.done() and tasks[task].job.state == CREATING]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.left_open = [opened for opened in tasks.values() if opened.job.is_open]
