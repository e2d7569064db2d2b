"""Spends a run's budget: reserves before an attempt, waits while others in flight may leave room, settles after it."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.core.config_budget import Caps, Spending, nano, usd
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.stage import Json
from pipeline.teacher.budget import Amount, Exceeded, Ledger, Limits, Scope, worst_tokens
from pipeline.teacher.prices import Price
from pipeline.teacher.segment import Ended


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Hold:
    """What is held for an attempt.

    Attributes:
        worst: its worst case.
        nano: that in nano-dollars; None: there is no price.
    """

    worst: Amount
    nano: int | None


@dataclass(slots=True)
class Totals:
    """What the attempts of one fetch came to.

    Attributes:
        requests: attempts that left.
        input_tokens, output_tokens, nano: where they are known; nano-dollars.
        unknown: attempts whose cost is not known.
        unknown_nano: their worst case.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    nano: int = 0
    unknown: int = 0
    unknown_nano: int = 0


def check_priced(spending: Spending, price: Price | None) -> None:
    """Refuse a cap in money where nobody knows what tokens cost.

    Raises:
        UsageError: the config caps money, and the teacher has no price.
    """
    scopes = (("budget", spending.budget), (f"budget.teachers.{spending.teacher}", spending.teacher_caps))
    capped = next((f"{field}.usd" for field, caps in scopes if caps.usd is not None), None)
    if price is None and capped is not None:
        what = f"{capped} is set, but the price of the teacher's tokens is not known"
        todo = "give it, in USD per million tokens: `price: {input: 2.5, output: 10}`"
        raise UsageError(what, where=f"teachers.{spending.teacher}.price", todo=todo)


class Purse:
    """The budget of one fetch, on one event loop.

    Args:
        price: of the teacher's tokens; None: unknown.
        spent: teacher's name -> what the run's attempts came to before.
        resume_command: for the message when the budget is reached.
        jobs: says for that message what open batch jobs hold of it; "": there are none.
    """

    def __init__(
        self,
        spending: Spending,
        price: Price | None,
        spent: Mapping[str | None, Amount],
        resume_command: str,
        jobs: Callable[[], str] = str,
    ) -> None:
        self._price, self._resume_command, self._jobs = price, resume_command, jobs
        name = spending.teacher
        run = Scope(_limits("budget", spending.budget), sum(spent.values(), Amount()))
        teacher = Scope(_limits(f"budget.teachers.{name}", spending.teacher_caps), spent.get(name, Amount()))
        self._ledger = Ledger((run, teacher))
        self._waiting: deque[tuple[Hold, asyncio.Future[None]]] = deque()
        self._reached: Incomplete | None = None
        self.totals = Totals()

    async def reserve(self, body: bytes, max_tokens: int) -> Hold:
        """Hold the worst case of an attempt that sends `body`; waits, first come first served, for those in flight.

        Raises:
            Incomplete: it does not fit, and nothing is in flight that could leave room.
        """
        if self._reached is not None:
            raise self._reached
        hold = self._hold(worst_tokens(body), max_tokens)
        if self._waiting or self._ledger.reserve(hold.worst) is not None:
            await self._wait(hold)
        return hold

    def take(self, hold: Hold) -> Incomplete | None:
        """Hold a worst case now, or say why not; nobody waits."""
        exceeded = self._ledger.reserve(hold.worst)
        return None if exceeded is None else self._error(exceeded, hold)

    def adopt(self, hold: Hold) -> None:
        """Hold the worst case of an attempt that an earlier process has sent."""
        self._ledger.adopt(hold.worst)

    def write_off(self, hold: Hold) -> None:
        """Count what is held for an attempt that will not be settled here as spent."""
        self._ledger.settle(hold.worst, hold.worst)

    def undo_write_off(self, hold: Hold) -> None:
        """Forget what was written off: whoever settles it after all adopts it first."""
        self._ledger.unspend(hold.worst)

    def release(self, hold: Hold) -> None:
        """Give back what was held for an attempt that did not leave."""
        self._ledger.settle(hold.worst, Amount())
        self._admit()

    def cost(self, hold: Hold, input_tokens: int | None, output_tokens: int | None) -> int | None:
        """Nano-dollars of an attempt; None: unknown."""
        if self._price is None or input_tokens is None or output_tokens is None:
            return hold.nano if hold.nano == 0 else None
        return self._price.cost(input_tokens, output_tokens)

    def settle(self, hold: Hold, ended: Ended) -> None:
        """Put what an attempt came to in the place of what was held; call it when that is on record."""
        actual = amount_of(hold, ended)
        self._ledger.settle(hold.worst, actual)
        totals = self.totals
        totals.requests += 1
        totals.input_tokens += ended.input_tokens or 0
        totals.output_tokens += ended.output_tokens or 0
        totals.nano += ended.cost or 0
        if ended.input_tokens is None or ended.output_tokens is None:
            self._count_unknown(hold.worst)
        self._admit()

    def report(self) -> dict[str, Json]:
        """What was spent, for the event log; what is in flight when the fetch ends has an unknown end."""
        totals = self._with_in_flight()
        priced = self._price is not None
        return {
            "requests": totals.requests,
            "input_tokens": totals.input_tokens,
            "output_tokens": totals.output_tokens,
            "cost_usd": totals.nano / 1e9 if priced else None,
            "unknown": totals.unknown,
            "unknown_usd": totals.unknown_nano / 1e9 if priced else None,
        }

    def summary(self) -> str:
        """The same as one line for a person."""
        totals = self._with_in_flight()
        told = f"{totals.requests:,} requests: {totals.input_tokens:,} tokens in, {totals.output_tokens:,} out"
        if self._price is not None and (self._price.input or self._price.output):
            told += f", {usd(totals.nano)}"
        if totals.unknown:
            at_most = f"up to {usd(totals.unknown_nano)}" if self._price is not None else "cost not known"
            told += f"; the end of {totals.unknown:,} is not known ({at_most})"
        return told

    def _hold(self, input_tokens: int, output_tokens: int) -> Hold:
        price = None if self._price is None else self._price.cost(input_tokens, output_tokens)
        return Hold(Amount(price or 0, input_tokens + output_tokens, 1), price)

    async def _wait(self, hold: Hold) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((hold, waiter))
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(hold)
            raise

    def _admit(self) -> None:
        """Let those in who wait, in their order, as far as they fit."""
        while self._waiting:
            hold, waiter = self._waiting[0]
            if not waiter.done():
                exceeded = self._ledger.reserve(hold.worst)
                if exceeded is not None and self._ledger.in_flight > 0:
                    return
                if exceeded is not None:
                    self._reached = self._error(exceeded, hold)
                    waiter.set_exception(self._reached)
                    return
                waiter.set_result(None)
            self._waiting.popleft()

    def _error(self, exceeded: Exceeded, hold: Hold) -> Incomplete:
        """What a person is told when the budget is reached."""
        limits, spent = exceeded.limits, exceeded.spent
        field = f"{limits.field}.{exceeded.cap}"
        match exceeded.cap:
            case "usd":
                has, cap, next_one = usd(spent.nano), usd(limits.nano or 0), usd(hold.worst.nano)
            case "tokens":
                has, cap = f"{spent.tokens:,} tokens", f"{limits.tokens:,}"
                next_one = f"{hold.worst.tokens:,}"
            case _:
                has, cap, next_one = f"{spent.requests:,} requests", f"{limits.requests:,}", "1"
        what = f"the budget is reached: {has} of {cap} spent, and the next request may take {next_one}"
        if self.totals.unknown and exceeded.cap != "requests":
            what += f"; in it {self.totals.unknown:,} requests of unknown end at their worst case"
        if jobs := self._jobs():
            what += f"; {jobs}"
        todo = f"raise {field}, then resume with: {self._resume_command}"
        return Incomplete(what, where=f"{field}: {cap}", todo=todo)

    def _count_unknown(self, worst: Amount) -> None:
        self.totals.unknown += 1
        self.totals.unknown_nano += worst.nano

    def _with_in_flight(self) -> Totals:
        totals = self.totals
        return Totals(
            requests=totals.requests + self._ledger.in_flight,
            input_tokens=totals.input_tokens,
            output_tokens=totals.output_tokens,
            nano=totals.nano,
            unknown=totals.unknown + self._ledger.in_flight,
            unknown_nano=totals.unknown_nano + self._ledger.held.nano,
        )


def amount_of(hold: Hold, ended: Ended) -> Amount:
    """What an attempt counts as: what it used, and the worst case of whatever is unknown."""
    known = ended.input_tokens is not None and ended.output_tokens is not None
    tokens = (ended.input_tokens or 0) + (ended.output_tokens or 0) if known else hold.worst.tokens
    return Amount(hold.worst.nano if ended.cost is None else ended.cost, tokens, 1)


def _limits(field: str, caps: Caps) -> Limits:
    return Limits(field, None if caps.usd is None else nano(caps.usd), caps.tokens, caps.requests)
