"""When the circuit breaker opens, what it lets through while it is half open, and how it closes again."""

import pytest

from pipeline.teacher.breaker import BreakerRules, CircuitBreaker, Permit, State
from pipeline.teacher.line import Wait

RULES = BreakerRules(window_s=30, min_requests=20, share=0.5, first_open_s=1, longest_open_s=8, trials=4)


class Story:
    """A breaker on a clock that is set by hand; its open times are as long as the rules say."""

    def __init__(self, jitter: float = 1.0) -> None:
        self.now = 100.0
        self.breaker = CircuitBreaker(RULES, lambda: self.now, lambda: jitter)

    @property
    def state(self) -> State:
        return self.breaker.state

    def leave(self) -> Permit:
        permit = self.breaker.enter()
        assert isinstance(permit, Permit), "it should have been let through"
        return permit

    def wait_s(self) -> float | None:
        wait = self.breaker.enter()
        assert isinstance(wait, Wait), "it should have been held back"
        return wait.seconds

    def succeed(self, times: int = 1) -> None:
        for _ in range(times):
            self.breaker.succeeded(self.leave())

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.breaker.failed(self.leave())

    def open(self) -> None:
        self.fail(RULES.min_requests)
        assert self.state is State.OPEN

    def half_open(self) -> None:
        self.open()
        self.now += RULES.first_open_s


class TestArithmetic:
    def test_21_failures_of_512_do_not_trip_a_breaker_of_50_percent(self) -> None:
        story = Story()
        for number in range(512):
            story.fail() if number % 24 == 0 and number < 21 * 24 else story.succeed()
        assert story.state is State.CLOSED

    def test_not_even_when_they_come_in_a_row(self) -> None:
        story = Story()
        story.succeed(491)
        story.fail(21)
        assert story.state is State.CLOSED

    @pytest.mark.parametrize(("failures", "state"), [(99, State.CLOSED), (100, State.OPEN)])
    def test_the_share_is_of_all_outcomes(self, failures: int, state: State) -> None:
        story = Story()
        story.succeed(100)
        story.fail(failures)
        assert story.state is state

    def test_few_outcomes_prove_nothing(self) -> None:
        story = Story()
        story.fail(RULES.min_requests - 1)
        assert story.state is State.CLOSED
        story.fail()
        assert story.state is State.OPEN

    def test_outcomes_leave_the_window(self) -> None:
        story = Story()
        story.fail(19)
        story.now += RULES.window_s
        story.fail(19)
        assert story.state is State.CLOSED
        story.now += RULES.window_s - 0.1
        story.fail()
        assert story.state is State.OPEN, "those of almost a window ago still count"

    def test_old_successes_do_not_hide_an_outage(self) -> None:
        story = Story()
        story.succeed(10_000)
        story.now += RULES.window_s
        story.fail(20)
        assert story.state is State.OPEN

    def test_refusals_for_load_and_what_we_cancelled_are_no_outcomes(self) -> None:
        story = Story()
        for _ in range(1000):
            story.breaker.busy(story.leave())
            story.breaker.let_go(story.leave())
        story.fail(19)
        assert story.state is State.CLOSED
        story.fail()
        assert story.state is State.OPEN


class TestOpen:
    def test_nobody_leaves_until_its_time_is_over(self) -> None:
        story = Story()
        story.open()
        assert story.wait_s() == 1
        story.now += 0.75
        assert story.wait_s() == 0.25
        story.now += 0.25
        story.leave()

    def test_what_was_in_flight_when_it_opened_changes_nothing(self) -> None:
        story = Story()
        flying = [story.leave() for _ in range(500)]
        story.open()
        for permit in flying:
            story.breaker.failed(permit)
        assert story.wait_s() == 1, "five hundred failures of one outage open it once"
        story.now += 1
        story.leave()
        for permit in flying:
            story.breaker.succeeded(permit)
        assert story.state is State.HALF_OPEN

    def test_its_time_doubles_with_each_failed_trial_up_to_a_bound(self) -> None:
        story = Story()
        story.open()
        waits = []
        for _ in range(6):
            waits.append(story.wait_s())
            story.now += waits[-1]
            story.fail()
        assert waits == [1, 2, 4, 8, 8, 8]

    def test_its_time_is_jittered_down_to_a_half(self) -> None:
        story = Story(jitter=0.0)
        story.open()
        assert story.wait_s() == 0.5

    def test_after_it_was_closed_its_time_is_short_again(self) -> None:
        story = Story()
        story.half_open()
        story.fail()
        story.now += 2
        story.succeed(7)
        assert story.state is State.CLOSED
        story.open()
        assert story.wait_s() == 1


class TestHalfOpen:
    def test_one_is_tried_then_two_then_four_then_all(self) -> None:
        story = Story()
        story.half_open()
        for at_a_time in (1, 2, 4):
            permits = [story.leave() for _ in range(at_a_time)]
            assert story.wait_s() == RULES.longest_open_s
            for permit in permits:
                assert story.state is State.HALF_OPEN
                story.breaker.succeeded(permit)
        assert story.state is State.CLOSED
        for _ in range(100):
            story.leave()

    def test_a_share_of_failures_opens_it_again_and_fewer_do_not(self) -> None:
        story = Story()
        story.half_open()
        story.succeed(3)
        permits = [story.leave() for _ in range(4)]
        story.breaker.failed(permits[0])
        assert story.state is State.HALF_OPEN
        story.breaker.failed(permits[1])
        assert story.state is State.OPEN
        assert story.wait_s() == 2

    def test_a_refusal_for_load_is_a_sign_of_life(self) -> None:
        story = Story()
        story.half_open()
        story.breaker.busy(story.leave())
        story.leave()
        story.leave()

    def test_a_trial_that_we_cancelled_is_tried_anew(self) -> None:
        story = Story()
        story.half_open()
        story.breaker.let_go(story.leave())
        story.leave()
        story.wait_s()

    def test_a_trial_that_hangs_does_not_keep_it_shut(self) -> None:
        story = Story()
        story.half_open()
        story.leave()
        story.now += RULES.longest_open_s
        second = story.leave()
        assert story.wait_s() == RULES.longest_open_s
        story.breaker.succeeded(second)
        story.leave()

    def test_a_new_server_starts_with_a_clean_record(self) -> None:
        story = Story()
        story.open()
        story.breaker.reset()
        assert story.state is State.CLOSED
        story.fail(19)
        assert story.state is State.CLOSED
