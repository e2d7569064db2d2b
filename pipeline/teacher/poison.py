"""Finds the prompt that ends a local engine: who was in flight when it died is asked again in ever smaller company."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
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


class Death(Enum):
    """What the end of an engine is taken for."""

    EXPLAINED = "explained"
    """The request that ended it is named."""
    SEARCHED = "searched"
    """One of those in flight may have ended it; which one, later deaths will tell."""
    UNEXPLAINED = "unexplained"
    """Nobody was in flight, or too many deaths in a row have named nobody."""


@dataclass(slots=True)
class Turn:
    """A request that waits to be let in.

    Attributes:
        is_in: true when it is; false when it has to ask again, since its level is another one.
    """

    key: str
    is_in: asyncio.Future[bool]


class Quarantine:
    """Requests of one teacher by the number of times that an engine died with them in flight.

    Requests of different numbers are never in flight together, and higher numbers go first: nobody enters while a
    request of a higher number is not settled, wherever that waits. So one prompt that ends the engine costs `CRASHES`
    deaths however many were in flight with it, several share the first of these, and the last death names it. Not
    covered: a prompt that ends the engine only in company; it is answered on its own.

    Args:
        servers: how many serve the teacher; the first deaths of a search may come once from each.

    Attributes:
        engine: the engine as it is installed; a refusal holds for this one only.
        patience: so many deaths in a row, over all servers, may name nobody and still belong to a search.
    """

    def __init__(self, engine: str, servers: int = 1) -> None:
        self.engine, self.patience = engine, CRASHES * max(2, servers)
        self._in_a_row = 0
        """Deaths with somebody in flight since the last one that named a request."""
        self._crashes: dict[str, int] = {}
        self._open = [0] * len(COMPANY)
        """By level: suspects that are neither settled nor named."""
        self._out: dict[int, set[str]] = {}
        """By server: requests that left for it and were not answered, since it was started."""
        self._noticed = asyncio.Event()
        """Set when the next death is noticed."""
        self._inside: Counter[int] = Counter()
        self._waiting: tuple[deque[Turn], ...] = tuple(deque() for _ in COMPANY)

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
        level = await self._enter(key)
        try:
            yield level
            if level > 0 and any(key in keys for keys in self._out.values()):
                await self._await_notice()
        finally:
            self._inside[level] -= 1
            self._wake()

    def is_stale(self, key: str, level: int) -> bool:
        """Whether who was let in at a level has to go back and ask again: an engine died meanwhile."""
        return self.is_poison(key) or self.level(key) != level or any(self._open[level + 1 :])

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
        """It is answered by whatever server, refused or given up: nobody asks for it any more."""
        for keys in self._out.values():
            keys.discard(key)
        if key in self._crashes:
            self._suspect(key, 0)
            self._wake()

    def crashed(self, server: int) -> Death:
        """A server died."""
        self._noticed.set()
        self._noticed = asyncio.Event()
        suspects = self._out.pop(server, set())
        for key in suspects:
            self._suspect(key, self._crashes.get(key, 0) + 1)
        self._send_back()
        if any(self.is_poison(key) for key in suspects):
            self._in_a_row = 0
            self._wake()
            return Death.EXPLAINED
        self._in_a_row += bool(suspects)
        return Death.SEARCHED if suspects and self._in_a_row <= self.patience else Death.UNEXPLAINED

    def _suspect(self, key: str, deaths: int) -> None:
        """Note how many deaths a request has seen, 0 once it is settled."""
        before = self._crashes.pop(key, 0)
        if 0 < before < CRASHES:
            self._open[before] -= 1
        if deaths > 0:
            self._crashes[key] = deaths
        if 0 < deaths < CRASHES:
            self._open[deaths] += 1

    async def _await_notice(self) -> None:
        """Who was not answered keeps the others out until it is clear whether the engine died of it: sent to a dying
        server, they would be suspected too."""
        try:
            await asyncio.wait_for(self._noticed.wait(), DEATH_S)
        except TimeoutError:
            pass

    def _may_enter(self, level: int) -> bool:
        """Whether nobody of another level is inside and nobody of a higher one is still to be settled, also where that
        one sleeps before its next try and does not wait here."""
        others = any(count > 0 for inside, count in self._inside.items() if inside != level)
        return not others and not any(self._open[level + 1 :]) and self._inside[level] < COMPANY[level]

    async def _enter(self, key: str) -> int:
        """Wait for the request's turn; gives its level."""
        while True:
            level = self.level(key)
            if self._may_enter(level) and not self._waiting[level]:
                self._inside[level] += 1
                return level
            if await self._wait(level, key):
                return level

    async def _wait(self, level: int, key: str) -> bool:
        turn = Turn(key, asyncio.get_running_loop().create_future())
        self._waiting[level].append(turn)
        try:
            return await turn.is_in
        except asyncio.CancelledError:
            if turn.is_in.done() and not turn.is_in.cancelled():
                self._inside[level] -= turn.is_in.result()
            elif turn in self._waiting[level]:
                self._waiting[level].remove(turn)
            self._wake()
            raise

    def _send_back(self) -> None:
        """Let those ask again who came to wait before an engine died of what may have been them: it went on with them
        after their time was out."""
        for level, waiting in enumerate(self._waiting):
            for turn in [turn for turn in waiting if self.level(turn.key) != level]:
                waiting.remove(turn)
                if not turn.is_in.done():
                    turn.is_in.set_result(False)

    def _wake(self) -> None:
        """Let in who may enter, the highest level first."""
        for level in reversed(range(len(COMPANY))):
            waiting = self._waiting[level]
            while waiting and self._may_enter(level):
                turn = waiting.popleft()
                if not turn.is_in.done():
                    self._inside[level] += 1
                    turn.is_in.set_result(True)
