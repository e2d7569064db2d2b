"""All encoded rows, counted block by block: what was written to the token shards, whatever was meant to be."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.student.preflight.findings import SHOWN_ROWS
from pipeline.student.tokenise import IGNORED

Flags = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Flagged:
    """How many rows have a flaw, and the ids of the first of them."""

    count: int = 0
    rows: list[str] = field(default_factory=list)

    def add(self, flags: Flags, ids: pa.Array) -> None:
        """Count the rows of a block that are flagged."""
        self.count += int(flags.sum())
        wanted = SHOWN_ROWS - len(self.rows)
        self.rows += [str(ids[int(at)]) for at in np.flatnonzero(flags)[:wanted]]


@dataclass(slots=True)
class Survey:
    """Numbers about a file of encoded rows.

    Attributes:
        rows, tokens, trained: rows, their ids, and labels that count in the loss.
        longest: tokens of the longest row.
        without_stop: rows whose last label is no stop token.
        double_bos: rows that begin with two BOS tokens.
        unmasked: rows whose first token is trained: they have no prompt.
        holes: rows with a token that is not trained behind one that is.
        altered: rows with a label that is not the token at its place.
        largest, smallest: ids; 0 where there is no row.
        last: last label -> rows.
    """

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    without_stop: Flagged = field(default_factory=Flagged)
    double_bos: Flagged = field(default_factory=Flagged)
    unmasked: Flagged = field(default_factory=Flagged)
    holes: Flagged = field(default_factory=Flagged)
    altered: Flagged = field(default_factory=Flagged)
    largest: int = 0
    smallest: int = 0
    last: Counter[int] = field(default_factory=Counter)

    @property
    def trained_share(self) -> float:
        """Of the tokens."""
        return self.trained / self.tokens if self.tokens else 0.0


def survey(path: Path, stops: Sequence[int], bos: int | None) -> Survey:
    """Count the rows of a file that `shards.encode_shards` wrote; memory-mapped, one block after the other."""
    found = Survey()
    for batch in read_blocks(path):
        if batch.num_rows > 0:
            _count(found, batch, stops, bos)
    return found


def read_blocks(path: Path) -> Iterator[pa.RecordBatch]:
    """The blocks of a token shard."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def _count(found: Survey, batch: pa.RecordBatch, stops: Sequence[int], bos: int | None) -> None:
    row_ids, ids, labels = batch["row_id"], _flat(batch["input_ids"]), _flat(batch["labels"])
    ends = batch["input_ids"].offsets.to_numpy()
    starts, lasts = ends[:-1] - ends[0], ends[1:] - 1 - ends[0]
    lengths, trains = np.diff(ends), labels != IGNORED
    found.rows += batch.num_rows
    found.tokens += len(ids)
    found.trained += int(trains.sum())
    found.longest = max(found.longest, int(lengths.max()))
    found.largest, found.smallest = max(found.largest, int(ids.max())), min(found.smallest, int(ids.min()))
    found.last.update(labels[lasts].tolist())
    found.without_stop.add(~np.isin(labels[lasts], list(stops)), row_ids)
    found.unmasked.add(trains[starts], row_ids)
    second = np.minimum(starts + 1, lasts)
    if bos is not None:
        found.double_bos.add((ids[starts] == bos) & (ids[second] == bos) & (lengths > 1), row_ids)
    stops_training = np.zeros(len(ids), bool)
    stops_training[1:] = trains[:-1] & ~trains[1:]
    stops_training[starts] = False
    found.holes.add(np.logical_or.reduceat(stops_training, starts), row_ids)
    found.altered.add(np.logical_or.reduceat(trains & (labels != ids), starts), row_ids)


def _flat(lists: Any) -> npt.NDArray[np.int32]:
    """The values of a column of lists, one list behind the other."""
    values: npt.NDArray[np.int32] = lists.flatten().to_numpy(zero_copy_only=False)
    return values
