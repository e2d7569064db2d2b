"""How many requests one endpoint gets at a time: additive increase, multiplicative decrease."""

import time
from collections.abc import Callable

from pipeline.teacher.line import Wait

FIRST_LIMIT = 32
SMALLEST_LIMIT = 1.0
CALM_S = 5.0
"""Overloads that follow each other faster are one episode: only its first says how much was too much."""
RECOVERY_S = 10.0
"""Time in which the limit then climbs from the bottom to `SAFE_SHARE` of what was too much."""
SAFE_SHARE = 0.9
PATIENCE_S = 30.0
"""After so long without an overload, what was too much once is old news: the limit doubles every `DOUBLING_S`."""
DOUBLING_S = 4.0
FEW_ANSWERS = 4
"""An overload after fewer answers since the last one belongs to a storm, and tells nothing about the capacity."""


class AdaptiveLimit:
    """Slots whose number follows what the endpoint can take. It neither waits nor wakes who waits: `Entrance` does.

    It grows by one per success until the first overload (slow start), then by one per window of successes. An overload
    halves it, once per window: the failures of requests that left before the last cut do not cut again, so that of a
    burst of refusals the first one counts.

    A storm of overloads leaves it at the bottom, from where one per window would take an hour with slow answers. When
    it is calm again it therefore grows by the clock, however long answers take: first to just below the limit at which
    the storm began, much later beyond it.

    Attributes:
        in_flight: requests that hold a slot now.
        limit: slots; a float, since growth after an overload is a fraction per success.
        maximum: the limit never grows beyond it.
    """

    def __init__(self, maximum: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.maximum = maximum
        self._clock = clock
        self._slow_start = True
        self._cuts = 0
        self._cut_at = self._grown_at = self._open_at = clock()
        self._answers_since_cut = 0
        self._window_after_cut = FEW_ANSWERS
        self._too_much = float(maximum)
        self._silent_since: float | None = None
        self._failed_at = 0.0
        self.in_flight = 0
        self.limit = float(min(FIRST_LIMIT, maximum))

    @property
    def silent_s(self) -> float:
        """Seconds since the first failure after the last success; 0 while all is well."""
        return 0.0 if self._silent_since is None else self._clock() - self._silent_since

    @property
    def vain_s(self) -> float:
        """Seconds from the first to the last failure since the last success: for so long it was asked in vain. Time
        in which nothing could leave (a rate, a pause) is no failure of the endpoint."""
        return 0.0 if self._silent_since is None else self._failed_at - self._silent_since

    def take(self) -> int | Wait:
        """Take a slot, to be given back: the window it belongs to, which is handed to `overloaded`."""
        if self.in_flight >= int(self.limit):
            return Wait()
        paused_s = self._open_at - self._clock()
        if paused_s > 0:
            return Wait(paused_s)
        self.in_flight += 1
        return self._cuts

    def give_back(self) -> None:
        """Give back what `take` took."""
        self.in_flight -= 1

    def succeeded(self) -> None:
        """The endpoint answered; an answer that says "this row is refused" counts too."""
        self._silent_since = None
        self._answers_since_cut += 1
        now = self._clock()
        since_growth, self._grown_at = now - self._grown_at, now
        if self.in_flight + 1 < self.limit:
            return  # the limit was not what held us back
        self.limit = min(self.maximum, self.limit + self._growth(now, since_growth))

    def failed(self) -> None:
        """The endpoint did not answer, for a reason that says nothing about its load."""
        self._failed_at = self._clock()
        if self._silent_since is None:
            self._silent_since = self._failed_at

    def overloaded(self, window: int) -> None:
        """The endpoint was too busy for a request that left in `window`."""
        self.failed()
        if window != self._cuts:
            return
        now = self._clock()
        calm = now - self._cut_at >= CALM_S and self._answers_since_cut >= self._window_after_cut
        if self._slow_start or calm:
            self._too_much = self.limit
        self._cut_at = self._grown_at = now
        self._answers_since_cut = 0
        self._cuts += 1
        self._slow_start = False
        self.limit = max(SMALLEST_LIMIT, self.limit / 2)
        self._window_after_cut = max(FEW_ANSWERS, int(self.limit))

    def forgive(self) -> None:
        """Forget failures so far: the endpoint was replaced."""
        self._silent_since = None

    def halve(self) -> int:
        """Never again more than half of what was allowed so far; gives the new maximum."""
        self.maximum = max(1, self.maximum // 2)
        self.limit = min(self.limit, float(self.maximum))
        return self.maximum

    def pause(self, seconds: float) -> None:
        """Let no request leave for so long; a pause that ends later stays."""
        self._open_at = max(self._open_at, self._clock() + seconds)

    def _growth(self, now: float, since_growth: float) -> float:
        """What one success adds."""
        if self._slow_start:
            return 1.0
        by_one_per_window = 1.0 / self.limit
        calm_s = now - self._cut_at
        safe = SAFE_SHARE * self._too_much
        if calm_s >= PATIENCE_S:
            by_the_clock = self.limit * (2 ** min(1.0, since_growth / DOUBLING_S) - 1)
        elif calm_s >= CALM_S and self.limit < safe:
            by_the_clock = min(safe - self.limit, safe * since_growth / RECOVERY_S)
        else:
            by_the_clock = 0.0
        return max(by_one_per_window, by_the_clock)
