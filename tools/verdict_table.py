"""Write docs/verdicts.md: the verdict on every term record under every policy that makes a difference.

python -m tools.verdict_table            writes the page
python -m tools.verdict_table --check    exits 1 where the page is not what the code says
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import product
from pathlib import Path

from pipeline.core.config_policy import PolicyConfig, Role
from pipeline.terms.policy import judge
from pipeline.terms.records import Registry, TermRecord, load_registry
from pipeline.terms.rules import CONFLICTS, RULES, UNLISTED
from pipeline.terms.statement import Source, Statement
from pipeline.terms.verdict import Verdict

PAGE = Path(__file__).resolve().parent.parent / "docs" / "verdicts.md"
COMMAND = "python -m tools.verdict_table"
READ_ON = date(2026, 11, 23)
"""Day of the verdicts. Age only warns, so no cell depends on it."""
FREE = "CC0-1.0"
"""Terms of everything but the record in question: they forbid and ask nothing."""
USES = ("commercial", "research")
RELEASES = {"private": ("none", "internal"), "public": ("public", "public")}
OTHER = "another-family"

INTRODUCTION = f"""\
# Verdicts

What the licence gates say to every record of the term registry. Code made this page (`{COMMAND}`), and
a test compares it, so a change of a record, of a rule or of a policy shows here.

**This is an automated reading of public licence texts and terms at the dates shown. It may be wrong, incomplete or out
of date, and it is not legal advice. You decide; ask a lawyer.**

## How to read it

A row is one record, alone: a teacher under these terms (of a data licence: a prompt set), and a student's base that
asks for nothing. A column is a policy:

- commercial, research: `policy.intended_use`.
- private: `release: {{dataset: none, model: internal}}`; public: `release: {{dataset: public, model: public}}`.
- same, other: whether the student's base is of the family that the terms are about.

All else is as it comes: `competes_with` says nothing, `allow_unknown: false`, `min_confidence: mirrored`, no territory,
an organisation without users or revenue.

A cell is the outcome:

- `allow`: nothing forbids it, and nothing is owed.
- `owed 3`: allowed, with three obligations; `(owed 3)`: all three are unsettled, or due only if handing something out
  inside one organisation counts as distributing it. They are said, and stop nothing.
- `deny LG-012`: forbidden by this rule; `open LG-012`: undetermined, because the policy has to say something, or
  because the terms are not known surely enough (`LG-001`). Both stop the run with exit code 4.

Only the first refusing rule is named. `python -m pipeline licenses check CONFIG` says all of it for a config of yours.
"""


def policy_of(use: str, release: str) -> PolicyConfig:
    """The policy of a column."""
    dataset, model = RELEASES[release]
    return PolicyConfig.model_validate({"intended_use": use, "release": {"dataset": dataset, "model": model}})


def role_of(record: TermRecord) -> Role:
    """What a source under a record is, as a rule."""
    return "prompt" if record.kind == "data_license" else "teacher"


def verdict_of(record: TermRecord, registry: Registry, policy: PolicyConfig, family: str) -> Verdict:
    """The verdict on one record alone."""
    sources = (Source(role_of(record), "it", "it", (record.id,)), Source("student_base", "s", "s", (FREE,), family))
    return judge(Statement(sources), policy, registry, gate="plan", today=READ_ON)


def base_verdict_of(record: TermRecord, registry: Registry, policy: PolicyConfig) -> Verdict:
    """The verdict on a student that was made from weights under a record."""
    base = Source("student_base", "s", "s", (record.id,), record.family)
    return judge(Statement((base,)), policy, registry, gate="plan", today=READ_ON)


def cell_of(verdict: Verdict) -> str:
    """An outcome in two words."""
    if not verdict.passes:
        word = "deny" if verdict.outcome == "deny" else "open"
        return f"{word} {verdict.refusals[0].rule}"
    owed = len(verdict.obligations)
    if owed == 0:
        return "allow"
    return f"(owed {owed})" if all(due.conservative for due in verdict.obligations) else f"owed {owed}"


def family_of(record: TermRecord) -> str:
    """The family that a record's terms are about."""
    named = [str(each.value) for each in record.restrictions if each.atom == "no_train.other_family"]
    return (named or [record.family or "no-family"])[0]


def cells_of(record: TermRecord, registry: Registry) -> list[str]:
    """One row: {commercial, research} × {private, public} × {same, other family}."""
    families = (family_of(record), OTHER)
    return [
        cell_of(verdict_of(record, registry, policy_of(use, release), family))
        for use, release, family in product(USES, RELEASES, families)
    ]


def base_cells_of(record: TermRecord, registry: Registry) -> list[str]:
    """One row of the table of weights: {commercial, research} × {private, public}."""
    return [
        cell_of(base_verdict_of(record, registry, policy_of(use, release))) for use, release in product(USES, RELEASES)
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def page() -> str:
    """The whole page."""
    registry = load_registry()
    records = sorted(registry.records.values(), key=lambda each: (each.kind, each.id.casefold()))
    policies = [f"{use}, {release}" for use, release in product(USES, RELEASES)]
    columns = [f"{name}, {family}" for name, family in product(policies, ("same", "other"))]
    known = [[f"`{each.id}`", each.confidence] for each in records]
    weights = [each for each in records if each.kind == "model_license"]
    rules = [[rule.id, f"`{atom}`", rule.meaning] for atom, rule in RULES.items()]
    rules += [[name, f"`{atom}`", meaning] for atom, (name, meaning) in CONFLICTS.items()]
    lines = [
        INTRODUCTION,
        "## Rules",
        "",
        "The ids are stable: overrides name them.",
        "",
        *table(("rule", "atom", "what it says"), [*rules, [UNLISTED.id, "any other", UNLISTED.meaning]]),
        "",
        f"## Teachers and prompts: {len(records)} records",
        "",
        *table(
            ("record", "confidence", *columns),
            [[*head, *cells_of(each, registry)] for head, each in zip(known, records, strict=True)],
        ),
        "",
        f"## A student's base: {len(weights)} licences of models",
        "",
        "The student starts from weights under them: terms about outputs do not count, terms about copies do.",
        "",
        *table(("record", *policies), [[f"`{each.id}`", *base_cells_of(each, registry)] for each in weights]),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page differs")
    asked, wanted = parser.parse_args(arguments), page()
    if not asked.check:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{PAGE.name} is not what the code says: {COMMAND}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
