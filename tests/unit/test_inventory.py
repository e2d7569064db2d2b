"""What is stored, and which of it a config uses: counted once each, and picked as a run picks."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptArtefact
from pipeline.teacher.inventory import UNREADABLE, take_inventory
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import lock_path, segment_paths
from pipeline.teacher.walk import SALVAGE, answers_by_key
from pipeline.teacher.wanted import Wanted, chosen, coverage, pick
from tests.stored_answers import answer, body, by_key, key, store, stored

CUT = body("so", finish="length", tokens=(7, 64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "responses"


class TestWalk:
    def test_folded_and_unfolded_answers_come_in_the_order_of_their_keys(self, folder: Path) -> None:
        answers = [answer(str(number), stored_ms=number) for number in range(100)]
        store(folder, *answers[:40])
        store(folder, *answers[40:70])
        store(folder, *answers[70:], fold=False)
        assert stored(folder) == by_key(answers)

    def test_an_answer_that_two_files_hold_comes_once(self, folder: Path) -> None:
        """As after a fold that was killed before it removed the segment."""
        store(folder, answer("a"), answer("b"))
        store(folder, answer("a"), fold=False)
        assert stored(folder) == by_key([answer("a"), answer("b")])

    def test_two_answers_to_a_key_come_oldest_first(self, folder: Path) -> None:
        store(folder, answer("a", stored_ms=2000))
        store(folder, answer("a", stored_ms=1000))
        assert [each.stored_ms for each in stored(folder)] == [1000, 2000]

    def test_no_folder_holds_nothing(self, folder: Path) -> None:
        assert stored(folder) == []

    def test_a_flipped_bit_in_a_folded_file_is_damage(self, folder: Path) -> None:
        store(folder, answer("a"))
        (file,) = (folder / "answers").iterdir()
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(CorruptArtefact) as caught:
            stored(folder)
        assert caught.value.where == str(file)

    def test_a_damaged_segment_is_damage_and_stays_where_it_is(self, folder: Path) -> None:
        store(folder, answer("a"), fold=False)
        (segment,) = (folder / "segments").glob("*.sqlite")
        segment.write_bytes(b"x" * 5000)
        with pytest.raises(CorruptArtefact) as caught:
            stored(folder)
        assert caught.value.todo == SALVAGE
        assert segment.exists()

    def test_the_check_ends_it(self, folder: Path) -> None:
        store(folder, answer("a"))
        with pytest.raises(KeyboardInterrupt):
            next(answers_by_key(folder, check=_interrupt))


def _interrupt() -> None:
    raise KeyboardInterrupt


class TestInventory:
    def test_rows_are_by_teacher_model_format_and_server(self, folder: Path) -> None:
        store(folder, answer("a"), answer("b", model="n"), answer("c", engine="vllm 2"), answer("d"))
        rows = {(row.kind.model, row.kind.engine): row.tally.answers for row in take_inventory(folder).rows}
        assert rows == {("m", "vllm 1"): 2, ("m", "vllm 2"): 1, ("n", "vllm 1"): 1}

    def test_refusals_are_counted_by_reason_and_cut_answers_apart(self, folder: Path) -> None:
        store(
            folder,
            answer("a"),
            answer("b", body=CUT),
            answer("c", body=body(None, finish="content_filter")),
            answer("d", status=0, rejected="oversize", body=b""),
            answer("e", status=500, body=b"no"),
            answer("f", wire="forgotten"),
            answer("g", body=body("uncounted", tokens=None)),
        )
        total = take_inventory(folder).total
        assert (total.answers, total.cut, total.uncounted) == (3, 1, 1)
        assert total.rejected == {"content_filter": 1, "oversize": 1, UNREADABLE: 2}
        assert (total.prompt_tokens, total.completion_tokens) == (14, 67)

    def test_days_are_those_of_the_oldest_and_the_newest(self, folder: Path) -> None:
        day = 86_400_000
        store(folder, answer("a", stored_ms=3 * day), answer("b", stored_ms=day - 1), answer("c", stored_ms=2 * day))
        assert take_inventory(folder).total.days == ("1970-01-01", "1970-01-04")

    def test_bytes_on_disk_are_those_of_the_files(self, folder: Path) -> None:
        store(folder, answer("a"), answer("b", model="n", body=body("x" * 5000)))
        found = take_inventory(folder)
        (file,) = (folder / "answers").iterdir()
        assert found.disk_bytes == file.stat().st_size
        small, large = (row.disk_bytes for row in found.rows)
        assert 0 < small < large <= found.disk_bytes

    def test_a_segment_says_who_holds_it(self, folder: Path) -> None:
        with ResponseStore(folder) as responses:
            responses.put([answer("a")])
            (held,) = take_inventory(folder).unfolded
        (left,) = take_inventory(folder).unfolded
        assert (held.pid, held.is_held) == (os.getpid(), True)
        assert (left.pid, left.is_held) == (os.getpid(), False)

    def test_counting_writes_nothing(self, folder: Path) -> None:
        store(folder, answer("a"))
        store(folder, answer("b"), fold=False)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        take_inventory(folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert all(not lock_path(path).exists() or lock_path(path) in before for path in segment_paths(folder))


class TestWanted:
    CASES = (
        [answer("a", stored_ms=2000), answer("a", stored_ms=1000, body=body("older"))],
        [answer("a", stored_ms=2000), answer("a", stored_ms=1000, cap=128, body=body("older, another cap"))],
        [answer("a", body=CUT), answer("a", cap=128, stored_ms=2000, body=body("whole"))],
        [answer("a", body=CUT)],
        [answer("a", status=400, body=b"{}")],
        [answer("a", status=400, body=b"{}", room=10), answer("a", cap=32, stored_ms=500)],
        [answer("a", status=500, body=b"")],
        [answer("a", body=body("x")), answer("a", body=body("y"))],
    )

    @pytest.mark.parametrize("answers", CASES)
    @pytest.mark.parametrize("cap", [32, 64, 65, 128])
    @pytest.mark.parametrize("room", [None, 10])
    def test_the_pick_is_what_the_response_store_gives(self, folder: Path, answers: list, cap: int, room: int) -> None:
        store(folder, *answers)
        with ResponseStore(folder) as responses:
            given = responses.get_many({key("a"): cap}, room).get(key("a"))
        picked = pick(stored(folder), cap, room)
        assert (None if picked is None else picked[1]) == given
        expected = [] if picked is None else [picked[0]]
        assert list(chosen(folder, Wanted({key("a"): 1}, (cap,), {} if room is None else {key("a"): room}))) == expected

    REFUSED = answer("a", cap=128, status=400, body=b"{}")
    WHOLE = answer("a", cap=256, body=body("whole", tokens=(7, 200)))

    @pytest.mark.parametrize(
        ("later", "told"),
        [
            ([], (0, 1)),
            ([REFUSED], (0, 1)),
            ([REFUSED, WHOLE], (1, 0)),
            ([REFUSED, replace(WHOLE, status=400, body=b"{}")], (1, 0)),
            ([replace(WHOLE, status=400, body=b"{}")], (0, 1)),
        ],
    )
    def test_a_round_that_is_refused_takes_nothing_away(self, folder: Path, later: list, told: tuple) -> None:
        """The answer that it did not replace stays in use, and what is asked after it counts too."""
        first = answer("a", body=CUT)
        store(folder, first, *later)
        wanted = Wanted({key("a"): 1}, (64, 128, 256), {})
        found = coverage(folder, wanted)
        assert ((found.answered, found.cut), found.refused, found.missing) == (told, {}, 0)
        assert list(chosen(folder, wanted)) == [first, *later]

    def test_a_request_whose_first_round_is_refused_is_refused(self, folder: Path) -> None:
        refused = answer("a", status=400, body=b"{}")
        store(folder, refused, replace(refused, cap=128))
        wanted = Wanted({key("a"): 3}, (64, 128), {})
        assert coverage(folder, wanted).refused == {"bad_request": 3}
        assert list(chosen(folder, wanted)) == [refused]

    def test_requests_are_answered_refused_cut_and_missing(self, folder: Path) -> None:
        store(
            folder,
            answer("a"),
            answer("b", body=CUT),
            answer("c", body=body(None, finish="content_filter")),
            answer("d", status=400, body=b"{}"),
            answer("other"),
        )
        rows = {key("a"): 2, key("b"): 3, key("c"): 4, key("d"): 5, key("e"): 6}
        found = coverage(folder, Wanted(rows, (65,), {}))
        assert (found.requests, found.answered, found.refused) == (20, 2, {"content_filter": 4})
        assert (found.cut, found.missing) == (3, 5 + 6)
