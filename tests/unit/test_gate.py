"""Breaker, rate and number in flight behind one line, on a virtual clock: who waits, for what, and what that costs."""

import asyncio
import random
from collections import Counter

import pytest

from pipeline.core.config_limits import Limits
from pipeline.teacher.breaker import BreakerRules, CircuitBreaker, State
from pipeline.teacher.gate import Entrance, Gate, Outcome, Ticket
from pipeline.teacher.limits import AdaptiveLimit
from pipeline.teacher.rates import RateLimiter
from tests.virtual_time import clock, run_virtually


def a_gate(maximum: int = 8, rules: BreakerRules | None = None, **limits: int) -> Gate:
    return Gate(
        AdaptiveLimit(maximum, clock),
        RateLimiter(Limits(**limits), clock),
        CircuitBreaker(rules, clock, jitter=lambda: 1.0),
    )


class Door:
    """An entrance whose visitors are noted: who left, when, through which gate."""

    def __init__(self, *gates: Gate) -> None:
        self.gates = gates
        self.entrance = Entrance(gates, clock)
        self.opened = clock()
        self.left: list[tuple[str, float]] = []
        self.through: Counter[int] = Counter()
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def send(self, name: str, *, takes_s: float = 1.0, tokens: tuple[int, int] = (1, 1)) -> asyncio.Task[None]:
        self.tasks[name] = asyncio.create_task(self._visit(name, takes_s, tokens))
        return self.tasks[name]

    async def _visit(self, name: str, takes_s: float, tokens: tuple[int, int]) -> None:
        async with self.entrance.admit(*tokens) as ticket:
            self.left.append((name, round(clock() - self.opened, 2)))
            self.through[ticket.index] += 1
            await asyncio.sleep(takes_s)
            ticket.settle(Outcome.ANSWERED)

    async def cancel(self, *names: str) -> None:
        for name in names:
            self.tasks[name].cancel()
        await asyncio.gather(*(self.tasks[name] for name in names), return_exceptions=True)

    async def all_back(self) -> None:
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert len(self.entrance) == 0
        assert all(gate.limit.in_flight == 0 for gate in self.gates)


async def moments() -> None:
    """Let everybody do what takes no time."""
    await asyncio.sleep(0.0001)


class TestOrder:
    def test_who_waits_for_a_rate_holds_no_slot(self) -> None:
        async def story() -> None:
            gate = a_gate(maximum=2, output_tokens_per_minute=600)
            door = Door(gate)
            door.send("large", tokens=(1, 300), takes_s=0.1)
            door.send("waits", tokens=(1, 300), takes_s=0.1)
            await asyncio.sleep(1)
            assert gate.limit.in_flight == 0
            await door.all_back()
            assert door.left == [("large", 0.0), ("waits", 30.0)]

        run_virtually(story())

    def test_who_waits_for_a_slot_holds_no_rate_so_that_no_reservations_pile_up(self) -> None:
        async def story() -> None:
            door = Door(a_gate(maximum=1, requests_per_minute=60))
            door.send("slow", takes_s=100)
            for number in range(20):
                door.send(f"{number}", takes_s=0)
            await door.all_back()
            times = [time for _, time in door.left[1:]]
            assert sum(time < 101 for time in times) <= 6, "one burst, not twenty that were let through meanwhile"
            assert times == sorted(times)
            assert times[-1] == pytest.approx(100 + 15, abs=0.1)

        run_virtually(story())

    def test_who_waits_for_a_rate_is_no_trial_of_the_breaker(self) -> None:
        async def story() -> None:
            door = Door(a_gate(rules=BreakerRules(min_requests=1, longest_open_s=1000), requests_per_minute=6))
            async with door.entrance.admit(1, 1) as ticket:
                ticket.settle(Outcome.FAILED)
            door.send("first")
            door.send("second")
            await door.all_back()
            assert door.left == [("first", 10.0), ("second", 20.0)]

        run_virtually(story())

    def test_who_waits_for_the_breaker_holds_no_slot(self) -> None:
        async def story() -> None:
            gate = a_gate(maximum=1, rules=BreakerRules(min_requests=1, first_open_s=5))
            door = Door(gate)
            async with door.entrance.admit(1, 1) as ticket:
                ticket.settle(Outcome.FAILED)
            door.send("waits")
            await asyncio.sleep(1)
            assert gate.limit.in_flight == 0
            await door.all_back()
            assert door.left == [("waits", 5.0)]

        run_virtually(story())

    def test_an_open_breaker_holds_everybody_back_although_there_are_slots(self) -> None:
        async def story() -> None:
            gate = a_gate(rules=BreakerRules(min_requests=1, first_open_s=5))
            door = Door(gate)
            async with door.entrance.admit(1, 1) as ticket:
                ticket.settle(Outcome.FAILED)
            for name in "abcd":
                door.send(name)
            await door.all_back()
            assert door.left == [("a", 5.0), ("b", 6.0), ("c", 6.0), ("d", 7.0)]

        run_virtually(story())


class TestLine:
    def test_first_come_first_served_whatever_they_want(self) -> None:
        async def story() -> None:
            door = Door(a_gate(output_tokens_per_minute=600))
            door.send("empties", tokens=(1, 300), takes_s=0)
            door.send("large", tokens=(1, 300), takes_s=0)
            for number in range(10):
                door.send(f"small {number}", tokens=(1, 1), takes_s=0)
            await door.all_back()
            assert [name for name, _ in door.left] == ["empties", "large", *(f"small {i}" for i in range(10))]

        run_virtually(story())

    def test_a_request_larger_than_the_limit_leaves_too(self) -> None:
        async def story() -> None:
            door = Door(a_gate(output_tokens_per_minute=60))
            for name in ("first", "second", "third"):
                door.send(name, tokens=(1, 6000), takes_s=0)
            await door.all_back()
            assert [name for name, _ in door.left] == ["first", "second", "third"]

        run_virtually(story())

    def test_a_reply_that_used_less_lets_the_next_one_leave_at_once(self) -> None:
        async def story() -> None:
            gate = a_gate(output_tokens_per_minute=600)
            door = Door(gate)

            async def reply() -> None:
                async with door.entrance.admit(1, 300) as ticket:
                    await asyncio.sleep(2)
                    ticket.settle(Outcome.ANSWERED, 1, 10)

            task = asyncio.create_task(reply())
            await moments()
            door.send("next", tokens=(1, 280))
            await task
            await door.all_back()
            assert door.left == [("next", 2.0)]

        run_virtually(story())

    def test_a_cancelled_first_one_lets_the_next_that_wants_less_leave(self) -> None:
        async def story() -> None:
            door = Door(a_gate(output_tokens_per_minute=600))
            door.send("leaves", tokens=(1, 200))
            door.send("large", tokens=(1, 300))
            door.send("small", tokens=(1, 50))
            door.send("middle", tokens=(1, 120))
            door.send("last", tokens=(1, 10))
            await asyncio.sleep(2)
            await door.cancel("large")
            await door.all_back()
            assert door.left == [("leaves", 0.0), ("small", 2.0), ("middle", 5.0 + 2.0), ("last", 8.0)]

        run_virtually(story())

    def test_who_is_cancelled_just_as_its_turn_comes_gives_everything_back(self) -> None:
        async def story() -> None:
            gate = a_gate(maximum=1, requests_per_minute=24, output_tokens_per_minute=600)
            door = Door(gate)
            async with door.entrance.admit(1, 1) as ticket:
                door.send("unlucky", tokens=(1, 299))
                door.send("next", tokens=(1, 299))
                await moments()
                ticket.settle(Outcome.ANSWERED, 1, 1)
            door.tasks["unlucky"].cancel()  # the slot is its already, and it has not run since
            await door.all_back()
            assert door.left == [("next", 0.0)]

        run_virtually(story())

    def test_its_trial_of_the_breaker_too(self) -> None:
        async def story() -> None:
            rules = BreakerRules(min_requests=1, first_open_s=1, longest_open_s=1000)
            door = Door(a_gate(maximum=1, rules=rules))
            async with door.entrance.admit(1, 1) as ticket:
                ticket.settle(Outcome.FAILED)
                door.send("unlucky")
                door.send("next")
                await asyncio.sleep(2)
            door.tasks["unlucky"].cancel()
            await door.all_back()
            assert door.left == [("next", 2.0)]

        run_virtually(story())

    def test_all_waiters_can_be_cancelled_and_leave_nothing_behind(self) -> None:
        async def story() -> None:
            gate = a_gate(maximum=2, requests_per_minute=60)
            door = Door(gate)
            for number in range(100):
                door.send(f"{number}", takes_s=50)
            await asyncio.sleep(1)
            await door.cancel(*door.tasks)
            await door.all_back()
            async with door.entrance.admit(1, 1) as ticket:
                assert ticket.waited_s == 0

        run_virtually(story())

    def test_hundreds_wait_with_one_timer_and_nobody_polls(self) -> None:
        async def story() -> None:
            loop = asyncio.get_running_loop()
            gate = a_gate(maximum=600, requests_per_minute=60)
            door = Door(gate)
            for number in range(500):
                door.send(f"{number}", takes_s=3600)
            await moments()
            for _ in range(10):
                gate.changed()
            timers = [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
            assert len(timers) == 5 + 1, "five that left sleep; of the others only the line has a timer"
            await door.cancel(*door.tasks)
            assert [timer for timer in loop._scheduled if not timer.cancelled()] == []  # type: ignore[attr-defined]

        run_virtually(story())

    def test_waiting_has_no_end_and_is_nobody_s_failure(self) -> None:
        async def story() -> None:
            gate = a_gate(requests_per_minute=1)
            door = Door(gate)
            for number in range(300):
                door.send(f"{number}", takes_s=0)
            await moments()
            async with door.entrance.admit(1, 1) as ticket:
                assert ticket.waited_s == pytest.approx(300 * 60, rel=0.01)
                assert gate.limit.silent_s == 0
                assert gate.breaker.state is State.CLOSED
            await door.all_back()
            assert len(door.left) == 300

        run_virtually(story())


class TestOutcomes:
    """What each outcome tells the three."""

    @pytest.mark.parametrize(
        ("outcome", "limit", "state", "silent"),
        [
            (Outcome.ANSWERED, 4, State.CLOSED, False),
            (Outcome.BUSY, 2, State.CLOSED, True),
            (Outcome.OVERLOADED, 2, State.OPEN, True),
            (Outcome.FAILED, 4, State.OPEN, True),
            (Outcome.NONSENSE, 4, State.CLOSED, True),
            (Outcome.UNSENT, 4, State.CLOSED, False),
        ],
    )
    def test_table(self, outcome: Outcome, limit: float, state: State, silent: bool) -> None:
        async def story() -> None:
            gate = a_gate(maximum=4, rules=BreakerRules(min_requests=1))
            async with Entrance([gate], clock).admit(1, 1) as ticket:
                ticket.settle(outcome)
            await asyncio.sleep(0.1)
            assert (gate.limit.limit, gate.breaker.state, gate.limit.silent_s > 0) == (limit, state, silent)

        run_virtually(story())

    def test_an_endpoint_that_talks_nonsense_is_silent_but_no_number_of_it_opens_the_breaker(self) -> None:
        async def story() -> None:
            gate = a_gate(maximum=4, rules=BreakerRules(min_requests=1))
            entrance = Entrance([gate], clock)
            for number in range(500):
                async with entrance.admit(1, 1) as ticket:
                    assert ticket.waited_s == 0
                    ticket.settle(Outcome.NONSENSE)
                assert gate.breaker.state is State.CLOSED
                assert gate.limit.silent_s == pytest.approx(0.1 * number)
                await asyncio.sleep(0.1)
            assert gate.limit.limit == 4, "nor is it load"
            async with entrance.admit(1, 1) as ticket:
                ticket.settle(Outcome.ANSWERED)
            assert gate.limit.silent_s == 0

        run_virtually(story())

    def test_a_request_that_did_not_leave_costs_nothing(self) -> None:
        async def story() -> None:
            gate = a_gate(requests_per_minute=1, output_tokens_per_minute=2)
            entrance = Entrance([gate], clock)
            for _ in range(100):
                async with entrance.admit(1, 1) as ticket:
                    ticket.settle(Outcome.UNSENT)
                    assert ticket.waited_s == 0

        run_virtually(story())

    def test_a_cancelled_request_frees_its_slot_tells_nothing_and_counts_as_used(self) -> None:
        async def story() -> None:
            gate = a_gate(maximum=1, rules=BreakerRules(min_requests=1), output_tokens_per_minute=600)
            door = Door(gate)
            door.send("cancelled", tokens=(1, 300), takes_s=100)
            await moments()
            await door.cancel("cancelled")
            assert gate.breaker.state is State.CLOSED
            assert gate.limit.silent_s == 0
            door.send("next", tokens=(1, 150))
            await door.all_back()
            assert door.left[1:] == [("next", 15.0)], "it may have been computed and billed"

        run_virtually(story())

    def test_a_ticket_is_settled_once(self) -> None:
        async def story() -> None:
            async with Entrance([a_gate()], clock).admit(1, 1) as ticket:
                ticket.settle(Outcome.ANSWERED)
                with pytest.raises(ValueError, match="once"):
                    ticket.settle(Outcome.ANSWERED)

        run_virtually(story())

    def test_a_pause_holds_everybody_back_and_does_not_end_in_a_burst(self) -> None:
        async def story() -> None:
            gate = a_gate(maximum=100, requests_per_minute=60)
            door = Door(gate)
            gate.pause(7)
            gate.pause(3)  # a shorter one does not end a longer one
            for number in range(8):
                door.send(f"{number}", takes_s=0)
            await door.all_back()
            assert [time for _, time in door.left] == [7.0] * 5 + [8.0, 9.0, 10.0]

        run_virtually(story())

    def test_a_server_that_says_nothing_remains_is_asked_as_its_bucket_fills(self) -> None:
        async def story() -> None:
            gate = a_gate()
            door = Door(gate)
            gate.observe(
                {
                    "x-ratelimit-limit-requests": "60",
                    "x-ratelimit-remaining-requests": "0",
                    "x-ratelimit-reset-requests": "1m0s",
                }
            )
            for name in "abc":
                door.send(name)
            await door.all_back()
            assert door.left == [("a", 1.0), ("b", 2.0), ("c", 3.0)]

        run_virtually(story())


class TestSeveralEndpoints:
    def test_the_least_loaded_gets_the_next_request(self) -> None:
        async def story() -> None:
            door = Door(a_gate(), a_gate())
            for number in range(10):
                door.send(f"{number}")
            await moments()
            assert door.through == {0: 5, 1: 5}
            await door.all_back()

        run_virtually(story())

    def test_nobody_waits_behind_a_dead_one_while_another_answers(self) -> None:
        async def story() -> None:
            dead, alive = a_gate(rules=BreakerRules(min_requests=1, first_open_s=1000, longest_open_s=1000)), a_gate()
            door = Door(dead, alive)
            async with door.entrance.admit(1, 1) as ticket:
                assert ticket.index == 0
                ticket.settle(Outcome.FAILED)
            for number in range(30):
                door.send(f"{number}")
            await door.all_back()
            assert door.through == {1: 30}
            assert clock() - door.opened == pytest.approx(4, abs=0.1)

        run_virtually(story())

    def test_one_that_is_being_restarted_gets_nothing(self) -> None:
        async def story() -> None:
            gate = a_gate()
            door = Door(gate)
            gate.shut()
            door.send("waits")
            await asyncio.sleep(40)
            assert door.left == []
            gate.reopen()
            await door.all_back()
            assert door.left == [("waits", 40.0)]

        run_virtually(story())

    def test_it_comes_back_with_a_clean_record(self) -> None:
        async def story() -> None:
            gate = a_gate(rules=BreakerRules(min_requests=1, first_open_s=1000, longest_open_s=1000))
            door = Door(gate)
            async with door.entrance.admit(1, 1) as ticket:
                ticket.settle(Outcome.FAILED)
            gate.shut()
            await asyncio.sleep(40)
            assert gate.limit.silent_s == pytest.approx(40)
            gate.reopen()
            assert gate.limit.silent_s == 0
            assert gate.breaker.state is State.CLOSED

        run_virtually(story())


class TestStorms:
    def test_a_dead_server_costs_256_workers_a_handful_of_requests_per_second(self) -> None:
        async def story() -> None:
            gate = a_gate(maximum=256)
            entrance = Entrance([gate], clock)
            sent: Counter[int] = Counter()
            start = clock()

            async def work() -> None:
                while True:
                    async with entrance.admit(1, 1) as ticket:
                        sent[int(clock() - start)] += 1
                        await asyncio.sleep(0.0005)  # connection refused
                        ticket.settle(Outcome.FAILED)
                    await asyncio.sleep(random.uniform(0, 0.5))

            tasks = [asyncio.create_task(work()) for _ in range(256)]
            await asyncio.sleep(60)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert 20 <= sent.pop(0) <= 64, "as many as leave before the twentieth failure is known"
            assert max(sent.values()) <= 2
            assert 5 <= sent.total() <= 15, "it is tried again and again, ever more rarely"

        run_virtually(story())

    def test_refusals_for_load_never_open_the_breaker(self) -> None:
        async def story() -> None:
            gate = a_gate()
            entrance = Entrance([gate], clock)
            for _ in range(500):
                async with entrance.admit(1, 1) as ticket:
                    ticket.settle(Outcome.BUSY)
            assert gate.breaker.state is State.CLOSED
            assert gate.limit.limit == 1

        run_virtually(story())


def test_a_ticket_names_the_endpoint_it_is_for() -> None:
    async def story() -> None:
        gates = [a_gate(maximum=1), a_gate(maximum=1)]
        entrance = Entrance(gates, clock)
        async with entrance.admit(1, 1) as first, entrance.admit(1, 1) as second:
            assert isinstance(first, Ticket)
            assert {first.index, second.index} == {0, 1}
            assert gates[first.index] is first.gate

    run_virtually(story())
