"""A verdict: what a gate found, what is owed, and what a reader has to know besides."""

from dataclasses import asdict, dataclass
from typing import Final, Literal, cast

from pipeline.core.stage import Json
from pipeline.terms.bind import Choice
from pipeline.terms.grants import read_value
from pipeline.terms.overrides import Override
from pipeline.terms.rules import REFUSED, Effect

Gate = Literal["plan", "dataset", "train", "publish"]
Outcome = Literal["allow", "allow_with_obligations", "deny", "undetermined"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("allow", "allow_with_obligations", "undetermined", "deny")
"""From the loosest."""


@dataclass(frozen=True, slots=True)
class Cited:
    """Where a finding has it from.

    Attributes:
        record: id of the record; where there is none, the licence's name, and all else is empty.
        effective, retrieved: date in the document, and when it was read (ISO).
    """

    record: str
    title: str
    effective: str | None
    retrieved: str | None
    confidence: str | None
    source_url: str | None
    clause: str | None
    quote: str | None


@dataclass(frozen=True, slots=True)
class Finding:
    """What one restriction or conflict does here.

    Attributes:
        rule: `LG-012`.
        atom, value: what it is about; `value` is canonical JSON.
        effect: see `rules.Effect`.
        why: why here.
        sources: whom it binds: `teacher:main`.
        cited: the documents, at least one.
        rows: how many rows come from those sources; None before there are rows.
        rows_left: how many remain without them.
        overrides: ids of the overrides that accept it.
    """

    rule: str
    atom: str
    value: str
    effect: Effect
    why: str
    sources: tuple[str, ...]
    cited: tuple[Cited, ...]
    rows: int | None = None
    rows_left: int | None = None
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`no_train.competing(openai)`; of an atom without a value, the atom alone."""
        value = read_value(self.value)
        inside = ", ".join(map(str, value)) if isinstance(value, list) else value
        return self.atom if value is None else f"{self.atom}({inside})"

    @property
    def refuses(self) -> bool:
        """Whether it alone stops a gate."""
        return self.effect in REFUSED


@dataclass(frozen=True, slots=True)
class Due:
    """An obligation that is due.

    Attributes:
        value: canonical JSON read back: a text, or what `product_display_if` holds.
        sources: on whose account: `teacher:main`.
        conservative: it is unsettled whether it is due: it is said, and stops nothing.
    """

    atom: str
    value: Json
    trigger: str
    record_id: str
    title: str
    clause: str | None
    quote: str | None
    sources: tuple[str, ...]
    conservative: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy may do with some sources.

    Attributes:
        findings: all of them, the strictest first; those that stop nothing too.
        obligations: what is due.
        warnings: what stays visible wherever the verdict goes.
        overrides: those that accepted a finding.
        records: ids of all records that bind, sorted.
        choices: what was taken where a licence lets one choose.
    """

    gate: Gate
    outcome: Outcome
    findings: tuple[Finding, ...]
    obligations: tuple[Due, ...]
    warnings: tuple[str, ...]
    overrides: tuple[Override, ...]
    records: tuple[str, ...]
    choices: tuple[Choice, ...]

    @property
    def passes(self) -> bool:
        """Whether the gate opens."""
        return self.outcome in ("allow", "allow_with_obligations")

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The findings that stop the gate."""
        return tuple(finding for finding in self.findings if finding.refuses)

    def to_json(self) -> dict[str, Json]:
        """As plain JSON, in one order."""
        parts = {
            "gate": self.gate,
            "outcome": self.outcome,
            "findings": [_plain(finding) for finding in self.findings],
            "obligations": [_plain(due) for due in self.obligations],
            "warnings": [*self.warnings],
            "overrides": [override.to_json() for override in self.overrides],
            "records": [*self.records],
            "choices": [_plain(choice) for choice in self.choices],
        }
        return cast(dict[str, Json], parts)


def _plain(value: Finding | Due | Choice) -> Json:
    return cast(Json, _lists(asdict(value)))


def _lists(value: object) -> object:
    if isinstance(value, dict):
        return {name: _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
