"""Token buckets of one endpoint on a clock set by hand, and the headers in which servers tell their limits."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.config_base import identity
from pipeline.core.config_limits import Limits
from pipeline.teacher.line import Wait
from pipeline.teacher.rates import Quota, RateLimiter, Reservation, Unit, read_quotas


class Story:
    """A limiter; its requests have 10 prompt tokens and a cap of 100 unless said otherwise."""

    def __init__(self, **limits: int) -> None:
        self.now = 50.0
        self.rates = RateLimiter(Limits(**limits), lambda: self.now)

    def leave(self, input_tokens: int = 10, output_tokens: int = 100) -> Reservation:
        reserved = self.rates.reserve(Reservation(input_tokens, output_tokens))
        assert isinstance(reserved, Reservation), f"held back: {reserved}"
        return reserved

    def wait_s(self, input_tokens: int = 10, output_tokens: int = 100) -> float:
        wait = self.rates.reserve(Reservation(input_tokens, output_tokens))
        assert isinstance(wait, Wait), "it should have been held back"
        assert wait.seconds is not None
        return wait.seconds


class TestConfig:
    def test_limits_are_optional_positive_and_in_no_key(self) -> None:
        assert Limits() == Limits(requests_per_minute=None, input_tokens_per_minute=None, output_tokens_per_minute=None)
        assert identity(Limits(requests_per_minute=1, input_tokens_per_minute=2, output_tokens_per_minute=3)) == {}
        for name in Limits.model_fields:
            with pytest.raises(ValidationError):
                Limits.model_validate({name: 0})


class TestBuckets:
    def test_without_limits_all_leave(self) -> None:
        story = Story()
        for _ in range(1000):
            story.leave()

    def test_requests_leave_in_a_burst_and_then_evenly(self) -> None:
        story = Story(requests_per_minute=60)
        for _ in range(5):
            story.leave()
        assert story.wait_s() == pytest.approx(1)
        story.now += 1
        story.leave()
        assert story.wait_s() == pytest.approx(1)

    def test_an_idle_hour_saves_up_one_burst_only(self) -> None:
        story = Story(requests_per_minute=60)
        story.now += 3600
        for _ in range(5):
            story.leave()
        story.wait_s()

    def test_prompt_and_completion_tokens_are_limited_apart(self) -> None:
        story = Story(input_tokens_per_minute=6000, output_tokens_per_minute=600)
        story.leave(input_tokens=10, output_tokens=300)
        assert story.wait_s(input_tokens=10, output_tokens=50) == pytest.approx(5)
        story.leave(input_tokens=2990, output_tokens=0)
        assert story.wait_s(input_tokens=100, output_tokens=0) == pytest.approx(1)

    def test_what_must_wait_for_one_bucket_takes_nothing_from_the_others(self) -> None:
        story = Story(requests_per_minute=60, output_tokens_per_minute=600)
        story.leave(output_tokens=300)
        for _ in range(100):
            story.wait_s(output_tokens=60)
        story.now += 6
        for _ in range(5):
            story.leave(output_tokens=12)

    def test_what_was_not_used_is_freed_on_the_reply(self) -> None:
        story = Story(output_tokens_per_minute=600)
        reserved = story.leave(output_tokens=300)
        assert story.wait_s(output_tokens=290) == pytest.approx(29)
        story.rates.settle(reserved, 10, 10)
        story.leave(output_tokens=290)

    def test_unknown_use_keeps_the_reservation(self) -> None:
        story = Story(output_tokens_per_minute=600)
        story.rates.settle(story.leave(output_tokens=300), None, None)
        assert story.wait_s(output_tokens=300) == pytest.approx(30)

    def test_use_beyond_the_reservation_is_owed(self) -> None:
        story = Story(input_tokens_per_minute=600)
        story.rates.settle(story.leave(input_tokens=300), 360, None)
        assert story.wait_s(input_tokens=60) == pytest.approx(12)

    def test_a_request_that_did_not_leave_is_given_back_whole(self) -> None:
        story = Story(requests_per_minute=1, input_tokens_per_minute=20, output_tokens_per_minute=200)
        for _ in range(100):
            story.rates.give_back(story.leave())
        story.leave()
        story.wait_s()

    def test_a_reply_never_fills_a_bucket_beyond_its_brim(self) -> None:
        story = Story(output_tokens_per_minute=600)
        reserved = story.leave(output_tokens=300)
        story.now += 3600
        story.rates.settle(reserved, 0, 0)
        story.leave(output_tokens=300)
        assert story.wait_s(output_tokens=1) == pytest.approx(0.1)

    def test_a_request_larger_than_the_bucket_leaves_when_it_is_full_and_makes_it_owe(self, caplog) -> None:
        story = Story(output_tokens_per_minute=600)
        with caplog.at_level(logging.WARNING):
            story.leave(output_tokens=1200)
            assert story.wait_s(output_tokens=1200) == pytest.approx(120)
            story.now += 120
            story.leave(output_tokens=1200)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert "1200 output tokens" in said[0]
        assert "`output_tokens_per_minute`" in said[0]

    def test_waits_do_not_add_up_rounding_errors_to_a_wait_for_ever(self) -> None:
        story = Story(requests_per_minute=7, output_tokens_per_minute=997)
        for _ in range(2000):
            wait = story.rates.reserve(Reservation(1, 333))
            if isinstance(wait, Wait):
                assert wait.seconds is not None
                story.now += wait.seconds
                story.leave(1, 333)


class TestLearned:
    """What a response says about the server's own buckets."""

    def test_while_something_remains_nothing_changes(self) -> None:
        story = Story()
        story.rates.observe([Quota(Unit.REQUESTS, 60, 1, 60), Quota(Unit.TOKENS, None, 5, 60)])
        for _ in range(100):
            story.leave()

    def test_an_empty_bucket_is_used_as_it_fills(self) -> None:
        story = Story()
        story.rates.observe([Quota(Unit.REQUESTS, 60, 0, 30)])
        assert story.wait_s() == pytest.approx(0.5)
        story.now += 0.5
        story.leave()
        assert story.wait_s() == pytest.approx(0.5)

    def test_tokens_are_prompt_and_completion_together(self) -> None:
        story = Story()
        story.rates.observe([Quota(Unit.TOKENS, 600, 0, 60)])
        assert story.wait_s(10, 100) == pytest.approx(11)

    def test_of_unknown_size_it_is_waited_for_until_it_is_full(self) -> None:
        story = Story()
        story.rates.observe([Quota(Unit.INPUT, None, 0, 7)])
        assert story.wait_s() == pytest.approx(7)

    def test_when_it_is_full_again_it_is_forgotten(self) -> None:
        story = Story()
        story.rates.observe([Quota(Unit.REQUESTS, 2, 0, 30)])
        story.now += 30
        for _ in range(100):
            story.leave()

    def test_hundreds_of_replies_that_say_the_same_do_not_empty_it_anew(self) -> None:
        story = Story()
        quota = Quota(Unit.REQUESTS, 60, 0, 60)
        for _ in range(100):
            story.rates.observe([quota])
            story.now += 0.01
        story.leave()

    def test_an_absurd_reset_holds_nobody_longer_than_a_minute(self) -> None:
        story = Story()
        story.rates.observe([Quota(Unit.REQUESTS, 1, 0, 1e12), Quota(Unit.TOKENS, None, 0, 1e12)])
        assert story.wait_s() <= 60

    def test_what_did_not_leave_is_given_back_here_too(self) -> None:
        story = Story()
        story.rates.observe([Quota(Unit.REQUESTS, 60, 0, 60)])
        story.now += 1
        story.rates.give_back(story.leave())
        story.leave()


class TestHeaders:
    def test_openai(self) -> None:
        headers = {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-limit-tokens": "150000",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-reset-tokens": "6m0s",
        }
        assert read_quotas(headers) == (Quota(Unit.REQUESTS, 60, 59, 1), Quota(Unit.TOKENS, 150_000, 0, 360))

    def test_anthropic_dates_are_read_by_the_server_s_own_clock(self) -> None:
        headers = {
            "date": "Mon, 04 May 2026 12:34:06 GMT",
            "anthropic-ratelimit-requests-limit": "50",
            "anthropic-ratelimit-requests-remaining": "0",
            "anthropic-ratelimit-requests-reset": "2026-05-04T12:34:56Z",
            "anthropic-ratelimit-input-tokens-remaining": "7",
            "anthropic-ratelimit-input-tokens-reset": "2026-05-04T14:34:16+02:00",
            "anthropic-ratelimit-output-tokens-limit": "8000",
            "anthropic-ratelimit-output-tokens-remaining": "8000",
            "anthropic-ratelimit-output-tokens-reset": "2026-05-04T12:00:00Z",
        }
        assert read_quotas(headers, now=0) == (
            Quota(Unit.REQUESTS, 50, 0, 50),
            Quota(Unit.INPUT, None, 7, 10),
            Quota(Unit.OUTPUT, 8000, 8000, 0),
        )

    def test_without_the_server_s_clock_it_is_ours(self) -> None:
        headers = {
            "anthropic-ratelimit-tokens-remaining": "0",
            "anthropic-ratelimit-tokens-reset": "1970-01-01T00:01:00",
        }
        assert read_quotas(headers, now=20) == (Quota(Unit.TOKENS, None, 0, 40),)

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("12ms", 0.012), ("1h2m3.5s", 3723.5), ("2m59.56s", 179.56), ("7", 7), ("0.25", 0.25), ("1m", 60), ("0s", 0)],
    )
    def test_durations(self, text: str, seconds: float) -> None:
        headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": text}
        assert [quota.reset_s for quota in read_quotas(headers)] == [pytest.approx(seconds)]

    @pytest.mark.parametrize("text", ["", "soon", "-5", "5 parsecs", "1e9", "٣s", "9" * 99, "2026-13-45T00:00:00Z"])
    def test_what_cannot_be_read_is_left_out(self, text: str) -> None:
        assert read_quotas({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": text}) == ()
        assert read_quotas({"x-ratelimit-remaining-tokens": text, "x-ratelimit-reset-tokens": "1s"}) == ()

    @given(st.text(max_size=45), st.text(max_size=30), st.text(max_size=10))
    def test_no_header_breaks_the_reader(self, reset: str, date: str, count: str) -> None:
        for remaining in ("0", count):
            headers = {"anthropic-ratelimit-tokens-remaining": remaining, "anthropic-ratelimit-tokens-reset": reset}
            for quota in read_quotas({**headers, "date": date, "anthropic-ratelimit-tokens-limit": count}):
                assert quota.reset_s >= 0
                assert quota.remaining >= 0
