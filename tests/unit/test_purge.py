"""Purging: a list by default, what was selected and nothing else, never beside a process that works there."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import CorruptArtefact, RunLocked, UsageError
from pipeline.core.runs import hold_lock, run_lock, share_data
from pipeline.teacher.purge import Selection, purge
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Stored
from tests.stored_answers import answer, body, by_key, key, store, stored

OLD, NEW = answer("old", model="old", stored_ms=1000, teacher="a" * 64), answer("new", stored_ms=5000)
CUT = answer("cut", body=body("so", finish="length"), stored_ms=6000)
REFUSED = answer("refused", body=body(None, finish="content_filter"), stored_ms=7000)
ALL = [OLD, NEW, CUT, REFUSED]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two folded files and a segment whose writer has gone."""
    store(tmp_path / "responses", OLD, NEW, cost=250)
    store(tmp_path / "responses", CUT, cost=None)
    store(tmp_path / "responses", REFUSED, fold=False, cost=1000)
    return tmp_path


def left(data: Path) -> list[Stored]:
    return stored(data / "responses")


@pytest.mark.parametrize(
    ("selection", "gone"),
    [
        (Selection(teacher="a" * 64), [OLD]),
        (Selection(teacher="aaaaaa"), [OLD]),
        (Selection(model="old"), [OLD]),
        (Selection(rejected="content_filter"), [REFUSED]),
        (Selection(before_ms=6000), [OLD, NEW]),
        (Selection(keys=frozenset({key("new"), key("refused"), key("nobody's")})), [NEW, REFUSED]),
        (Selection(model="m", before_ms=6000), [NEW]),
        (Selection(before_ms=10_000), ALL),
        (Selection(before_ms=1000), []),
    ],
)
class TestSelection:
    def test_a_list_changes_nothing(self, data: Path, selection: Selection, gone: list[Stored]) -> None:
        before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
        found = purge(data, selection)
        assert (found.done, found.total.stored, found.kept) == (False, len(gone), len(ALL) - len(gone))
        assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before

    def test_the_selected_ones_go_and_the_others_stay(
        self, data: Path, selection: Selection, gone: list[Stored]
    ) -> None:
        found = purge(data, selection, delete=True)
        assert (found.done, found.total.stored, found.kept) == (True, len(gone), len(ALL) - len(gone))
        assert left(data) == by_key([each for each in ALL if each not in gone])
        with ResponseStore(data / "responses") as responses:
            assert len(responses.get_many(dict.fromkeys((each.key for each in ALL), 64))) == len(ALL) - len(gone)


def test_an_answer_that_two_files_hold_goes_from_both(data: Path) -> None:
    store(data / "responses", OLD, CUT)
    purge(data, Selection(model="old"), delete=True)
    assert left(data) == by_key([NEW, CUT, REFUSED])


def test_the_bill_stays(data: Path) -> None:
    purge(data, Selection(before_ms=10_000), delete=True)
    rows = [row for path in (data / "responses" / "attempts").iterdir() for row in pq.read_table(path).to_pylist()]
    assert sorted(row["key"] for row in rows) == sorted(each.key for each in ALL)


def test_it_says_what_they_cost_as_far_as_that_is_known(data: Path) -> None:
    found = purge(data, Selection(before_ms=10_000))
    assert (found.cost, found.unpriced) == (250 + 250 + 1000, 1)
    assert purge(data, Selection(keys=frozenset({key("cut")}))).cost is None


@pytest.mark.parametrize(
    ("selection", "what"),
    [
        (Selection(model="odl"), "no stored answer is of model odl; did you mean 'old'?"),
        (Selection(teacher="ffff"), "no stored answer is of teacher ffff; valid here: aaaaaaaaaaaa, tttttttttttt"),
        (Selection(rejected="content_filtre"), "rejected as content_filtre; did you mean 'content_filter'?"),
    ],
)
def test_a_name_that_nothing_has_is_a_mistake(data: Path, selection: Selection, what: str) -> None:
    for delete in (False, True):
        with pytest.raises(UsageError) as caught:
            purge(data, selection, delete=delete)
        assert what in caught.value.what
    assert left(data) == by_key(ALL)


def test_digits_that_several_teachers_have_in_common_are_refused(data: Path) -> None:
    store(data / "responses", answer("x", teacher="a" * 63 + "b"))
    with pytest.raises(UsageError, match="2 teachers"):
        purge(data, Selection(teacher="aaa"), delete=True)


def test_a_damaged_file_stops_it_before_anything_goes(data: Path) -> None:
    files = sorted((data / "responses" / "answers").iterdir())
    content = [path.read_bytes() for path in files]
    files[1].write_bytes(content[1][:-1] + b"x")
    with pytest.raises(CorruptArtefact):
        purge(data, Selection(before_ms=10_000), delete=True)
    assert files[0].read_bytes() == content[0]


def test_a_damaged_file_of_attempts_is_named_and_nothing_goes(data: Path) -> None:
    for path in (data / "responses" / "attempts").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptArtefact, match="attempts"):
        purge(data, Selection(before_ms=10_000), delete=True)
    assert left(data) == by_key(ALL)


class TestOthers:
    def test_a_run_in_the_folder_is_named(self, data: Path) -> None:
        with share_data(data), hold_lock(run_lock(data / "runs" / "small")), pytest.raises(RunLocked) as caught:
            purge(data, Selection(before_ms=10_000), delete=True)
        assert f"held by pid {os.getpid()} on" in caught.value.what
        assert left(data) == by_key(ALL)

    def test_a_process_that_writes_answers_outside_of_a_run_is_named(self, data: Path) -> None:
        with ResponseStore(data / "responses") as responses:
            responses.put([answer("fresh")])
            with pytest.raises(RunLocked) as caught:
                purge(data, Selection(before_ms=10_000), delete=True)
        assert f"pid {os.getpid()}, which writes answers" in caught.value.what
        assert len(left(data)) == 5

    def test_a_list_needs_nobody_to_stop(self, data: Path) -> None:
        with share_data(data), ResponseStore(data / "responses") as responses:
            responses.put([answer("fresh")])
            assert purge(data, Selection(before_ms=10_000)).total.stored == 5
