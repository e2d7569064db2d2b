"""Reservations: who may leave, who waits, and what a person is told when nothing fits any more."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pipeline.core.config_budget import Budget, Spending
from pipeline.core.errors import Incomplete, UsageError
from pipeline.teacher.budget import Amount, Ledger, Limits, Scope, surely_free, worst_tokens
from pipeline.teacher.prices import FREE, Price
from pipeline.teacher.segment import Ended
from pipeline.teacher.spending import Hold, Purse, check_priced

PRICE = Price(1_000_000, 2_000_000)
"""One nano-dollar per token in, two per token out."""
BODY = b"x" * 44
"""With what a template may add, 300 tokens at most."""
WORST = 300 + 2 * 100


def spending(**budget: Any) -> Spending:
    return Spending(run="r", teacher="t", budget=Budget.model_validate(budget))


def purse(spent: Amount = Amount(), price: Price | None = PRICE, **budget: Any) -> Purse:  # noqa: B008
    return Purse(spending(**budget), price, {"t": spent}, "python -m pipeline run x.yaml")


def ended(*used: int | None, cost: int | None = None) -> Ended:
    return Ended(1, "answer", 200, *(used or (None, None)), cost)


def nano_usd(nano: int) -> float:
    return nano / 1e9


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test; `functools.wraps` would show pytest the signature it cannot call."""

    def run(self: object) -> None:
        asyncio.run(test(self))

    return run


class TestLedger:
    def test_a_worst_case_that_one_scope_refuses_is_held_in_none(self) -> None:
        ledger = Ledger((Scope(Limits("budget", tokens=100)), Scope(Limits("budget.teachers.t", tokens=50))))
        exceeded = ledger.reserve(Amount(tokens=60))
        assert exceeded is not None and (exceeded.limits.field, exceeded.cap) == ("budget.teachers.t", "tokens")
        assert ledger.held == Amount() and ledger.in_flight == 0
        assert ledger.reserve(Amount(tokens=50)) is None
        assert ledger.held == Amount(tokens=50) and ledger.in_flight == 1

    def test_what_settles_for_less_leaves_room(self) -> None:
        ledger = Ledger((Scope(Limits("budget", nano=100)),))
        assert ledger.reserve(Amount(nano=80)) is None
        assert ledger.reserve(Amount(nano=30)) is not None
        ledger.settle(Amount(nano=80), Amount(nano=70))
        assert ledger.reserve(Amount(nano=30)) is None

    def test_a_cap_that_was_lowered_below_what_is_spent_lets_nothing_leave(self) -> None:
        assert Ledger((Scope(Limits("budget", requests=3), Amount(requests=5)),)).reserve(Amount(requests=1))


class TestWhatAnAttemptCosts:
    @pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422, 429])
    def test_what_is_turned_away_is_free(self, status: int) -> None:
        assert surely_free(status, "bad_request")

    @pytest.mark.parametrize("status", [200, 408, 499, 500, 502, 503, 504, 529])
    def test_whatever_may_have_reached_a_model_is_not(self, status: int) -> None:
        assert not surely_free(status, "")

    @pytest.mark.parametrize("reason", ["content_filter", "refusal"])
    def test_a_filter_that_answers_with_400_may_have_looked_at_a_completion(self, reason: str) -> None:
        assert not surely_free(400, reason)

    def test_a_prompt_has_at_most_one_token_per_byte_beside_the_template_s(self) -> None:
        assert worst_tokens("é".encode() * 10) == 20 + 256

    def test_half_a_usage_is_an_unknown_cost(self) -> None:
        one = purse()
        assert one.cost(Hold(Amount(5), 5), 3, None) is None and one.cost(Hold(Amount(5), 5), 3, 4) == 11

    def test_a_teacher_without_a_price_costs_an_unknown_sum_and_a_free_one_nothing(self) -> None:
        assert purse(price=None).cost(Hold(Amount(), None), 3, 4) is None
        assert purse(price=FREE).cost(Hold(Amount(), 0), None, None) == 0


class TestPurse:
    @in_loop
    async def test_a_reservation_that_fits_does_not_wait(self) -> None:
        hold = await purse(usd=nano_usd(WORST)).reserve(BODY, 100)
        assert hold == Hold(Amount(WORST, 400, 1), WORST)

    @in_loop
    async def test_one_that_does_not_waits_for_those_in_flight(self) -> None:
        one = purse(usd=nano_usd(WORST + 50))
        first = await one.reserve(BODY, 100)
        second = asyncio.create_task(one.reserve(BODY, 100))
        await asyncio.sleep(0)
        assert not second.done()
        one.settle(first, ended(10, 10, cost=30))
        assert await second == first
        one.settle(first, ended(10, 10, cost=30))
        with pytest.raises(Incomplete):
            await one.reserve(BODY, 100)

    @in_loop
    async def test_when_nothing_is_in_flight_it_ends_and_nobody_is_let_in_after_it(self) -> None:
        one = purse(usd=nano_usd(WORST + 50))
        first = await one.reserve(BODY, 100)
        waiting = asyncio.create_task(one.reserve(BODY, 100))
        await asyncio.sleep(0)
        one.settle(first, ended())
        with pytest.raises(Incomplete):
            await one.reserve(b"", 1)  # which would fit
        with pytest.raises(Incomplete):
            await waiting

    @in_loop
    async def test_those_who_wait_go_in_their_order_so_that_a_long_prompt_is_not_passed_by_for_ever(self) -> None:
        one = purse(tokens=1000)
        first, order = await one.reserve(b"x" * 144, 300), []

        async def later(name: str, body: bytes) -> None:
            await one.reserve(body, 0)
            order.append(name)

        tasks = [asyncio.create_task(later(*each)) for each in (("long", b"x" * 144), ("short, which would fit", b""))]
        await asyncio.sleep(0)
        assert order == []
        one.settle(first, ended(100, 100, cost=1))
        await asyncio.gather(*tasks)
        assert order == ["long", "short, which would fit"]

    @in_loop
    async def test_one_who_is_cancelled_while_it_waits_holds_nothing(self) -> None:
        one = purse(requests=1)
        first = await one.reserve(BODY, 100)
        waiting = asyncio.create_task(one.reserve(BODY, 100))
        await asyncio.sleep(0)
        one.release(first)  # lets the waiting one in …
        waiting.cancel()  # … which is stopped before it hears of it
        await asyncio.gather(waiting, return_exceptions=True)
        assert await one.reserve(BODY, 100) == first

    @in_loop
    async def test_unknown_ends_stay_at_their_worst_case(self) -> None:
        one = purse(usd=nano_usd(2 * WORST))
        for _ in range(2):
            one.settle(await one.reserve(BODY, 100), ended())
        with pytest.raises(Incomplete) as caught:
            await one.reserve(BODY, 100)
        assert caught.value.what.endswith("in it 2 requests of unknown end at their worst case")
        assert one.report() == {
            "requests": 2,
            "input_tokens": 0,
            "output_tokens": 0,
            "cost_usd": 0.0,
            "unknown": 2,
            "unknown_usd": nano_usd(2 * WORST),
        }

    @in_loop
    async def test_what_was_spent_before_counts(self) -> None:
        with pytest.raises(Incomplete) as caught:
            await purse(Amount(1_000_000_000, 5, 7), usd=1).reserve(BODY, 100)
        assert str(caught.value).splitlines() == [
            "error: the budget is reached: $1.00 of $1.00 spent, and the next request may take $0.0000005",
            "   at: budget.usd: $1.00",
            "   do: raise budget.usd, then resume with: python -m pipeline run x.yaml",
        ]

    @in_loop
    async def test_what_is_in_flight_at_the_end_is_told_as_unknown(self) -> None:
        one = purse()
        await one.reserve(BODY, 100)
        one.settle(await one.reserve(BODY, 100), ended(10, 10, cost=30))
        assert one.summary() == (
            "2 requests: 10 tokens in, 10 out, $0.00000003; the end of 1 is not known (up to $0.0000005)"
        )
        assert purse(price=None).report()["cost_usd"] is None


class TestPrices:
    def test_a_cap_in_money_needs_a_price(self) -> None:
        for capped in (spending(usd=1), spending(teachers={"t": {"usd": 1}})):
            check_priced(capped, FREE)
            with pytest.raises(UsageError):
                check_priced(capped, None)
        check_priced(spending(tokens=1, requests=1, teachers={"other": {"usd": 1}}), None)
