"""How many requests an endpoint gets at a time, through the line in front of it; and which GPUs a server gets."""

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import pytest

from pipeline.core.config_limits import Limits
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.errors import UsageError
from pipeline.teacher.endpoint import open_gate
from pipeline.teacher.gate import Entrance, Outcome, Ticket
from pipeline.teacher.gpus import server_environments
from pipeline.teacher.limits import FIRST_LIMIT, AdaptiveLimit


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


class Door:
    """One endpoint and the line in front of it, as a teacher without rate limits has them."""

    def __init__(self, concurrency: int) -> None:
        self.gate = open_gate(concurrency, Limits())
        self.limit = self.gate.limit
        self.entrance = Entrance([self.gate])

    def slot(self) -> AbstractAsyncContextManager[Ticket]:
        return self.entrance.admit(1, 1)

    async def use(self, outcome: Outcome, times: int) -> None:
        """`times` requests that end with one outcome while all other slots are taken."""
        for _ in range(times):
            async with AsyncExitStack() as slots:
                tickets = [await slots.enter_async_context(self.slot()) for _ in range(int(self.limit.limit))]
                tickets[0].settle(outcome)


def test_it_starts_small_and_grows_by_one_per_success_up_to_its_maximum():
    door = Door(40)
    assert door.limit.limit == FIRST_LIMIT
    run(door.use(Outcome.ANSWERED, 5))
    assert door.limit.limit == FIRST_LIMIT + 5
    run(door.use(Outcome.ANSWERED, 100))
    assert door.limit.limit == 40


def test_an_overload_halves_it_and_then_it_grows_by_one_per_window():
    door = Door(64)
    run(door.use(Outcome.BUSY, 1))
    assert door.limit.limit == FIRST_LIMIT / 2
    run(door.use(Outcome.ANSWERED, FIRST_LIMIT // 2))
    assert FIRST_LIMIT / 2 + 0.9 < door.limit.limit < FIRST_LIMIT / 2 + 1.1


def test_failures_of_one_window_cut_once():
    async def story() -> None:
        door = Door(64)
        async with AsyncExitStack() as slots:
            for ticket in [await slots.enter_async_context(door.slot()) for _ in range(20)]:
                ticket.settle(Outcome.BUSY)
        assert door.limit.limit == FIRST_LIMIT / 2

    run(story())


def test_one_request_may_always_leave():
    door = Door(64)
    run(door.use(Outcome.BUSY, 50))
    assert door.limit.limit == 1


def test_a_limit_that_was_not_used_up_does_not_grow():
    door = Door(64)

    async def story() -> None:
        async with door.slot() as ticket:
            ticket.settle(Outcome.ANSWERED)

    run(story())
    assert door.limit.limit == FIRST_LIMIT


def test_no_more_than_the_limit_are_in_flight_and_all_get_their_turn():
    door = Door(3)
    most = 0
    order: list[int] = []

    async def one(number: int) -> None:
        nonlocal most
        async with door.slot():
            most = max(most, door.limit.in_flight)
            order.append(number)
            await asyncio.sleep(0)

    async def story() -> None:
        await asyncio.gather(*(one(i) for i in range(50)))

    run(story())
    assert most == 3
    assert order == list(range(50)), "first come, first served"
    assert door.limit.in_flight == 0


def test_cancelled_waiters_and_holders_give_their_slots_back():
    async def story() -> None:
        door = Door(2)

        async def hold() -> None:
            async with door.slot():
                await asyncio.sleep(60)

        tasks = [asyncio.create_task(hold()) for _ in range(6)]
        await asyncio.sleep(0.01)
        tasks[4].cancel()
        tasks[0].cancel()
        tasks[2].cancel()  # it may have been handed the slot of the first in this very tick
        await asyncio.sleep(0.01)
        assert door.limit.in_flight == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert door.limit.in_flight == 0
        async with door.slot():
            assert door.limit.in_flight == 1

    run(story())


def test_a_slot_handed_to_a_waiter_that_is_cancelled_in_the_same_tick_is_handed_on():
    async def story() -> None:
        door = Door(1)

        async def hold() -> None:
            async with door.slot():
                await asyncio.sleep(0)

        async with door.slot():
            first, second = asyncio.create_task(hold()), asyncio.create_task(hold())
            await asyncio.sleep(0.01)
        first.cancel()
        await second
        assert door.limit.in_flight == 0

    run(story())


def test_a_pause_holds_everybody_back_and_ends_by_itself():
    async def story() -> None:
        door = Door(4)
        loop = asyncio.get_running_loop()
        start = loop.time()
        door.gate.pause(0.15)
        door.gate.pause(0.01)  # a shorter one does not end a longer one
        async with door.slot():
            assert loop.time() - start >= 0.15

    run(story())


def test_silence_is_counted_from_the_first_failure_after_the_last_success():
    now = 100.0
    limit = AdaptiveLimit(4, clock=lambda: now)
    assert limit.silent_s == 0
    limit.failed()
    now = 103.0
    limit.failed()
    now = 110.0
    assert limit.silent_s == 10
    assert limit.vain_s == 3, "time in which nobody asked, since none might leave, is not in vain"
    limit.succeeded()
    assert (limit.silent_s, limit.vain_s) == (0, 0)


def two_servers(inherited: dict[str, str], installed: int, **teacher: object) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of two servers with two GPUs each."""
    settings = {"kind": "vllm", "model": "./m", "servers": 2, "tensor_parallel_size": 2, **teacher}
    environments = server_environments(VllmTeacher.model_validate(settings), {"A": "b", **inherited}, installed)
    assert {environment["A"] for environment in environments} == {"b"}
    return [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments]


class TestGpus:
    """Two servers on one GPU would both ask for most of its memory."""

    def test_each_server_has_its_own(self) -> None:
        assert two_servers({}, 8) == ["0,1", "2,3"]

    def test_those_we_were_given_are_dealt_out(self) -> None:
        assert two_servers({"CUDA_VISIBLE_DEVICES": "7, 5,GPU-ab,1"}, 8) == ["7,5", "GPU-ab,1"]

    def test_the_config_may_choose_them(self) -> None:
        chosen = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
        assert two_servers({"CUDA_VISIBLE_DEVICES": "0"}, 8, env=chosen) == ["4,5", "6,7"]

    def test_one_server_keeps_what_it_inherits(self) -> None:
        assert two_servers({"CUDA_VISIBLE_DEVICES": "3,4,5"}, 8, servers=1) == ["3,4,5"]
        assert two_servers({}, 8, servers=1) == [None]

    @pytest.mark.parametrize(("inherited", "installed"), [({}, 0), ({"CUDA_VISIBLE_DEVICES": ""}, 8)])
    def test_without_any_nothing_is_set(self, inherited: dict[str, str], installed: int) -> None:
        assert two_servers(inherited, installed) == [inherited.get("CUDA_VISIBLE_DEVICES")] * 2

    @pytest.mark.parametrize(("inherited", "seen"), [({}, 3), ({"CUDA_VISIBLE_DEVICES": "0,-1,1,2,3"}, 1)])
    def test_too_few_are_an_error_before_anything_starts(self, inherited: dict[str, str], seen: int) -> None:
        with pytest.raises(UsageError, match=f"need 4; {seen} are visible"):
            two_servers(inherited, 3)
