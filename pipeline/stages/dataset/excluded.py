"""Rows of sources that the config takes out of the data set; each leaves with a reason."""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config import DatasetStep
from pipeline.core.record import RECORD_SCHEMA, ShardWriter, rejects_schema
from pipeline.core.stage import Json
from pipeline.terms.licenses import comparable

NONE: Final[frozenset[str]] = frozenset()
REJECTS = "rejects"
"""Folder of the rows that left, for `why`. It is no part of what ships."""


class Excluder:
    """Takes rows out whose teacher or prompt set is excluded, and writes them to `out/rejects/` with their reason.

    A row leaves for a prompt set also where a duplicate in that set was merged into it: its licences hold for it. It
    leaves for a teacher also where it is under a licence of that teacher's that is none of its own teacher's and
    prompts': a duplicate brought it along (from which teacher nobody noted, so that a row leaves although another one
    with the same licence wrote the duplicate).
    A context manager; where nothing is excluded, nothing is written.

    Args:
        prompt_sources: `sources.json` of the stage `prompts`.
        out: folder of the stage's result.
    """

    def __init__(self, cfg: DatasetStep, prompt_sources: Mapping[str, Mapping[str, Json]], out: Path) -> None:
        dataset = cfg.dataset
        self._teachers, self._sets = frozenset(dataset.exclude_teachers), frozenset(dataset.exclude_prompt_sets)
        self._by_teacher = {each.name: _plain(each.licenses) for each in cfg.declared if each.role == "teacher"}
        self._by_set = {name: _plain([str(facts.get("license"))]) for name, facts in prompt_sources.items()}
        acts = self._teachers or self._sets
        self._writer = ShardWriter(out / REJECTS, rejects_schema(RECORD_SCHEMA)) if acts else None
        self._stack = ExitStack()
        self.rejected: Counter[str] = Counter()

    def __enter__(self) -> "Excluder":
        if self._writer is not None:
            self._stack.enter_context(self._writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def stay(self, table: pa.Table) -> pa.Table:
        """The rows of a table of `RECORD_SCHEMA` that stay; the others are written and counted."""
        if self._writer is None:
            return table
        reasons = self._reasons(table)
        column = pa.array(reasons, pa.string())
        left = table.append_column(pa.field("reason", pa.string()), column).filter(pc.is_valid(column))
        self._writer.write(left)
        self.rejected.update(reason for reason in reasons if reason is not None)
        return table.filter(pc.is_null(column))

    def _reasons(self, table: pa.Table) -> list[str | None]:
        columns = (table[name].to_pylist() for name in ("teacher", "prompt_set", "also_in", "license_set"))
        return [self._reason(*row) for row in zip(*columns, strict=True)]

    def _reason(self, teacher: str, prompt_set: str, also_in: list[str], license_set: list[str]) -> str | None:
        if teacher in self._teachers:
            return f"excluded:teacher:{teacher}"
        sets = (prompt_set, *also_in)
        excluded = next((name for name in sets if name in self._sets), None)
        if excluded is not None:
            return f"excluded:prompt_set:{excluded}"
        brought = self._brought(teacher, sets, tuple(license_set)) if self._teachers else frozenset()
        source = next((name for name in sorted(self._teachers) if brought & self._by_teacher.get(name, NONE)), None)
        return None if source is None else f"excluded:teacher:{source}"

    def _brought(self, teacher: str, sets: Iterable[str], license_set: tuple[str, ...]) -> frozenset[str]:
        """The licences of a row that neither its teacher nor its prompts are under."""
        own = self._by_teacher.get(teacher, NONE).union(*(self._by_set.get(name, NONE) for name in sets))
        return _plain(license_set) - own


def _plain(names: Iterable[str]) -> frozenset[str]:
    return frozenset(map(comparable, names))
