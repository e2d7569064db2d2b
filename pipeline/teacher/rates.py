"""Requests and tokens per minute of one endpoint: token buckets, reserved for the worst case, then settled."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import mktime_tz, parsedate_tz
from enum import Enum
from typing import Final

from pipeline.core.config_limits import Limits
from pipeline.teacher.line import Wait

log = logging.getLogger(__name__)

REQUEST_BURST_MINUTES = 1 / 12
"""Requests that may leave at once after a pause, as a share of a minute's."""
TOKEN_BURST_MINUTES = 1 / 2
"""The same for tokens. More, since a request in flight holds its worst case: what it will not use is not lost, but it
is not there for others either."""
LONGEST_RESET_S = 60.0
"""A reset further away is not waited for: limits per day, and absurd values, are left to the server's own refusals."""
ENOUGH: Final = 1e-6
"""Less than so much of a token missing is rounding."""


class Unit(Enum):
    """What a limit counts."""

    REQUESTS = "requests"
    INPUT = "input tokens"
    OUTPUT = "output tokens"
    TOKENS = "tokens"
    """Prompt and completion together; only servers have such limits."""


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Reservation:
    """What was reserved for one request, in tokens."""

    input_tokens: int
    output_tokens: int

    def amount(self, unit: Unit) -> int:
        """What of it counts towards a limit."""
        if unit is Unit.REQUESTS:
            return 1
        if unit is Unit.TOKENS:
            return self.input_tokens + self.output_tokens
        return self.input_tokens if unit is Unit.INPUT else self.output_tokens


@dataclass(frozen=True, slots=True)
class Quota:
    """What a response says about a limit of the server.

    Attributes:
        limit: size of the server's bucket, None where it is not said.
        remaining: what is left of it.
        reset_s: seconds until it is full again.
    """

    unit: Unit
    limit: int | None
    remaining: int
    reset_s: float


@dataclass(slots=True)
class Bucket:
    """Fills continuously and never overflows; it may owe, when more was used than reserved.

    Attributes:
        per_second: how fast it fills.
        capacity: what it holds at most.
        level: what it held at `at`.
    """

    per_second: float
    capacity: float
    level: float
    at: float

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until there is so much, or until it is full for an amount larger than itself; 0: there is."""
        self._fill(now)
        missing = min(amount, self.capacity) - self.level
        return 0.0 if missing <= ENOUGH else missing / self.per_second

    def add(self, amount: float, now: float) -> None:
        """Put something in (what is above the brim is lost), or take it out (negative), below zero if need be."""
        self._fill(now)
        self.level += amount

    def _fill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + self.per_second * (now - self.at))
        self.at = now


@dataclass(slots=True)
class _Drip:
    """A server's bucket that it told us is empty; it is looked after until it is full again."""

    bucket: Bucket
    until: float


class RateLimiter:
    """Decides when a request may leave; it neither waits nor sends (`Entrance` does, first come, first served).

    In any minute at most the limit plus the burst is reserved. A request that is larger than what a bucket holds
    leaves when that is full and makes it owe, so that the average is kept and nobody waits for ever.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        limits = Limits() if limits is None else limits
        self._clock = clock
        self._drips: dict[Unit, _Drip] = {}
        self._too_large: set[Unit] = set()
        """Units for which was said already that a request is larger than the bucket."""
        self._buckets = {
            unit: _full_bucket(per_minute, burst, clock())
            for unit, per_minute, burst in (
                (Unit.REQUESTS, limits.requests_per_minute, REQUEST_BURST_MINUTES),
                (Unit.INPUT, limits.input_tokens_per_minute, TOKEN_BURST_MINUTES),
                (Unit.OUTPUT, limits.output_tokens_per_minute, TOKEN_BURST_MINUTES),
            )
            if per_minute is not None
        }

    def reserve(self, wanted: Reservation) -> Reservation | Wait:
        """Reserve the worst case of a request, or nothing of it."""
        if not self._buckets and not self._drips:
            return wanted
        now = self._clock()
        wait_s = max((bucket.wait_s(wanted.amount(unit), now) for unit, bucket in self._buckets.items()), default=0.0)
        for unit, drip in self._drips.items():
            wait_s = max(wait_s, min(drip.bucket.wait_s(wanted.amount(unit), now), drip.until - now))
        if wait_s > 0:
            return Wait(wait_s)
        for unit, bucket in self._buckets.items():
            self._say_once_if_too_large(unit, wanted.amount(unit), bucket)
            bucket.add(-wanted.amount(unit), now)
        for unit, drip in self._drips.items():
            drip.bucket.add(-wanted.amount(unit), now)
        return wanted

    def settle(self, reserved: Reservation, input_tokens: int | None, output_tokens: int | None) -> None:
        """Give back what a request did not use, or take what it used beyond its reservation.

        Args:
            input_tokens, output_tokens: what it used; None: nobody knows, so that it counts with what was reserved.
        """
        for unit, used in ((Unit.INPUT, input_tokens), (Unit.OUTPUT, output_tokens)):
            if used is not None and unit in self._buckets:
                self._buckets[unit].add(reserved.amount(unit) - used, self._clock())

    def give_back(self, reserved: Reservation) -> None:
        """Free a reservation altogether: the request did not leave."""
        now = self._clock()
        buckets = [*self._buckets.items(), *((unit, drip.bucket) for unit, drip in self._drips.items())]
        for unit, bucket in buckets:
            bucket.add(reserved.amount(unit), now)

    def observe(self, quotas: Iterable[Quota]) -> None:
        """Obey what a response says: where nothing remains, as much may leave as drips into the server's bucket until
        it is full again. Without the bucket's size nothing leaves until then; `LONGEST_RESET_S` bounds it."""
        now = self._clock()
        for quota in quotas:
            reset_s = min(quota.reset_s, LONGEST_RESET_S)
            if quota.remaining > 0 or reset_s <= 0:
                continue
            known = self._drips.get(quota.unit)
            if known is not None and now < known.until:
                known.until = max(known.until, now + reset_s)  # it was empty before: what dripped in since stays
                continue
            size = 1.0 if quota.limit is None else float(max(1, quota.limit))
            self._drips[quota.unit] = _Drip(Bucket(size / reset_s, size, 0.0, now), now + reset_s)

    def _say_once_if_too_large(self, unit: Unit, amount: int, bucket: Bucket) -> None:
        if amount <= bucket.capacity or unit in self._too_large:
            return
        self._too_large.add(unit)
        what = "a request may need %d %s, more than the %d that may leave at once under `%s`"
        name = f"{unit.value.replace(' ', '_')}_per_minute"
        log.warning(f"{what}: such requests leave one at a time", amount, unit.value, bucket.capacity, name)


def _full_bucket(per_minute: int, burst_minutes: float, now: float) -> Bucket:
    capacity = max(1.0, per_minute * burst_minutes)
    return Bucket(per_minute / 60, capacity, capacity, now)


OPENAI_UNITS: Final = {"requests": Unit.REQUESTS, "tokens": Unit.TOKENS}
ANTHROPIC_UNITS: Final = {**OPENAI_UNITS, "input-tokens": Unit.INPUT, "output-tokens": Unit.OUTPUT}
_FACTS: Final = ("remaining", "reset", "limit")
QUOTAS: Final[tuple[tuple[Unit, tuple[str, ...]], ...]] = (
    *((unit, tuple(f"x-ratelimit-{fact}-{name}" for fact in _FACTS)) for name, unit in OPENAI_UNITS.items()),
    *((unit, tuple(f"anthropic-ratelimit-{name}-{fact}" for fact in _FACTS)) for name, unit in ANTHROPIC_UNITS.items()),
)
"""Names of the headers that tell what is left, when it is more, and how much there is."""
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?", re.ASCII)
"""Go's notation of a duration: `6m0s`, `1h2m3.5s`, `12ms`."""


def read_quotas(headers: Mapping[str, str], *, now: float | None = None) -> tuple[Quota, ...]:
    """The limits that a response tells, in OpenAI's headers (`x-ratelimit-…`) or Anthropic's (`anthropic-ratelimit-…`).

    What is incomplete or cannot be read is left out: these headers are advice, and no error is worth a lost answer.

    Args:
        headers: looked up by lower-case name; aiohttp's mapping knows names in any case.
        now: Unix time against which a date is read where the response has no `date`; None: the clock.
    """
    quotas = (_read_quota(unit, names, headers, now) for unit, names in QUOTAS if names[0] in headers)
    return tuple(quota for quota in quotas if quota is not None)


def _read_quota(unit: Unit, names: tuple[str, ...], headers: Mapping[str, str], now: float | None) -> Quota | None:
    of_remaining, of_reset, of_limit = names
    remaining = _read_count(headers.get(of_remaining))
    if remaining is None:
        return None
    reset_s = _read_reset(headers.get(of_reset, "").strip(), headers.get("date", ""), now)
    limit = _read_count(headers.get(of_limit))
    return None if reset_s is None else Quota(unit, limit, remaining, reset_s)


def _read_count(text: str | None) -> int | None:
    text = "" if text is None else text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _read_reset(text: str, date: str, now: float | None) -> float | None:
    """Seconds until a reset that is written as seconds, as a duration or as a date; None where it is none of them."""
    if not text or len(text) > 40:
        return None
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    duration = DURATION.fullmatch(text)
    if duration is not None:
        hours, minutes, seconds, milliseconds = (float(part or 0) for part in duration.groups())
        return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    try:
        reset = datetime.fromisoformat(text)
        reset = reset if reset.tzinfo is not None else reset.replace(tzinfo=UTC)
        return max(0.0, reset.timestamp() - _server_time(date, now))
    except (ValueError, OverflowError):
        return None


def _server_time(date: str, now: float | None) -> float:
    """The server's own clock where it tells it, since ours may be wrong."""
    parsed = parsedate_tz(date)
    if parsed is not None:
        return mktime_tz(parsed)
    return time.time() if now is None else now
