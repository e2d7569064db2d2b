"""Who may be in flight with whom after an engine died."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from pipeline.teacher.poison import COMPANY, CRASHES, Death, Quarantine


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def after_deaths(deaths: int, *keys: str) -> Quarantine:
    """Requests that were in flight at so many deaths."""
    quarantine = Quarantine("engine 1")
    for _ in range(deaths):
        for key in keys:
            quarantine.sent(0, key)
        quarantine.crashed(0)
    return quarantine


async def most_together(quarantine: Quarantine, keys: list[str]) -> dict[int, int]:
    """Level -> most requests of it that were inside together; fails if two levels ever were."""
    inside: list[int] = []
    most: dict[int, int] = {}

    async def visit(key: str) -> None:
        async with quarantine.admit(key) as level:
            inside.append(level)
            assert set(inside) == {level}, "two levels are in flight together"
            most[level] = max(most.get(level, 0), len(inside))
            await asyncio.sleep(0.001)
            quarantine.settled(key)
            inside.remove(level)

    await asyncio.gather(*map(visit, keys))
    return most


def test_without_a_death_all_are_in_flight_together():
    async def work() -> None:
        assert await most_together(Quarantine("e"), [f"k{i}" for i in range(50)]) == {0: 50}

    run(work())


def test_suspects_are_in_flight_with_few_and_then_alone():
    async def work() -> None:
        once = [f"once {i}" for i in range(40)]
        quarantine = after_deaths(1, *once, "twice", "twice too")
        for key in ("twice", "twice too"):
            quarantine.sent(0, key)
        quarantine.crashed(0)
        most = await most_together(quarantine, ["fresh", *once, "twice", "twice too"])
        assert most == {0: 1, 1: COMPANY[1], 2: 1}

    run(work())


def test_the_most_suspected_go_first():
    async def work() -> None:
        quarantine, order = after_deaths(1, "suspect"), []

        async def visit(key: str) -> None:
            async with quarantine.admit(key):
                order.append(key)
                await asyncio.sleep(0.001)
                quarantine.settled(key)

        await asyncio.gather(*(asyncio.create_task(visit(key)) for key in ("one", "suspect", "two", "three")))
        assert order == ["suspect", "one", "two", "three"]

    run(work())


def test_nobody_enters_while_one_that_is_more_suspected_sleeps_before_its_next_try():
    """It waits in no line then; let in, they would die of the next prompt that ends the engine, suspected as well."""

    async def work() -> None:
        for deaths, key in ((0, "fresh"), (1, "once")):
            quarantine, entered = after_deaths(deaths, key), asyncio.Event()
            for _ in range(deaths + 1):
                quarantine.sent(1, "asleep")
                quarantine.crashed(1)

            async def enter(quarantine: Quarantine = quarantine, key: str = key, entered: Any = entered) -> None:
                async with quarantine.admit(key):
                    entered.set()

            task = asyncio.create_task(enter())
            await asyncio.sleep(0.02)
            assert not entered.is_set()
            quarantine.settled("asleep")
            await asyncio.wait_for(task, 5)

    run(work())


def test_who_was_let_in_before_a_death_goes_back_behind_its_suspects():
    quarantine = after_deaths(1, "suspect")
    assert quarantine.is_stale("fresh", 0) and not quarantine.is_stale("suspect", 1)
    quarantine.settled("suspect")
    assert not quarantine.is_stale("fresh", 0)


def test_one_that_waits_when_a_server_dies_of_what_it_sent_before_waits_among_the_suspects():
    """Its time was out, so it came back to wait, and the server went on with it."""

    async def work() -> None:
        quarantine, levels = after_deaths(2, "first"), []
        quarantine.sent(1, "slow")

        async def wait() -> None:
            async with quarantine.admit("slow") as level:
                levels.append(level)
                quarantine.settled("slow")

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        quarantine.crashed(1)
        await asyncio.sleep(0)
        assert levels == []
        quarantine.settled("first")
        await waiting
        assert levels == [1]

    run(work())


def test_a_death_is_searched_for_a_while_and_explained_when_it_names_a_request():
    quarantine = Quarantine("e", servers=3)
    assert quarantine.crashed(0) is Death.UNEXPLAINED, "nobody was in flight"
    for number in range(quarantine.patience):
        quarantine.sent(number % 3, f"innocent {number}")
        assert quarantine.crashed(number % 3) is Death.SEARCHED
    quarantine.sent(0, "one more")
    assert quarantine.crashed(0) is Death.UNEXPLAINED
    for death in (Death.UNEXPLAINED, Death.UNEXPLAINED, Death.EXPLAINED):
        quarantine.sent(0, "bad")
        assert quarantine.crashed(0) is death
    quarantine.sent(0, "another")
    assert quarantine.crashed(0) is Death.SEARCHED, "the count began anew"


def test_only_who_was_in_flight_unanswered_at_the_dead_server_is_suspected():
    quarantine = Quarantine("e")
    for key in ("answered", "unseen", "lost", "settled"):
        quarantine.sent(0, key)
    quarantine.sent(1, "elsewhere")
    quarantine.unblame(0, "answered")
    quarantine.unblame(0, "unseen")
    quarantine.settled("settled")
    quarantine.crashed(0)
    levels = {key: quarantine.level(key) for key in ("answered", "unseen", "lost", "elsewhere", "settled")}
    assert levels == {"answered": 0, "unseen": 0, "lost": 1, "elsewhere": 0, "settled": 0}


def test_the_last_death_names_the_request():
    quarantine = after_deaths(CRASHES - 1, "bad", "good")
    quarantine.settled("good")
    quarantine.sent(0, "bad")
    assert quarantine.crashed(0) is Death.EXPLAINED
    assert quarantine.is_poison("bad") and not quarantine.is_poison("good")


def test_an_answer_clears_of_suspicion():
    quarantine = after_deaths(2, "slow")
    quarantine.settled("slow")
    assert quarantine.level("slow") == 0


def test_who_waits_and_is_cancelled_leaves_no_trace():
    async def work() -> None:
        quarantine = after_deaths(2, "a", "b", "c")

        async def visit(key: str, seconds: float) -> None:
            async with quarantine.admit(key):
                await asyncio.sleep(seconds)
                quarantine.settled(key)

        first = asyncio.create_task(visit("a", 0.02))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(visit("b", 0))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await first
        await visit("c", 0)

    run(work())


def test_one_that_failed_alone_keeps_the_others_out_until_the_death_is_noticed():
    """Sent to a dying server, they would be suspected as well."""

    async def work() -> None:
        quarantine, entered = after_deaths(2, "bad", "good"), asyncio.Event()

        async def fail() -> None:
            async with quarantine.admit("bad"):
                quarantine.sent(0, "bad")

        async def enter() -> None:
            async with quarantine.admit("good"):
                entered.set()

        tasks = [asyncio.create_task(fail()), asyncio.create_task(enter())]
        await asyncio.sleep(0.05)
        assert not entered.is_set()
        assert quarantine.crashed(0) is Death.EXPLAINED
        await asyncio.gather(*tasks)
        assert entered.is_set() and not quarantine.is_poison("good")

    run(work())
