"""The response store: what was answered is found again, whatever happened to the process that asked."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.core.config_teacher import Sampling
from pipeline.core.errors import CorruptArtefact
from pipeline.core.record import Message
from pipeline.teacher.lookup import look_up_all
from pipeline.teacher.request import Asked
from pipeline.teacher.responses import Outcome, ResponseStore
from pipeline.teacher.rounds import resolve
from pipeline.teacher.segment import Attempt, Ended, Segment, Stored
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def body(text: str, finish: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode()


def answer(name: str, text: str = "fine", finish: str = "stop", **changes: object) -> Stored:
    plain = Stored(key(name), 64, 1000, "t" * 64, "m", "vllm 1", OPENAI_CHAT.name, 200, None, body(text, finish))
    return replace(plain, **changes)


def text_of(store: ResponseStore, name: str, cap: int = 64) -> str | None:
    outcome = store.get_many({key(name): cap}).get(key(name))
    return None if outcome is None else outcome.rejected or (outcome.reply.text if outcome.reply else None)


@pytest.fixture
def store(tmp_path):
    with ResponseStore(tmp_path / "responses") as store:
        yield store


def files(tmp_path: Path, kind: str, pattern: str = "*") -> list[Path]:
    return sorted((tmp_path / "responses" / kind).glob(pattern))


def test_an_answer_is_found_before_and_after_folding(store, tmp_path):
    store.put([answer("a", "one"), answer("b", "two")])
    assert (text_of(store, "a"), text_of(store, "b"), text_of(store, "c")) == ("one", "two", None)
    assert store.fold() == 2
    assert (text_of(store, "a"), text_of(store, "b"), text_of(store, "c")) == ("one", "two", None)
    assert files(tmp_path, "segments") == []
    store.put([answer("c", "three")])
    assert text_of(store, "c") == "three"


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("stored", "cap", "hit"),
    [
        (answer("a", finish="stop", cap=64), 64, True),
        (answer("a", finish="stop", cap=64), 1000, True),
        (answer("a", finish="stop", cap=64), 1, True),
        (answer("a", finish="length", cap=64), 64, True),
        (answer("a", finish="length", cap=64), 32, True),
        (answer("a", finish="length", cap=64), 65, False),
        (answer("a", status=400, body=b"{}"), 64, True),
        (answer("a", status=400, body=b"{}"), 65, False),
        (answer("a", status=0, body=b"", rejected="oversize"), 64, True),
        (answer("a", status=0, body=b"", rejected="oversize"), 32, False),
        (answer("a", finish="content_filter"), 1000, True),
        (answer("a", status=500), 64, False),
    ],
)
def test_a_stored_answer_is_a_hit_unless_it_was_cut_by_a_smaller_cap(store, stored, cap, hit, folded):
    store.put([stored])
    if folded:
        store.fold()
    assert (text_of(store, "a", cap) is not None) is hit


def cut(tokens: int | None, **changes: object) -> Stored:
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    choice = {"message": {"content": "so far"}, "finish_reason": "length"}
    return answer("a", body=json.dumps({"choices": [choice], **usage}).encode(), **changes)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("stored", "room", "hit"),
    [
        (answer("a", room=128), 4096, True),
        (cut(20, room=128), 128, True),
        (cut(20, room=128), 64, True),
        (cut(20, room=128), 4096, False),
        (cut(20, room=128), None, False),
        (cut(None, room=128), 4096, False),
        (cut(20, room=None), 4096, True),
        (cut(64, room=128), 4096, True),
        (answer("a", status=400, body=b"{}", room=128), 128, True),
        (answer("a", status=400, body=b"{}", room=128), 4096, False),
        (answer("a", status=403, body=b"{}", room=128, rejected="forbidden"), 4096, True),
    ],
)
def test_more_room_asks_again_only_for_what_was_cut_or_refused_for_lack_of_it(store, stored, room, hit, folded):
    store.put([stored])
    if folded:
        store.fold()
    assert (key("a") in store.get_many({key("a"): 64}, room)) is hit


def test_a_look_up_of_many_keys_reads_each_file_once(store, tmp_path, monkeypatch):
    """Keys lie anywhere in the store, so that small look-ups would read all of it again and again."""
    asked = Asked("t" * 64, {}, Sampling(max_tokens=64), 0)
    requests = [asked.request("s", str(i), 0, [Message("user", str(i))]) for i in range(5000)]
    store.put([answer("", key=bytes.fromhex(request.key)) for request in requests])
    store.fold()
    looked = []
    find = store.get_many
    monkeypatch.setattr(store, "get_many", lambda *given, **how: looked.append(1) or find(*given, **how))
    answers = list(resolve(store, asked, (), requests))
    assert [outcome.reply.text for outcome in answers] == ["fine"] * 5000
    assert sum(chunk.answered for chunk in look_up_all(store, asked, requests)) == 5000
    assert len(looked) == 2


@pytest.mark.parametrize("folded", [False, True])
def test_a_look_up_can_be_stopped_between_answers(tmp_path, folded):
    looks = []

    def check():
        looks.append(None)
        if len(looks) == 5:
            raise KeyboardInterrupt

    with ResponseStore(tmp_path / "responses", check=check) as store:
        store.put([answer(str(number)) for number in range(10)])
        if folded:
            store.fold()
        with pytest.raises(KeyboardInterrupt):
            store.get_many({key(str(number)): 64 for number in range(10)})
    assert len(looks) == 5


def test_of_several_answers_the_one_with_this_cap_wins_then_the_oldest(store):
    store.put([answer("a", "late", stored_ms=9), answer("a", "early", stored_ms=5), answer("a", "big", cap=99)])
    assert text_of(store, "a", 64) == "early"
    assert text_of(store, "a", 99) == "big"
    assert text_of(store, "a", 70) == "early"
    store.fold()
    store.put([answer("a", "earliest", stored_ms=1)])
    assert text_of(store, "a", 64) == "earliest"


def test_a_refused_row_is_found_with_its_reason(store):
    store.put([answer("a", status=400, body=b'{"error": {"message": "too long"}}')])
    store.put([answer("b", status=200, rejected="empty", body=b'{"choices": []}')])
    assert store.get_many({key("a"): 64, key("b"): 64}) == {
        key("a"): Outcome(None, "bad_request"),
        key("b"): Outcome(None, "empty"),
    }


def test_raw_bodies_come_back_byte_for_byte_from_a_folded_file(store, tmp_path):
    raw = body("x").replace(b'"x"', b'"\xff\\ud800\x00"')
    store.put([answer("a", body=raw)])
    store.fold()
    (file,) = files(tmp_path, "answers")
    table = pq.read_table(file)
    assert table["body"].to_pylist() == [raw]


def test_folded_files_are_sorted_and_named_by_their_bytes(store, tmp_path):
    store.put([answer(f"k{i}") for i in range(3000)])
    assert store.fold() == 3000
    (file,) = files(tmp_path, "answers")
    assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest()
    keys = pq.read_table(file)["key"].to_pylist()
    assert keys == sorted(keys) and len(keys) == 3000
    assert pq.ParquetFile(file).num_row_groups == 3
    assert len(store.get_many({key(f"k{i}"): 64 for i in range(0, 3000, 7)})) == 429


def test_attempts_are_on_record_and_an_unknown_outcome_is_told_from_a_known_one(store, tmp_path):
    store.put(intents=[Attempt(1, key("a"), 64, 5), Attempt(2, key("b"), 64, 6), Attempt(3, key("c"), 64, 7)])
    store.put([answer("a")], outcomes=[Ended(1, "answer"), Ended(2, "retry:timeout")])
    store.fold()
    (file,) = files(tmp_path, "attempts")
    outcomes = {row["key"]: row["outcome"] for row in pq.read_table(file).to_pylist()}
    assert outcomes == {key("a"): "answer", key("b"): "retry:timeout", key("c"): None}


DYING = """
import os, sys
from pathlib import Path
from pipeline.teacher.responses import ResponseStore
from tests.unit.test_responses import answer
store = ResponseStore(Path(sys.argv[1]))
store.put([answer("dead", "last words")])
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_stored_is_read_and_folded_by_others(store, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", DYING, str(tmp_path / "responses")], env=env, check=False)
    assert len(files(tmp_path, "segments", "*.sqlite")) == 1
    assert text_of(store, "dead") == "last words"
    assert store.fold() == 1
    assert text_of(store, "dead") == "last words"
    assert files(tmp_path, "segments") == []


def test_the_segment_of_a_living_process_is_read_but_not_folded(store, tmp_path):
    with ResponseStore(tmp_path / "responses") as other:
        other.put([answer("a", "theirs")])
        assert text_of(store, "a") == "theirs"
        assert store.fold() == 0
        other.put([answer("b", "more")])
        assert text_of(store, "b") == "more"
    assert store.fold() == 2


def test_a_segment_whose_writer_died_before_making_its_tables_is_no_obstacle(store, tmp_path):
    (tmp_path / "responses" / "segments" / "1-abc.sqlite").touch()
    assert text_of(store, "a") is None
    assert store.fold() == 0
    assert files(tmp_path, "segments") == []


def test_a_fold_that_dies_between_rename_and_removal_loses_and_doubles_nothing(store, tmp_path, monkeypatch):
    store.put([answer("a", "one")], intents=[Attempt(1, key("a"), 64, 5)])
    store.close()
    (segment,) = files(tmp_path, "segments", "*.sqlite")
    kept = segment.read_bytes()
    store.fold()
    segment.write_bytes(kept)
    (tmp_path / "responses" / "answers" / ".torn.tmp").write_bytes(b"half")
    assert store.fold() == 1
    assert text_of(store, "a") == "one"
    assert len(files(tmp_path, "answers", "*.parquet")) == 1, "equal rows make an equally named file"
    assert len(files(tmp_path, "attempts", "*.parquet")) == 1
    assert files(tmp_path, "answers", ".*") == []


def test_a_damaged_file_is_an_integrity_error_not_a_miss(store, tmp_path):
    store.put([answer(f"k{i}", "text " * 50) for i in range(200)])
    store.fold()
    (file,) = files(tmp_path, "answers")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptArtefact, match="damaged"):
        store.get_many({key(f"k{i}"): 64 for i in range(200)})


def test_nobody_else_can_read_the_answers(store, tmp_path):
    old = os.umask(0)
    try:
        with ResponseStore(tmp_path / "open") as fresh:
            fresh.put([answer("a")])
            paths = list((tmp_path / "open").rglob("*"))
            assert [path for path in paths if path.stat().st_mode & 0o077] == []
            assert {path.suffix for path in paths if path.is_file()} >= {".sqlite", ".lock", ".sqlite-wal"}
            fresh.fold()
            paths = list((tmp_path / "open").rglob("*"))
            assert any(path.suffix == ".parquet" for path in paths)
            assert [path for path in paths if path.stat().st_mode & 0o077] == []
    finally:
        os.umask(old)


def test_one_write_is_all_or_nothing(tmp_path):
    segment = Segment(tmp_path)
    try:
        segment.write([Attempt(1, key("a"), 64, 5)], [], [])
        with pytest.raises(Exception, match="UNIQUE"):
            segment.write([Attempt(2, key("b"), 64, 5), Attempt(1, key("a"), 64, 5)], [], [answer("a")])
        segment.write([Attempt(2, key("b"), 64, 5)], [], [])
    finally:
        segment.close()
