"""What a provider of batch jobs must be able to do, and what is known of a job and of a line there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.teacher.batch.tracker import Job


@dataclass(frozen=True, slots=True)
class Look:
    """What the provider says of a job.

    Attributes:
        job_id: its name there.
        ended_as: "completed", "expired", "cancelled" or "failed", once nothing more will come; None: it runs.
        done: lines that it has worked through, whatever came of them.
        total: lines that it has, where it says so.
        results: names of the files with results that there are so far; what they mean is the provider's.
        complaint: why a job failed as a whole, in the provider's words.
        is_too_much: it failed because too many tokens were in its queue, so a smaller job may do later.
    """

    job_id: str
    ended_as: str | None
    done: int = 0
    total: int | None = None
    results: tuple[str, ...] = ()
    complaint: str = ""
    is_too_much: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a job's results.

    Attributes:
        custom_id: as it was sent.
        status: HTTP status that an online call would have had; None: the line was not run, and is not billed.
        body: what an online call would have brought.
        reason: why it was not run ("expired", "cancelled").
        request_id: under which the provider knows it.
        is_free: the provider documents that it bills nothing for lines that ended like this.
    """

    custom_id: object
    status: int | None
    body: bytes = b""
    reason: str = ""
    request_id: str | None = None
    is_free: bool = False


class Provider(Protocol):
    """The batch endpoints of one kind of teacher."""

    def prefix(self, custom_id: str) -> bytes:
        """What stands before a request's body in a line of a job; behind the body stands one brace."""

    async def upload(self, job: Job, requests: Path) -> str | None:
        """Send the lines ahead, where the provider takes files; costs nothing and may be repeated. None: it does not.

        Raises:
            Incomplete, UsageError: see `calls.Calls`.
        """

    async def create(self, job: Job, requests: Path) -> Look:
        """Make the job. Never repeated on its own.

        Raises:
            Unclear: the job may exist or not.
            Incomplete, UsageError: see `calls.Calls`.
        """

    async def find(self, job: Job, claimed: Callable[[str], bool], scratch: Path) -> "Found":
        """Look for a job that may have been made.

        Args:
            claimed: whether a job of this id is known to be another one.
            scratch: a file that may be written, and is gone afterwards.
        """

    async def look(self, job_id: str) -> Look | None:
        """What became of a job; None: the provider does not know it."""

    async def cancel(self, job_id: str) -> None:
        """Ask for its end; what was answered so far is kept. A job that has ended already is left alone."""

    async def fetch(self, look: Look, path: Path) -> bool:
        """Write all results that there are into a file, one line each, synced to the disk; False if some that there
        should be are gone."""

    def read(self, line: dict[str, Any]) -> Line:
        """What a line of the results says."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search for a job came to.

    Attributes:
        look: the job; None: it is not there.
        is_sure: whether the answer is certain; a server that cannot list its jobs leaves it open.
        wait: it may be one that runs, which cannot be told before it has ended: look again later.
    """

    look: Look | None
    is_sure: bool = True
    wait: bool = False
