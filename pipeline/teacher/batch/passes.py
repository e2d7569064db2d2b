"""One pass over what is missing, by jobs: what it leaves is the work of the online pass behind it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_batch import BatchConfig
from pipeline.core.config_budget import Spending
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import Retry
from pipeline.core.stage import Context
from pipeline.teacher.batch.door import ByJobs
from pipeline.teacher.batch.tracker import Tracker
from pipeline.teacher.fetch import Work, fetch_hits
from pipeline.teacher.lookup import Looked
from pipeline.teacher.loop import Loop
from pipeline.teacher.recorder import Recorder
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.spending import Purse


@dataclass(frozen=True, slots=True)
class Means:
    """What asking by jobs needs beside the work itself; as in `door.ByJobs`."""

    teacher: LocalServer | ApiTeacher
    retry: Retry
    spending: Spending
    batch: BatchConfig | None
    ctx: Context
    store: ResponseStore
    recorder: Recorder
    purse: Purse
    tracker: Tracker
    may_miss: int
    written_off: dict[str, dict[bytes, int]] = field(default_factory=dict)


def pass_by_jobs(means: Means, loop: Loop, asked: Asked, work: Work, *, proven: bool) -> Work | None:
    """Ask by jobs in batch mode, or end the jobs that are open in online mode; returns what is left for online calls.

    Raises:
        Incomplete, UsageError, Interrupted: see `ByJobs.run`.
    """
    teacher, online = means.teacher, means.batch is None
    if not isinstance(teacher, ApiTeacher) or (online and not means.tracker.open_jobs()):
        return work
    by_jobs = ByJobs(
        teacher=teacher,
        asked=asked,
        retry=means.retry,
        spending=means.spending,
        batch=means.batch,
        ctx=means.ctx,
        store=means.store,
        recorder=means.recorder,
        purse=means.purse,
        tracker=means.tracker,
        proven=proven,
        source=iter(work.looked.misses) if online else _misses(work),
        count=work.count,
        may_miss=means.may_miss,
        written_off=means.written_off,
    )
    try:
        loop.run(by_jobs.run())
    finally:
        _count(work, by_jobs)
    if online:
        return replace(work, looked=replace(work.looked, misses=by_jobs.left))
    return replace(work, looked=Looked(by_jobs.left, 0, 0), lookup=iter(())) if by_jobs.left else None


def _misses(work: Work) -> Iterator[Request]:
    """All that is missing; what is stored is counted on the way."""
    looked: Looked | None = work.looked
    while looked is not None:
        fetch_hits(looked, work.counts, work.count)
        yield from looked.misses
        looked = next(work.lookup, None)


def _count(work: Work, by_jobs: ByJobs) -> None:
    counts, done = work.counts, by_jobs.done
    counts.asked += done.settled + done.pending.total()
    counts.cut += done.cut
    counts.rejected += done.rejected
    counts.pending += done.pending
    counts.given_up |= done.given_up
    counts.retries += done.retries
