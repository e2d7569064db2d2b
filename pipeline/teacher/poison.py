"""Finds the prompt that ends a local engine: who was in flight when it died is asked again in ever smaller company."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

CRASHES: Final = 3
"""After so many deaths of an engine with it in flight, the last one alone, a request is refused."""
COMPANY: Final = (1_000_000, 16, 1)
"""Most requests in flight together, over all servers, by how many deaths each of them has seen."""
NOTICE_S: Final = 0.5
"""Least time before a request that failed is sent again: a death is mostly noticed, and told to `crashed`, by then."""
DEATH_S: Final = 15.0
"""A server that still runs so long after a request failed did not die of that: a watchdog takes its time with what is
left of a server."""


class Quarantine:
    """Requests of one teacher by the number of times that an engine died with them in flight.

    Requests of different numbers are never in flight together, and higher numbers go first: so one prompt that ends
    the engine costs `CRASHES` deaths however many were in flight with it, and the last death names it. Not covered: a
    prompt that ends the engine only in company; it is answered on its own.

    Attributes:
        engine: the engine as it is installed; a refusal holds for this one only.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self._crashes: dict[str, int] = {}
        self._out: dict[int, set[str]] = {}
        """By server: requests that left for it and were not answered, since it was started."""
        self._noticed = asyncio.Event()
        """Set when the next death is noticed."""
        self._inside: Counter[int] = Counter()
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = tuple(deque() for _ in COMPANY)

    def level(self, key: str) -> int:
        """Which company a request may be in: an index of `COMPANY`."""
        return min(self._crashes.get(key, 0), len(COMPANY) - 1)

    def is_poison(self, key: str) -> bool:
        """Whether it is this request that ends the engine."""
        return self._crashes.get(key, 0) >= CRASHES

    @asynccontextmanager
    async def admit(self, key: str) -> AsyncIterator[int]:
        """Wait until the request's company is let in, and be part of it for the block; gives its level.

        Waiting has no time-out. The level may change while something else is waited for inside the block.
        """
        level = self.level(key)
        if self._may_enter(level) and not self._waiting[level]:
            self._inside[level] += 1
        else:
            await self._wait(level)
        try:
            yield level
            if level > 0 and any(key in keys for keys in self._out.values()):
                await self._await_notice()
        finally:
            self._inside[level] -= 1
            self._wake()

    def is_suspect(self, server: int, key: str) -> bool:
        """Whether it left for a server and was not answered, since that was started."""
        return key in self._out.get(server, ())

    def sent(self, server: int, key: str) -> None:
        """The request leaves for a server."""
        self._out.setdefault(server, set()).add(key)

    def unblame(self, server: int, key: str) -> None:
        """The server answered it in some way, or never saw it."""
        self._out.setdefault(server, set()).discard(key)

    def settled(self, key: str) -> None:
        """It is answered, by whatever server."""
        self._crashes.pop(key, None)
        for keys in self._out.values():
            keys.discard(key)

    def crashed(self, server: int) -> bool:
        """A server died; whether this has named the request that ended it."""
        self._noticed.set()
        self._noticed = asyncio.Event()
        suspects = self._out.pop(server, set())
        for key in suspects:
            self._crashes[key] = self._crashes.get(key, 0) + 1
        return any(self.is_poison(key) for key in suspects)

    async def _await_notice(self) -> None:
        """Who was not answered keeps the others out until it is clear whether the engine died of it: sent to a dying
        server, they would be suspected too."""
        try:
            await asyncio.wait_for(self._noticed.wait(), DEATH_S)
        except TimeoutError:
            pass

    def _may_enter(self, level: int) -> bool:
        """Whether nobody of another level is inside or, of a higher one, waiting."""
        others = any(count > 0 for inside, count in self._inside.items() if inside != level)
        return not others and not any(self._waiting[level + 1 :]) and self._inside[level] < COMPANY[level]

    async def _wait(self, level: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[level].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._inside[level] -= 1
            elif turn in self._waiting[level]:
                self._waiting[level].remove(turn)
            self._wake()
            raise

    def _wake(self) -> None:
        """Let in who may enter, the highest level first."""
        for level in reversed(range(len(COMPANY))):
            waiting = self._waiting[level]
            while waiting and self._may_enter(level):
                turn = waiting.popleft()
                if not turn.done():
                    self._inside[level] += 1
                    turn.set_result(None)
