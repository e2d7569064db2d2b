"""The write-ahead log of a segment, read without SQLite: what was committed, and how much of it can be read.

Source of the layout: https://www.sqlite.org/fileformat2.html, sections 4.1 and 4.2.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pipeline.teacher.segment import PAGE_BYTES

WAL_HEADER_BYTES: Final = 32
FRAME_HEADER_BYTES: Final = 24
"""In front of each page in a -wal: its number, the size of the database if this ends a transaction, two salts, sums."""
FRAME_BYTES: Final = FRAME_HEADER_BYTES + PAGE_BYTES
WAL_ORDERS: Final = {bytes.fromhex("377f0682"): "<", bytes.fromhex("377f0683"): ">"}
"""How a -wal begins, and the byte order of the words that its sums add up."""
WAL_VERSION: Final = (3007000).to_bytes(4, "big")
WORD: Final = 2**32

Sums = tuple[int, int]


def committed_frames(wal: bytes) -> int:
    """Frames up to the last one that ends a transaction; SQLite stops before, and says nothing, at a damaged one."""
    count = 0
    for number, at in enumerate(_whole_frames(wal), 1):
        # Frames of an earlier round share neither salt with the header; one bit flip leaves one of the two.
        is_ours = wal[at + 8 : at + 12] == wal[16:20] or wal[at + 12 : at + 16] == wal[20:24]
        if is_ours and wal[at + 4 : at + 8] != bytes(4):
            count = number
    return count


def readable_frames(wal: bytes) -> int:
    """Of the committed frames those that SQLite reads: up to the first whose sums, which cover all before it too, do
    not match."""
    count = 0
    for frame in _frames(wal):
        if not frame.is_whole:
            break
        if frame.commits:
            count = frame.number
    return count


def is_torn(wal: bytes) -> bool:
    """Whether all that cannot be read is the last transaction, whose writer was killed before it was there.

    SQLite writes the header of a frame, then its page. Where the log's room is used again, the page of an earlier round
    stands behind the new header in between, and the header alone says that the transaction is complete. Nobody was told
    so. One wrong bit in that frame would look alike but for its sums: then it is damage.
    """
    last = committed_frames(wal)
    for frame in _frames(wal):
        if not frame.is_whole:
            return frame.number == last and frame.is_of_this_round and not _one_bit_explains(*frame.error)
    return False


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame as SQLite would read it after all that come before it.

    Attributes:
        number: from 1.
        commits: whether its header ends a transaction.
        is_of_this_round: whether its header has both salts of the log's.
        error: by how much its sums differ from those of its content, modulo 2**32.
    """

    number: int
    commits: bool
    is_of_this_round: bool
    error: Sums

    @property
    def is_whole(self) -> bool:
        return self.is_of_this_round and self.error == (0, 0)


def _frames(wal: bytes) -> Iterator[_Frame]:
    """The frames from the first one on; none where the log's own header is damaged."""
    order = WAL_ORDERS.get(wal[:4])
    if order is None or wal[4:12] != WAL_VERSION + PAGE_BYTES.to_bytes(4, "big"):
        return
    sums = _wal_sums(wal[:24], order, (0, 0))
    if _sums_at(wal, 24) != sums:
        return
    for number, at in enumerate(_whole_frames(wal), 1):
        sums = _wal_sums(wal[at : at + 8] + wal[at + FRAME_HEADER_BYTES : at + FRAME_BYTES], order, sums)
        told = _sums_at(wal, at + 16)
        error = (told[0] - sums[0]) % WORD, (told[1] - sums[1]) % WORD
        yield _Frame(number, wal[at + 4 : at + 8] != bytes(4), wal[at + 8 : at + 16] == wal[16:24], error)


def _one_bit_explains(first: int, second: int) -> bool:
    """Whether one wrong bit of a frame's page, of the covered part of its header or of its sums makes this error."""
    powers = {sign * 2**bit % WORD for bit in range(32) for sign in (1, -1)}
    if (first in powers and second == 0) or (second in powers and first == 0):
        return True  # of the sums themselves
    for by_first, by_second in _weights():
        # The first sum's weight may be even and then has no inverse, so the powers are tried.
        if any(power * by_first % WORD == first and power * by_second % WORD == second for power in powers):
            return True
    return False


def _weights() -> Iterator[Sums]:
    """By how much the two sums of a frame change where one of its words is greater by one, from the last word on."""
    after_even, after_odd = (1, 1), (0, 1)
    for _ in range((8 + PAGE_BYTES) // 8):
        yield after_even
        yield after_odd
        after_even, after_odd = _pair_later(after_even), _pair_later(after_odd)


def _pair_later(change: Sums) -> Sums:
    first = (change[0] + change[1]) % WORD
    return first, (change[1] + first) % WORD


def _whole_frames(wal: bytes) -> range:
    return range(WAL_HEADER_BYTES, len(wal) - FRAME_BYTES + 1, FRAME_BYTES)


def _wal_sums(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for even, odd in zip(words, words, strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


def _sums_at(wal: bytes, at: int) -> tuple[int, int]:
    return int.from_bytes(wal[at : at + 4], "big"), int.from_bytes(wal[at + 4 : at + 8], "big")
