"""What a request must pass before it leaves: its endpoint's circuit breaker, its rate and its number in flight."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from pipeline.teacher.breaker import CircuitBreaker, Permit
from pipeline.teacher.limits import AdaptiveLimit
from pipeline.teacher.line import Line, Wait
from pipeline.teacher.rates import RateLimiter, Reservation, read_quotas
from pipeline.teacher.verdict import BAD_PAYLOAD, Action, Verdict


class Outcome(Enum):
    """How a request ended, as far as it says something about the endpoint."""

    ANSWERED = "answered"
    """The endpoint did its work, also where it refused the row."""
    BUSY = "busy"
    """It refused for load (429): it gets less at a time, and is alive."""
    OVERLOADED = "overloaded"
    """It failed for what may be load (5xx, a time-out)."""
    FAILED = "failed"
    """It failed for a reason that says nothing about its load (connection refused, cut body)."""
    NONSENSE = "nonsense"
    """It is alive, but this was no answer (a maintenance page with status 200): perhaps this row's bad luck."""
    UNSENT = "unsent"
    """The request did not leave."""


def outcome_of_attempt(verdict: Verdict) -> Outcome:
    """What the end of an attempt says about the endpoint. A completion without content is the model's doing."""
    if verdict.action in (Action.ANSWER, Action.REJECT, Action.STRIKE):
        return Outcome.ANSWERED
    if verdict.reason == "rate_limited":
        return Outcome.BUSY
    if verdict.reason == BAD_PAYLOAD:
        return Outcome.NONSENSE
    return Outcome.OVERLOADED if verdict.overload else Outcome.FAILED


@dataclass(frozen=True, slots=True)
class Pass:
    """What a gate took for one request: a slot of a window, a reservation and the breaker's permit."""

    window: int
    reservation: Reservation
    permit: Permit


class Gate:
    """The three limits of one endpoint, taken together or not at all.

    So nobody holds a slot or a trial of the breaker while waiting for a rate, and what was reserved leaves at once:
    reservations do not pile up behind a pause, to leave all together at its end.

    Attributes:
        is_shut: nobody enters, because the endpoint is being restarted.
        is_out: nobody enters, because the endpoint does not answer; somebody else probes it.
        is_watched: there is such a somebody.
        is_doubtful: a request failed since somebody last looked.
    """

    def __init__(self, limit: AdaptiveLimit, rates: RateLimiter, breaker: CircuitBreaker) -> None:
        self.limit, self.rates, self.breaker = limit, rates, breaker
        self.is_shut = self.is_out = self.is_watched = self.is_doubtful = False
        self._wake: Callable[[], None] | None = None

    @property
    def load(self) -> float:
        """Share of the slots in use; compares endpoints."""
        return self.limit.in_flight / self.limit.limit

    def on_change(self, wake: Callable[[], None]) -> None:
        """Call this whenever somebody might enter who could not before; one entrance per gate."""
        self._wake = wake

    def enter(self, wanted: Reservation) -> Pass | Wait:
        """Take everything that a request needs, or nothing. What is cheapest to give back is asked first."""
        if self.is_shut or self.is_out:
            return Wait()
        window = self.limit.take()
        if isinstance(window, Wait):
            return window
        permit = self.breaker.enter()
        if isinstance(permit, Wait):
            self.limit.give_back()
            return permit
        reservation = self.rates.reserve(wanted)
        if isinstance(reservation, Wait):
            self.breaker.let_go(permit)
            self.limit.give_back()
            return reservation
        return Pass(window, reservation, permit)

    def settle(self, taken: Pass, outcome: Outcome, input_tokens: int | None, output_tokens: int | None) -> None:
        """Learn how a request ended; its slot is still held."""
        match outcome:
            case Outcome.ANSWERED:
                self.limit.succeeded()
                self.breaker.succeeded(taken.permit)
            case Outcome.BUSY:
                self.limit.overloaded(taken.window)
                self.breaker.busy(taken.permit)
            case Outcome.OVERLOADED:
                self.limit.overloaded(taken.window)
                self.breaker.failed(taken.permit)
            case Outcome.FAILED:
                self.limit.failed()
                self.breaker.failed(taken.permit)
            case Outcome.NONSENSE:
                self.limit.failed()
                self.breaker.busy(taken.permit)
            case Outcome.UNSENT:
                self.breaker.let_go(taken.permit)
                self.rates.give_back(taken.reservation)
        self.is_doubtful |= outcome in (Outcome.OVERLOADED, Outcome.FAILED, Outcome.NONSENSE)
        if outcome is not Outcome.UNSENT:
            self.rates.settle(taken.reservation, input_tokens, output_tokens)
        self.changed()

    def observe(self, headers: Mapping[str, str]) -> None:
        """Obey what a response says about the server's limits; see `read_quotas`."""
        self.rates.observe(read_quotas(headers))

    def pause(self, seconds: float) -> None:
        """Let no request leave for so long."""
        self.limit.pause(seconds)

    def take_out(self) -> None:
        """The endpoint takes no connection: let nobody enter until `come_back`, if somebody watches over that."""
        self.is_out = self.is_watched

    def come_back(self) -> None:
        """Requests may enter again; whether they are answered is still to be seen."""
        self.is_out = self.is_doubtful = False
        self.changed()

    def shut(self) -> None:
        """Let nobody enter until `reopen`."""
        self.is_shut = True

    def reopen(self) -> None:
        """Let requests enter again, and forget the failures so far: the endpoint was replaced."""
        self.is_shut = False
        self.limit.forgive()
        self.breaker.reset()
        self.changed()

    def changed(self) -> None:
        """Tell those who wait."""
        if self._wake is not None:
            self._wake()


@dataclass(slots=True)
class Ticket:
    """Leave to send one request to one endpoint.

    Attributes:
        index: which of the entrance's gates.
        is_stale: who holds it may not use it any more, and asks for another.
        waited_s: seconds spent in the line. They are our doing: no failure, and nothing off the row's time budget.
    """

    gate: Gate
    index: int
    taken: Pass
    waited_s: float = 0.0
    is_stale: bool = False
    _is_settled: bool = False

    def settle(self, outcome: Outcome, input_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """Tell how the request ended, once. Without it nothing is learned (we cancelled the request), and what was
        reserved counts as used.

        Args:
            input_tokens, output_tokens: what it used; None: unknown, so that the reservation stands.
        """
        if self._is_settled:
            raise ValueError("a ticket is settled once")
        self._is_settled = True
        self.gate.settle(self.taken, outcome, input_tokens, output_tokens)

    def leave(self) -> None:
        """Give the slot back."""
        if not self._is_settled:
            self.gate.breaker.let_go(self.taken.permit)
        self.gate.limit.give_back()
        self.gate.changed()


class Admission:
    """A wait in the line, then a slot for the block. (A generator would cost as much as all else that happens here.)"""

    __slots__ = ("_clock", "_line", "_ticket", "_wanted")

    def __init__(self, line: Line[Reservation, Ticket], wanted: Reservation, clock: Callable[[], float]) -> None:
        self._line, self._wanted, self._clock = line, wanted, clock
        self._ticket: Ticket | None = None

    async def __aenter__(self) -> Ticket:
        came = self._clock()
        self._ticket = ticket = await self._line.enter(self._wanted)
        ticket.waited_s = self._clock() - came
        return ticket

    async def __aexit__(self, *raised: object) -> None:
        if self._ticket is not None:
            self._ticket.leave()


class Entrance:
    """The one line in front of all endpoints of a teacher: who comes first enters the first gate that opens.

    One line for all, since one per endpoint would keep those who chose an endpoint that then died waiting behind it
    while others idle.
    """

    def __init__(self, gates: Sequence[Gate], clock: Callable[[], float] = time.monotonic) -> None:
        self._gates = tuple(enumerate(gates))
        self._clock = clock
        self._line: Line[Reservation, Ticket] = Line(self._enter, self._undo)
        for gate in gates:
            gate.on_change(self._line.wake)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._line)

    def admit(self, input_tokens: int, output_tokens: int) -> "Admission":
        """Wait until a request may leave, and hold its slot for the block. Waiting has no time-out.

        Args:
            input_tokens: best guess of the prompt's tokens.
            output_tokens: most that the completion may have.
        """
        return Admission(self._line, Reservation(input_tokens, output_tokens), self._clock)

    def _enter(self, wanted: Reservation) -> Ticket | Wait:
        """Through the gate of the least loaded endpoint that lets somebody in."""
        waits: list[float] = []
        gates = self._gates if len(self._gates) == 1 else sorted(self._gates, key=lambda numbered: numbered[1].load)
        for index, gate in gates:
            taken = gate.enter(wanted)
            if isinstance(taken, Pass):
                return Ticket(gate, index, taken)
            if taken.seconds is not None:
                waits.append(taken.seconds)
        return Wait(min(waits, default=None))

    def _undo(self, ticket: Ticket) -> None:
        """The task that should have got it was cancelled. The line wakes whoever is next."""
        ticket.gate.rates.give_back(ticket.taken.reservation)
        ticket.gate.breaker.let_go(ticket.taken.permit)
        ticket.gate.limit.give_back()
