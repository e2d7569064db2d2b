"""What can go wrong in a way that a person can act on, and the exit code each case ends with."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import ClassVar


class ExitCode(IntEnum):
    """Process exit codes; fixed, because other tools call this program."""

    COMPLETE = 0
    BUG = 1
    USAGE = 2
    INCOMPLETE = 3
    POLICY = 4
    INTEGRITY = 5
    LOCKED = 6
    INTERRUPTED = 130
    TERMINATED = 143


class PipelineError(Exception):
    """An error for a person: three short lines, no traceback.

    Args:
        what: what happened, one sentence.
        where: the file, key or row it happened at.
        todo: what to do about it.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.USAGE

    def __init__(self, what: str, *, where: str, todo: str) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.todo = todo

    def __reduce__(self) -> tuple[Callable[[], "PipelineError"], tuple[()]]:
        """How it comes back from a worker process: an exception is pickled by its positional arguments alone."""
        return partial(type(self), self.what, where=self.where, todo=self.todo), ()

    def __str__(self) -> str:
        return f"error: {self.what}\n   at: {self.where}\n   do: {self.todo}"


class UsageError(PipelineError):
    """The config, a file it names, or the command line is wrong; nothing was spent."""


class Incomplete(PipelineError):
    """The work is not finished; the same command resumes it."""

    exit_code = ExitCode.INCOMPLETE


class PolicyRefused(PipelineError):
    """Terms forbid what the policy means to do, or nobody knows them. The message takes up to one screen.

    Args:
        message: the whole message, where there is more to say than three lines.
    """

    exit_code = ExitCode.POLICY

    def __init__(self, what: str, *, where: str, todo: str, message: str = "") -> None:
        super().__init__(what, where=where, todo=todo)
        self.message = message

    def __reduce__(self) -> tuple[Callable[[], "PipelineError"], tuple[()]]:
        """As for every error, with its message."""
        return partial(type(self), self.what, where=self.where, todo=self.todo, message=self.message), ()

    def __str__(self) -> str:
        return self.message or super().__str__()


class CorruptArtefact(PipelineError):
    """Bytes on disk are not the bytes that were committed."""

    exit_code = ExitCode.INTEGRITY


class LockDrift(PipelineError):
    """What runs, or what came out of it, is not what the lock file says."""

    exit_code = ExitCode.INTEGRITY


class RunLocked(PipelineError):
    """Another process holds this run."""

    exit_code = ExitCode.LOCKED


class Interrupted(PipelineError):
    """A signal asked us to stop; what was finished is kept."""

    exit_code = ExitCode.INTERRUPTED


class Terminated(Interrupted):
    """SIGTERM asked us to stop; what was finished is kept."""

    exit_code = ExitCode.TERMINATED


class LostRows(Exception):
    """A stage broke `rows_in == rows_out + rejected`: a bug in that stage, never a user's mistake."""


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def disk_errors(where: str, todo: str) -> Iterator[None]:
    """Turn a full, failing or write-protected disk into `Incomplete`; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        place = str(error.filename or where)
        raise Incomplete(f"cannot read or write: {error.strerror}", where=place, todo=todo) from error


@contextmanager
def boundary(error_class: type[PipelineError], what: str, *, where: str, todo: str) -> Iterator[None]:
    """Turn a foreign library's exception into one of ours; ours pass unchanged.

    Use it around calls whose failures a person can act on (reading a user's file, loading a model). It is the
    one place besides `main()` that catches every `Exception`, so keep the guarded block to that single call.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        system = error.strerror if isinstance(error, OSError) else None
        reason = system or f"{type(error).__name__}: {error}"
        raise error_class(f"{what}: {reason}", where=where, todo=todo) from error
