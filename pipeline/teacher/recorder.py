"""Group commit: what all requests of one event-loop tick want stored goes into one transaction."""

import asyncio
import time

from pipeline.core.errors import PipelineError
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Attempt, Ended, Stored

LARGEST_GROUP = 64
"""Rows per transaction: about 2 ms in which the event loop stands still."""


class Recorder:
    """Asynchronous front of a `ResponseStore`; each method returns once its row is committed.

    A failed write is raised to everybody whose row was in it.

    Args:
        run, teacher: names of the run that asks and of the teacher in its config, noted with each attempt.
    """

    def __init__(self, store: ResponseStore, run: str | None = None, teacher: str | None = None) -> None:
        self._store, self._run, self._teacher = store, run, teacher
        self._next_attempt = 1
        self._waiting: list[asyncio.Future[None]] = []
        """One for each that waits for the group: whoever is cancelled takes nobody along."""
        self._intents: list[Attempt] = []
        self._outcomes: list[Ended] = []
        self._answers: list[Stored] = []

    async def intend(self, key: bytes, cap: int, reserved: int | None, reserved_tokens: int) -> int:
        """Note that a request is about to leave, with its worst case; returns the attempt's number."""
        number, sent_ms = self._next_attempt, now_ms()
        attempt = Attempt(number, key, cap, sent_ms, None, self._run, self._teacher, reserved, reserved_tokens)
        self._next_attempt += 1
        self._intents.append(attempt)
        await self._commit()
        return attempt.id

    def number(self) -> int:
        """A number for an attempt whose beginning and end somebody puts into the store at once."""
        self._next_attempt += 1
        return self._next_attempt - 1

    async def settle(self, ended: Ended, answer: Stored | None = None) -> None:
        """Note how an attempt ended, with the answer if there is one."""
        self._outcomes.append(ended)
        if answer is not None:
            self._answers.append(answer)
        await self._commit()

    async def keep(self, answer: Stored) -> None:
        """Store an answer whose attempt was settled before."""
        self._answers.append(answer)
        await self._commit()

    async def _commit(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._write)
        committed = loop.create_future()
        self._waiting.append(committed)
        if len(self._intents) + len(self._outcomes) + len(self._answers) >= LARGEST_GROUP:
            self._write()
        await committed

    def _write(self) -> None:
        if not self._waiting:
            return  # the group was full before the tick ended
        intents, outcomes, answers, waiting = self._intents, self._outcomes, self._answers, self._waiting
        self._intents, self._outcomes, self._answers, self._waiting = [], [], [], []
        failure: PipelineError | None = None
        try:
            self._store.put(answers, intents=intents, outcomes=outcomes)
        except PipelineError as error:  # handed on to every waiter, not swallowed
            failure = error
        for each in waiting:
            if each.done():
                continue  # cancelled: what it wanted stored is stored all the same
            if failure is None:
                each.set_result(None)
            else:
                each.set_exception(failure)


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
