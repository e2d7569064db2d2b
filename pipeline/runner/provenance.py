"""What a data set's manifest says of the terms of its rows: sources, term records, verdict, overrides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pipeline.core.lineage import Manifest
from pipeline.runner.catalogue import part, text, texts
from pipeline.terms.statement import PROVENANCE


@dataclass(frozen=True, slots=True)
class Term:
    """What is known of one licence or of the terms of an API.

    Attributes:
        name: as the rows have it.
        id, title, effective, confidence: of the record that the data set was judged by; None: it has none.
    """

    name: str
    id: str | None = None
    title: str | None = None
    effective: str | None = None
    confidence: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a data set was judged when it was made.

    Attributes:
        outcome: "allow", "allow_with_obligations", "deny" or "undetermined".
        intended_use, dataset_release, model_release: of the policy of that time.
        overrides: ids of those that were in force.
    """

    outcome: str
    intended_use: str | None
    dataset_release: str | None
    model_release: str | None
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """The part of a manifest that is about terms.

    Attributes:
        sources: as `Source.to_json` has them.
        row_sets: as `RowSet` in `Statement.to_json`.
        records: id -> the term record, as JSON.
        judgement: None where the manifest has none.
    """

    sources: Sequence[Mapping[str, Any]]
    row_sets: Sequence[Mapping[str, Any]]
    records: Mapping[str, Mapping[str, Any]]
    judgement: Judgement | None

    @classmethod
    def of(cls, manifest: Manifest) -> "Provenance | None":
        """What a data set's manifest says; None: nothing, as before terms were recorded."""
        told = manifest.metrics.get(PROVENANCE)
        if not isinstance(told, dict):
            return None
        statement, records = part(told, "statement"), part(told, "records")
        return cls(
            sources=_objects(part(statement, "sources")),
            row_sets=_objects(part(statement, "row_sets")),
            records=cast(dict[str, dict[str, Any]], records) if isinstance(records, dict) else {},
            judgement=_judgement(told),
        )

    def term(self, name: str) -> Term:
        """What the data set was judged by where its rows say `name`."""
        wanted = name.casefold()
        for record in self.records.values():
            named = (str(record.get("id")), *texts(record.get("aliases")))
            if wanted in {each.casefold() for each in named}:
                values = {key: record.get(key) for key in ("id", "title", "effective", "confidence")}
                return Term(name, **{key: None if value is None else str(value) for key, value in values.items()})
        return Term(name)


def _judgement(told: Mapping[str, Any]) -> Judgement | None:
    outcome = part(told.get("verdict"), "outcome")
    if not isinstance(outcome, str):
        return None
    policy, overrides = told.get("policy"), told.get("overrides")
    return Judgement(
        outcome=outcome,
        intended_use=text(part(policy, "intended_use")),
        dataset_release=text(part(policy, "release", "dataset")),
        model_release=text(part(policy, "release", "model")),
        overrides=tuple(str(part(each, "id")) for each in overrides) if isinstance(overrides, list) else (),
    )


def _objects(value: Any) -> Sequence[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
