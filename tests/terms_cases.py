"""Term records, sources and policies for tests of verdicts: small, made by hand, of no real document."""

from datetime import date
from typing import Any

from pipeline.core.config_policy import PolicyConfig
from pipeline.terms.overrides import Override
from pipeline.terms.policy import judge
from pipeline.terms.records import Registry, TermRecord
from pipeline.terms.statement import RowSet, Source, Statement
from pipeline.terms.verdict import Gate, Verdict

TODAY = date(2026, 11, 23)
READ = date(2026, 11, 1)


def a_record(name: str, *restrictions: Any, owes: tuple[Any, ...] = (), **fields: Any) -> TermRecord:
    """A verified record. A restriction is an atom, or (atom, value); an obligation is (atom, value, trigger)."""
    pairs = [each if isinstance(each, tuple) else (each, None) for each in restrictions]
    return TermRecord.model_validate(
        {
            "id": name,
            "title": f"Terms {name}",
            "kind": "model_license",
            "effective": "2025-01-01",
            "retrieved": READ,
            "source_url": "https://terms.example/x",
            "confidence": "verified",
            "text_sha256": "0" * 64,
            "restrictions": [
                {"atom": atom, "value": value, "clause": "1", "quote": f"words of {atom}"} for atom, value in pairs
            ],
            "obligations": [
                {"atom": atom, "value": value, "trigger": trigger, "clause": "2", "quote": f"words of {atom}"}
                for atom, value, trigger in owes
            ],
            **fields,
        }
    )


def a_registry(*records: TermRecord) -> Registry:
    names = {name.casefold(): each.id for each in records for name in (each.id, *each.aliases)}
    return Registry({each.id: each for each in records}, names, {})


def a_policy(use: str = "commercial", dataset: str = "public", model: str = "public", **more: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({"intended_use": use, "release": {"dataset": dataset, "model": model}, **more})


def teacher(*licenses: str, name: str = "main", what: str = "maker:model") -> Source:
    return Source("teacher", name, what, licenses)


def prompts(*licenses: str, name: str = "set") -> Source:
    return Source("prompt", name, "hub/prompts", licenses)


def student(*licenses: str, family: str | None = "qwen") -> Source:
    return Source("student_base", "student", "Maker/Small", licenses or ("free",), family)


FREE = a_record("free")
"""Terms that forbid and ask nothing."""


def verdict_on(
    sources: tuple[Source, ...],
    *records: TermRecord,
    policy: PolicyConfig | None = None,
    rows: tuple[RowSet, ...] = (),
    gate: Gate = "plan",
    overrides: tuple[Override, ...] = (),
    today: date = TODAY,
) -> Verdict:
    """The verdict on some sources, and a student under free terms where they name none."""
    there = sources if any(each.role == "student_base" for each in sources) else (*sources, student())
    chosen = a_policy() if policy is None else policy
    statement, registry = Statement(there, rows), a_registry(FREE, *records)
    return judge(statement, chosen, registry, gate=gate, overrides=overrides, today=today)
