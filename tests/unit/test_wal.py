"""What a segment's write-ahead log says of a writer that was killed, and of a bit that is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.teacher.salvage import salvage
from pipeline.teacher.segment import Segment, Stored, read_answers
from pipeline.teacher.wal import FRAME_BYTES, WAL_HEADER_BYTES, committed_frames, is_torn, readable_frames

SALTS = slice(16, 24)


def an_answer(number: int) -> Stored:
    body = random.Random(number).randbytes(900)
    return Stored(number.to_bytes(32, "big"), 10, number, "t" * 64, "m", "e", "w", 200, None, body)


class Log:
    """The files of a segment that is written until its log's room is used again, before and after its last write."""

    def __init__(self, folder: Path) -> None:
        segment = Segment(folder)
        self.path, self.answers = segment.path, 0
        rounds = set()
        while len(rounds) < 3:
            self.before = self.files()
            segment.write([], [], [an_answer(self.answers)])
            self.answers += 1
            rounds.add(self.files()[1][SALTS])
        for _ in range(4):  # into the round, where frames of the one before still stand behind
            self.before = self.files()
            segment.write([], [], [an_answer(self.answers)])
            self.answers += 1
        self.after = self.files()
        segment.close()

    def files(self) -> tuple[bytes, bytes]:
        log = self.path.with_name(self.path.name + "-wal")
        return self.path.read_bytes(), log.read_bytes() if log.exists() else bytes(32)

    def put(self, folder: Path, wal: bytes) -> Path:
        folder.mkdir()
        path = folder / self.path.name
        path.write_bytes(self.after[0])
        path.with_name(path.name + "-wal").write_bytes(wal)
        return path

    @property
    def last_page(self) -> slice:
        start = WAL_HEADER_BYTES + committed_frames(self.after[1]) * FRAME_BYTES
        return slice(start - FRAME_BYTES + 24, start)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return Log(tmp_path_factory.mktemp("log"))


def with_page(log: Log, page: bytes) -> bytes:
    wal = bytearray(log.after[1])
    wal[log.last_page] = page
    return bytes(wal)


def test_a_whole_log_is_read_to_its_last_transaction(log: Log) -> None:
    assert readable_frames(log.after[1]) == committed_frames(log.after[1]) > 0
    assert not is_torn(log.after[1])


def test_a_writer_killed_between_header_and_page_damaged_nothing(log: Log, tmp_path: Path) -> None:
    wal = with_page(log, log.before[1][log.last_page])
    assert readable_frames(wal) < committed_frames(wal), "the header says that the transaction is complete"
    assert is_torn(wal)
    path = log.put(tmp_path / "torn", wal)
    assert salvage(path) is None
    assert len([*read_answers(path)]) == log.answers - 1


@pytest.mark.parametrize("seed", range(12))
def test_a_wrong_bit_in_the_last_page_is_damage(log: Log, tmp_path: Path, seed: int) -> None:
    page = bytearray(log.after[1][log.last_page])
    at = random.Random(seed).randrange(len(page) * 8)
    page[at // 8] ^= 1 << at % 8
    wal = with_page(log, bytes(page))
    assert readable_frames(wal) < committed_frames(wal)
    assert not is_torn(wal)
    found = salvage(log.put(tmp_path / "flipped", wal))
    assert found is not None
    assert len(found.answers) >= log.answers - 1


def test_a_wrong_bit_in_the_sums_is_damage(log: Log) -> None:
    wal = bytearray(log.after[1])
    wal[log.last_page.start - 5] ^= 4
    assert not is_torn(bytes(wal))


def test_a_wrong_page_before_the_last_is_damage(log: Log) -> None:
    wal = bytearray(log.after[1])
    start = log.last_page.start - FRAME_BYTES
    wal[start : start + 100] = bytes(100)
    assert not is_torn(bytes(wal))
