"""Finding few rows in many shards: one column is read of everything, the others only where a row is."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import DISK_ERRORS, CorruptArtefact
from pipeline.core.store import REBUILD

Mask = Callable[[pa.Table], pa.ChunkedArray]
"""Takes a table of the searched columns and says for each row whether it is looked for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row lies.

    Attributes:
        file: the parquet file.
        row_group: number of its row group, from 0.
        row: number of the row in the file, from 0.
    """

    file: Path
    row_group: int
    row: int


@dataclass(frozen=True, slots=True)
class Match:
    """A row that was found: its place, and the row as a table of one."""

    place: Place
    table: pa.Table


def find_rows(folder: Path, searched: Collection[str], mask: Mask) -> Iterator[Match]:
    """The rows in a folder of shards for which `mask` is true, in their order.

    Args:
        searched: the columns that `mask` needs.

    Raises:
        CorruptArtefact: a shard is not readable parquet, or a page's checksum does not match.
    """
    for path in sorted(folder.glob("*.parquet")):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                yield from _in_file(file, path, searched, mask)
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            raise CorruptArtefact(f"unreadable parquet: {error}", where=str(path), todo=REBUILD) from error


def _in_file(file: pq.ParquetFile, path: Path, searched: Collection[str], mask: Mask) -> Iterator[Match]:
    start = 0
    for group in range(file.num_row_groups):
        names = file.read_row_group(group, columns=[*searched])
        hits = pc.indices_nonzero(mask(names)).to_pylist()
        table = file.read_row_group(group) if hits else None
        for hit in hits:
            assert table is not None
            yield Match(Place(path, group, start + hit), table.slice(hit, 1))
        start += names.num_rows


def has_id(names: Collection[str]) -> Mask:
    """Rows with one of these row ids."""
    wanted = pa.array(names, pa.string())
    return lambda table: pc.is_in(table["row_id"], value_set=wanted)


def begins_with(prefix: str) -> Mask:
    """Rows whose id begins so."""
    return lambda table: pc.starts_with(table["row_id"], prefix)


def is_prompt(prompt_set: str, prompt_id: str) -> Mask:
    """Rows of one prompt."""
    return lambda table: pc.and_(pc.equal(table["prompt_set"], prompt_set), pc.equal(table["prompt_id"], prompt_id))


def is_duplicate_of(row_id: str) -> Mask:
    """Rejected rows that left as duplicates of this one."""
    return lambda table: pc.equal(table["reason"], f"duplicate_of:{row_id}")
