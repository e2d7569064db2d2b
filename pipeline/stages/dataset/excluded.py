"""Rows of sources that the config takes out of the data set; each leaves with a reason."""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config import DatasetConfig
from pipeline.core.record import RECORD_SCHEMA, ShardWriter, rejects_schema

REJECTS = "rejects"
"""Folder of the rows that left, for `why`. It is no part of what ships."""


class Excluder:
    """Takes rows out whose teacher or prompt set is excluded, and writes them to `out/rejects/` with their reason.

    A row leaves for a prompt set also where a duplicate in that set was merged into it: its licences hold for it.
    A context manager; where nothing is excluded, nothing is written.
    """

    def __init__(self, cfg: DatasetConfig, out: Path) -> None:
        self._teachers, self._sets = frozenset(cfg.exclude_teachers), frozenset(cfg.exclude_prompt_sets)
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
        columns = (table[name].to_pylist() for name in ("teacher", "prompt_set", "also_in"))
        return [self._reason(*row) for row in zip(*columns, strict=True)]

    def _reason(self, teacher: str, prompt_set: str, also_in: list[str]) -> str | None:
        if teacher in self._teachers:
            return f"excluded:teacher:{teacher}"
        excluded = next((name for name in (prompt_set, *also_in) if name in self._sets), None)
        return None if excluded is None else f"excluded:prompt_set:{excluded}"
