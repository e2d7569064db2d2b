"""Counting the rows of all results that came from a source, or are under its licence, by a few columns of them."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.columns import text_array
from pipeline.core.record import read_shard, shard_paths
from pipeline.runner.catalogue import Catalogue, Held
from pipeline.runner.meaning import Meanings, Meant
from pipeline.runner.rows import decides, opened

FOLDERS: Mapping[str, str] = {
    "prompts": "rows",
    "generate": "rows",
    "filter": "rows",
    "dedup": "rows",
    "dataset": "data",
    "evaluate": "answers",
}
"""Stage -> the folder of the rows that it keeps."""


@dataclass(frozen=True, slots=True)
class Touched:
    """Rows of one result that came from the source.

    Attributes:
        stage, key: of the result.
        path: its folder.
        runs: names of the runs that hold it; none: they went on to another.
        rows: touched rows that the result keeps.
        of: all rows that it keeps.
        through_duplicates: those of the touched rows that came from elsewhere themselves: an exact duplicate of them
            came from the source, so that its licence holds for them.
        removable: those of the touched rows that leave when the source is excluded: all but the rows of which a
            duplicate came from an excluded teacher.
    """

    stage: str
    key: str
    path: Path
    runs: tuple[str, ...]
    rows: int
    of: int
    through_duplicates: int
    removable: int

    @property
    def share(self) -> float:
        """Touched rows as a share of all."""
        return self.rows / self.of if self.of else 0.0


@dataclass(frozen=True, slots=True)
class _Counts:
    rows: int = 0
    touched: int = 0
    through_duplicates: int = 0
    removable: int = 0


def touched_results(catalogue: Catalogue, meanings: Meanings) -> Iterator[Touched]:
    """The results of all stages of rows that hold a touched row, in the order of the stages.

    Raises:
        CorruptArtefact: a shard cannot be read.
    """
    known: dict[tuple[str, str], tuple[Meant, _Counts]] = {}
    for stage in FOLDERS:
        for held in catalogue.of_stage(stage):
            meant = meanings.scope(held)
            if meant == Meant():
                continue
            same = _same_rows(catalogue, held)
            if same is not None and same.place in known and known[same.place][0] == meant:
                counts = known[same.place][1]
            else:
                counts = _count(held, meant, _merged_into(catalogue, held, meant))
            known[held.place] = meant, counts
            if counts.touched > 0:
                yield Touched(
                    stage=stage,
                    key=held.manifest.key,
                    path=held.path,
                    runs=held.runs,
                    rows=counts.touched,
                    of=counts.rows,
                    through_duplicates=counts.through_duplicates,
                    removable=counts.removable,
                )


def _same_rows(catalogue: Catalogue, held: Held) -> Held | None:
    """The result of `dedup` all of whose rows, and no others, are in a data set."""
    if held.manifest.stage != "dataset" or held.manifest.rejected:
        return None
    return catalogue.input_of(held, "dedup")


def _count(held: Held, meant: Meant, merged: frozenset[str]) -> _Counts:
    """Count the rows of a result.

    Args:
        merged: ids of rows of which a duplicate came from one of the teachers.
    """
    stage = held.manifest.stage
    tests = _tests(stage, meant, merged)
    paths = shard_paths(held.path / FOLDERS[stage])
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = [*pool.map(lambda path: _count_shard(path, tests, only_student=stage == "evaluate"), paths)]
    return _total(found)


def _total(found: Iterable[_Counts]) -> _Counts:
    rows = touched = through = removable = 0
    for each in found:
        rows, touched = rows + each.rows, touched + each.touched
        through, removable = through + each.through_duplicates, removable + each.removable
    return _Counts(rows, touched, through, removable)


@dataclass(frozen=True, slots=True)
class _Test:
    """A column that tells of the source.

    Attributes:
        leaf: its path in the file's schema.
        values: one of which a touched row has there.
        array: the same for Arrow, made once.
        is_own: the row itself came from the source, not only a duplicate of it.
        removes: excluding the source takes such a row out.
    """

    column: str
    leaf: str
    values: frozenset[str]
    array: pa.StringArray
    is_own: bool
    removes: bool


def _tests(stage: str, meant: Meant, merged: frozenset[str]) -> list[_Test]:
    teachers, sets, licenses = (frozenset(each) for each in (meant.teachers, meant.prompt_sets, meant.licenses))
    own_set = _test("prompt_set", sets, is_own=True, removes=True)
    if stage == "evaluate":
        return [own_set]
    tests = [
        own_set,
        _test("also_in", sets, is_own=False, removes=True),
        _test("license_set", licenses, is_own=False, removes=False),
        _test("row_id", merged, is_own=False, removes=False),
    ]
    if stage != "prompts":
        tests.append(_test("teacher", teachers, is_own=True, removes=True))
    return [test for test in tests if test.values]


def _test(column: str, values: frozenset[str], *, is_own: bool, removes: bool) -> _Test:
    leaf = f"{column}.list.element" if column in ("also_in", "license_set") else column
    return _Test(column, leaf, values, text_array(values), is_own, removes)


def _count_shard(path: Path, tests: Sequence[_Test], *, only_student: bool) -> _Counts:
    """Count the rows of a file.

    Args:
        only_student: of answers of three models the student's count.
    """
    with opened(path) as file:
        return _total(_count_group(file, group, tests, only_student) for group in range(file.num_row_groups))


def _count_group(file: pq.ParquetFile, group: int, tests: Sequence[_Test], only_student: bool) -> _Counts:
    """Count the rows of a row group; a column whose statistics decide for all rows is not read."""
    facts = file.metadata.row_group(group)
    decided = [(test, decides(facts, file.schema, test.leaf, test.values)) for test in tests]
    if not only_student and any(test.is_own and answer is True for test, answer in decided):
        return _Counts(facts.num_rows, facts.num_rows, 0, facts.num_rows)
    asked = [test.column for test, answer in decided if answer is None]
    table = file.read_row_group(group, columns=[*asked, *(["model"] if only_student else [])], use_threads=False)
    rows = facts.num_rows
    counted = pc.is_in(table["model"], value_set=text_array(["student"])) if only_student else _all(rows, value=True)
    own = touched = removable = _all(rows, value=False)
    for test, answer in decided:
        hits = _hits(table[test.column], test.array) if answer is None else _all(rows, value=answer)
        own = pc.or_(own, hits) if test.is_own else own
        removable = pc.or_(removable, hits) if test.removes else removable
        touched = pc.or_(touched, hits)
    own, touched, removable = (_true(pc.and_(each, counted)) for each in (own, touched, removable))
    return _Counts(_true(counted), touched, touched - own, removable)


def _all(rows: int, *, value: bool) -> pa.BooleanArray:
    nulls = pa.nulls(rows)
    return nulls.is_null() if value else nulls.is_valid()


def _hits(column: pa.ChunkedArray, values: pa.StringArray) -> pa.ChunkedArray:
    """Whether a column's text, or one of its list, is among some; for each row."""
    if not pa.types.is_list(column.type):
        return pc.is_in(column, value_set=values)
    return pa.chunked_array([_lists_with(chunk, values) for chunk in column.chunks], pa.bool_())


def _lists_with(lists: pa.ListArray, values: pa.StringArray) -> pa.BooleanArray:
    hits = pc.filter(pc.list_parent_indices(lists), pc.is_in(lists.flatten(), value_set=values))
    flags = np.zeros(len(lists), np.uint8)
    flags[hits.to_numpy()] = 1
    return pa.Array.from_buffers(pa.uint8(), len(lists), [None, pa.py_buffer(flags)]).cast(pa.bool_())


def _true(mask: pa.ChunkedArray | pa.BooleanArray) -> int:
    return int(mask.true_count if isinstance(mask, pa.BooleanArray) else sum(chunk.true_count for chunk in mask.chunks))


def _merged_into(catalogue: Catalogue, held: Held, meant: Meant) -> frozenset[str]:
    """Ids of the rows of `dedup`, or of the data set made of it, for which a row of one of the teachers left. Not where
    a licence is meant: it is in `license_set` of such a row."""
    stage = held.manifest.stage
    if stage not in ("dedup", "dataset") or not meant.teachers or meant.licenses:
        return frozenset()
    dedup = held if stage == "dedup" else catalogue.input_of(held, "dedup")
    found: set[str] = set()
    for path in () if dedup is None else shard_paths(dedup.path / "rejects"):
        table = read_shard(path, ["teacher", "reason"])
        reasons = table["reason"].filter(pc.is_in(table["teacher"], value_set=text_array(meant.teachers))).to_pylist()
        found.update(reason.removeprefix("duplicate_of:") for reason in reasons)
    return frozenset(found)
