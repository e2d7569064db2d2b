"""Judges sources by a policy: what may be done with the data set and the student, and what is owed for it.

The grant of a whole is the join of the grants of its parts, and nothing but the grant, the student's families and the
policy decide: so a source, a licence, an atom or rows more never loosen a verdict. What can make it looser is an
override that was written for exactly these sources, the family of a student where there was no student before, and an
alternative (`A OR B`) that is taken because the other one got stricter.
"""

from collections.abc import Iterable, Sequence
from datetime import date
from itertools import groupby
from typing import Final

from pipeline.core.config_policy import PolicyConfig
from pipeline.terms.bind import Bound, bind, involves
from pipeline.terms.duties import Conflict, conflicts, owed
from pipeline.terms.grants import Held, read_value, value_text
from pipeline.terms.licenses import UNKNOWN
from pipeline.terms.overrides import Active, Override, active
from pipeline.terms.records import Registry, TermRecord
from pipeline.terms.rules import CONFLICTS, EFFECTS, REFUSED, Effect, Ruling, Situation, of_atom, rule_on
from pipeline.terms.statement import Statement
from pipeline.terms.verdict import Cited, Due, Finding, Gate, Outcome, Verdict

__all__ = ["Due", "Finding", "Gate", "Verdict", "judge"]

Ruled = tuple[Held, Ruling]
CHANGE_IN_PLACE: Final = "api_terms"
"""Kind of the records whose documents are rewritten under one address."""


def judge(
    statement: Statement,
    policy: PolicyConfig,
    registry: Registry,
    *,
    gate: Gate,
    overrides: Sequence[Override] = (),
    today: date,
) -> Verdict:
    """What a policy may do with the sources of a statement.

    Args:
        statement: with rows, only teachers and prompt sets that have some bind; the student's base, judges and the like
            always do. Without any source nothing binds: a data set whose sources nobody knows names them as `unknown`.
        gate: which one asks; it is recorded, and rows count at all of them where there are some.
        overrides: those of `read_overrides`; which of them hold is decided here.
        today: for expiry dates and the age of records.

    Raises:
        UsageError: a choice of the policy is none of its expression's alternatives.
    """
    holding = active(overrides, statement, policy, today)
    bound = bind(statement, policy, registry, holding.overrides)
    found = _findings(bound, statement, policy, registry, holding)
    due = _obligations(bound, policy, registry)
    used = {name for finding in found for name in finding.overrides}
    applied = tuple(each for each in holding.overrides if each.id in used or each.kind == "assertion")
    records = tuple(registry.records[name] for name in sorted(bound.grant.records))
    return Verdict(
        gate=gate,
        outcome=_outcome(found, due),
        findings=found,
        obligations=due,
        warnings=_warnings(bound, policy, applied, holding, records, statement, today),
        overrides=applied,
        records=tuple(record.id for record in records),
        choices=bound.choices,
    )


def _outcome(findings: Iterable[Finding], due: Sequence[Due]) -> Outcome:
    effects = {finding.effect for finding in findings}
    if "deny" in effects:
        return "deny"
    if "undetermined" in effects:
        return "undetermined"
    return "allow_with_obligations" if due else "allow"


def situation(statement: Statement, policy: PolicyConfig) -> Situation:
    """What atoms are judged by: the policy and the families of the student's bases."""
    bases = [source.family for source in statement.sources if source.role == "student_base"]
    return Situation(policy, frozenset(None if family is None else family.casefold() for family in bases))


# ------------------------------------------------------------------------------------------------------------- findings


def _findings(
    bound: Bound, statement: Statement, policy: PolicyConfig, registry: Registry, holding: Active
) -> tuple[Finding, ...]:
    at = situation(statement, policy)
    groups: dict[tuple[str, str, bool, bool], list[Ruled]] = {}
    for held in sorted((each for each in bound.grant.held if each.trigger is None), key=_order):
        ruling = rule_on(held, at)
        if ruling is not None:
            accepted = bool(holding.accepting(of_atom(held.atom).id, *held.key, (held.bearer,)))
            groups.setdefault((*held.key, held.asserted is not None, accepted), []).append((held, ruling))
    found = [
        _finding(of_atom(atom).id, atom, value, ruled, statement, registry, holding)
        for (atom, value, _, _), ruled in groups.items()
    ]
    found += [_of_conflict(conflict, statement, registry, holding) for conflict in conflicts(bound.grant.held, policy)]
    return tuple(sorted(found, key=_place))


def _order(held: Held) -> tuple[str, ...]:
    return (*held.key, held.bearer, held.record, held.clause or "", held.quote or "")


def _place(finding: Finding) -> tuple[int, int, str, str]:
    """The strictest first, of those the one that takes the most rows."""
    return EFFECTS.index(finding.effect), -(finding.rows or 0), finding.rule, finding.value


def _finding(
    rule: str,
    atom: str,
    value: str,
    ruled: Sequence[Ruled],
    statement: Statement,
    registry: Registry,
    holding: Active,
) -> Finding:
    """One finding of all sources that one atom binds; of those the strictest decide."""
    effect: Effect = min((ruling.effect for _, ruling in ruled), key=EFFECTS.index)
    strictest = [(held, ruling) for held, ruling in ruled if ruling.effect == effect]
    sources = tuple(dict.fromkeys(held.bearer for held, _ in strictest))
    accepted = tuple(each.id for each in holding.accepting(rule, atom, value, sources))
    rows, left = _rows(statement, sources)
    return Finding(
        rule=rule,
        atom=atom,
        value=value,
        effect="overridden" if accepted and effect in REFUSED else effect,
        why=strictest[0][1].why,
        sources=sources,
        cited=_cited([held for held, _ in strictest], registry),
        rows=rows,
        rows_left=left,
        overrides=accepted,
    )


def _of_conflict(conflict: Conflict, statement: Statement, registry: Registry, holding: Active) -> Finding:
    ruling = Ruling("deny", conflict.why)
    ruled = [(held, ruling) for held in conflict.held]
    value = value_text(conflict.values)
    return _finding(CONFLICTS[conflict.atom][0], conflict.atom, value, ruled, statement, registry, holding)


def _rows(statement: Statement, sources: Sequence[str]) -> tuple[int | None, int | None]:
    if not statement.row_sets:
        return None, None
    rows = sum(each.rows for each in statement.row_sets if involves(each, sources, statement.sources))
    return rows, statement.rows - rows


def _cited(held: Iterable[Held], registry: Registry) -> tuple[Cited, ...]:
    """Each document once, in order."""
    found: dict[str, Cited] = {}
    for each in held:
        record = registry.records.get(each.record)
        found.setdefault(each.record, _cite(each, record))
    return tuple(found.values())


def _cite(held: Held, record: TermRecord | None) -> Cited:
    if record is None:
        return Cited(held.record, held.record, None, None, None, None, None, None)
    if held.atom == UNKNOWN and held.kind is None:
        return Cited(record.id, record.title, None, None, None, None, None, None)
    retrieved, url = record.retrieved.isoformat(), record.source_url
    return Cited(record.id, record.title, record.effective, retrieved, record.confidence, url, held.clause, held.quote)


# ---------------------------------------------------------------------------------------------------------- obligations


def _obligations(bound: Bound, policy: PolicyConfig, registry: Registry) -> tuple[Due, ...]:
    """What is due, each once a record and trigger; it is firm where one source makes it so."""
    due = sorted(owed(bound.grant.held, policy), key=lambda each: (*_duty(each.held), each.held.bearer))
    found = []
    for (atom, value, record, trigger), group in groupby(due, key=lambda each: _duty(each.held)):
        members = list(group)
        held = members[0].held
        found.append(
            Due(
                atom=atom,
                value=read_value(value),
                trigger=trigger,
                record_id=record,
                title=registry.records[record].title,
                clause=held.clause,
                quote=held.quote,
                sources=tuple(dict.fromkeys(each.held.bearer for each in members)),
                conservative=all(each.conservative for each in members),
            )
        )
    return tuple(found)


def _duty(held: Held) -> tuple[str, str, str, str]:
    return held.atom, held.value, held.record, held.trigger or ""


# ------------------------------------------------------------------------------------------------------------- warnings


def _warnings(
    bound: Bound,
    policy: PolicyConfig,
    applied: Sequence[Override],
    holding: Active,
    records: Iterable[TermRecord],
    statement: Statement,
    today: date,
) -> tuple[str, ...]:
    at = situation(statement, policy)
    ruled = ((held, rule_on(held, at)) for held in bound.grant.held if held.trigger is None)
    told = {f"{held.role} {held.source}: {ruling.why}" for held, ruling in ruled if ruling is not None and ruling.warn}
    told |= {
        f"{held.role} {held.source}: {held.record} is share-alike; whether that reaches the student is unsettled"
        for held in bound.grant.held
        if held.atom == "share_alike" and held.role != "student_base" and policy.release.model != "none"
    }
    return (*_of_overrides(applied), *holding.warnings, *sorted(told), *bound.warnings, *_old(records, policy, today))


def _of_overrides(applied: Sequence[Override]) -> list[str]:
    if not applied:
        return []
    listed = "; ".join(f"{each.rule}, expires {each.expires}" for each in applied)
    plural = "s" if len(applied) > 1 else ""
    return [f"{len(applied)} licence override{plural} active: {listed}"]


def _old(records: Iterable[TermRecord], policy: PolicyConfig, today: date) -> list[str]:
    ages = {record.id: (today - record.retrieved).days for record in records if record.kind == CHANGE_IN_PLACE}
    return [
        f"{name} was read {age} days ago, more than policy.max_record_age_days = {policy.max_record_age_days}: read it "
        "again, and put a record with its new date into the folder policy.registry"
        for name, age in ages.items()
        if age > policy.max_record_age_days
    ]
