"""Which terms bind: the sources that count, their licences resolved to records, alternatives chosen between."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pipeline.core.config_policy import PolicyConfig
from pipeline.terms.duties import owed
from pipeline.terms.grants import Grant, Held, grant_of, is_below, join, join_all
from pipeline.terms.licenses import UNKNOWN, comparable
from pipeline.terms.overrides import Override
from pipeline.terms.records import Alternative, Registry, resolve
from pipeline.terms.rules import EFFECTS, REFUSED, Situation, rule_on
from pipeline.terms.statement import RowSet, Source, Statement

WITH_ROWS: Final = ("teacher", "prompt")
"""Roles whose sources have rows of their own; all others have a part in every row."""
IN_THE_DATA_SET: Final = (*WITH_ROWS, "system_prompt")
"""Roles whose texts are handed out with a data set, whether they train or not."""
OF_TRAINING: Final = ("no_train.", "needs_permission", "no_automated_extraction")
"""How the names of the restrictions begin that training alone meets."""
OF_THE_STUDENT: Final = frozenset({"train_on_outputs", "distribute_model_trained_on_outputs", "serve_product"})
"""Triggers that no data set pulls."""
MERGED: Final = "duplicates merged into "
"""How the name of a source begins that stands for a licence that a duplicate brought along; no config's name has a
blank."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was taken where a licence lets one choose.

    Attributes:
        source: `prompt:gsm8k`.
        expression: the licence as declared.
        taken: names that hold.
        left: the alternatives that were not taken.
        by: who chose.
    """

    source: str
    expression: str
    taken: Alternative
    left: tuple[Alternative, ...]
    by: str


@dataclass(frozen=True, slots=True)
class Bound:
    """What binds a statement's sources.

    Attributes:
        grant: all atoms.
        choices: between alternatives.
        warnings: of sources that do not bind, and assertions that answer nothing.
    """

    grant: Grant
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]


def bind(statement: Statement, policy: PolicyConfig, registry: Registry, overrides: Sequence[Override] = ()) -> Bound:
    """All that binds a statement's sources under a policy: the join over those that are there.

    Args:
        overrides: those that hold today; assertions among them answer for sources whose licence nobody knows.

    Raises:
        UsageError: a choice of the policy is none of its expression's alternatives.
    """
    grants, choices, warnings = [], list[Choice](), list[str]()
    for source in sources_there(statement):
        if not binds(source, policy):
            continue
        grant, chosen = _of_source(source, policy, registry)
        asserted, told = _asserted(source, overrides, policy, registry)
        whole = grant if asserted is None else join(_answered(grant, told), asserted)
        grants.append(whole if source.role in policy.roles_that_train else _handed_out(whole, policy))
        warnings += [] if asserted is None or told is not None else [_too_weak(source, policy)]
        choices += chosen
    return Bound(join_all(grants), tuple(choices), (*unjudged(statement, policy), *warnings))


# ---------------------------------------------------------------------------------------------- roles that do not train


def binds(source: Source, policy: PolicyConfig) -> bool:
    """Whether a source's terms count: where it trains, and where its texts are handed out with the data set."""
    handed_out = source.role in IN_THE_DATA_SET and policy.release.dataset != "none"
    return handed_out or source.role in policy.roles_that_train


def unjudged(statement: Statement, policy: PolicyConfig) -> tuple[str, ...]:
    """What `policy.roles_that_train` leaves out of the verdict, a line for each source that is there."""
    lines = []
    for source in sources_there(statement):
        if source.role not in policy.roles_that_train:
            said = ", ".join(source.licenses) or UNKNOWN
            how = "judged for handing the data set out only" if binds(source, policy) else "not judged"
            lines.append(
                f"the terms of {source.role} {source.name} ({said}) were {how}: policy.roles_that_train has no "
                f"{source.role}"
            )
    return tuple(lines)


def _handed_out(grant: Grant, policy: PolicyConfig) -> Grant:
    """The part that the data set alone meets: all but what is about training and the student."""
    return Grant(frozenset(held for held in grant.held if _is_of_data_set(held, policy)), grant.records)


def _is_of_data_set(held: Held, policy: PolicyConfig) -> bool:
    if held.trigger is not None:
        return held.trigger not in OF_THE_STUDENT
    if held.atom == "internal_only":
        return policy.release.dataset == "public"  # its rule looks at the student's release too
    return not held.atom.startswith(OF_TRAINING)


# ---------------------------------------------------------------------------------------------------------- the sources


def sources_there(statement: Statement) -> tuple[Source, ...]:
    """The sources that count: all of them before there are rows; then of teachers and prompt sets those that have rows.

    What rows name and no source declares counts as well: a teacher or prompt set without a source as unknown, and a
    licence of theirs that none of their sources has.
    """
    rows = [each for each in statement.row_sets if each.rows > 0]
    if not rows:
        return statement.sources
    there = {name for each in rows for name in _named(each)}
    kept = [source for source in statement.sources if source.role not in WITH_ROWS or source.place in there]
    missing = sorted(there - {source.place for source in kept})
    strangers = [Source(role, name, name, (UNKNOWN,)) for role, name in missing]  # type: ignore[arg-type]
    return (*kept, *strangers, *_undeclared(rows, kept))


def _named(rows: RowSet) -> set[tuple[str, str]]:
    return {("teacher", rows.teacher), *(("prompt", name) for name in rows.prompt_sets)}


def _undeclared(rows: Iterable[RowSet], sources: Sequence[Source]) -> list[Source]:
    """Licences in the column `license_set` that no source of those rows declares, each as a source of its own: a
    duplicate brought them along. They bind as a teacher's: as what is asked most of."""
    found = {(each.teacher, name) for each in rows for name in _brought(each, sources)}
    return [Source("teacher", merged_name(*each), "not declared by their sources", each[1:]) for each in sorted(found)]


def _brought(rows: RowSet, sources: Iterable[Source]) -> tuple[str, ...]:
    """The licences of rows that none of their own sources declares."""
    named = _named(rows)
    declared = {comparable(name) for source in sources if source.place in named for name in source.licenses}
    return tuple(name for name in rows.licenses if comparable(name) not in declared)


def merged_name(teacher: str, license_name: str) -> str:
    """Name of the source that stands for a licence that duplicates brought into a teacher's rows."""
    return f"{MERGED}{teacher}: {license_name}"


def involves(rows: RowSet, bearers: Iterable[str], sources: Iterable[Source]) -> bool:
    """Whether rows come from one of some sources (`teacher:main`); judges and the student have a part in every row.

    Args:
        sources: of the statement.
    """
    named = {f"{role}:{name}" for role, name in _named(rows)}
    named |= {f"teacher:{merged_name(rows.teacher, name)}" for name in _brought(rows, sources)}
    return any(bearer in named or bearer.split(":", 1)[0] not in WITH_ROWS for bearer in bearers)


# --------------------------------------------------------------------------------------------------------- alternatives


def _of_source(source: Source, policy: PolicyConfig, registry: Registry) -> tuple[Grant, list[Choice]]:
    grants, choices = [], []
    for expression in source.licenses or (UNKNOWN,):
        options = resolve(expression, registry, policy.choose)
        every = resolve(expression, registry, {})
        ranked = sorted((_rank(option, source, policy, registry), option) for option in options)
        taken = ranked[0][1]
        grants.append(grant_of(taken, registry, policy, role=source.role, source=source.name))
        if len(every) > 1:
            by = "policy.choose" if len(options) < len(every) else "the fewest findings and obligations"
            left = tuple(option for option in every if option != taken)
            choices.append(Choice(source.bearer, expression, taken, left, by))
    return join_all(grants), choices


def _rank(option: Alternative, source: Source, policy: PolicyConfig, registry: Registry) -> tuple[int, int, int, int]:
    """The less, the better: one that refuses never before one that does not, then one that is known, then the fewest
    obligations, then the fewest findings.

    Each source is looked at alone and without the student, so that no other source can change what was chosen: a
    verdict could become looser by it.
    """
    grant = grant_of(option, registry, policy, role=source.role, source=source.name)
    at = Situation(policy, frozenset())
    rulings = {held: rule_on(held, at) for held in grant.held if held.trigger is None}
    effects = {held.key: ruling.effect for held, ruling in rulings.items() if ruling is not None}
    worst = min((EFFECTS.index(effect) for effect in effects.values()), default=len(EFFECTS))
    refused = sum(effect in REFUSED for effect in effects.values())
    unknown = sum(atom == UNKNOWN for atom, _ in effects)
    due = {(each.held.key, each.held.trigger) for each in owed(grant.held, policy)}
    return (len(REFUSED) - worst if refused else 0), unknown, len(due), len(effects)


# ----------------------------------------------------------------------------------------------------------- assertions


def _asserted(
    source: Source, overrides: Sequence[Override], policy: PolicyConfig, registry: Registry
) -> tuple[Grant | None, str | None]:
    """What someone asserts that a source is under, and who says so; None: below what the policy asks for."""
    own = [each for each in overrides if each.asserts(source, policy)]
    if not own:
        return None, None
    names = tuple(each.license for each in own if each.license is not None)
    grant, _ = _of_source(replace(source, licenses=names), policy, registry)
    told = "; ".join(f"{each.person} asserts {each.license} until {each.expires}" for each in own)
    return grant, None if is_below("user_asserted", policy.min_confidence) else told


def _answered(grant: Grant, told: str | None) -> Grant:
    """An assertion answers where nobody named a licence that is known, and nothing else: what is known still binds, and
    so does that a record is not known surely enough."""
    if told is None:
        return grant
    return Grant(
        frozenset(
            replace(each, asserted=told) if each.atom == UNKNOWN and each.kind is None else each for each in grant.held
        ),
        grant.records,
    )


def _too_weak(source: Source, policy: PolicyConfig) -> str:
    return (
        f"what is asserted of {source.role} {source.name} ranks as user_asserted, below policy.min_confidence = "
        f"{policy.min_confidence}, and answers nothing"
    )
