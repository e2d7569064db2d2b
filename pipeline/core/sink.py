"""Where a stage of rows puts what it keeps and what it rejects; counts both, so that no row can leave unseen."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.lineage import digest_json
from pipeline.core.record import Prompt, Record, ShardWriter, rejects_schema, to_table
from pipeline.core.stage import Json, Result


class RowSink:
    """Writes kept rows to `out/rows/` and rejected rows with their `reason` to `out/rejects/`.

    A context manager; call `result` after the block.
    """

    def __init__(self, out: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._kept = ShardWriter(out / "rows", schema)
        self._rejected = ShardWriter(out / "rejects", rejects_schema(schema))
        self._reasons: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> "RowSink":
        self._stack.enter_context(self._kept)
        self._stack.enter_context(self._rejected)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def keep(self, rows: Sequence[Prompt] | Sequence[Record] | pa.Table) -> None:
        """Keep rows, in this order."""
        table = rows if isinstance(rows, pa.Table) else to_table(self._schema, rows)
        self._kept.write(table)

    def reject(self, rows: Sequence[Prompt] | Sequence[Record] | pa.Table, reasons: Sequence[str]) -> None:
        """Reject rows, each with its reason; a reason's part after the first `:` is detail and not counted apart."""
        if isinstance(rows, pa.Table):
            column = pa.array(reasons, pa.string())
            table = rows.append_column(pa.field("reason", pa.string(), nullable=False), column)
        else:
            table = to_table(rejects_schema(self._schema), rows, reasons)
        self._reasons.update(counted_reason(reason) for reason in reasons)
        self._rejected.write(table)

    def split(self, table: pa.Table, reasons: Sequence[str | None]) -> None:
        """Keep the rows whose reason is None and reject the others."""
        column = pa.array(reasons, pa.string())
        self.keep(table.filter(pc.is_null(column)))
        self.reject(table.filter(pc.is_valid(column)), [reason for reason in reasons if reason is not None])

    def result(self, rows_in: int, metrics: Mapping[str, Json] | None = None) -> Result:
        """The stage's result; its content covers kept and rejected rows, both in order."""
        kept, rejected = self._kept.written(), self._rejected.written()
        return Result(
            rows_in=rows_in,
            rows_out=kept.rows,
            rejected=dict(sorted(self._reasons.items())),
            content=digest_json({"rows": kept.content, "rejects": rejected.content}),
            metrics=metrics or {},
        )


def counted_reason(reason: str) -> str:
    """The reason under which a row is counted: `duplicate_of:<row_id>` counts as `duplicate_of`, but a finish reason
    or an error class (`finish_reason:length`) counts with its detail, since there are few of them."""
    head, _, _ = reason.partition(":")
    return head if head == "duplicate_of" else reason
