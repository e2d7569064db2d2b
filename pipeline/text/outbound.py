"""The outbound guard: decides which prompts may leave this machine, and with what replaced."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.core.config_outbound import OutboundConfig
from pipeline.core.record import Message
from pipeline.core.stage import Json
from pipeline.text.found import Detector, Found, merge, redact
from pipeline.text.personal import KINDS as PERSONAL
from pipeline.text.personal import find_personal
from pipeline.text.secrets import KINDS as SECRETS
from pipeline.text.secrets import find_secrets

REDACTED = "redacted"
"""Flag of rows whose prompt was redacted."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What becomes of a prompt.

    Attributes:
        messages: the prompt with all matches replaced, also where it is blocked, so that rows behind `prompts`, which
            the report shows, do not hold them. Equal to what was given where nothing was found.
        kinds: kind of each match, in the order in which they were found.
        reason: `outbound:<kind>` of the first match that blocks it; None: it may leave.
    """

    messages: tuple[Message, ...]
    kinds: tuple[str, ...]
    reason: str | None

    @property
    def redacted(self) -> bool:
        """Whether it leaves other than it was given."""
        return self.reason is None and bool(self.kinds)


@dataclass(frozen=True, slots=True)
class Guard:
    """The policy at work.

    Attributes:
        policy: what is looked for; None: nothing leaves this machine, so nothing is.
    """

    policy: OutboundConfig | None

    @property
    def acts(self) -> bool:
        """Whether it looks for anything."""
        return self.policy is not None and not self.policy.secrets == self.policy.personal == "off"

    def check(self, messages: Sequence[Message]) -> Checked:
        """Scan the texts and the reasoning of all turns."""
        detect = self._detector()
        passed: list[Message] = []
        kinds: list[str] = []
        for message in messages:
            content, found = redact(message.content, detect)
            reasoning = message.reasoning_content
            if reasoning is not None:
                reasoning, found_there = redact(reasoning, detect)
                found += found_there
            passed.append(replace(message, content=content, reasoning_content=reasoning) if found else message)
            kinds += found
        blocking = next((kind for kind in kinds if self._blocks(kind)), None)
        return Checked(tuple(passed), tuple(kinds), None if blocking is None else f"outbound:{blocking}")

    def _detector(self) -> Detector:
        secrets = self.policy is not None and self.policy.secrets != "off"
        personal = self.policy is not None and self.policy.personal != "off"

        def detect(text: str) -> list[Found]:
            found = [*(find_secrets(text) if secrets else ()), *(find_personal(text) if personal else ())]
            return merge(found, (*SECRETS, *PERSONAL)) if secrets and personal else found

        return detect

    def _blocks(self, kind: str) -> bool:
        if self.policy is None:
            return False
        return (self.policy.secrets if kind in SECRETS else self.policy.personal) == "block"


class Tally:
    """Counts what the guard did, for the manifest. Each prompt counts once, however many samples are drawn."""

    def __init__(self) -> None:
        self._blocked = self._redacted = 0
        self._matches: Counter[str] = Counter()

    def add(self, each: Iterable[Checked]) -> None:
        """Count prompts."""
        for checked in each:
            self._blocked += checked.reason is not None
            self._redacted += checked.redacted
            self._matches.update(checked.kinds)

    def metrics(self) -> dict[str, Json]:
        """Prompts blocked and redacted, and matches by kind."""
        matches: dict[str, Json] = {**dict(sorted(self._matches.items()))}
        return {"prompts_blocked": self._blocked, "prompts_redacted": self._redacted, "matches": matches}
