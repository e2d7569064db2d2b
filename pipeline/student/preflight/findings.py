"""What a pre-flight check found, which checks there are, and what their findings decide. Loads nothing heavy."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from pipeline.core.errors import UsageError
from pipeline.core.stage import Json

Level: TypeAlias = Literal["ok", "warning", "error", "not_applicable"]

FILE: Final = "preflight.json"
"""Where the findings are kept, beside the model and in the step's work folder."""

NAMES: Final = {
    "PF01": "end of turn is trained",
    "PF02": "stop tokens agree",
    "PF03": "completions are whole",
    "PF04": "one BOS token",
    "PF05": "end survives padding",
    "PF06": "prompts are masked",
    "PF07": "columns are alike",
    "PF08": "prompt is a prefix",
    "PF09": "reasoning is kept",
    "PF10": "tokens round-trip",
    "PF11": "soft targets align",
    "PF12": "columns reach the batch",
    "PF13": "loss knows its labels",
    "PF14": "loss scales",
    "PF15": "loss is finite",
    "PF16": "adapters can learn",
    "PF17": "ids are in the vocabulary",
    "PF18": "packed rows are apart",
    "PF19": "soft targets' temperature",
    "PF20": "system prompts",
    "PF21": "validation is unseen",
    "PF22": "memory",
    "PF23": "rows are accounted for",
}
"""Id -> name, in the order in which they are told. Ids never change their meaning."""

BINDING: Final = frozenset({"PF07", "PF23"})
"""Checks whose errors nobody can accept: there is nothing that could be trained."""
SHOWN_ROWS: Final = 3
"""Row ids that a finding names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        id: `PF01` to `PF23`.
        name: see `NAMES`.
        level: error: training would teach something else than was meant; not_applicable: `message` says why.
        figure: the number that was looked at, for a table.
        message: what was found, one sentence without a full stop; empty where all is well.
        fix: what to do about it; empty where there is nothing to do.
        rows: some of the rows' ids.
    """

    id: str
    name: str
    level: Level
    figure: str
    message: str = ""
    fix: str = ""
    rows: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`PF08 prompt is a prefix: error: what; what to do about it`."""
        return "; ".join(filter(None, (f"{self.id} {self.name}: {self.level}: {self.message or 'fine'}", self.fix)))

    def to_json(self) -> dict[str, Json]:
        """The finding for a file."""
        return {**asdict(self), "rows": [*self.rows]}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Finding":
        """What `to_json` gave."""
        return cls(**{**value, "rows": tuple(value["rows"])})


def fine(id_: str, figure: str, message: str = "") -> Finding:
    """Nothing is wrong."""
    return Finding(id_, NAMES[id_], "ok", figure, message)


def skipped(id_: str, why: str) -> Finding:
    """There is nothing to look at."""
    return Finding(id_, NAMES[id_], "not_applicable", "-", why)


def flawed(
    id_: str, level: Literal["warning", "error"], figure: str, message: str, *, fix: str, rows: Iterable[str] = ()
) -> Finding:
    """Something is wrong."""
    return Finding(id_, NAMES[id_], level, figure, message, fix, tuple(rows)[:SHOWN_ROWS])


def in_order(findings: Iterable[Finding], why_not: str) -> tuple[Finding, ...]:
    """A finding for each check, in their order; those that were not made say why.

    Raises:
        ValueError: a check was made twice.
    """
    found = list(findings)
    by_id = {each.id: each for each in found}
    if len(by_id) != len(found):
        raise ValueError(f"a check was made twice: {sorted(each.id for each in found)}")
    return tuple(by_id.get(id_) or skipped(id_, why_not) for id_ in NAMES)


def merged(found: Iterable[Finding], more: Iterable[Finding]) -> list[Finding]:
    """Both; of a check that is in both, what was found later."""
    return [*{each.id: each for each in (*found, *more)}.values()]


# --------------------------------------------------------------------------------------------------------- deciding


def accept(findings: Iterable[Finding], accepted: Collection[str]) -> tuple[Finding, ...]:
    """The findings, with errors that somebody accepted as warnings."""
    return tuple(
        replace(each, level="warning", message=f"{each.message} (accepted)")
        if each.level == "error" and each.id in accepted and each.id not in BINDING
        else each
        for each in findings
    )


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """Those that stop a training."""
    return [each for each in findings if each.level == "error"]


def refuse(findings: Sequence[Finding], accepted: Collection[str] = ()) -> None:
    """Stop if there is an error that nobody accepted.

    Raises:
        UsageError: there is; it tells the first one and how many more there are.
    """
    errors = errors_of(accept(findings, accepted))
    if not errors:
        return
    first = errors[0]
    more = [each.id for each in errors[1:]]
    named = f", rows {', '.join(first.rows)}" if first.rows else ""
    others = f"; {len(more)} more: {', '.join(more)}" if more else ""
    where = f"pre-flight check {first.id} ({first.name}){named}{others}"
    raise UsageError(first.message, where=where, todo=first.fix)


def summary(findings: Sequence[Finding], accepted: Collection[str]) -> dict[str, Json]:
    """How many checks ended how, for the stage's metrics and its event.

    Args:
        findings: as they were found, before anything was accepted.
    """
    ids: dict[str, list[Json]] = {}
    for each in sorted(findings, key=lambda finding: finding.id):
        ids.setdefault(each.level, []).append(each.id)
    errors: list[Json] = ids.get("error", [])
    return {
        "ok": len(ids.get("ok", [])),
        "not_applicable": ids.get("not_applicable", []),
        "warnings": ids.get("warning", []),
        "errors": [id_ for id_ in errors if id_ not in accepted or id_ in BINDING],
        "accepted": [id_ for id_ in errors if id_ in accepted and id_ not in BINDING],
    }
