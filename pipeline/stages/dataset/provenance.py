"""Where the rows come from and whether they may ship: the statement, the gate, and what the manifest says of both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

from pipeline.core.config import DatasetStep, DeclaredSource
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.stage import Json
from pipeline.stages.dataset.census import Census
from pipeline.stages.dataset.upstream import Passed, Upstream
from pipeline.terms.bind import sources_there
from pipeline.terms.declared import source_of
from pipeline.terms.gate import enforce
from pipeline.terms.licenses import UNKNOWN
from pipeline.terms.notices import Notices, notices_of
from pipeline.terms.overrides import Override, read_overrides, scopes_of
from pipeline.terms.policy import judge
from pipeline.terms.records import Registry, load_registry
from pipeline.terms.statement import Source, Statement, prompt_source
from pipeline.terms.training import today
from pipeline.terms.verdict import Verdict
from pipeline.text.markdown import escape_markdown

FORMAT: Final = 1
"""Version of the section `provenance` of the manifest: docs/dataset-manifest.schema.json."""
LOCAL_PATHS: Final = frozenset({"registry", "texts", "overrides"})
"""Fields of the policy that hold paths of this machine: they do not ship."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What may ship, and why.

    Attributes:
        statement: the sources and the rows.
        there: the sources that some row comes from, and those that have a part in all (the student's base).
        registry: the term records.
        verdict: the gate's.
        overrides: those in the policy's file that are for some of these sources, in force or not.
        notices: what goes along.
    """

    statement: Statement
    there: tuple[Source, ...]
    registry: Registry
    verdict: Verdict
    overrides: tuple[Override, ...]
    notices: Notices


def judge_rows(cfg: DatasetStep, census: Census, upstream: Upstream, where: str, command: str = "") -> Judged:
    """Judge the rows that are really there.

    Args:
        where: the rows, for messages.
        command: that was typed, for the commands in messages.

    Raises:
        PolicyRefused: their terms forbid what the policy means to do, or nobody knows them.
        UsageError: the policy's records, texts or choices cannot be used.
        CorruptArtefact: the file of overrides was changed.
    """
    policy = cfg.policy
    statement = state(cfg.declared, census, upstream)
    registry = load_registry(policy.registry)
    overrides = read_overrides(policy.overrides)
    verdict = judge(statement, policy, registry, gate="dataset", overrides=overrides, today=today())
    enforce(verdict, statement, policy, "dataset", where, command)
    there = sources_there(statement)
    of_rows = replace(statement, sources=tuple(each for each in there if each.role != "student_base"))
    notices = notices_of(of_rows, verdict.obligations, registry, policy, escape_markdown)  # no row is made of the base
    scopes = scopes_of(statement, policy).items()
    own = tuple(each for each in overrides if each.sources.items() & scopes)
    return Judged(statement, there, registry, verdict, own, notices)


# ------------------------------------------------------------------------------------------------------------ sources


def state(declared: Sequence[DeclaredSource], census: Census, upstream: Upstream) -> Statement:
    """All sources of the config, as the plan judges them, and the rows that are there."""
    prompts = [
        prompt_source(name, *(str(facts.get(key, UNKNOWN)) for key in ("source", "revision", "license")))
        for name, facts in sorted(upstream.prompt_sources.items())
    ]
    return Statement((*map(source_of, declared), *prompts), census.row_sets)


def replayed(declared: Sequence[DeclaredSource]) -> frozenset[str]:
    """Teachers whose completions existed before: those that declare an origin instead of a model."""
    return frozenset(each.name for each in declared if each.role == "teacher" and "origin" in each.facts)


def hub_ids(upstream: Upstream) -> dict[str, str]:
    """Prompt set -> id on the hub, of those that are read from there, or whose card names an address there."""
    found = {}
    for name, facts in upstream.prompt_sources.items():
        address, prefix = str(facts.get("source", "")), "https://huggingface.co/datasets/"
        if facts.get("kind") == "hub":
            found[name] = str(facts.get("dataset"))
        elif address.startswith(prefix):
            found[name] = address.removeprefix(prefix).split("?")[0].strip("/")
    return found


# ----------------------------------------------------------------------------------------------------------- manifest


def provenance_json(
    judged: Judged, policy: PolicyConfig, upstream: Upstream, passed: Sequence[Passed], census: Census
) -> dict[str, Json]:
    """The manifest's section `provenance`; documented in docs/dataset.md."""
    records = {term.record.id: term.record for term in judged.notices.terms if term.record is not None}
    return {
        "format": FORMAT,
        "statement": judged.statement.to_json(),
        "statement_sha256": judged.statement.sha256,
        "records": {name: record.to_json() for name, record in sorted(records.items())},
        "record_sha256": {name: record.sha256 for name, record in sorted(records.items())},
        "texts": judged.notices.to_json(),
        "policy": policy_json(policy),
        "verdict": judged.verdict.to_json(),
        "overrides": [each.to_json() for each in judged.overrides],
        "conservation": [each.to_json() for each in passed],
        "teachers": teachers_json(census, upstream),
        "prompt_sets": {name: upstream.prompt_sources.get(name, {}) for name in sorted(census.prompt_sets)},
        "runs": upstream.runs(),
        "decontamination": upstream.decontamination(),
        "scans": upstream.scans(),
    }


def policy_json(policy: PolicyConfig) -> dict[str, Json]:
    """The policy without the paths of this machine."""
    return cast(dict[str, Json], policy.model_dump(mode="json", exclude=set(LOCAL_PATHS)))


def teachers_json(census: Census, upstream: Upstream) -> dict[str, Json]:
    """What is known of each teacher besides its terms: what `generate` found, and what the provider says answered."""
    found: dict[str, Json] = {}
    for name in sorted(census.teachers):
        pairs = sorted({each[1:] for each in census.returned if each[0] == name}, key=repr)
        returned: list[Json] = [{"model": model, "fingerprint": fingerprint} for model, fingerprint in pairs]
        found[name] = {**upstream.teachers.get(name, {}), "rows": census.teachers[name], "returned": returned}
    return found
