"""One job: from its intent on disk to its last settled line, taken up wherever a process left it."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipeline.core.config_batch import BatchConfig
from pipeline.core.errors import Incomplete, PipelineError, UsageError
from pipeline.core.store import sync_folder
from pipeline.teacher.batch.calls import Unclear
from pipeline.teacher.batch.provider import Look, Provider
from pipeline.teacher.batch.settle import Open, Result, Settler
from pipeline.teacher.batch.tracker import CREATED, CREATING, ENDED, INTENDED, Tracker
from pipeline.teacher.complaints import abort_error, refused_error
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.recorder import now_ms
from pipeline.teacher.verdict import Verdict, snippet

log = logging.getLogger(__name__)

FIRST_LOOKS: Final = 16
"""The first wait between looks is so many times shorter than `poll_s`."""
SEARCHES: Final = 3
"""Looks at the list of jobs before one that is not there counts as never made: lists may lag behind."""
CREATIONS: Final = 3
"""How often a job is sent whose creation surely failed."""
PARTIAL_SHARE: Final = 10
"""Partial results are read when another 1/10 of the lines is done, so that they are not read too often."""
REFUSALS: Final = 20
"""Refused requests, without an answer in between, that show a wrong config."""
TOO_MUCH: Final = "too_much"
"""Why lines are asked again whose job was too large for the provider's queue."""
UNBILLED: Final = frozenset({"expired", "cancelled", "failed"})
"""Ends of jobs after which a line without a result was not run."""
LOST: Final = "lost"


@dataclass(slots=True)
class Life:
    """Leads jobs through their states.

    Attributes:
        report: told what each line came to.
        shown: told how many lines the provider has worked through.
        closing: jobs are to end now: they are cancelled, and what they brought is kept.
    """

    provider: Provider
    endpoint: Endpoint
    tracker: Tracker
    settler: Settler
    config: BatchConfig
    report: Callable[[Open, Result], None]
    shown: Callable[[Open, Look], None]
    closing: bool = False

    async def lead(self, opened: Open) -> None:
        """From whatever state it is in to its end.

        Raises:
            UsageError: the provider refuses the job as a whole, the key, or everything that is asked.
            Incomplete: the provider does not answer, or the account's credit is used up; the job stays as it is.
        """
        if opened.job.state == INTENDED:
            await self._upload(opened)
        if opened.job.state == CREATING:
            await self._create(opened)
        if opened.job.state == CREATED:
            await self._follow(opened)
        if opened.job.state == ENDED:
            self._settle(opened)

    async def recover(self, opened: Open) -> None:
        """Take up a job whose process died while it was made. One that the provider never had is forgotten, and its
        lines are not in `opened` any more; one that it does not tell of is closed as lost."""
        job = opened.job
        if job.state == INTENDED:
            log.info("batch job %s was not sent; its requests are sent anew", job.token)
            self._forget(opened)
        if job.state == CREATING and not await self._search(opened) and opened.job.is_open:
            log.info("batch job %s is not at the provider; its requests are sent anew", job.token)
            self._forget(opened)

    def _forget(self, opened: Open) -> None:
        self.tracker.discard(opened.job)
        self.settler.let_go(opened)

    async def _upload(self, opened: Open) -> None:
        job = opened.job
        try:
            file_id = await self.provider.upload(job, self.tracker.requests(job))
        except Unclear as error:
            what = f"the provider does not take the requests of a batch job: {error}"
            raise Incomplete(what, where=self.endpoint.host, todo="run again later") from error
        opened.job = self.tracker.save(job, state=CREATING, file_id=file_id)

    async def _create(self, opened: Open) -> None:
        for _ in range(CREATIONS):
            job = opened.job
            try:
                look = await self.provider.create(job, self.tracker.requests(job))
            except PipelineError:
                self._forget(opened)  # it was surely not made
                raise
            except Unclear as unclear:
                log.warning(
                    "%s: a batch job may have been made or not (%s); looking for it", self.endpoint.host, unclear
                )
                if await self._search(opened) or not opened.job.is_open:
                    return
                continue
            self._made(opened, look)
            log.info("batch job %s: %d requests submitted to %s", look.job_id, job.lines, self.endpoint.host)
            return
        self._forget(opened)
        what = f"the provider made no batch job in {CREATIONS} tries"
        raise Incomplete(what, where=self.endpoint.host, todo="run again later; nothing was lost")

    async def _search(self, opened: Open) -> bool:
        """Whether a job that may have been made is there. If nobody can tell, it is closed: its lines count at their
        worst case, and are asked again."""
        job, wait, misses = opened.job, self._first_wait, 0
        scratch = self.tracker.folder / f"{job.token}.{os.getpid()}.tmp"
        while True:
            others = {one.job_id for one in self.tracker.jobs() if one.token != job.token}
            found = await self.provider.find(job, others.__contains__, scratch)
            if found.look is not None:
                self._made(opened, found.look)
                log.info("batch job %s was found again", found.look.job_id)
                return True
            if not found.is_sure:
                log.warning("batch job %s: %s cannot tell whether it has it", job.token, self.endpoint.host)
                self._close_lost(opened)
                return False
            misses += not found.wait
            if misses >= SEARCHES:
                return False
            await asyncio.sleep(wait)
            wait = min(self.config.poll_s, wait * 1.5)

    def _made(self, opened: Open, look: Look) -> None:
        opened.job = self.tracker.save(opened.job, state=CREATED, job_id=look.job_id, created_ms=now_ms())

    @property
    def _first_wait(self) -> float:
        return self.config.poll_s / FIRST_LOOKS

    async def _follow(self, opened: Open) -> None:
        """Look at the job until it has ended, and fetch its results."""
        job_id, wait = opened.job.job_id or "", self._first_wait
        while True:
            look = await self.provider.look(job_id)
            if look is None:
                log.warning("batch job %s: %s knows it no longer", job_id, self.endpoint.host)
                self._close_lost(opened)
                return
            self.shown(opened, look)
            if look.ended_as is not None:
                break
            await self._collect(opened, look)
            if self._is_due(opened):
                opened.is_cancelled = True
                log.info("batch job %s: cancelling it after %d of %d lines", job_id, look.done, opened.job.lines)
                await self.provider.cancel(job_id)
            await asyncio.sleep(wait)
            wait = min(self.config.poll_s, wait * 1.5)
        await self._end(opened, look)

    def _is_due(self, opened: Open) -> bool:
        if opened.is_cancelled:
            return False
        after = self.config.online_after_s
        age_s = time.time() - (opened.job.created_ms or 0) / 1000
        return self.closing or (after is not None and age_s > after)

    async def _collect(self, opened: Open, look: Look) -> None:
        """Keep what a running job has brought so far, where the provider shows it."""
        if not look.results or look.done - opened.collected < max(1, opened.job.lines // PARTIAL_SHARE):
            return
        opened.collected = look.done
        partial = self.tracker.folder / f"{opened.job.token}.{os.getpid()}.tmp"
        try:
            await self.provider.fetch(look, partial)
            self._read(opened, partial)
        finally:
            partial.unlink(missing_ok=True)

    async def _end(self, opened: Open, look: Look) -> None:
        if look.ended_as == "failed" and not look.results:
            self._close_failed(opened, look)
            return
        target = self.tracker.results(opened.job)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        complete = await self.provider.fetch(look, temporary)
        temporary.replace(target)
        sync_folder(target.parent)
        ended_as = look.ended_as if complete else LOST
        opened.job = self.tracker.save(opened.job, state=ENDED, ended_as=ended_as)

    def _settle(self, opened: Open) -> None:
        job = opened.job
        self._read(opened, self.tracker.results(job))
        missing, ended_as = len(opened.sizes), job.ended_as or LOST
        if missing:
            reason = "missing" if ended_as == "completed" else ended_as
            for result in self.settler.close(opened, reason, is_free=ended_as in UNBILLED):
                self.report(opened, result)
        opened.job = self.tracker.finish(job)
        without = f", {missing} of them without a result" if missing else ""
        log.info("batch job %s has ended (%s): %d lines%s", job.name, ended_as, job.lines, without)
        self._check(opened)

    def _read(self, opened: Open, path: Path) -> None:
        for result in self.settler.read(opened, path):
            self.report(opened, result)

    def _check(self, opened: Open) -> None:
        """Raise what the lines of a job say about all others."""
        verdict: Verdict | None = self.settler.abort
        if verdict is not None:
            raise abort_error(self.endpoint, verdict)
        held = self.settler.held
        if len(held) >= REFUSALS:
            raise refused_error(self.endpoint, len(held), snippet(held[0].body))

    def _close_lost(self, opened: Open) -> None:
        for result in self.settler.close(opened, LOST, is_free=False):
            self.report(opened, result)
        opened.job = self.tracker.finish(opened.job, ended_as=LOST)

    def _close_failed(self, opened: Open, look: Look) -> None:
        """The provider refused the job as a whole: none of its lines was run."""
        reason = TOO_MUCH if look.is_too_much else "failed"
        for result in self.settler.close(opened, reason, is_free=True):
            self.report(opened, result)
        opened.job = self.tracker.finish(opened.job, ended_as="failed")
        log.warning("batch job %s has failed: %s", look.job_id, look.complaint)
        if not look.is_too_much:
            what = f"the provider refuses a batch job: {look.complaint}"
            todo = "correct the teacher's settings, `sampling` or `generate.batch`, then run again"
            raise UsageError(what, where=f"{self.endpoint.host}, job {look.job_id}", todo=todo)
