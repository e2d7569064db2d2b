"""The gate before the first request: the terms of everything that a config names, judged before anything is spent."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Final

from pipeline.core.config import DeclaredSource, RunConfig
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.errors import UsageError
from pipeline.core.mistakes import nearest
from pipeline.runner.session import Session
from pipeline.runner.steps import Step, declared_sources
from pipeline.terms.declared import source_of
from pipeline.terms.gate import enforce
from pipeline.terms.grants import is_below
from pipeline.terms.overrides import (
    Decision,
    Evidence,
    Kind,
    Override,
    append_override,
    evidence_of,
    read_overrides,
)
from pipeline.terms.policy import judge
from pipeline.terms.records import Registry, load_registry, resolve
from pipeline.terms.rules import REFUSED
from pipeline.terms.statement import Statement, prompt_source
from pipeline.terms.training import today
from pipeline.terms.verdict import Finding, Verdict

logger = logging.getLogger(__name__)

JUDGED: Final = frozenset({"generate", "train", "evaluate"})
"""Steps that the terms of a config stop; `dataset` judges its rows itself."""


@dataclass(frozen=True, slots=True)
class Planned:
    """The verdict on a config."""

    verdict: Verdict
    statement: Statement
    registry: Registry


def statement_of(run: RunConfig) -> Statement:
    """The sources of a config: its teachers, its prompt sets by their cards, and the student's base; without those
    whose rows the config takes out of the data set.

    Raises:
        UsageError: a card cannot be read.
    """
    from pipeline.stages.prompts.card import source_facts  # the stage's package loads Arrow

    kept = {name: each for name, each in run.prompts.sets.items() if name not in run.dataset.exclude_prompt_sets}
    cards = {name: source_facts(each) for name, each in kept.items()}
    prompts = [prompt_source(name, card.source, card.revision, card.license) for name, card in cards.items()]
    declared = [source_of(each) for each in declared_sources(run) if not _is_excluded(each, run)]
    return Statement((*declared, *prompts))


def _is_excluded(source: DeclaredSource, run: RunConfig) -> bool:
    return source.role == "teacher" and source.name in run.dataset.exclude_teachers


def _left_out(run: RunConfig) -> tuple[str, ...]:
    """A warning for each source that the verdict leaves out, since its rows leave before they ship."""
    teachers = [("teacher", "exclude_teachers", name) for name in run.dataset.exclude_teachers]
    sets = [("prompt set", "exclude_prompt_sets", name) for name in run.dataset.exclude_prompt_sets]
    return tuple(
        f"the terms of {role} {name} were not judged: `generate` makes its rows, and dataset.{field} takes them out of "
        "the data set"
        for role, field, name in (*teachers, *sets)
        if role != "teacher" or name in run.generate.teachers
    )


def judge_plan(session: Session) -> Planned:
    """Judge a config.

    Raises:
        UsageError: a card, a term record or a choice in the policy cannot be read.
        CorruptArtefact: the file of overrides was changed.
    """
    run = session.loaded.config
    registry, statement = load_registry(run.policy.registry), statement_of(run)
    overrides = read_overrides(run.policy.overrides)
    verdict = judge(statement, run.policy, registry, gate="plan", overrides=overrides, today=today())
    verdict = replace(verdict, warnings=(*verdict.warnings, *_left_out(run)))
    return Planned(verdict, statement, registry)


@dataclass(frozen=True, slots=True)
class Signed:
    """What a person decides about a rule that refuses a config.

    Attributes:
        rule: `LG-002`.
        kind: permission, interpretation or assertion.
        person: name and contact.
        reason: at least 20 characters.
        evidence: a file with the permission, the contract or a note.
        expires: the last day on which it holds.
        source, license: of an assertion: `prompt:gsm8k`, and the licence that it is under.
    """

    rule: str
    kind: Kind
    person: str
    reason: str
    evidence: Path
    expires: date
    source: str | None = None
    license: str | None = None


def record_override(session: Session, signed: Signed) -> tuple[Override, ...]:
    """Write down what a person decided about every finding of a rule that refuses this config, for its sources as they
    are; returns what was written.

    Raises:
        UsageError: the config names no file for it, the rule refuses nothing here, or the decision is not complete.
        CorruptArtefact: the file of overrides was changed.
    """
    policy = session.loaded.config.policy
    if policy.overrides is None:
        todo = "name one that is kept in version control: policy: {overrides: configs/overrides.jsonl}"
        raise UsageError("the config names no file of overrides", where=f"{session.loaded.path}: policy", todo=todo)
    planned = judge_plan(session)
    refused = [each for each in planned.verdict.findings if each.effect in REFUSED]
    matching = [each for each in refused if each.rule == signed.rule and _is_about(each, signed.source)]
    if not matching:
        rules = ", ".join(sorted({each.rule for each in refused})) or "none does"
        todo = f"name a rule that refuses it: {rules}"
        raise UsageError(f"{signed.rule} refuses nothing here", where=str(session.loaded.path), todo=todo)
    _check_assertion(signed, planned, policy)
    evidence = evidence_of(signed.evidence)
    decisions = [_decision(signed, each, evidence) for each in matching]
    return tuple(
        append_override(policy.overrides, each, planned.statement, policy, today=today()) for each in decisions
    )


def _check_assertion(signed: Signed, planned: Planned, policy: PolicyConfig) -> None:
    """Raises: UsageError: what is asserted would answer nothing, and what is written stays written."""
    if signed.license is None:
        return
    if is_below("user_asserted", policy.min_confidence):
        what = f"an assertion answers nothing here: policy.min_confidence is {policy.min_confidence}"
        raise UsageError(what, where="--kind assertion", todo="set policy: {min_confidence: user_asserted}")
    known = planned.registry
    for name in sorted({each for names in resolve(signed.license, known, policy.choose) for each in names}):
        if known.find(name) is None:
            todo = f"{nearest(name.casefold(), [*known.names])}; all: python -m pipeline licenses list"
            raise UsageError(f"nobody knows a licence named {name}", where="--license", todo=todo[:300])


def _is_about(finding: Finding, source: str | None) -> bool:
    return source is None or source in finding.sources


def _decision(signed: Signed, finding: Finding, evidence: Evidence) -> Decision:
    return Decision(
        rule=finding.rule,
        atom=finding.atom,
        value=finding.value,
        sources=finding.sources if signed.source is None else (signed.source,),
        kind=signed.kind,
        person=signed.person,
        reason=signed.reason,
        evidence=evidence,
        expires=signed.expires,
        source=signed.source if signed.kind == "assertion" else None,
        license=signed.license,
    )


def check_terms(session: Session, steps: Sequence[Step]) -> None:
    """Refuse to start steps that would ask a teacher, train, or evaluate, where that cannot be used for what it is
    meant for. It costs nothing here, and holds for steps that have a result already: an override may have expired
    since. The data set and the training are judged again by the rows that are there then.

    Raises:
        PolicyRefused, UsageError, CorruptArtefact: as `check_plan`.
    """
    # An edited line is said as such: it also makes the steps that read it out of date.
    read_overrides(session.loaded.config.policy.overrides)
    if not any(step.kind in JUDGED for step in steps):
        return
    for warning in check_plan(session).verdict.warnings:
        logger.warning("terms: %s", warning)


def check_plan(session: Session) -> Planned:
    """Refuse a config whose terms forbid what its policy means to do.

    Raises:
        PolicyRefused: they do, or nobody knows them.
        UsageError, CorruptArtefact: as `judge_plan`.
    """
    planned = judge_plan(session)
    refuse_plan(session, planned)
    return planned


def refuse_plan(session: Session, planned: Planned) -> None:
    """Refuse what was judged.

    Raises:
        PolicyRefused: terms forbid it, or nobody knows them.
    """
    path, command = str(session.loaded.path), session.command("run")
    enforce(planned.verdict, planned.statement, session.loaded.config.policy, "plan", path, command)
