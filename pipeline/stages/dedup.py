"""Stage `dedup`: of rows with equal prompt and completion one stays and remembers where the others came from."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.config import DedupStep
from pipeline.core.lineage import canonical_json
from pipeline.core.record import RECORD_SCHEMA, STRINGS, count_rows, read_shards
from pipeline.core.sink import RowSink
from pipeline.core.stage import Context, Json, Result, check_cancelled
from pipeline.text.conversation import Turn, conversations
from pipeline.text.normalise import normalise

VERSION = 1

ORIGIN_COLUMNS = ["row_id", "prompt_set", "also_in", "license_set"]


def input_files(cfg: DedupStep) -> dict[str, Path]:
    """None."""
    return {}


@dataclass(slots=True)
class Origins:
    """Where the rows of one class of duplicates came from, together."""

    kept_id: str = ""
    kept_set: str = ""
    sets: set[str] = field(default_factory=set)
    licenses: set[str] = field(default_factory=set)

    @property
    def also_in(self) -> list[str]:
        """The prompt sets besides the kept row's own."""
        return sorted(self.sets - {self.kept_set})


def run(cfg: DedupStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Remove exact duplicates from the rows of `filter`; the rest keeps its order.

    Three scans, so that what is held are some 50 bytes a row and the ids of the duplicates: digests of all rows,
    origins of the duplicated ones (the kept row may stand behind them), then the writing.
    """
    rows = inputs["filter"] / "rows"
    rows_in = count_rows(rows.glob("*.parquet"))
    ctx.progress.start(rows_in, "rows")
    kept_at = find_kept(read_shards(rows, ["prompt", "completion", "split"]), normalised=cfg.dedup.normalise)
    origins = _collect_origins(read_shards(rows, ORIGIN_COLUMNS), kept_at)
    start = 0
    with RowSink(out, RECORD_SCHEMA) as sink:
        for table in read_shards(rows):
            check_cancelled(ctx)
            reasons = _reasons(start, table.num_rows, kept_at, origins)
            sink.split(_with_origins(table, start, origins), reasons)
            start += table.num_rows
            ctx.progress.advance(table.num_rows, rejected=sum(reason is not None for reason in reasons))
    return sink.result(rows_in, {"classes_with_duplicates": len(origins)})


def find_kept(tables: Iterable[pa.Table], *, normalised: bool) -> npt.NDArray[np.int64]:
    """For each row the position of the row that stays for it (its own, if it stays).

    The first of a class stays, but a validation row before any training row: a text that were trained on and validated
    on at once would make the validation loss look better than it is, so here the training copy leaves.
    """
    digests, ranks = [], []
    for table in tables:
        digests.append(np.frombuffer(b"".join(_digests(table, normalised=normalised)), dtype="<u8").reshape(-1, 2))
        ranks.append(np.array([split != "validation" for split in table["split"].to_pylist()], dtype=bool))
    if not digests:
        return np.zeros(0, dtype=np.int64)
    whole, rank = np.concatenate(digests), np.concatenate(ranks)
    order = np.lexsort((np.arange(len(whole)), rank, whole[:, 1], whole[:, 0]))
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (whole[order[1:]] != whole[order[:-1]]).any(axis=1)
    kept_at = np.empty(len(order), dtype=np.int64)
    kept_at[order] = order[begins][np.cumsum(begins) - 1]
    return kept_at


def _digests(table: pa.Table, *, normalised: bool) -> Iterable[bytes]:
    """16 bytes a row over prompt and completion, roles and reasoning included."""
    for prompt, completion in zip(conversations(table["prompt"]), conversations(table["completion"]), strict=True):
        value: list[Json] = [_comparable(prompt, normalised), _comparable(completion, normalised)]
        yield hashlib.blake2b(canonical_json(value), digest_size=16).digest()


def _comparable(turns: Iterable[Turn], normalised: bool) -> Json:
    if not normalised:
        return [[*turn] for turn in turns]
    return [
        [role, normalise(content), None if reasoning is None else normalise(reasoning)]
        for role, content, reasoning in turns
    ]


def _collect_origins(tables: Iterable[pa.Table], kept_at: npt.NDArray[np.int64]) -> dict[int, Origins]:
    """The origins of every class with duplicates, by the position of its kept row."""
    duplicated = set(kept_at[kept_at != np.arange(len(kept_at))].tolist())
    origins = {position: Origins() for position in duplicated}
    start = 0
    for table in tables:
        columns = [table[name].to_pylist() for name in ORIGIN_COLUMNS]
        for position, (row_id, prompt_set, also_in, licenses) in enumerate(zip(*columns, strict=True), start):
            found = origins.get(int(kept_at[position]))
            if found is None:
                continue
            found.sets.update((prompt_set, *also_in))
            found.licenses.update(licenses)
            if kept_at[position] == position:
                found.kept_id, found.kept_set = row_id, prompt_set
        start += table.num_rows
    return origins


def _reasons(
    start: int, count: int, kept_at: npt.NDArray[np.int64], origins: Mapping[int, Origins]
) -> list[str | None]:
    kept = kept_at[start : start + count].tolist()
    return [None if at == start + offset else f"duplicate_of:{origins[at].kept_id}" for offset, at in enumerate(kept)]


def _with_origins(table: pa.Table, start: int, origins: Mapping[int, Origins]) -> pa.Table:
    """The table with `also_in` and `license_set` of its kept rows joined."""
    joined = {row: origins[start + row] for row in range(table.num_rows) if start + row in origins}
    if not joined:
        return table
    also_in, licenses = table["also_in"].to_pylist(), table["license_set"].to_pylist()
    for row, found in joined.items():
        also_in[row], licenses[row] = found.also_in, sorted(found.licenses)
    for name, values in (("also_in", also_in), ("license_set", licenses)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, STRINGS))
    return table
