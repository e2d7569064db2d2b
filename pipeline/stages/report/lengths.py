"""Lengths of completions, kept and rejected, gathered shard by shard as counts per length."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.stages.report.artefacts import Artefacts
from pipeline.stages.report.charts import nice_step

BINS = 32
"""About how many bins a histogram has."""

SHOWN_SHARE = 0.995
"""The axis ends where this share of all rows is covered; longer rows fall into the last, open bin."""

Unit = Literal["tokens", "characters"]

REJECTING = ("generate", "filter", "dedup")
"""Stages whose rejected rows hold a completion and did not reach the data set."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many rows have which length; `unmeasured` rows were rejected without a completion or a token count."""

    unit: Unit
    kept: Mapping[int, int]
    rejected: Mapping[int, int]
    unmeasured: int


@dataclass(frozen=True, slots=True)
class Bins:
    """Equally wide bins over both groups; `open_end`: the last one holds everything beyond its lower edge."""

    edges: tuple[int, ...]
    kept: tuple[int, ...]
    rejected: tuple[int, ...]
    open_end: bool


def read_lengths(artefacts: Artefacts) -> Lengths:
    """Completion lengths in the teacher's tokens, or in characters if it did not count the tokens of a kept row."""
    kept, uncounted = _tokens(artefacts.shards("dataset", "data", ["completion_tokens"]))
    if uncounted > 0:
        kept, _ = _characters(artefacts.shards("dataset", "data", ["completion"]))
        rejected, unmeasured = _characters(_rejected(artefacts, "completion"))
        return Lengths("characters", kept, rejected, unmeasured)
    rejected, unmeasured = _tokens(_rejected(artefacts, "completion_tokens"))
    return Lengths("tokens", kept, rejected, unmeasured)


def _rejected(artefacts: Artefacts, column: str) -> Iterable[pa.Table]:
    for kind in REJECTING:
        yield from artefacts.shards(kind, "rejects", [column])


def _tokens(tables: Iterable[pa.Table]) -> tuple[Counter[int], int]:
    """Rows per token count, and rows without one."""
    found: Counter[int] = Counter()
    missing = 0
    for table in tables:
        missing += table["completion_tokens"].null_count
        _tally(found, pc.drop_null(table["completion_tokens"]))
    return found, missing


def _characters(tables: Iterable[pa.Table]) -> tuple[Counter[int], int]:
    """Rows per number of characters over a completion's messages, and rows without any message."""
    found: Counter[int] = Counter()
    missing = 0
    for table in tables:
        column = table["completion"].combine_chunks()
        parents = pc.list_parent_indices(column)
        texts = pc.struct_field(pc.list_flatten(column), "content")
        sums = (
            pa.table({"row": parents, "length": pc.utf8_length(texts)}).group_by("row").aggregate([("length", "sum")])
        )
        missing += table.num_rows - sums.num_rows
        _tally(found, sums["length_sum"])
    return found, missing


def _tally(found: Counter[int], values: pa.ChunkedArray) -> None:
    for item in pc.value_counts(values).to_pylist():
        found[item["values"]] += item["counts"]


def bin_lengths(lengths: Lengths) -> Bins | None:
    """Bins for a histogram of both groups, or None where no row has a length."""
    both = Counter(lengths.kept) + Counter(lengths.rejected)
    if not both:
        return None
    covered, longest = _quantile(both, SHOWN_SHARE), max(both)
    width = max(1, int(nice_step((covered + 1) / BINS)))
    bins = covered // width + 1
    open_end = longest >= bins * width
    edges = tuple(index * width for index in range(bins + open_end + 1))
    counts = [_binned(group, width, bins + open_end) for group in (lengths.kept, lengths.rejected)]
    return Bins(edges, counts[0], counts[1], open_end)


def _quantile(counts: Mapping[int, int], share: float) -> int:
    """The smallest length that at least `share` of the rows do not exceed."""
    need, seen = share * sum(counts.values()), 0
    for length in sorted(counts):
        seen += counts[length]
        if seen >= need:
            return length
    return max(counts)


def _binned(group: Mapping[int, int], width: int, bins: int) -> tuple[int, ...]:
    found = [0] * bins
    for length, number in group.items():
        found[min(length // width, bins - 1)] += number
    return tuple(found)


def median(counts: Mapping[int, int]) -> int | None:
    """The median length (the lower one of two), or None without rows."""
    return _quantile(counts, 0.5) if counts else None
