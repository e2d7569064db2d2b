"""What a request goes through until it is settled: its tries, one attempt's end, a refusal that is not believed yet."""

import random
import time
from dataclasses import dataclass

from pipeline.core.config_teacher import Retry
from pipeline.core.errors import Incomplete
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.segment import Stored
from pipeline.teacher.spending import Hold
from pipeline.teacher.transport import Raw
from pipeline.teacher.verdict import FORBIDDEN, Verdict


@dataclass(slots=True)
class Tries:
    """What one request went through so far.

    Attributes:
        answered_before: how many requests had been answered when this one first failed.
        first_failure: monotonic time.
        asked_to_wait: seconds that do not count against the time budget.
    """

    answered_before: int = 0
    failures: int = 0
    strikes: int = 0
    first_failure: float | None = None
    asked_to_wait: float = 0.0

    def time_to_wait(self, verdict: Verdict, retry: Retry, answered: int, host: str, least_s: float) -> float | None:
        """Seconds until the next try (what the server asked for, plus full jitter), None when the budget is used up.

        Waits that the server asked for do not count against the row's budget.

        Args:
            answered: requests that were answered so far.
            least_s: the least wait.

        Raises:
            Incomplete: the server asks for a longer wait than the whole budget.
        """
        now = time.monotonic()
        if self.first_failure is None:
            self.first_failure, self.answered_before = now, answered
        asked = 0.0 if verdict.retry_after is None else verdict.retry_after
        if asked > retry.budget_s:
            what = f"the API asks us to wait {asked:.0f} s ({verdict.reason}), longer than `retry.budget_s`"
            raise Incomplete(what, where=host, todo="run again later; answers received so far are kept")
        self.asked_to_wait += asked
        bound = min(retry.max_wait_s, retry.first_wait_s * 2 ** min(self.failures, 30))
        wait = max(least_s, asked + random.uniform(0, bound))
        self.failures += 1
        return None if now + wait - self.first_failure - self.asked_to_wait > retry.budget_s else wait


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Attempted:
    """What came of one attempt.

    Attributes:
        number: of the attempt, in the response store.
        hold: what was reserved for it.
        raw: the response; None: there is no complete one.
        left: False if no connection came about.
        request_id: under which the provider knows it.
    """

    number: int
    hold: Hold
    raw: Raw | None
    verdict: Verdict
    left: bool = True
    request_id: str | None = None

    @property
    def used(self) -> tuple[int | None, int | None]:
        """Tokens of input and output as the provider counts them; None: unknown."""
        reply = self.verdict.reply
        return (None, None) if reply is None else (reply.prompt_tokens, reply.output_tokens)


@dataclass(frozen=True, slots=True)
class Held:
    """A refusal that is not believed yet.

    Attributes:
        attempt: its number.
        host: who refused.
    """

    attempt: int
    host: str
    reason: str
    stored: Stored

    def is_confirmed_by(self, endpoint: Endpoint, answered: int) -> bool:
        """Whether an answer to this attempt shows that the refusal was about its row: it comes from the same host. For
        `forbidden` also to a request that left later: till then it may be the key that is refused there."""
        return self.host == endpoint.host and (self.reason != FORBIDDEN or self.attempt < answered)
