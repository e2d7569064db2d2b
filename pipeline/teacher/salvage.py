"""What is intact in a damaged segment: rows that agree with their check sums, read from its pages without SQLite.

A page of a table that is whole gives its rows, whatever became of the header, of the other pages and of the tree that
joins them. Source of the layout: https://www.sqlite.org/fileformat2.html, sections 1.6, 2.1 and 4.1.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.core.errors import CorruptArtefact
from pipeline.teacher.segment import (
    ATTEMPT_COLUMNS,
    COLUMNS,
    OLD_ATTEMPT_COLUMNS,
    PAGE_BYTES,
    Attempt,
    Stored,
    open_segment,
    stored_of,
    text_of,
)
from pipeline.teacher.wal import FRAME_BYTES, FRAME_HEADER_BYTES, WAL_HEADER_BYTES, committed_frames, is_torn

TABLE_LEAF: Final = 0x0D
MOST_PAGES: Final = 2**32 - 2
INTEGER_BYTES: Final = (0, 1, 2, 3, 4, 6, 8)
"""By serial type; 8 and 9 are the numbers 0 and 1 without any bytes."""

Value = bytes | str | int | None


@dataclass(frozen=True, slots=True)
class Intact:
    """What is intact in a damaged segment: answers and attempts, each sorted by key."""

    answers: list[Stored]
    attempts: list[Attempt]


def salvage(path: Path) -> Intact | None:
    """What is intact in a segment whose writer is gone; None if all of it is as it was written.

    Attempts have no check sums: those are taken that look like one. Not covered: a transaction that was cut off may
    count, since what was received was received.

    Raises:
        Incomplete: the disk fails.
    """
    wal_path = path.with_name(path.name + "-wal")
    wal = wal_path.read_bytes() if wal_path.exists() else b""  # SQLite removes it, with what it does not understand
    if _is_sound(path, wal):
        return None
    if wal and not wal_path.exists():
        wal_path.write_bytes(wal)
    intact = _intact(path, wal)
    is_empty = not intact.answers and not intact.attempts
    return None if is_empty and _lacks_tables(path) else intact


def _is_sound(path: Path, wal: bytes) -> bool:
    if path.stat().st_size == 0:
        return not wal
    try:
        with open_segment(path) as db:
            if db is None:
                return False  # its writer died early, or the list of tables is damaged
            read = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1] if wal else 0
            if read < committed_frames(wal) and not is_torn(wal):
                return False
            (told,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            for row in db.execute(f"SELECT {COLUMNS} FROM answers"):
                stored_of(row)
            return bool(told == "ok")
    except CorruptArtefact:
        return False


def _lacks_tables(path: Path) -> bool:
    try:
        with open_segment(path) as db:
            return db is None
    except CorruptArtefact:
        return False


def _intact(path: Path, wal: bytes) -> Intact:
    answers: dict[Stored, None] = {}
    attempts: dict[int, Attempt] = {}
    with path.open("rb") as file:
        for number, row in Pages(file.fileno(), wal).rows():
            answer, attempt = _answer(row), _attempt(number, row)
            if answer is not None:
                answers[answer] = None
            if attempt is not None and (number not in attempts or attempts[number].outcome is None):
                attempts[number] = attempt
    return Intact(
        sorted(answers, key=lambda answer: (answer.key, answer.stored_ms)),
        sorted(attempts.values(), key=lambda attempt: (attempt.key, attempt.id)),
    )


def _answer(row: Sequence[Value]) -> Stored | None:
    if len(row) != len(COLUMNS.split(",")):
        return None
    try:
        return stored_of(row)
    except sqlite3.DatabaseError:
        return None


def _attempt(number: int, row: Sequence[Value]) -> Attempt | None:
    if len(row) not in (len(OLD_ATTEMPT_COLUMNS), len(ATTEMPT_COLUMNS)):
        return None
    match row[0], row[1:]:
        case None, [bytes(key), int(cap), int(sent_ms), str() | None as outcome, *rest] if len(key) == 32:
            texts = {"run", "teacher", "request_id"}
            facts = dict(zip(ATTEMPT_COLUMNS[len(OLD_ATTEMPT_COLUMNS) :], rest, strict=False))
            if all(isinstance(fact, (str if name in texts else int) | None) for name, fact in facts.items()):
                given: dict[str, Any] = facts
                return Attempt(number, key, cap, sent_ms, outcome, **given)
    return None


class Pages:
    """The pages of a segment and of its -wal.

    Args:
        main: descriptor of the file. Not mapped: a sector that cannot be read would kill the process.
        wal: content of its -wal.
    """

    def __init__(self, main: int, wal: bytes) -> None:
        self._main, self._wal = main, wal
        self._count = -(-os.fstat(main).st_size // PAGE_BYTES)
        self._frames = {
            int.from_bytes(wal[at : at + 4], "big"): at for at in range(WAL_HEADER_BYTES, len(wal), FRAME_BYTES)
        }

    def rows(self) -> Iterator[tuple[int, list[Value]]]:
        """(number, values) of every row that is whole, from every page; in a -wal it occurs as often as its page.

        Raises:
            OSError: the disk fails.
        """
        for page in self._all():
            for cell in _cells(page):
                with suppress(IndexError, ValueError):
                    yield self._row(page, cell)

    def _all(self) -> Iterator[bytes]:
        yield from map(self._of_main, range(1, self._count + 1))
        yield from map(self._of_wal, range(WAL_HEADER_BYTES, len(self._wal), FRAME_BYTES))

    def _of_main(self, number: int) -> bytes:
        return os.pread(self._main, PAGE_BYTES, (number - 1) * PAGE_BYTES)

    def _of_wal(self, frame: int) -> bytes:
        return self._wal[frame + FRAME_HEADER_BYTES : frame + FRAME_BYTES]

    def _row(self, page: bytes, at: int) -> tuple[int, list[Value]]:
        """A row's number and values; what does not fit on its page lies on others, each naming the next.

        Raises:
            IndexError, ValueError: it is not whole.
        """
        size, at = _varint(page, at)
        number, at = _varint(page, at)
        if size > (self._count + len(self._frames)) * PAGE_BYTES:
            raise ValueError("longer than the file")
        here = _size_on_page(size)
        payload = bytearray(page[at : at + here])
        overflow = int.from_bytes(page[at + here : at + here + 4], "big")
        while len(payload) < size:
            if not 0 < overflow <= MOST_PAGES:
                raise ValueError("no such page")
            more = self._of_wal(self._frames[overflow]) if overflow in self._frames else self._of_main(overflow)
            if len(more) <= 4:
                raise ValueError("the file ends within the row")
            overflow = int.from_bytes(more[:4], "big")
            payload += more[4:]
        return number, _values(bytes(payload[:size]))


def _cells(page: bytes) -> list[int]:
    """Where the rows of a page begin; none if it is no leaf of a table. (The first page holds none of our tables.)"""
    if page[:1] != bytes([TABLE_LEAF]):
        return []
    count = int.from_bytes(page[3:5], "big")
    pointers = page[8 : 8 + 2 * count]
    return [int.from_bytes(pointers[at : at + 2], "big") for at in range(0, len(pointers) - 1, 2)]


def _size_on_page(size: int) -> int:
    """Of a row's bytes those that lie on its own page."""
    largest, smallest = PAGE_BYTES - 35, (PAGE_BYTES - 12) * 32 // 255 - 23
    if size <= largest:
        return size
    here = smallest + (size - smallest) % (PAGE_BYTES - 4)
    return here if here <= largest else smallest


def _values(payload: bytes) -> list[Value]:
    """The values of a row: a list of types, then their bytes."""
    start, at = _varint(payload, 0)
    end = start
    values: list[Value] = []
    while at < end:
        kind, at = _varint(payload, at)
        size = INTEGER_BYTES[kind] if kind < 7 else max(0, (kind - 12) // 2)
        raw = payload[start : start + size]
        start += size
        if kind >= 12:
            values.append(text_of(raw) if kind % 2 else raw)
        elif kind in (8, 9):
            values.append(kind - 8)
        else:
            values.append(int.from_bytes(raw, "big", signed=True) if kind else None)
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 1 to 9 bytes, and where it ends."""
    number = 0
    for length in range(8):
        byte = data[at + length]
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            return number, at + length + 1
    return number << 8 | data[at + 8], at + 9
