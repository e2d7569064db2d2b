"""A circuit breaker: an endpoint that fails most of the time is left alone, then tried with few requests."""

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from pipeline.teacher.line import Wait

SLICES = 10
"""Parts of the window that outcomes are counted in: they leave it a tenth at a time."""


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When a breaker opens and how it closes again.

    Attributes:
        window_s: outcomes of so many last seconds count.
        min_requests: with fewer outcomes in the window it stays closed.
        share: of failures among all outcomes in the window, from which on it opens.
        first_open_s: how long it is open at first; doubles each time that a trial fails.
        longest_open_s: bound of that.
        trials: requests that are tried at a time before it closes: one, then twice as many, up to this number.
    """

    window_s: float = 30.0
    min_requests: int = 20
    share: float = 0.5
    first_open_s: float = 1.0
    longest_open_s: float = 10.0
    trials: int = 4


class State(Enum):
    """What a breaker does with requests."""

    CLOSED = "closed"
    """All may leave."""
    OPEN = "open"
    """None may leave."""
    HALF_OPEN = "half-open"
    """A few may leave, to see whether the endpoint is back."""


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to send one request; the period says what its outcome may still change."""

    period: int


@dataclass(slots=True)
class _Slice:
    start: float
    outcomes: int = 0
    failures: int = 0


class CircuitBreaker:
    """Counts outcomes and decides who may leave; it neither waits nor sends.

    It opens when of at least `min_requests` outcomes in the window the share of failures is reached: 21 failures of
    512 do not trip one of 50 %. A refusal for load (429), time spent waiting and what we cancelled ourselves are no
    outcomes. Outcomes of requests that left before the last change of state change nothing: those hundreds that were
    in flight when the endpoint died open it once.

    Args:
        clock: monotonic seconds.
        jitter: uniform in [0, 1); an open time is half to all of what the rules say.
    """

    def __init__(
        self,
        rules: BreakerRules | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.rules = BreakerRules() if rules is None else rules
        self.state = State.CLOSED
        self._clock, self._jitter = clock, jitter
        self._period = 0
        self._slices: deque[_Slice] = deque()
        self._failed_trials = 0
        """How often in a row it opened since it was closed."""
        self._open_until = 0.0
        self._trials = 1
        self._out = self._worked = self._failed = 0
        """Requests of this round of trials: without an outcome yet, answered, failed."""
        self._tried_at = 0.0

    @property
    def period(self) -> int:
        """Grows with each change of state."""
        return self._period

    def enter(self) -> Permit | Wait:
        """Leave to send one request, to be handed to exactly one of the four methods that tell its outcome."""
        now = self._clock()
        if self.state is State.OPEN:
            if now < self._open_until:
                return Wait(self._open_until - now)
            self._begin(State.HALF_OPEN)
            self._trials = 1
        if self.state is State.HALF_OPEN:
            if self._out + self._worked + self._failed >= self._trials:
                # A trial that hangs must not keep the endpoint closed until it times out: others follow, rarely.
                due = self._tried_at + self.rules.longest_open_s
                if now < due:
                    return Wait(due - now)
            self._out += 1
            self._tried_at = now
        return Permit(self._period)

    def succeeded(self, permit: Permit) -> None:
        """The endpoint did its work."""
        if permit.period != self._period:
            return
        if self.state is State.CLOSED:
            self._count(failures=0)
            return
        self._out -= 1
        self._worked += 1
        self._end_round()

    def failed(self, permit: Permit) -> None:
        """The endpoint did not do its work."""
        if permit.period != self._period:
            return
        if self.state is State.CLOSED:
            self._count(failures=1)
            outcomes = sum(part.outcomes for part in self._slices)
            failures = sum(part.failures for part in self._slices)
            if outcomes >= self.rules.min_requests and failures >= self.rules.share * outcomes:
                self._open()
            return
        self._out -= 1
        self._failed += 1
        if self._failed >= self.rules.share * self._trials:
            self._open()
        else:
            self._end_round()

    def busy(self, permit: Permit) -> None:
        """The endpoint refused for load (429): no outcome, but a sign of life where one is waited for."""
        if self.state is State.HALF_OPEN:
            self.succeeded(permit)

    def let_go(self, permit: Permit) -> None:
        """There is no outcome: the request did not leave, or we cancelled it."""
        if self.state is State.HALF_OPEN and permit.period == self._period:
            self._out -= 1

    def reset(self) -> None:
        """Close and forget: the endpoint was replaced."""
        self._failed_trials = 0
        self._begin(State.CLOSED)

    def _begin(self, state: State) -> None:
        """Enter a state; what left before is from another period."""
        self.state = state
        self._period += 1
        self._slices.clear()
        self._out = self._worked = self._failed = 0

    def _open(self) -> None:
        self._begin(State.OPEN)
        bound = self.rules.first_open_s * 2 ** min(self._failed_trials, 30)
        seconds = min(bound, self.rules.longest_open_s) * (1 + self._jitter()) / 2
        self._failed_trials += 1
        self._open_until = self._clock() + seconds

    def _end_round(self) -> None:
        """When all trials of a round have ended well enough, begin one of twice as many, or close after the last."""
        if self._worked + self._failed < self._trials:
            return
        if self._trials >= self.rules.trials:
            self.reset()
            return
        self._begin(State.HALF_OPEN)
        self._trials *= 2

    def _count(self, failures: int) -> None:
        now = self._clock()
        while self._slices and self._slices[0].start <= now - self.rules.window_s:
            self._slices.popleft()
        if not self._slices or now - self._slices[-1].start >= self.rules.window_s / SLICES:
            self._slices.append(_Slice(now))
        self._slices[-1].outcomes += 1
        self._slices[-1].failures += failures
