"""What is intact in a damaged segment: rows that agree with their check sums, read from its pages without SQLite.

A page of a table that is whole gives its rows, whatever became of the header, of the other pages and of the tree that
joins them. Source of the layout: https://www.sqlite.org/fileformat2.html, sections 1.6, 2.1 and 4.1.
"""

import mmap
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipeline.core.errors import CorruptArtefact
from pipeline.teacher.segment import COLUMNS, PAGE_BYTES, Attempt, Stored, open_segment, stored_of, text_of

TABLE_LEAF: Final = 0x0D
FILE_HEADER_BYTES: Final = 100
"""In front of the first page."""
WAL_HEADER_BYTES: Final = 32
FRAME_HEADER_BYTES: Final = 24
"""In front of each page in a -wal: its number, the size of the database if this ends a transaction, two salts, sums."""
FRAME_BYTES: Final = FRAME_HEADER_BYTES + PAGE_BYTES
INTEGER_BYTES: Final = (0, 1, 2, 3, 4, 6, 8)
"""By serial type; 8 and 9 are the numbers 0 and 1 without any bytes."""

Value = bytes | str | int | None
Buffer = bytes | mmap.mmap


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
            if wal and db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1] < _committed_frames(wal):
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


def _committed_frames(wal: bytes) -> int:
    """Frames up to the last one that ends a transaction; SQLite stops before, and says nothing, at a damaged one."""
    salt = wal[16:24]  # frames with another are of an earlier round
    count = 0
    for number, at in enumerate(range(WAL_HEADER_BYTES, len(wal) - FRAME_BYTES + 1, FRAME_BYTES), 1):
        if wal[at + 8 : at + 16] == salt and wal[at + 4 : at + 8] != bytes(4):
            count = number
    return count


def _intact(path: Path, wal: bytes) -> Intact:
    answers: dict[Stored, None] = {}
    attempts: dict[int, Attempt] = {}
    with path.open("rb") as file, ExitStack() as stack:
        size = path.stat().st_size
        main = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size > 0 else b""
        for number, row in _rows(main, wal):
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
    match row:
        case [None, bytes(key), int(cap), int(sent_ms), str() | None as outcome] if len(key) == 32:
            return Attempt(number, key, cap, sent_ms, outcome)
    return None


def _rows(main: Buffer, wal: Buffer) -> Iterator[tuple[int, list[Value]]]:
    """(number, values) of every row on every page that can be read; in a -wal a row occurs as often as its page."""
    places: dict[int, tuple[Buffer, int]] = {
        start // PAGE_BYTES + 1: (main, start) for start in range(0, len(main), PAGE_BYTES)
    }
    leaves = [*places.values()]
    for frame in range(WAL_HEADER_BYTES, len(wal), FRAME_BYTES):
        place = (wal, frame + FRAME_HEADER_BYTES)
        places[int.from_bytes(wal[frame : frame + 4], "big")] = place
        leaves.append(place)
    for buffer, start in leaves:
        page = buffer[start : start + PAGE_BYTES]
        for cell in _cells(page, FILE_HEADER_BYTES if buffer is main and start == 0 else 0):
            with suppress(IndexError, ValueError, KeyError):
                yield _row(page, cell, places)


def _cells(page: bytes, header: int) -> list[int]:
    """Where the rows of a page begin; none if it is no leaf of a table."""
    if page[header : header + 1] != bytes([TABLE_LEAF]):
        return []
    count = int.from_bytes(page[header + 3 : header + 5], "big")
    pointers = page[header + 8 : header + 8 + 2 * count]
    return [int.from_bytes(pointers[at : at + 2], "big") for at in range(0, len(pointers) - 1, 2)]


def _row(page: bytes, at: int, places: dict[int, tuple[Buffer, int]]) -> tuple[int, list[Value]]:
    """A row's number and values; what does not fit on its page lies on others, each naming the next.

    Raises:
        IndexError, ValueError, KeyError: it is not whole.
    """
    size, at = _varint(page, at)
    if size > len(places) * PAGE_BYTES:
        raise ValueError("longer than the file")
    number, at = _varint(page, at)
    largest = PAGE_BYTES - 35
    smallest = (PAGE_BYTES - 12) * 32 // 255 - 23
    here = size
    if size > largest:
        here = smallest + (size - smallest) % (PAGE_BYTES - 4)
        here = here if here <= largest else smallest
    payload = bytearray(page[at : at + here])
    overflow = int.from_bytes(page[at + here : at + here + 4], "big") if size > here else 0
    while len(payload) < size:
        buffer, start = places[overflow]
        overflow = int.from_bytes(buffer[start : start + 4], "big")
        more = buffer[start + 4 : start + PAGE_BYTES]
        if not more:
            raise ValueError("the file ends within the row")
        payload += more
    return number, _values(bytes(payload[:size]))


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
