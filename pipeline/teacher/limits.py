"""How many requests one endpoint gets at a time: additive increase, multiplicative decrease."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

FIRST_LIMIT = 32
SMALLEST_LIMIT = 1.0


class AdaptiveLimit:
    """A semaphore whose size follows what the endpoint can take.

    It grows by one per success until the first overload (slow start), then by one per window of successes; an
    overload halves it, once per window: the failures of requests that left before the last cut do not cut again.
    Not safe to share between event loops.

    Attributes:
        in_flight: requests that hold a slot now.
        limit: slots; a float, since growth after an overload is a fraction per success.
        maximum: the limit never grows beyond it.
    """

    def __init__(self, maximum: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.maximum = maximum
        self._clock = clock
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._slow_start = True
        self._cuts = 0
        self._open_at = clock()
        self._silent_since: float | None = None
        self.in_flight = 0
        self.limit = float(min(FIRST_LIMIT, maximum))

    @property
    def load(self) -> float:
        """Share of the slots in use or waited for; compares endpoints."""
        return (self.in_flight + len(self._waiters)) / self.limit

    @property
    def silent_s(self) -> float:
        """Seconds since the first failure after the last success; 0 while all is well."""
        return 0.0 if self._silent_since is None else self._clock() - self._silent_since

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Hold one slot; yields the window it belongs to, to be handed to `overloaded`."""
        if self._waiters or not self._is_open():
            await self._wait()
        else:
            self.in_flight += 1
        try:
            yield self._cuts
        finally:
            self.in_flight -= 1
            self._wake()

    def succeeded(self) -> None:
        """The endpoint answered; an answer that says "this row is refused" counts too."""
        self._silent_since = None
        if self.in_flight + 1 < self.limit:
            return  # the limit was not what held us back
        self.limit = min(self.maximum, self.limit + (1.0 if self._slow_start else 1.0 / self.limit))
        self._wake()

    def failed(self) -> None:
        """The endpoint did not answer, for a reason that says nothing about its load."""
        if self._silent_since is None:
            self._silent_since = self._clock()

    def overloaded(self, window: int) -> None:
        """The endpoint was too busy for a request that left in `window`."""
        self.failed()
        if window != self._cuts:
            return
        self._cuts += 1
        self._slow_start = False
        self.limit = max(SMALLEST_LIMIT, self.limit / 2)

    def forgive(self) -> None:
        """Forget failures so far: the endpoint was replaced."""
        self._silent_since = None

    def pause(self, seconds: float) -> None:
        """Let no request leave for so long; a pause that ends later stays."""
        open_at = self._clock() + seconds
        if open_at <= self._open_at:
            return
        self._open_at = open_at
        asyncio.get_running_loop().call_later(seconds + 0.001, self._wake)

    def _is_open(self) -> bool:
        return self.in_flight < int(self.limit) and self._clock() >= self._open_at

    async def _wait(self) -> None:
        """Queue up until `_wake` hands a slot over."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.in_flight -= 1
                self._wake()
            raise

    def _wake(self) -> None:
        """Hand free slots to those who wait, first come first served."""
        while self._waiters and self._is_open():
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.in_flight += 1
                waiter.set_result(None)
