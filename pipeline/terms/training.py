"""The gate before training: a data set's own records, judged again for the student and the use of this moment."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, cast

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.errors import CorruptArtefact, boundary
from pipeline.core.lineage import Manifest, file_sha256
from pipeline.core.store import MANIFEST
from pipeline.terms.gate import enforce
from pipeline.terms.licenses import UNKNOWN
from pipeline.terms.overrides import read_overrides
from pipeline.terms.policy import judge
from pipeline.terms.records import Registry, TermRecord, load_registry
from pipeline.terms.statement import PROVENANCE, Source, Statement
from pipeline.terms.verdict import Gate, Verdict


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict and what it is about.

    Attributes:
        statement: the sources, with the student's base of this moment.
        registry: the records that it was judged by.
        manifest_sha256: of the data set's manifest; None: it has none.
    """

    verdict: Verdict
    statement: Statement
    registry: Registry
    manifest_sha256: str | None


def today() -> date:
    """The day that expiries and ages are counted to, in UTC."""
    return datetime.now(UTC).date()


def check_dataset(dataset: Path, student: Source, policy: PolicyConfig, today: date, command: str = "") -> Judged:
    """Judge a data set before a row of it is read; its stored verdict is not believed.

    Args:
        dataset: its artefact folder.
        student: the base that is trained on it.
        command: that was typed, for the commands in the message.

    Raises:
        PolicyRefused: its terms forbid what the policy means to do, or nobody knows them.
        CorruptArtefact: its manifest, or the file of overrides, was changed.
    """
    judged = judge_dataset(dataset, student, policy, "train", today)
    enforce(judged.verdict, judged.statement, policy, "train", str(dataset), command)
    return judged


def judge_dataset(dataset: Path, student: Source, policy: PolicyConfig, gate: Gate, today: date) -> Judged:
    """The same without refusing.

    Raises:
        CorruptArtefact: as `check_dataset`.
    """
    path = dataset / MANIFEST
    registry = load_registry(policy.registry)
    found = provenance_of(path) if path.is_file() else None
    if found is None:
        statement = Statement((Source("teacher", "data", "parquet without a manifest of ours", (UNKNOWN,)), student))
    else:
        statement = with_student(Statement.from_json(found["statement"]), student)
        registry = with_records(registry, found["records"])
    overrides = read_overrides(policy.overrides)
    verdict = judge(statement, policy, registry, gate=gate, overrides=overrides, today=today)
    return Judged(verdict, statement, registry, file_sha256(path) if path.is_file() else None)


def provenance_of(manifest: Path) -> Mapping[str, Any] | None:
    """What a data set's manifest says of its sources; None: nothing.

    Raises:
        CorruptArtefact: the manifest was changed, or its statement cannot be read.
    """
    found = Manifest.read(manifest).metrics.get(PROVENANCE)
    if found is None:
        return None
    todo = "run the pipeline again: it will be rebuilt"
    with boundary(CorruptArtefact, "the provenance cannot be read", where=str(manifest), todo=todo):
        assert isinstance(found, dict)
        Statement.from_json(cast(Mapping[str, Any], found["statement"]))
        return cast(Mapping[str, Any], found)


def with_student(statement: Statement, student: Source) -> Statement:
    """The statement with this student's base in the place of the one that the data set was made for."""
    others = tuple(source for source in statement.sources if source.role != "student_base")
    return replace(statement, sources=(*others, student))


def with_records(registry: Registry, records: Mapping[str, Any]) -> Registry:
    """The registry with the records that a data set was judged by, which win: a later edition of terms does not change
    what those were that held when its rows were asked for."""
    read = {name: TermRecord.model_validate(value) for name, value in records.items()}
    names = {alias.casefold(): each.id for each in read.values() for alias in (each.id, *each.aliases)}
    return replace(registry, records={**registry.records, **read}, names={**registry.names, **names})
