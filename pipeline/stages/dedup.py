"""Stage `dedup`: of rows with equal prompt and completion one stays and remembers where the others came from."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.config import DedupConfig, DedupStep
from pipeline.core.record import RECORD_SCHEMA, STRINGS, count_rows, read_shard, read_shards, shard_paths
from pipeline.core.sink import RowSink
from pipeline.core.stage import Context, Json, Result, check_cancelled
from pipeline.text.conversation import Turn, calls_of, conversations
from pipeline.text.equals import Digests, Positions, digest_of, digests_of, first_of_equals, have_equals
from pipeline.text.normalise import normalise

VERSION = 2

ORIGIN_COLUMNS = ["row_id", "prompt_set", "also_in", "license_set"]

T = TypeVar("T")


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

    The first of a class stays, but a validation row before any training row: a text that were trained on and validated
    on at once would make the validation loss look better than it is, so here the training copy leaves.

    Three scans, so that what is held are some 50 bytes a row and the ids of the duplicates: digests of all rows,
    origins of the duplicated ones (the kept row may stand behind them), then the writing.
    """
    rows = inputs["filter"] / "rows"
    rows_in = count_rows(shard_paths(rows))
    ctx.progress.start(2 * rows_in, "rows")
    digested = ctx.fanout(functools.partial(digest_shard, cfg.dedup), shard_paths(rows))
    kept_at = find_kept(_counted(digested, ctx))
    origins = _collect_origins(_uncancelled(read_shards(rows, ORIGIN_COLUMNS), ctx), kept_at)
    start = 0
    with RowSink(out, RECORD_SCHEMA) as sink:
        for table in _uncancelled(read_shards(rows), ctx):
            reasons = _reasons(start, table.num_rows, kept_at, origins)
            sink.split(_with_origins(table, start, origins), reasons)
            start += table.num_rows
            ctx.progress.advance(table.num_rows, rejected=sum(reason is not None for reason in reasons))
    return sink.result(rows_in, {"classes_with_duplicates": len(origins)})


@dataclass(frozen=True, slots=True)
class Digested:
    """What is compared of a shard's rows.

    Attributes:
        digests: of prompt and completion, roles and reasoning included.
        ranks: of equal rows, one of the lowest rank stays; shape (rows,).
    """

    digests: Digests
    ranks: npt.NDArray[np.uint8]


def digest_shard(cfg: DedupConfig, path: Path) -> Digested:
    """Digest the rows of a file."""
    table = read_shard(path, ["prompt", "completion", "split", "tools"])
    pairs = zip(conversations(table["prompt"]), conversations(table["completion"]), _tools_of(table), strict=True)
    digests = (
        digest_of([_comparable(prompt, cfg.normalise), _comparable(completion, cfg.normalise), *tools])
        for prompt, completion, tools in pairs
    )
    ranks = [split != "validation" for split in table["split"].to_pylist()]
    return Digested(digests_of(b"".join(digests)), np.array(ranks, dtype=np.uint8))


def _tools_of(table: pa.Table) -> Iterator[list[Json]]:
    """What each row has to do with tools, to the letter: what it offers and what it calls; nothing for most rows."""
    columns = (table["tools"].to_pylist(), calls_of(table["prompt"]), calls_of(table["completion"]))
    for offered, *called in zip(*columns, strict=True):
        parts: list[Json] = [offered]
        for calls in called:
            parts.append([*calls])
        yield parts if offered is not None or any(called) else []


def _comparable(turns: Iterable[Turn], normalised: bool) -> Json:
    if not normalised:
        return [[*turn] for turn in turns]
    return [
        [role, normalise(content), None if reasoning is None else normalise(reasoning)]
        for role, content, reasoning in turns
    ]


def find_kept(shards: Iterable[Digested]) -> Positions:
    """For each row the position of the row that stays for it (its own, if it stays)."""
    found = [(shard.digests, shard.ranks) for shard in shards]
    if not found:
        return np.zeros(0, dtype=np.int64)
    digests, ranks = (np.concatenate(parts) for parts in zip(*found, strict=True))
    del found
    return first_of_equals(digests, ranks)


def _counted(shards: Iterable[Digested], ctx: Context) -> Iterator[Digested]:
    for shard in _uncancelled(shards, ctx):
        ctx.progress.advance(len(shard.ranks))
        yield shard


def _uncancelled(items: Iterable[T], ctx: Context) -> Iterator[T]:
    for item in items:
        check_cancelled(ctx)
        yield item


def _collect_origins(tables: Iterable[pa.Table], kept_at: Positions) -> dict[int, Origins]:
    """The origins of every class with duplicates, by the position of its kept row."""
    several = have_equals(kept_at)
    origins: dict[int, Origins] = {}
    start = 0
    for table in tables:
        at = np.flatnonzero(several[start : start + table.num_rows])
        columns = [table[name].take(at).to_pylist() for name in ORIGIN_COLUMNS]
        for position, row_id, prompt_set, also_in, licenses in zip((start + at).tolist(), *columns, strict=True):
            found = origins.setdefault(int(kept_at[position]), Origins())
            found.sets.update((prompt_set, *also_in))
            found.licenses.update(licenses)
            if kept_at[position] == position:
                found.kept_id, found.kept_set = row_id, prompt_set
        start += table.num_rows
    return origins


def _reasons(start: int, count: int, kept_at: Positions, origins: Mapping[int, Origins]) -> list[str | None]:
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
