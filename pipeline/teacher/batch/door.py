"""The way into batch mode: which jobs are open, what they may still cost, and asking for what is missing by jobs."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_batch import BatchConfig
from pipeline.core.config_budget import Spending
from pipeline.core.config_teacher import Retry
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.runs import hold_lock
from pipeline.core.stage import Context, Json
from pipeline.core.store import make_folder
from pipeline.teacher.batch.anthropic import AnthropicBatches
from pipeline.teacher.batch.calls import Calls, open_batch_session
from pipeline.teacher.batch.dispatch import Count, Dispatcher
from pipeline.teacher.batch.life import Life
from pipeline.teacher.batch.openai import OpenAIBatches
from pipeline.teacher.batch.provider import Provider
from pipeline.teacher.batch.settle import STRIKES, Open, Settler, hold_of, recorded
from pipeline.teacher.batch.tracker import CREATED, ENDED, INTENDED, Job, Tracker, all_open_jobs, custom_id
from pipeline.teacher.budget import Amount
from pipeline.teacher.complaints import refused_error
from pipeline.teacher.drift import Drift
from pipeline.teacher.endpoint import Endpoint, api_endpoints
from pipeline.teacher.prepare import prepare
from pipeline.teacher.prices import batch_price_of
from pipeline.teacher.recorder import Recorder
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.spending import Purse
from pipeline.teacher.verdict import snippet

log = logging.getLogger(__name__)


@contextmanager
def holding_jobs(responses: Path, identity: str, batch: BatchConfig | None) -> Iterator[Tracker]:
    """The jobs of a teacher, for this process alone where there are any or will be.

    Raises:
        RunLocked: another process waits for jobs of this teacher in this data folder.
    """
    tracker = Tracker(responses, identity)
    if batch is None and not tracker.open_jobs():
        yield tracker
        return
    make_folder(tracker.folder, 0o700)
    with hold_lock(tracker.lock):
        tracker.sweep()
        yield tracker


def in_flight(responses: Path, spending: Spending, identity: str) -> dict[str | None, Amount]:
    """Teacher's name -> worst case of the run's open jobs, but for those that `ByJobs` takes up itself."""
    amounts: dict[str | None, Amount] = {}
    for job in all_open_jobs(responses):
        if job.run == spending.run and not (job.identity == identity and job.teacher == spending.teacher):
            worst = Amount(job.worst_nano, job.worst_tokens, job.lines)
            amounts[job.teacher] = amounts.get(job.teacher, Amount()) + worst
    return amounts


@dataclass(frozen=True, slots=True)
class Done:
    """What one round of asking by jobs came to.

    Attributes:
        settled: requests that were answered or refused.
        cut, rejected, pending, given_up, retries: as in `Dispatcher`.
    """

    settled: int = 0
    cut: int = 0
    rejected: int = 0
    pending: Counter[str] = field(default_factory=Counter)
    given_up: dict[str, str] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class ByJobs:
    """One round of asking by jobs; in online mode it only ends those that are open.

    Attributes:
        batch: how jobs are made; None: online mode.
        proven: whether this teacher has answered anything yet, in this run or before.
        source: what is missing, in order. In online mode the first part of it is enough: it is given back.
        count: advances the step's progress.
        may_miss: rows that may stay without an answer; one more is an error.
        written_off: token of each job that an earlier round of the same purse has left open -> its `Open.sizes`.
        done: after `run`: what it came to.
        left: after `run`: what is to be asked online.
    """

    teacher: ApiTeacher
    asked: Asked
    retry: Retry
    spending: Spending
    batch: BatchConfig | None
    ctx: Context
    store: ResponseStore
    recorder: Recorder
    purse: Purse
    tracker: Tracker
    proven: bool
    source: Iterator[Request]
    count: Count
    may_miss: int = 0
    written_off: dict[str, dict[bytes, int]] = field(default_factory=dict)
    left: list[Request] = field(default_factory=list)
    done: Done = field(default_factory=Done)

    async def run(self) -> None:
        """Ask for what is missing.

        Raises:
            Incomplete: rows stay pending, the budget is reached, or the provider is down; open jobs stay open.
            UsageError: the provider refuses jobs, the key, or everything that is asked.
            Interrupted: a signal asked us to stop; open jobs stay open.
        """
        endpoint = api_endpoints(self.teacher)[0]
        prepare(endpoint, self.asked, self.teacher.kind)
        async with open_batch_session(self.retry.timeout_s) as session:
            calls = Calls(session, endpoint, self.teacher.base_url, self.retry)
            dispatcher = self._dispatcher(endpoint, provider_of(self.teacher, calls))
            if self.batch is None and not dispatcher.adopted:
                self.left = list(self.source)
                return
            try:
                self.left = await dispatcher.run()
            finally:
                self._tell(dispatcher)
        self._finish(endpoint, dispatcher)

    def _finish(self, endpoint: Endpoint, dispatcher: Dispatcher) -> None:
        settler = dispatcher.life.settler
        if settler.held and not settler.proven:
            raise refused_error(endpoint, len(settler.held), snippet(settler.held[0].body))
        settler.believe()
        self.proven = settler.proven
        for opened in dispatcher.left_open:
            log.info("batch job %s is left open: nothing that it holds is asked for here", opened.job.name)
            settler.write_off(opened)
            if opened.counts:
                self.written_off[opened.job.token] = dict(opened.sizes)
        if dispatcher.pending.total() > self.may_miss:
            raise self._incomplete(endpoint, dispatcher)

    def _incomplete(self, endpoint: Endpoint, dispatcher: Dispatcher) -> Incomplete:
        """What a person is told whose rows no job has answered."""
        pending = dispatcher.pending
        reasons = ", ".join(f"{name} ×{count}" for name, count in pending.most_common(3))
        what = f"{pending.total()} rows have no answer yet ({reasons}); all others are stored"
        todo = f"resume with: {self.ctx.resume_command} (or ask them online: `generate.mode: online`)"
        return Incomplete(what, where=endpoint.host, todo=todo)

    def _dispatcher(self, endpoint: Endpoint, provider: Provider) -> Dispatcher:
        settler = Settler(
            provider=provider,
            endpoint=endpoint,
            store=self.store,
            recorder=self.recorder,
            purse=self.purse,
            proven=self.proven,
            secret=endpoint.read_key(),
            cap=self.asked.sampling.max_tokens,
            room=self.asked.room,
            strikes=self._strikes,
            drift=Drift.of(self.teacher, self.asked.identity, self.ctx),
        )
        config = self.batch or BatchConfig()
        source, adopted = self._adopt(provider)
        life = Life(provider, endpoint, self.tracker, settler, config, _nobody, _nobody, closing=self.batch is None)
        dispatcher = Dispatcher(
            life=life,
            tracker=self.tracker,
            purse=self.purse,
            config=config,
            ctx=self.ctx,
            count=self.count,
            template=self._template(endpoint),
            body_of=lambda request: endpoint.body(request, self.asked.sampling),
            source=source,
            adopted=adopted,
        )
        life.report, life.shown = dispatcher.report, dispatcher.shown
        return dispatcher

    @property
    def _strikes(self) -> int:
        """What is paid for again and again has to end: where nobody asks online, a row has as many tries as rounds."""
        if self.batch is None or self.batch.stragglers == "online":
            return STRIKES
        return min(STRIKES, self.batch.rounds)

    def _template(self, endpoint: Endpoint) -> Job:
        price, logprobs = batch_price_of(self.teacher), endpoint.logprobs
        return Job(
            token="",
            state=INTENDED,
            kind=self.teacher.kind,
            base_url=self.teacher.base_url,
            identity=self.asked.identity,
            model=endpoint.model,
            wire=endpoint.wire.name,
            cap=self.asked.sampling.max_tokens,
            room=self.asked.room,
            run=self.spending.run,
            teacher=self.spending.teacher,
            price_input=None if price is None else price.input,
            price_output=None if price is None else price.output,
            lines=0,
            worst_nano=0,
            worst_tokens=0,
            intended_ms=0,
            logprobs=None if logprobs is None else logprobs.sent,
            token_ids=logprobs is not None and logprobs.ids,
        )

    def _adopt(self, provider: Provider) -> tuple[Iterator[Request], list[Open]]:
        """The source, and the jobs that this run takes up: in batch mode all of the teacher's, in online mode those of
        the run and those that hold what it would ask for again."""
        opened = [self._open(job, provider) for job in self.tracker.open_jobs() if self._is_here(job)]
        if self.batch is not None:
            adopted, source = opened, self.source
        else:
            first = list(self.source)
            wanted = {bytes.fromhex(request.key) for request in first}
            adopted = [one for one in opened if one.job.run == self.spending.run or not wanted.isdisjoint(one.sizes)]
            source = iter(first)
        for one in adopted:
            self._hold(one)
        return source, adopted

    def _hold(self, opened: Open) -> None:
        """Hold the worst case of a job's lines: once, whatever the number of rounds that leave it open."""
        if not opened.counts:
            return
        for size in self.written_off.pop(opened.job.token, {}).values():
            self.purse.undo_write_off(hold_of(opened.job, size))
        for size in opened.sizes.values():
            self.purse.adopt(hold_of(opened.job, size))

    def _is_here(self, job: Job) -> bool:
        """Whether the job is where the teacher is asked today. Another teacher of the run may ask the same model at
        another URL.

        Raises:
            UsageError: a job of this run and teacher is elsewhere.
        """
        if job.base_url == self.teacher.base_url and job.kind == self.teacher.kind:
            return True
        if (job.run, job.teacher) != (self.spending.run, self.spending.teacher):
            return False
        what = f"batch job {job.name} with {job.lines} requests is open at another URL: {job.base_url}"
        todo = "set the teacher's base_url back until its jobs have ended: else their answers would be paid twice"
        raise UsageError(what, where=f"teachers.{job.teacher}.base_url", todo=todo)

    def _open(self, job: Job, provider: Provider) -> Open:
        prefix_chars = len(provider.prefix(custom_id(bytes(32), job.token)))
        sizes = {key: len(body) for key, body in self.tracker.lines(job, prefix_chars)}
        if job.state in (CREATED, ENDED):
            for key in recorded(self.tracker.folder.parent.parent, job):
                sizes.pop(key, None)
        counts = (job.run, job.teacher) == (self.spending.run, self.spending.teacher)
        return Open(job, sizes, counts=counts)

    def _tell(self, dispatcher: Dispatcher) -> None:
        retries: dict[str, Any] = dict(sorted(dispatcher.retries.items()))
        facts: dict[str, Json] = {
            "teacher": self.spending.teacher,
            "jobs": dispatcher.jobs,
            "adopted": len(dispatcher.adopted),
            "lines": dispatcher.lines,
            "left_open": len(dispatcher.left_open),
            "retries": retries,
        }
        self.done = Done(
            dispatcher.settled,
            dispatcher.cut,
            dispatcher.rejected,
            dispatcher.pending,
            dispatcher.given_up,
            dispatcher.retries,
        )
        self.ctx.events.emit("batch_asked", **facts)


def provider_of(teacher: ApiTeacher, calls: Calls) -> Provider:
    """The batch endpoints of a teacher."""
    return AnthropicBatches(calls) if teacher.kind == "anthropic" else OpenAIBatches(calls)


def _nobody(*_: object) -> None:
    """Until the dispatcher is there to be told."""
