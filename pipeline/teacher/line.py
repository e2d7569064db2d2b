"""A line of tasks that wait for something scarce: first come, first served, one timer, no polling."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

TIMER_SLACK_S = 0.001
"""Timers of event loops count in milliseconds and may ring that much too early."""

Wanted = TypeVar("Wanted")
Taken = TypeVar("Taken")


@dataclass(frozen=True, slots=True)
class Wait:
    """There is nothing to take yet.

    Attributes:
        seconds: after which it is worth another try; None: not before something is given back.
    """

    seconds: float | None = None


class Line(Generic[Wanted, Taken]):
    """Tasks in the order in which they came; the first one leaves as soon as it can take what it wants.

    Nobody is overtaken, so one who wants much is not starved by those who want little. How long somebody waits is
    nobody's failure: there is no time-out. Not safe to share between event loops.

    Args:
        take: takes what is wanted, or says when to try again. It must not call `wake`.
        give_back: undoes `take`, for a task that was cancelled just as its turn came.
    """

    def __init__(self, take: Callable[[Wanted], Taken | Wait], give_back: Callable[[Taken], None]) -> None:
        self._take, self._give_back = take, give_back
        self._waiting: OrderedDict[asyncio.Future[Taken], Wanted] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def enter(self, wanted: Wanted) -> Taken:
        """Wait for one's turn; at once, without giving way to other tasks, if nobody waits and there is enough."""
        if not self._waiting:
            taken = self._take(wanted)
            if not isinstance(taken, Wait):
                return taken
            self._set_timer(taken.seconds)
        turn: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = wanted
        try:
            return await turn
        except asyncio.CancelledError:
            self._waiting.pop(turn, None)
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())
            self.wake()  # the next one may want less
            raise

    def wake(self) -> None:
        """Let leave who can. To be called whenever something was given back or became more."""
        while self._waiting:
            turn, wanted = next(iter(self._waiting.items()))
            if not turn.done():  # else it is cancelled
                taken = self._take(wanted)
                if isinstance(taken, Wait):
                    self._set_timer(taken.seconds)
                    return
                turn.set_result(taken)
            del self._waiting[turn]
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, seconds: float | None) -> None:
        """Ring in so many seconds. A timer that rings earlier is left alone: it only makes us look once more."""
        if seconds is None:
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds + TIMER_SLACK_S
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.wake()
