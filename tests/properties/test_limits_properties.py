"""The number in flight against simulated servers on a virtual clock: never above the limit, near the capacity, back in
time. The backoff of the rows is the client's: full jitter, doubling."""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.core.config_limits import Limits
from pipeline.teacher.breaker import CircuitBreaker
from pipeline.teacher.gate import Entrance, Gate, Outcome
from pipeline.teacher.limits import AdaptiveLimit
from pipeline.teacher.line import Wait
from pipeline.teacher.rates import REQUEST_BURST_MINUTES, TOKEN_BURST_MINUTES, RateLimiter
from tests.virtual_time import clock, run_virtually

MAXIMUM = 64
FAST_S = 0.02
"""What a refusal takes."""


@dataclass
class Server:
    """Answers `capacity` requests at a time in `latency_s` and refuses more with 429.

    Attributes:
        ill: outcome of requests while it is ill (from `ill_from` to `ill_until`).
        well_share: of requests that are answered although it is ill.
    """

    capacity: int
    latency_s: float
    random: random.Random
    ill: Outcome = Outcome.OVERLOADED
    ill_from: float = float("inf")
    ill_until: float = float("inf")
    well_share: float = 0.0
    busy: int = 0
    most: int = 0
    answered: Counter[int] = field(default_factory=Counter)
    """Second -> answers in it."""
    refused: Counter[int] = field(default_factory=Counter)

    async def ask(self) -> Outcome:
        now = clock()
        if self.ill_from <= now < self.ill_until and self.random.random() >= self.well_share:
            await asyncio.sleep(FAST_S)
            self.refused[int(now)] += 1
            return self.ill
        if self.busy >= self.capacity:
            await asyncio.sleep(FAST_S)
            self.refused[int(now)] += 1
            return Outcome.BUSY
        self.busy += 1
        self.most = max(self.most, self.busy)
        await asyncio.sleep(self.latency_s * self.random.uniform(0.8, 1.2))
        self.busy -= 1
        self.answered[int(clock())] += 1
        return Outcome.ANSWERED

    def throughput(self, start: float, end: float) -> float:
        """Answers per second."""
        return sum(count for second, count in self.answered.items() if start <= second < end) / (end - start)

    @property
    def full_throughput(self) -> float:
        return min(self.capacity, MAXIMUM) / self.latency_s


@dataclass
class Client:
    """`2 * MAXIMUM` rows at a time, each tried until it is answered."""

    server: Server
    gate: Gate
    entrance: Entrance
    random: random.Random
    broken: list[str] = field(default_factory=list)
    """Requests that left while as many were in flight as the limit allowed."""

    async def work(self) -> None:
        failures = 0
        while True:
            async with self.entrance.admit(1, 1) as ticket:
                if self.gate.limit.in_flight > int(self.gate.limit.limit):
                    self.broken.append(f"{self.gate.limit.in_flight} in flight of {self.gate.limit.limit}")
                outcome = await self.server.ask()
                ticket.settle(outcome)
            failures = 0 if outcome is Outcome.ANSWERED else failures + 1
            if failures > 0:
                await asyncio.sleep(self.random.uniform(0, min(60.0, 0.5 * 2**failures)))


async def simulate(
    server: Server, seconds: float, *, during: Callable[[Client], Awaitable[None]] | None = None
) -> Client:
    rng = server.random
    gate = Gate(AdaptiveLimit(MAXIMUM, clock), RateLimiter(clock=clock), CircuitBreaker(clock=clock, jitter=rng.random))
    client = Client(server, gate, Entrance([gate], clock), rng)
    tasks = [asyncio.create_task(client.work()) for _ in range(2 * MAXIMUM)]
    if during is not None:
        tasks.append(asyncio.create_task(during(client)))
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert gate.limit.in_flight == 0
    assert len(client.entrance) == 0
    return client


FEW = settings(max_examples=max(10, settings.default.max_examples // 8))  # each example is minutes of simulated time
SEEDS = st.integers(0, 2**32)
CAPACITIES = st.integers(2, 2 * MAXIMUM)
LATENCIES = st.floats(1, 10)
ILLNESSES = st.sampled_from([Outcome.OVERLOADED, Outcome.BUSY, Outcome.FAILED])


def draw_random(seed: int) -> random.Random:
    return random.Random(seed)


@FEW
@given(SEEDS, CAPACITIES, LATENCIES, ILLNESSES, st.floats(0, 0.9))
def test_no_request_leaves_while_as_many_are_in_flight_as_the_limit_allows(seed, capacity, latency_s, ill, well_share):
    async def story() -> None:
        server = Server(capacity, latency_s, draw_random(seed), ill, clock() + 20, clock() + 40, well_share)
        client = await simulate(server, 80)
        assert client.broken == []
        assert server.most <= MAXIMUM

    run_virtually(story())


@FEW
@given(SEEDS, CAPACITIES, LATENCIES)
def test_the_limit_stays_within_a_factor_of_the_capacity_and_the_server_busy(seed, capacity, latency_s):
    async def story() -> None:
        server = Server(capacity, latency_s, draw_random(seed))
        seen: list[float] = []

        async def watch(client: Client) -> None:
            await asyncio.sleep(60)
            while True:
                seen.append(client.gate.limit.limit)
                await asyncio.sleep(0.5)

        start = clock()
        await simulate(server, 150, during=watch)
        reachable = min(capacity, MAXIMUM)
        assert len(seen) > 150
        assert reachable / 2 <= median(seen) <= 1.2 * reachable + 1
        assert quantiles(seen, n=20)[-1] <= 1.5 * reachable + 2, "it overshoots for moments where it looks for more"
        assert server.throughput(start + 60, start + 150) >= 0.6 * server.full_throughput

    run_virtually(story())


@FEW
@given(SEEDS, st.integers(16, 2 * MAXIMUM), LATENCIES, ILLNESSES, st.sampled_from([0.0, 0.1, 0.3]), st.floats(5, 400))
@example(1, 64, 10.0, Outcome.OVERLOADED, 0.2, 120.0)  # some are answered while the limit is at the bottom
@example(1, 64, 10.0, Outcome.OVERLOADED, 0.0, 400.0)
def test_throughput_is_back_a_minute_after_the_server_is(seed, capacity, latency_s, ill, well_share, ill_s):
    async def story() -> None:
        well_again = clock() + 60 + ill_s
        server = Server(capacity, latency_s, draw_random(seed), ill, clock() + 60, well_again, well_share)
        await simulate(server, 60 + ill_s + 100)
        assert server.throughput(well_again + 60, well_again + 100) >= 0.5 * server.full_throughput

    run_virtually(story())


def test_a_server_that_grew_is_used_a_minute_later():
    async def story() -> None:
        server = Server(4, 5.0, draw_random(1))

        async def grow(_: Client) -> None:
            await asyncio.sleep(60)
            server.capacity = MAXIMUM

        start = clock()
        await simulate(server, 170, during=grow)
        assert server.throughput(start + 130, start + 170) >= 0.5 * server.full_throughput

    run_virtually(story())


class Busy:
    """A limit on a clock set by hand, all of whose slots are always taken."""

    def __init__(self, maximum: int) -> None:
        self.now = 0.0
        self.limit = AdaptiveLimit(maximum, lambda: self.now)

    def answers(self, seconds: float, every_s: float) -> None:
        for _ in range(round(seconds / every_s)):
            self.now += every_s
            while not isinstance(self.limit.take(), Wait):
                pass
            self.limit.succeeded()
            self.limit.give_back()

    def overload(self) -> None:
        while self.limit.in_flight > 0:
            self.limit.give_back()
        window = self.limit.take()
        assert isinstance(window, int)
        self.limit.overloaded(window)


def test_what_a_storm_took_is_back_a_quarter_of_a_minute_after_its_end():
    busy = Busy(64)
    busy.answers(4, 0.1)
    assert busy.limit.limit == 64
    for _ in range(60):
        busy.answers(0.6, 0.3)
        busy.overload()
    assert busy.limit.limit < 2
    busy.answers(15.5, 0.5)
    assert busy.limit.limit >= 0.9 * 64


def test_a_capacity_that_shrank_is_learned():
    busy = Busy(64)
    busy.answers(4, 0.1)
    for _ in range(4):
        busy.overload()
        while busy.limit.limit < 8:
            busy.answers(0.2, 0.2)
        busy.answers(6, 0.2)
    busy.overload()
    busy.answers(16, 0.2)
    assert busy.limit.limit < 32, "it climbs to what was too much the last time, not the first time"


EVENTS = st.lists(st.sampled_from(["leave", "answered", "overloaded", "failed", "later"]), max_size=300)


@given(EVENTS, st.integers(1, 100))
def test_whatever_happens_the_limit_stays_in_bounds_and_a_window_is_cut_once(events, maximum):
    now = 0.0
    limit = AdaptiveLimit(maximum, lambda: now)
    flying: deque[int] = deque()
    cut: set[int] = set()
    for event in events:
        before = limit.limit
        if event == "leave":
            window = limit.take()
            assert isinstance(window, Wait) == (len(flying) >= int(before))
            if not isinstance(window, Wait):
                flying.append(window)
        elif event == "later":
            now += 1.7
        elif flying:
            window = flying.popleft()
            {
                "answered": limit.succeeded,
                "failed": limit.failed,
                "overloaded": lambda window=window: limit.overloaded(window),
            }[event]()
            if limit.limit < before:
                assert event == "overloaded"
                assert window not in cut, "the first refusal of a burst cuts, the others do not"
                assert limit.limit == max(1.0, before / 2)
                cut.add(window)
            limit.give_back()
        assert 1 <= limit.limit <= max(maximum, 1)
        assert limit.in_flight == len(flying)


REQUESTS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 400), st.floats(0, 1), st.floats(0, 3)), min_size=1, max_size=120
)


@given(REQUESTS, st.integers(5, 60), st.integers(900, 3000), st.integers(900, 3000))
def test_no_minute_gets_more_than_the_limits_and_their_bursts_and_nobody_is_overtaken(
    requests, per_minute, input_tokens, output_tokens
):
    limits = Limits(
        requests_per_minute=per_minute, input_tokens_per_minute=input_tokens, output_tokens_per_minute=output_tokens
    )
    left: list[tuple[float, int, int, int]] = []

    async def story() -> None:
        gate = Gate(AdaptiveLimit(1000, clock), RateLimiter(limits, clock), CircuitBreaker(clock=clock))
        entrance = Entrance([gate], clock)

        async def ask(number: int, tokens_in: int, cap: int, used: float, takes_s: float) -> None:
            async with entrance.admit(tokens_in, cap) as ticket:
                left.append((clock(), number, tokens_in, int(used * cap)))
                await asyncio.sleep(takes_s)
                ticket.settle(Outcome.ANSWERED, tokens_in, int(used * cap))

        async with asyncio.TaskGroup() as tasks:
            for number, request in enumerate(requests):
                tasks.create_task(ask(number, *request))

    run_virtually(story())
    assert [number for _, number, _, _ in left] == list(range(len(requests)))
    for start, *_ in left:
        minute = [row for row in left if start <= row[0] < start + 60]
        assert len(minute) <= per_minute + max(1, per_minute * REQUEST_BURST_MINUTES) + 1e-3
        assert sum(row[2] for row in minute) <= input_tokens * (1 + TOKEN_BURST_MINUTES) + 1e-3
        assert sum(row[3] for row in minute) <= output_tokens * (1 + TOKEN_BURST_MINUTES) + 1e-3
