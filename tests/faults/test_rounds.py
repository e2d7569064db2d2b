"""What becomes of answers that a cap ended: only they are asked again, and only once in a run and its resumes."""

import pytest

from pipeline.core.errors import Incomplete
from tests.faults.generate_runs import Stage, cap_of, numbered
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, failure

LONG = {"p001": 40, "p003": 100, "p004": 1000}
"""Tokens that the answer to a prompt needs; the others need 10."""
RAISE = {"kind": "raise", "caps": [64, 256]}


def needs(seen: Seen, _: int) -> Act:
    """An answer that ends by itself where the cap lets it."""
    enough = cap_of(seen) >= LONG.get(seen.prompt, 10)
    return completion(f"{seen.prompt} under {cap_of(seen)}", finish="stop" if enough else "length")


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path, numbered(6))


def caps_asked(server: ScriptedServer) -> dict[str, list[int]]:
    asked: dict[str, list[int]] = {}
    for seen in server.seen:
        asked.setdefault(seen.prompt, []).append(cap_of(seen))
    return asked


class TestKeptByDefault:
    def test_a_cut_answer_is_a_row_with_its_finish_reason(self, stage):
        with ScriptedServer(needs) as server:
            stage.run({"t": server}, sampling={"max_tokens": 16})
        assert [row.finish_reason for row in stage.rows] == ["stop", "length", "stop", "length", "length", "stop"]
        assert len(server.seen) == 6


class TestDropped:
    def test_a_cut_answer_leaves_as_length(self, stage):
        with ScriptedServer(needs) as server:
            result = stage.run({"t": server}, sampling={"max_tokens": 16}, on_length={"kind": "drop"})
        assert (result.rows_out, result.rejected) == (3, {"length": 3})


class TestRaised:
    def test_only_what_was_cut_is_asked_again_rung_by_rung(self, stage):
        with ScriptedServer(needs) as server:
            stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE)
        assert caps_asked(server) == {
            "p000": [16],
            "p001": [16, 64],
            "p002": [16],
            "p003": [16, 64, 256],
            "p004": [16, 64, 256],
            "p005": [16],
        }
        assert [row.completion[0].content for row in stage.rows][1:5] == [
            "p001 under 64",
            "p002 under 16",
            "p003 under 256",
            "p004 under 256",
        ]
        assert [row.finish_reason for row in stage.rows].count("length") == 1, "the last rung's answer is kept"

    def test_a_rerun_asks_nothing_and_a_higher_rung_only_what_is_still_cut(self, stage):
        with ScriptedServer(needs) as server:
            first = stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE)
            asked = len(server.seen)
            assert stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE) == first
            assert len(server.seen) == asked
            higher = {"kind": "raise", "caps": [64, 256, 1024]}
            stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=higher)
        assert [(seen.prompt, cap_of(seen)) for seen in server.seen[asked:]] == [("p004", 1024)]
        assert [row.finish_reason for row in stage.rows] == ["stop"] * 6

    def test_turning_it_on_later_asks_only_the_cut_rows_and_keeps_their_ids(self, stage):
        with ScriptedServer(needs) as server:
            stage.run({"t": server}, sampling={"max_tokens": 16})
            ids, asked = [row.row_id for row in stage.rows], len(server.seen)
            stage.run({"t": server}, sampling={"max_tokens": 16}, on_length={"kind": "raise", "caps": [2000]})
        assert {seen.prompt for seen in server.seen[asked:]} == set(LONG)
        assert [row.row_id for row in stage.rows] == ids

    def test_a_rung_that_the_server_refuses_takes_nothing_away(self, stage):
        def no_room(seen: Seen, number: int) -> Act:
            return failure(400, "too long") if cap_of(seen) > 64 else needs(seen, number)

        with ScriptedServer(no_room) as server:
            result = stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE)
        assert result.rejected == {}
        assert stage.rows[3].completion[0].content == "p003 under 64"
        assert stage.rows[3].finish_reason == "length"

    def test_progress_counts_each_row_once(self, stage):
        with ScriptedServer(needs) as server:
            stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE)
        assert stage.ctx.progress.done == 6

    def test_a_rung_that_stays_without_an_answer_is_resumed(self, stage):
        down = [True]

        def fails(seen: Seen, number: int) -> Act:
            return failure(503) if down[0] and cap_of(seen) == 256 else needs(seen, number)

        with ScriptedServer(fails) as server:
            with pytest.raises(Incomplete, match="answer"):
                stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE)
            asked, down[0] = len(server.seen), False
            stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE)
        assert [(seen.prompt, cap_of(seen)) for seen in server.seen[asked:]] in (
            [("p003", 256), ("p004", 256)],
            [("p004", 256), ("p003", 256)],
        )


class TestAllowedToMiss:
    def broken(self, seen: Seen, _: int) -> Act:
        return failure(503) if seen.prompt == "p002" else completion(seen.prompt)

    def test_without_it_the_stage_waits_for_a_resume(self, stage):
        with ScriptedServer(self.broken) as server, pytest.raises(Incomplete, match="answer"):
            stage.run({"t": server})

    def test_a_share_of_rows_may_leave_as_given_up(self, stage):
        with ScriptedServer(self.broken) as server:
            result = stage.run({"t": server}, allow_missing={"share": 0.2})
        assert (result.rows_in, result.rows_out, result.rejected) == (6, 5, {"gave_up:status:503": 1})

    def test_a_smaller_share_does_not_do(self, stage):
        with ScriptedServer(self.broken) as server, pytest.raises(Incomplete, match="answer"):
            stage.run({"t": server}, allow_missing={"share": 0.1})

    def test_a_rung_that_is_down_is_waited_for_whatever_may_be_missing(self, stage):
        def down(seen: Seen, number: int) -> Act:
            return failure(503) if cap_of(seen) == 64 else needs(seen, number)

        ladder = {"kind": "raise", "caps": [64]}
        with ScriptedServer(down) as server, pytest.raises(Incomplete):
            stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=ladder, allow_missing={"share": 0.6})


def test_a_rung_that_is_refused_is_refused_in_a_resumed_run_too(stage):
    """All of the first round is stored then, and nothing of this run has shown that the teacher works."""

    def no_room(seen: Seen, number: int) -> Act:
        return failure(400, "too long") if cap_of(seen) > 16 else needs(seen, number)

    with ScriptedServer(no_room) as server:
        stage.run({"t": server}, sampling={"max_tokens": 16})
        result = stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE)
    assert result.rejected == {} and [row.finish_reason for row in stage.rows].count("length") == 3


def test_what_one_row_gets_does_not_depend_on_the_others(tmp_path):
    """A row whose rung was refused is asked on the next one, alone or not."""

    def refuses_one(seen: Seen, _: int) -> Act:
        if seen.prompt == "p001" and cap_of(seen) == 64:
            return failure(400, "odd")
        return completion(f"{cap_of(seen)}", finish="stop" if cap_of(seen) >= 256 else "length")

    for count in (2, 3):
        stage = Stage(tmp_path / str(count), numbered(count)[1:])
        with ScriptedServer(refuses_one) as server:
            stage.run({"t": server}, sampling={"max_tokens": 16}, on_length=RAISE)
        assert (stage.rows[0].prompt_id, stage.rows[0].completion[0].content) == ("p001", "256")
