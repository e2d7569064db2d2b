"""Finding few rows in many shards: one column is read, of row groups that may hold them; the others where a row is."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.columns import one_text
from pipeline.core.errors import DISK_ERRORS, CorruptArtefact
from pipeline.core.store import REBUILD

Mask = Callable[[pa.Table], pa.ChunkedArray]

AFTER_HEX = "g"
"""What stands behind all hex digits."""


@dataclass(frozen=True, slots=True)
class Sought:
    """Which rows are looked for.

    Attributes:
        columns: what `mask` needs.
        mask: takes a table of these columns and says for each row whether it is one.
        bounds: column of texts -> the least and the greatest value that such a row has: row groups whose statistics
            say that they have none of these are not read.
    """

    columns: tuple[str, ...]
    mask: Mask
    bounds: Mapping[str, tuple[str, str]] = field(default_factory=dict)


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


def find_rows(folder: Path, sought: Sought, near: float | None = None) -> Iterator[Match]:
    """The rows of a folder of shards that are looked for, in their order. Several files are read at once; who takes
    the first row and no more does not wait for the others.

    Args:
        near: where the row should be, as a share of the shards before it: those nearest to it are read first, so that
            a good guess saves time and a bad one costs none.

    Raises:
        CorruptArtefact: a shard is not readable parquet, or a page's checksum does not match.
    """
    paths = sorted(folder.glob("*.parquet"))
    if near is not None:
        nearest = sorted(range(len(paths)), key=lambda number: abs(number + 0.5 - near * len(paths)))
        paths = [paths[number] for number in nearest]
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        for found in pool.map(lambda path: _in_file(path, sought), paths):
            yield from found
    finally:
        pool.shutdown(cancel_futures=True)


def share_before(place: Place) -> float:
    """How far down its folder's shards a row is, from 0 to 1; where stages keep the order, it is about there in all."""
    paths = sorted(place.file.parent.glob("*.parquet"))
    return (paths.index(place.file) + 0.5) / len(paths)


def _in_file(path: Path, sought: Sought) -> list[Match]:
    with opened(path) as file:
        return [*_matches(file, path, sought)]


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A shard, open for the block.

    Raises:
        CorruptArtefact: it is not readable parquet, or the checksum of a page that is read does not match.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise CorruptArtefact(f"unreadable parquet: {error}", where=str(path), todo=REBUILD) from error


def decides(group: pq.RowGroupMetaData, schema: pq.ParquetSchema, leaf: str, values: Collection[str]) -> bool | None:
    """Whether all rows of a row group have one of some texts in a column, or none has; None: its statistics leave that
    open.

    Args:
        leaf: path of the column in the file's schema: `teacher`, `also_in.list.element`.
    """
    number = next((each for each in range(len(schema)) if schema.column(each).path == leaf), None)
    column = None if number is None else group.column(number)
    facts = None if column is None else column.statistics
    if facts is None or not facts.has_null_count:
        return None
    if facts.null_count == group.num_rows and facts.num_values == 0:
        return False
    if not facts.has_min_max:
        return None
    with suppress(UnicodeDecodeError):  # statistics that were cut in the middle of a character
        least, greatest = facts.min, facts.max
        if not any(least <= value <= greatest for value in values):
            return False
        if least == greatest and facts.null_count == 0:
            return True
    return None


def _matches(file: pq.ParquetFile, path: Path, sought: Sought) -> Iterator[Match]:
    start = 0
    leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    numbers = {name: leaves.index(name) for name in sought.bounds if name in leaves}
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        if all(_may_hold(facts.column(number), *sought.bounds[name]) for name, number in numbers.items()):
            searched = file.read_row_group(group, columns=[*sought.columns], use_threads=False)
            hits = pc.indices_nonzero(sought.mask(searched)).to_pylist()
            table = file.read_row_group(group, use_threads=False) if hits else None
            for hit in hits:
                assert table is not None
                yield Match(Place(path, group, start + hit), table.slice(hit, 1))
        start += facts.num_rows


def _may_hold(column: pq.ColumnChunkMetaData, least: str, greatest: str) -> bool:
    """Whether a column's statistics leave room for a value between two."""
    facts = column.statistics
    if facts is None or not facts.has_min_max:
        return True
    with suppress(UnicodeDecodeError):  # statistics that were cut in the middle of a character
        return bool(facts.min <= greatest and facts.max >= least)
    return True


def has_id(name: str) -> Sought:
    """The row of an id."""
    return Sought(("row_id",), _equals("row_id", name))


def has_id_of_prompt(name: str, prompt_set: str, prompt_id: str) -> Sought:
    """The row of an id in shards whose rows are in the order of their prompts."""
    bounds = {"prompt_set": (prompt_set, prompt_set), "prompt_id": (prompt_id, prompt_id)}
    return Sought(("row_id",), _equals("row_id", name), bounds)


def begins_with(prefix: str) -> Sought:
    """Rows whose id begins so."""
    bounds = {"row_id": (prefix, prefix + AFTER_HEX)}
    return Sought(("row_id",), lambda table: pc.starts_with(table["row_id"], prefix), bounds)


def is_prompt(prompt_set: str, prompt_id: str) -> Sought:
    """Rows of one prompt."""
    of_set, of_id = _equals("prompt_set", prompt_set), _equals("prompt_id", prompt_id)
    bounds = {"prompt_set": (prompt_set, prompt_set), "prompt_id": (prompt_id, prompt_id)}
    return Sought(("prompt_set", "prompt_id"), lambda table: pc.and_(of_set(table), of_id(table)), bounds)


def is_duplicate_of(row_id: str) -> Sought:
    """Rejected rows that left as duplicates of this one."""
    reason = f"duplicate_of:{row_id}"
    return Sought(("reason",), _equals("reason", reason), {"reason": (reason, reason)})


def _equals(column: str, value: str) -> Mask:
    wanted = one_text(value)
    return lambda table: pc.equal(table[column], wanted)
