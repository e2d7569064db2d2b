"""The outbound guard: decides which prompts may leave this machine, and with what replaced."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core.config_outbound import OutboundConfig
from pipeline.core.lineage import canonical_json
from pipeline.core.record import Message
from pipeline.core.stage import Json
from pipeline.text.found import Detector, Found, merge, redact
from pipeline.text.personal import KINDS as PERSONAL
from pipeline.text.personal import find_personal
from pipeline.text.secrets import KINDS as SECRETS
from pipeline.text.secrets import find_secrets

REDACTED = "redacted"
"""Flag of rows whose prompt was redacted."""


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Checked:
    """What becomes of a prompt.

    Attributes:
        messages: the prompt with all matches replaced, also where it is blocked, so that rows behind `prompts`, which
            the report shows, do not hold them. Equal to what was given where nothing was found.
        kinds: kind of each match, in the order in which they were found.
        reason: `outbound:<kind>` of the first match that blocks it; None: it may leave.
        tools: JSON of the functions that the prompt offers, likewise with all matches replaced.
    """

    messages: tuple[Message, ...]
    kinds: tuple[str, ...]
    reason: str | None
    tools: str | None = None

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

    def check(self, messages: Sequence[Message], tools: str | None = None) -> Checked:
        """Scan the texts, the reasoning and the tool calls of all turns, and the functions that are offered."""
        detect = self._detector()
        passed: list[Message] = []
        kinds: list[str] = []
        for message in messages:
            redacted, found = _redact_message(message, detect)
            passed.append(redacted if found else message)
            kinds += found
        if tools is not None:
            redacted_tools, found = redact_json(tools, detect)
            tools = (
                redacted_tools if redacted_tools.startswith("[{") else None
            )  # of the whole nothing but a mark is left
            kinds += found
        blocking = next((kind for kind in kinds if self._blocks(kind)), None)
        return Checked(tuple(passed), tuple(kinds), None if blocking is None else f"outbound:{blocking}", tools)

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


def _redact_message(message: Message, detect: Detector) -> tuple[Message, list[str]]:
    content, found = redact(message.content, detect)
    others = {}
    for name in ("reasoning_content", "name", "tool_call_id"):
        text = getattr(message, name)
        if text is not None:
            others[name], found_there = redact(text, detect)
            found += found_there
    calls = []
    for call in message.tool_calls:
        arguments, found_there = redact_json(call.arguments, detect)
        calls.append(replace(call, arguments=arguments))
        found += found_there
    if not found:  # nearly all: making a message anew costs more than the scan
        return message, found
    return replace(message, content=content, tool_calls=tuple(calls), **others), found


def redact_json(text: str, detect: Detector) -> tuple[str, list[str]]:
    """`found.redact` for JSON text: in its texts and names, where no escapes hide anything, then as a whole, where a
    name says what the value beside it is. It stays JSON, unless it was none; without matches it is left as it was.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return redact(text, detect)
    kinds: list[str] = []
    cleaned = _redact_value(value, detect, kinds)
    text = canonical_json(cleaned).decode("utf-8", "replace") if kinds else text
    whole, more = redact(text, detect)
    return (whole if _is_json(whole) else json.dumps(whole)), kinds + more


def _redact_value(value: Any, detect: Detector, kinds: list[str]) -> Any:
    if isinstance(value, str):
        text, found = redact(value, detect)
        kinds += found
        return text
    if isinstance(value, dict):
        pairs = ((_redact_value(key, detect, kinds), _redact_value(each, detect, kinds)) for key, each in value.items())
        return dict(pairs)
    return [_redact_value(each, detect, kinds) for each in value] if isinstance(value, list) else value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class Tally:
    """Counts what the guard did, for the manifest. Each prompt counts once, however many samples are drawn."""

    def __init__(self) -> None:
        self._blocked = self._redacted = 0
        self._matches: Counter[str] = Counter()

    def add(self, each: Iterable[Checked]) -> None:
        """Count prompts."""
        for checked in each:
            if not checked.kinds:
                continue  # nothing was found: there is nothing to count
            self._blocked += checked.reason is not None
            self._redacted += checked.redacted
            self._matches.update(checked.kinds)

    def metrics(self) -> dict[str, Json]:
        """Prompts blocked and redacted, and matches by kind."""
        matches: dict[str, Json] = {**dict(sorted(self._matches.items()))}
        return {"prompts_blocked": self._blocked, "prompts_redacted": self._redacted, "matches": matches}
