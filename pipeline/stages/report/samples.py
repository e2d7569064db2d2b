"""Which rows the report shows, and the story of each: the stages it passed and where it left, and why.

The choice depends on row ids and reasons alone: rows are ranked by the sha256 of their id, so that a report of the same
rows shows the same ones, and nobody picks the pretty ones.
"""

import hashlib
import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.record import RECORD_SCHEMA, Record, records_of
from pipeline.core.sink import counted_reason
from pipeline.stages.report.artefacts import Artefacts

REJECTING = ("generate", "filter", "dedup", "dataset", "train")
"""Stages that a row can leave at, in order."""

PASSED = ("prompts", "generate", "filter", "dedup", "dataset")
"""Stages behind a kept row."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row to show.

    Attributes:
        row: the row as the last stage that held it in full wrote it.
        left_at: the stage it left at, or None if it is in the data set.
        reason: why it left; None if it did not.
    """

    row: Record
    left_at: str | None
    reason: str | None

    @property
    def passed(self) -> tuple[str, ...]:
        """The stages that the row passed, in order."""
        order = (*PASSED, "train")
        return PASSED if self.left_at is None else order[: order.index(self.left_at)]

    @property
    def counted_reason(self) -> str | None:
        """The reason under which the row was counted."""
        return None if self.reason is None else counted_reason(self.reason)


@dataclass(frozen=True, slots=True)
class Choice:
    """The ids to show: of kept rows in order, and of rejected rows with stage and reason in order."""

    kept: tuple[str, ...]
    rejected: tuple[tuple[str, str, str], ...]


def read_samples(artefacts: Artefacts, wanted: int) -> tuple[Sample, ...]:
    """Choose `wanted` rows (fewer if there are fewer) and read them.

    Half are kept rows, half rejected ones spread over the reasons; when one half has too few rows the other fills up.
    """
    choice = choose(_kept_ids(artefacts), _rejected_ids(artefacts), wanted)
    rows = _kept_rows(artefacts, {*choice.kept, *(name for name, stage, _ in choice.rejected if stage == "train")})
    samples = [Sample(rows[name], None, None) for name in choice.kept if name in rows]
    for stage in REJECTING:
        ids = {name: reason for name, at, reason in choice.rejected if at == stage}
        found = rows if stage == "train" else _rejected_rows(artefacts, stage, ids)
        samples += [Sample(found[name], stage, reason) for name, reason in ids.items() if name in found]
    return tuple(samples)


# ------------------------------------------------------------------------------------------------------ choose


def rank(name: str) -> str:
    """The place of a row in the order of choice: the sha256 of its id."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def choose(kept: Iterable[str], rejected: Iterable[tuple[str, str, str]], wanted: int) -> Choice:
    """Choose ids; memory is bounded by `wanted` times the number of reasons.

    Args:
        kept: ids of the rows in the data set.
        rejected: (id, stage, reason) of rejected rows.
        wanted: how many ids to choose.
    """
    best_kept = heapq.nsmallest(wanted, kept, key=rank)
    spread = _round_robin(_best_by_reason(rejected, wanted))
    half = wanted // 2
    take_rejected = min(len(spread), max(half, wanted - len(best_kept)))
    take_kept = min(len(best_kept), wanted - take_rejected)
    return Choice(tuple(best_kept[:take_kept]), tuple(spread[:take_rejected]))


Rejected = tuple[str, str, str]


def _best_by_reason(rejected: Iterable[Rejected], wanted: int) -> Mapping[tuple[int, str], list[Rejected]]:
    """The first `wanted` rejected rows of each (stage, counted reason), in the order of their rank."""
    best: dict[tuple[int, str], list[Rejected]] = {}
    for item in rejected:
        _, stage, reason = item
        group = best.setdefault((REJECTING.index(stage), counted_reason(reason)), [])
        group.append(item)
        if len(group) > 2 * wanted + 64:
            group[:] = heapq.nsmallest(wanted, group, key=_rank_of)
    return {key: heapq.nsmallest(wanted, best[key], key=_rank_of) for key in sorted(best)}


def _rank_of(item: Rejected) -> str:
    return rank(item[0])


def _round_robin(groups: Mapping[tuple[int, str], list[Rejected]]) -> list[Rejected]:
    """The first of every group, then the second of every group, and so on."""
    longest = max((len(group) for group in groups.values()), default=0)
    return [group[turn] for turn in range(longest) for group in groups.values() if turn < len(group)]


# -------------------------------------------------------------------------------------------------------- read


def _kept_ids(artefacts: Artefacts) -> Iterator[str]:
    for table in artefacts.shards("dataset", "data", ["row_id"]):
        yield from table["row_id"].to_pylist()


def _rejected_ids(artefacts: Artefacts) -> Iterator[Rejected]:
    for stage in REJECTING:
        for table in artefacts.shards(stage, "rejects", ["row_id", "reason"]):
            for name, reason in zip(table["row_id"].to_pylist(), table["reason"].to_pylist(), strict=True):
                yield name, stage, reason


def _kept_rows(artefacts: Artefacts, names: Collection[str]) -> dict[str, Record]:
    """The rows with these ids as `dedup` kept them: `dataset` ships a part of their columns."""
    return _pick(artefacts.shards("dedup", "rows"), names)


def _rejected_rows(artefacts: Artefacts, stage: str, names: Collection[str]) -> dict[str, Record]:
    return _pick(artefacts.shards(stage, "rejects"), names)


def _pick(tables: Iterable[pa.Table], names: Collection[str]) -> dict[str, Record]:
    """The rows with these ids; shards are read until all are found."""
    if not names:
        return {}
    wanted = pa.array(sorted(names), pa.string())
    found: dict[str, Record] = {}
    for table in tables:
        picked = table.filter(pc.is_in(table["row_id"], wanted)).select(RECORD_SCHEMA.names)
        found.update((record.row_id, record) for record in records_of(picked))
        if len(found) == len(names):
            break
    return found
