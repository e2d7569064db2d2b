"""What the rows of a data set say about themselves: counts, licences, teachers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.record import OPTIONAL_OF_MESSAGE
from pipeline.core.stage import Json
from pipeline.terms.licenses import UNKNOWN
from pipeline.terms.statement import RowSet

OPTIONAL_COLUMNS = ("tools", "returned_model", "fingerprint")
"""Columns of the rows that the shards have only where some row has a value."""


@dataclass(slots=True)
class Census:
    """Facts gathered row by row, each independent of the order of the rows.

    Attributes:
        splits, sets, tasks: rows by split, prompt set and task.
        teachers: rows by teacher.
        license_sets: rows by (teacher, prompt sets it is in, licences).
        returned: (teacher, model and fingerprint as the provider named them) of the rows that have either.
        used: (message column, optional field of messages) where some row uses the field; likewise (column, "") for
            the columns of `OPTIONAL_COLUMNS`.
        completion_tokens: sum over the rows that have a count.
        counted: rows that have one.
        verified: rows by verdict ("right", "not_compared").
    """

    splits: Counter[str] = field(default_factory=Counter)
    sets: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    teachers: Counter[str] = field(default_factory=Counter)
    license_sets: Counter[tuple[str, tuple[str, ...], tuple[str, ...]]] = field(default_factory=Counter)
    returned: set[tuple[str, str | None, str | None]] = field(default_factory=set)
    used: set[tuple[str, str]] = field(default_factory=set)
    completion_tokens: int = 0
    counted: int = 0
    verified: int = 0

    @property
    def rows(self) -> int:
        """All rows."""
        return self.splits.total()

    @property
    def licenses(self) -> set[str]:
        """Every licence that some row is under."""
        return {name for _, _, names in self.license_sets for name in names}

    @property
    def row_sets(self) -> tuple[RowSet, ...]:
        """The rows by where they come from, in one order."""
        found = sorted(self.license_sets.items())
        return tuple(RowSet(rows, teacher, sets, licenses) for (teacher, sets, licenses), rows in found)

    @property
    def prompt_sets(self) -> set[str]:
        """Every prompt set that held some row, as its own or as a duplicate."""
        return {name for _, sets, _ in self.license_sets for name in sets}

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table of `RECORD_SCHEMA`."""
        self.splits.update(table["split"].to_pylist())
        self.tasks.update(task for task in table["task"].to_pylist() if task is not None)
        names = ("prompt_set", "also_in", "teacher", "license_set")
        for prompt_set, also_in, teacher, licenses in zip(*(table[name].to_pylist() for name in names), strict=True):
            self.sets[prompt_set] += 1
            self.teachers[teacher] += 1
            self.license_sets[teacher, (prompt_set, *also_in), tuple(licenses)] += 1
        self._add_returned(table)
        for name in ("prompt", "completion"):
            unused = [field for field in OPTIONAL_OF_MESSAGE if (name, field) not in self.used]
            self.used.update((name, field) for field in unused if _is_used(table[name], field))
        self.used.update((name, "") for name in OPTIONAL_COLUMNS if table[name].null_count < table.num_rows)
        self.completion_tokens += pc.sum(table["completion_tokens"]).as_py() or 0
        self.counted += pc.count(table["completion_tokens"]).as_py()
        self.verified += pc.sum(table["verified"]).as_py() or 0

    def _add_returned(self, table: pa.Table) -> None:
        """Grouped by Arrow: the few pairs that there are, not the rows, are looked at one by one."""
        names = ["teacher", "returned_model", "fingerprint"]
        if table["returned_model"].null_count < table.num_rows or table["fingerprint"].null_count < table.num_rows:
            pairs = table.select(names).group_by(names).aggregate([])
            found = zip(*(pairs[name].to_pylist() for name in names), strict=True)
            self.returned.update(each for each in found if each[1:] != (None, None))

    def sources(self, prompt_sources: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
        """Prompt sets and teachers with their licences; "unknown" where nobody said.

        Args:
            prompt_sources: `sources.json` of the stage `prompts`.
        """
        sets: dict[str, Json] = {}
        for name, facts in sorted(prompt_sources.items()):
            told = {key: facts.get(key, UNKNOWN) for key in ("source", "revision", "license", "description")}
            sets[name] = {**told, "rows": self.sets[name]}
        by_set = {name: str(facts.get("license", UNKNOWN)) for name, facts in prompt_sources.items()}
        teachers: dict[str, Json] = {
            name: {"licenses": cast(list[Json], self.teacher_licenses(name, by_set)), "rows": rows}
            for name, rows in sorted(self.teachers.items())
        }
        return {"prompt_sets": sets, "teachers": teachers}

    def teacher_licenses(self, teacher: str, license_of: Mapping[str, str]) -> list[str]:
        """The licences that all rows of a teacher share and that do not come from their prompts.

        When prompts and teacher are under the same licence nothing is left after taking the prompts' away, and the
        shared licences themselves are the answer.
        """
        of_rows = [(sets, set(names)) for (who, sets, names) in self.license_sets if who == teacher]
        shared = set.intersection(*(names for _, names in of_rows))
        from_prompts = {license_of.get(name, UNKNOWN) for sets, _ in of_rows for name in sets}
        return sorted(shared - from_prompts or shared) or [UNKNOWN]

    def metrics(self, sources: dict[str, Json]) -> dict[str, Json]:
        """The facts for the manifest."""
        return {
            "sources": sources,
            "licenses": cast(list[Json], sorted(self.licenses)),
            "splits": _counts(self.splits),
            "tasks": _counts(self.tasks),
            "completion_tokens": self.completion_tokens,
            "verified": self.verified,
        }


def _counts(counter: Counter[str]) -> dict[str, Json]:
    return {name: counter[name] for name in sorted(counter)}


def _is_used(column: pa.ChunkedArray, field: str) -> bool:
    """Whether a message in the column has a value in a field."""
    values = (pc.struct_field(chunk.flatten(), field) for chunk in column.chunks)
    return any(some.null_count < len(some) for some in values)
