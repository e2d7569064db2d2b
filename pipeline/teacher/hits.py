"""Which of many requests have a stored answer: a million are looked up in seconds, and no answer stays in memory.

Keys are compared column by column; only answers to wanted keys are read and parsed. The hit rule and the order of hits
are those of `ResponseStore.get_many`. Nothing is written, so a damaged segment is an error here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.teacher.responses import is_hit, outcome_of
from pipeline.teacher.segment import Stored, open_segment, read_answers, segment_paths
from pipeline.teacher.walk import Check, folded_errors, folded_files, never, readable
from pipeline.teacher.wanted import pick

KEY: Final = np.dtype("S32")
"""A request key. Keys are compared as arrays only: numpy drops the zeros at the end of a single one."""
FETCH_ROWS: Final = 65_536
"""Keys of a segment that are compared at a time."""
GROUPS: Final = 64
"""Row groups of a folded file whose keys are compared at a time."""
CONTESTED_ROWS: Final = 16_384
"""Requests with several stored answers that are told apart at a time: these answers are in memory."""

Keys = npt.NDArray[np.bytes_]


class Standing(IntFlag):
    """What is stored for a request, in the order of how much it is worth.

    `CUT`: nothing but answers that a smaller cap cut, so that it would be asked again. `AT_CAP`: an answer that stands,
    though it ended at its own cap: a further round (`generate.on_length`) may ask for it.
    """

    MISSING = 0
    CUT = 1
    REFUSED = 2
    AT_CAP = 4
    ANSWERED = 8


@dataclass(frozen=True, slots=True)
class Distinct:
    """Different request keys.

    Attributes:
        keys: sorted.
        rows: how many requests have each; they are asked once.
        first: position of the first of them among all requests.
    """

    keys: Keys
    rows: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]

    @classmethod
    def of(cls, packed: bytes | bytearray) -> "Distinct":
        """From the keys of all requests behind each other, 32 bytes each."""
        keys, first, rows = np.unique(np.frombuffer(packed, KEY), return_index=True, return_counts=True)
        return cls(keys, rows.astype(np.int64), first.astype(np.int64))

    def only(self, at: npt.NDArray[np.int64]) -> "Distinct":
        """Those at some places."""
        return Distinct(self.keys[at], self.rows[at], self.first[at])


def standings(
    folder: Path,
    wanted: Distinct,
    cap: int,
    room: int | None,
    check: Check = never,
    logprobs: LogprobsAsked | None = None,
) -> npt.NDArray[np.uint8]:
    """The `Standing` of each of the wanted keys, in their order.

    Args:
        folder: `data/responses`; it may be missing.
        cap, room, logprobs: as in `is_hit`.
        check: called now and then; what it raises ends the look-up.

    Raises:
        CorruptArtefact: a file is damaged.
        Incomplete: the disk fails, or a file disappears meanwhile.
    """
    found = np.zeros(len(wanted.keys), np.uint8)
    with readable(folder):
        for at, stored in _answers_to(folder, wanted.keys, check):
            found[at] |= _standing(stored, cap, room, logprobs)
        hits = found & ~np.uint8(Standing.CUT)
        contested = np.nonzero(hits & (hits - np.uint8(1)))[0]  # more than one bit
        for start in range(0, len(contested), CONTESTED_ROWS):
            some = contested[start : start + CONTESTED_ROWS]
            for at, stored in _stands(folder, wanted.keys[some], cap, room, check, logprobs):
                found[some[at]] = _standing(stored, cap, room, logprobs)
    return np.where(found > Standing.CUT, found & ~np.uint8(Standing.CUT), found)


def _standing(stored: Stored, cap: int, room: int | None, logprobs: LogprobsAsked | None) -> Standing:
    """What one stored answer is to a request."""
    outcome = outcome_of(stored, logprobs)
    if outcome is None:
        return Standing.MISSING
    if is_hit(stored, outcome, cap, room, logprobs=logprobs):
        if outcome.rejected is not None:
            return Standing.REFUSED
        return Standing.AT_CAP if outcome.is_cut else Standing.ANSWERED
    return Standing.MISSING if outcome.reply is None else Standing.CUT


def _stands(
    folder: Path, keys: Keys, cap: int, room: int | None, check: Check, logprobs: LogprobsAsked | None
) -> Iterator[tuple[int, Stored]]:
    """Of several hits to a key that differ, the one that stands."""
    answers: dict[int, list[Stored]] = {}
    for at, stored in _answers_to(folder, keys, check) if len(keys) > 0 else ():
        answers.setdefault(at, []).append(stored)
    for at, group in answers.items():
        hit = pick(group, cap, room, logprobs)
        if hit is not None:
            yield at, hit[0]


def _answers_to(folder: Path, keys: Keys, check: Check) -> Iterator[tuple[int, Stored]]:
    """Every stored answer to a wanted key, with its key's place; what is folded meanwhile is found in its new file."""
    for path in segment_paths(folder / "segments"):
        check()
        hit = [key for some in segment_keys(path) for key in (some[places(keys, some) >= 0]).tolist()]
        for stored in read_answers(path, [key.ljust(32, b"\0") for key in hit]):
            yield _place(keys, stored.key), stored
    for path in folded_files(folder):
        yield from _of_folded(path, keys, check)


def segment_keys(path: Path) -> Iterator[Keys]:
    """The keys of the answers in a segment, some at a time; one with several answers comes once."""
    with open_segment(path) as db:
        if db is None:
            return
        cursor = db.execute("SELECT DISTINCT key FROM answers ORDER BY key")
        while rows := cursor.fetchmany(FETCH_ROWS):
            yield np.array([row[0] for row in rows], KEY)


def _of_folded(path: Path, keys: Keys, check: Check) -> Iterator[tuple[int, Stored]]:
    with folded_errors(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group, at in _places_in(file, keys):
            check()
            rows = file.read_row_group(group, use_threads=False).filter(pa.array(at >= 0))
            for place, row in zip(at[at >= 0].tolist(), rows.to_pylist(), strict=True):
                yield place, Stored(**row)


def _places_in(file: pq.ParquetFile, keys: Keys) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each row group that holds a wanted key, with the place of each of its keys."""
    for start in range(0, file.num_row_groups, GROUPS):
        groups = range(start, min(start + GROUPS, file.num_row_groups))
        at = places(keys, key_column(file.read_row_groups([*groups], columns=["key"], use_threads=False)))
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in groups])
        for group, part in zip(groups, np.split(at, ends[:-1]), strict=True):
            if (part >= 0).any():
                yield group, part


def key_column(table: pa.Table) -> Keys:
    """The column `key` of a table, as a copy."""
    column = table["key"].combine_chunks()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [np.frombuffer(one.buffers()[1], KEY, len(one), one.offset * 32) for one in chunks if len(one) > 0]
    return np.concatenate(parts) if parts else np.empty(0, KEY)


def places(keys: Keys, others: Keys) -> npt.NDArray[np.int64]:
    """Where each of `others` is in the sorted `keys`; -1: nowhere."""
    if len(keys) == 0:
        return np.full(len(others), -1, np.int64)
    at = np.searchsorted(keys, others)
    at[at == len(keys)] = 0
    return np.where(keys[at] == others, at, -1)


def _place(keys: Keys, key: bytes) -> int:
    return int(np.searchsorted(keys, np.array([key], KEY))[0])
