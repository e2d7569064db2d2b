"""What requests may come to before they are sent: tokens and money, low, likely and high. Arithmetic, no I/O.

high
    What the budget reserves: one token per byte of each body and `TEMPLATE_TOKENS`, and an answer as long as its cap.
    No request takes more. Those whose answers are cut are asked again under each higher cap (`generate.on_length`);
    those that fail and are tried again come on top.
likely
    As the teacher's answered requests were on average: tokens per byte of body, tokens of an answer. Only where there
    are some. It holds as far as what is to be asked is like what was asked.
low
    With answered requests: as the tenth of them that took least. Without: a guess, that a token of the prompt is
    `BYTES_PER_TOKEN` bytes of text (English prose has 4 to 5 a token) and an answer a twentieth of its cap. With a
    target (`generate.accept`) no more than the rows that are missing, as if all of them were good.
"""

from dataclasses import dataclass
from typing import Final

from pipeline.teacher.budget import TEMPLATE_TOKENS, Amount
from pipeline.teacher.experience import Experience
from pipeline.teacher.prices import Price

BYTES_PER_TOKEN: Final = 6
"""Of text, where nothing is known of the teacher: more than tokenizers make of most."""
SHARE_OF_CAP: Final = 20
"""An answer is guessed to take at least this part of its cap."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that are to be sent.

    Attributes:
        requests: how many.
        body_bytes: of their bodies together.
        text_bytes: of that what the prompts take.
        cap: `max_tokens` of each.
        again: caps under which a request whose answer is cut is asked again, one after the other.
        least: how many are sent at least, where a target may be met before all are.
        is_sure: whether they are sent at all; else they count in the high numbers alone.
    """

    requests: int
    body_bytes: int
    text_bytes: int
    cap: int
    again: tuple[int, ...] = ()
    least: int | None = None
    is_sure: bool = True

    @property
    def low_share(self) -> float:
        """The share of them that is sent for certain."""
        if not self.is_sure:
            return 0.0
        return 1.0 if self.least is None or self.requests == 0 else min(1.0, self.least / self.requests)


@dataclass(frozen=True, slots=True)
class Span:
    """A number that is not known yet; `likely` is None where nothing was seen that says it."""

    low: int
    likely: int | None
    high: int

    def __add__(self, other: "Span") -> "Span":
        likely = None if self.likely is None or other.likely is None else self.likely + other.likely
        return Span(self.low + other.low, likely, self.high + other.high)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a load may come to.

    Attributes:
        requests: that are sent, without those that fail and are tried again.
        tokens_in, tokens_out: of prompts and completions.
        nano: nano-dollars; None: nobody knows what the tokens cost.
    """

    requests: Span
    tokens_in: Span
    tokens_out: Span
    nano: Span | None

    def __add__(self, other: "Forecast") -> "Forecast":
        return Forecast(
            self.requests + other.requests,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            None if self.nano is None or other.nano is None else self.nano + other.nano,
        )

    @property
    def low(self) -> Amount:
        """The least of everything; of money 0 where no price is known."""
        nano = 0 if self.nano is None else self.nano.low
        return Amount(nano, self.tokens_in.low + self.tokens_out.low, self.requests.low)

    @property
    def likely(self) -> Amount | None:
        """What is likely; None where nothing says it."""
        numbers = self.requests.likely, self.tokens_in.likely, self.tokens_out.likely
        requests, tokens_in, tokens_out = numbers
        if requests is None or tokens_in is None or tokens_out is None:
            return None
        return Amount(0 if self.nano is None else self.nano.likely or 0, tokens_in + tokens_out, requests)

    @property
    def high(self) -> Amount:
        """The most of everything; of money 0 where no price is known."""
        nano = 0 if self.nano is None else self.nano.high
        return Amount(nano, self.tokens_in.high + self.tokens_out.high, self.requests.high)


def forecast(load: Load, seen: Experience | None, price: Price | None, batch_price: Price | None = None) -> Forecast:
    """What a load may come to.

    Args:
        price: of the teacher's tokens; None: unknown.
        batch_price: the same in batch jobs, where some requests may still be asked at `price`; None: none are.
        seen: what is known of the teacher; None: nothing.
    """
    rounds, likely = 1 + len(load.again), load.requests if load.is_sure else 0
    least = round(load.requests * load.low_share)
    requests = Span(least, likely if load.least is None else None, load.requests * rounds)
    tokens_in, tokens_out = _tokens_in(load, seen), _tokens_out(load, seen)
    nano = None if price is None else _money((batch_price or price, price), tokens_in, tokens_out, requests.high)
    return Forecast(requests, tokens_in, tokens_out, nano)


def _tokens_in(load: Load, seen: Experience | None) -> Span:
    high = (load.body_bytes + TEMPLATE_TOKENS * load.requests) * (1 + len(load.again))
    if seen is None:
        return _span(load, load.text_bytes / BYTES_PER_TOKEN, None, high)
    return _span(load, load.body_bytes * seen.input_low, load.body_bytes * seen.input_mean, high)


def _tokens_out(load: Load, seen: Experience | None) -> Span:
    high = load.requests * (load.cap + sum(load.again))
    if seen is None:
        return _span(load, load.requests * max(1, load.cap // SHARE_OF_CAP), None, high)
    return _span(load, load.requests * seen.output_low, load.requests * seen.output_mean, high)


def _span(load: Load, low: float, likely: float | None, high: int) -> Span:
    """In their order: a server that billed more than the worst case makes no number larger than that, and of few
    attempts with one very short answer the mean may lie below the tenth."""
    if not load.is_sure:
        return Span(0, None if likely is None else 0, high)
    middle = min(round(low if likely is None else likely), high)
    least = min(int(low * load.low_share), middle)
    return Span(least, None if likely is None or load.least is not None else middle, high)


def _money(prices: tuple[Price, Price], tokens_in: Span, tokens_out: Span, requests: int) -> Span:
    """Of (low, high) prices. Each request is rounded up to a whole nano-dollar, which only the most of it takes into
    account."""
    cheap, dear = prices
    low, high = cheap.cost(tokens_in.low, tokens_out.low), dear.cost(tokens_in.high, tokens_out.high)
    high += requests if high > 0 else 0
    if tokens_in.likely is None or tokens_out.likely is None:
        return Span(low, None, high)
    return Span(low, cheap.cost(tokens_in.likely, tokens_out.likely), high)
