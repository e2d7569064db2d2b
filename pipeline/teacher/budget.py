"""The budget's arithmetic: worst cases are reserved before requests leave and settled when they end. No I/O.

What an attempt costs follows from how it ended:

- it was answered, and the usage is told: that usage;
- it surely never reached a model (no connection came about, or a status of `surely_free`): nothing;
- anything else (a timeout, a connection that broke, a 5xx, an answer without usage, a process that died): unknown, so
  that the worst case which was reserved for it stays for ever.

Every attempt counts as one request, whatever it came to. The worst case of an attempt is one token per byte of the body
that is sent (no tokenizer makes more of text) with `TEMPLATE_TOKENS` for what the server's chat template adds, and
`max_tokens`. Not covered: a server that bills more than that.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

TEMPLATE_TOKENS: Final = 256
"""Tokens that a chat template may add to a conversation: markers, dates, a system prompt of its own."""
PERHAPS_BILLED: Final = frozenset({408, 499})
"""Of the statuses below 500 those that say that somebody stopped waiting, while the model may have been at work."""


@dataclass(frozen=True, slots=True)
class Amount:
    """So much of everything that is capped.

    Attributes:
        nano: nano-dollars.
        tokens: of prompts and completions.
        requests: attempts.
    """

    nano: int = 0
    tokens: int = 0
    requests: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.nano + other.nano, self.tokens + other.tokens, self.requests + other.requests)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.nano - other.nano, self.tokens - other.tokens, self.requests - other.requests)


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps of one scope; None: no cap.

    Attributes:
        field: where the caps are in the config ("budget", "budget.teachers.big").
        nano, tokens, requests: as in `Amount`.
    """

    field: str
    nano: int | None = None
    tokens: int | None = None
    requests: int | None = None

    @property
    def is_any(self) -> bool:
        """Whether anything is capped."""
        return self.nano is not None or self.tokens is not None or self.requests is not None

    def exceeded_by(self, total: Amount) -> Iterator[str]:
        """Names of the caps that a total would exceed, as the config calls them."""
        if self.nano is not None and total.nano > self.nano:
            yield "usd"
        if self.tokens is not None and total.tokens > self.tokens:
            yield "tokens"
        if self.requests is not None and total.requests > self.requests:
            yield "requests"


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Why a reservation does not fit.

    Attributes:
        limits: the scope whose cap it is.
        cap: "usd", "tokens" or "requests".
        spent: what that scope has spent, unknown outcomes at their worst case; without what is in flight.
    """

    limits: Limits
    cap: str
    spent: Amount


@dataclass(frozen=True, slots=True)
class Scope:
    """One set of caps, and what counted in it when the ledger was opened."""

    limits: Limits
    before: Amount = Amount()


class Ledger:
    """Reservations against several scopes at once: the run's and the teacher's.

    At every moment `before + spent + held` is within the caps of every scope, unless `before` alone was not (somebody
    lowered a cap) or a server billed more than the worst case.

    Attributes:
        spent: what has ended since the ledger was opened.
        held: the worst case of what is in flight.
        in_flight: how many attempts that is.
    """

    def __init__(self, scopes: Iterable[Scope]) -> None:
        self._scopes = [scope for scope in scopes if scope.limits.is_any]
        self.spent = self.held = Amount()
        self.in_flight = 0

    def reserve(self, worst: Amount) -> Exceeded | None:
        """Hold a worst case, or say which cap stands in its way."""
        held = self.held + worst
        for scope in self._scopes:
            spent = scope.before + self.spent
            for cap in scope.limits.exceeded_by(spent + held):
                return Exceeded(scope.limits, cap, spent)
        self.held = held
        self.in_flight += 1
        return None

    def adopt(self, worst: Amount) -> None:
        """Hold the worst case of what has left before, whether it fits or not."""
        self.held += worst
        self.in_flight += 1

    def unspend(self, amount: Amount) -> None:
        """Take back what was counted as spent."""
        self.spent -= amount

    def settle(self, worst: Amount, actual: Amount) -> None:
        """Put what an attempt came to in the place of what was held for it; `actual` is `worst` if that is unknown."""
        self.held -= worst
        self.spent += actual
        self.in_flight -= 1


def surely_free(status: int, reason: str) -> bool:
    """Whether a status says that no model was at work: the request was turned away at the door (400, 401, 422, 429) or
    sent elsewhere (3xx). A 5xx may come from a gateway that lost a model at work, and a filter that answers with 400
    may have looked at a completion, which Azure OpenAI bills."""
    return 300 <= status < 500 and status not in PERHAPS_BILLED and reason not in ("content_filter", "refusal")


def worst_tokens(body: bytes) -> int:
    """Most tokens that the prompt in a request's body can be."""
    return len(body) + TEMPLATE_TOKENS
