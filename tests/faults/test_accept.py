"""A target count: candidates in a fixed order, until enough of them pass the checks of the filter."""

import random
import threading
from collections import Counter

import pytest

from pipeline.core.config_accept import Accept
from pipeline.core.errors import Incomplete
from pipeline.stages.generate.accept import wave_size
from tests.faults.generate_runs import Stage, numbered
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion

CHECKS = {"min_chars": 10}
HOT = {"temperature": 1}
GOOD, BAD = "a long enough answer", "short"


def every(step: int):
    """A server to which every `step`-th prompt is answered well."""

    def script(seen: Seen, _: int) -> Act:
        return completion(GOOD if int(seen.prompt[1:]) % step == 0 else BAD)

    return script


def good(stage: Stage) -> int:
    return sum(row.completion[0].content == GOOD for row in stage.rows)


def test_it_stops_at_the_row_that_makes_enough(tmp_path):
    stage = Stage(tmp_path, numbered(60))
    with ScriptedServer(every(2)) as server:
        result = stage.run({"t": server}, CHECKS, accept={"rows": 10, "max_candidates": 60})
    assert good(stage) == 10
    assert result.metrics["accept"] == {"wanted": 10, "good": 10, "candidates": result.rows_in}
    assert result.rows_in == result.rows_out, "those that do not pass stay rows, for the filter to reject"


def test_candidates_come_in_the_order_of_row_ids_and_none_after_the_last_good_one(tmp_path):
    stage, everything = Stage(tmp_path / "few", numbered(40)), Stage(tmp_path / "all", numbered(40))
    with ScriptedServer(every(3)) as server:
        everything.run({"t": server})
        stage.run({"t": server}, CHECKS, accept={"rows": 5, "max_candidates": 40})
    taken = {row.row_id for row in stage.rows}
    assert taken == {row.row_id for row in sorted(everything.rows, key=lambda row: row.row_id)[: len(taken)]}
    last = max(stage.rows, key=lambda row: row.row_id)
    assert last.completion[0].content == GOOD


def test_the_rows_do_not_depend_on_who_answered_first(tmp_path):
    results = []
    for seed in range(3):
        draw, lock = random.Random(seed), threading.Lock()

        def slow(seen: Seen, number: int, draw=draw, lock=lock) -> Act:
            with lock:
                delay = draw.random() / 50
            return Act(**{**vars(every(3)(seen, number)), "delay_s": delay})

        stage = Stage(tmp_path / str(seed), numbered(40))
        with ScriptedServer(slow) as server:
            results.append(stage.run({"t": server}, CHECKS, accept={"rows": 6, "max_candidates": 40}))
    assert results[0] == results[1] == results[2]


def test_few_answers_are_paid_for_that_are_not_used(tmp_path):
    stage = Stage(tmp_path, numbered(300))
    with ScriptedServer(every(2)) as server:
        result = stage.run({"t": server}, CHECKS, accept={"rows": 50, "max_candidates": 300})
    assert result.rows_in <= len(server.seen) <= result.rows_in + 5


def test_a_second_sample_comes_when_the_first_samples_are_used_up(tmp_path):
    stage = Stage(tmp_path, numbered(10))
    counts: Counter[str] = Counter()

    def later_better(seen: Seen, _: int) -> Act:
        counts[seen.prompt] += 1
        return completion(BAD if counts[seen.prompt] == 1 else GOOD)

    with ScriptedServer(later_better) as server:
        result = stage.run({"t": server}, CHECKS, samples=3, sampling=HOT, accept={"rows": 4, "max_candidates": 30})
    assert result.rows_in == 14
    assert Counter(row.sample for row in stage.rows) == {0: 10, 1: 4}


def test_too_few_good_candidates_end_the_step_with_what_there_is(tmp_path):
    stage = Stage(tmp_path, numbered(30))
    with ScriptedServer(every(10)) as server:
        result = stage.run({"t": server}, CHECKS, accept={"rows": 20, "max_candidates": 25})
    assert result.metrics["accept"] == {"wanted": 20, "good": good(stage), "candidates": 25}
    assert len(server.seen) == 25


def test_a_budget_that_ends_before_is_resumed_without_paying_twice(tmp_path):
    stage = Stage(tmp_path, numbered(60))
    with ScriptedServer(every(2)) as server:
        with pytest.raises(Incomplete, match="budget is reached"):
            stage.run(
                {"t": server},
                CHECKS,
                accept={"rows": 20, "max_candidates": 60},
                spending={"run": "r", "budget": {"requests": 15}},
            )
        assert len(server.seen) == 15
        result = stage.run({"t": server}, CHECKS, accept={"rows": 20, "max_candidates": 60})
    assert good(stage) == 20
    assert max(Counter(server.prompts).values()) == 1 and len(server.seen) <= result.rows_in + 5


def test_rows_that_are_rejected_count_as_candidates(tmp_path):
    def filters(seen: Seen, number: int) -> Act:
        return completion("", finish="content_filter") if seen.prompt.endswith("1") else every(1)(seen, number)

    stage = Stage(tmp_path, numbered(40))
    with ScriptedServer(filters) as server:
        result = stage.run({"t": server}, CHECKS, accept={"rows": 30, "max_candidates": 40})
    assert (good(stage), result.rejected) == (30, {"content_filter": result.rows_in - 30})


@pytest.mark.parametrize(("wanted", "good", "seen", "size"), [(100, 0, 0, 100), (50, 50, 100, 50), (50, 1, 100, 2500)])
def test_a_wave_is_what_is_wanted_or_half_of_what_would_do(wanted, good, seen, size):
    assert wave_size(wanted, good, seen) == size


def test_fewer_candidates_than_rows_are_refused():
    with pytest.raises(ValueError, match="less than the 10 rows"):
        Accept(rows=10, max_candidates=9)


class TestSeveralTeachers:
    """They take turns in each wave, and spend one budget."""

    def run(self, stage: Stage, servers: dict[str, ScriptedServer], requests: int):
        return stage.run(
            servers,
            CHECKS,
            route={"kind": "all", "teachers": ["a", "b"]},
            accept={"rows": 20, "max_candidates": 80},
            spending={"run": "r", "budget": {"requests": requests}},
        )

    def test_one_budget_holds_for_both_over_all_waves(self, tmp_path):
        stage = Stage(tmp_path, numbered(40))
        with ScriptedServer(every(3)) as a, ScriptedServer(every(3)) as b:
            servers = {"a": a, "b": b}
            with pytest.raises(Incomplete, match="budget is reached"):
                self.run(stage, servers, 30)
            assert len(a.seen) + len(b.seen) == 30
            result = self.run(stage, servers, 100)
            assert good(stage) == 20
            assert result.rows_in <= len(a.seen) + len(b.seen) <= result.rows_in + 5


def test_a_prompt_that_is_never_answered_does_not_silence_the_waves_after_it(tmp_path):
    stage = Stage(tmp_path, numbered(60))

    def one_is_down(seen: Seen, number: int) -> Act:
        return Act(status=503) if seen.prompt in ("p000", "p001", "p002") else every(2)(seen, number)

    with ScriptedServer(one_is_down) as server:
        result = stage.run(
            {"t": server}, CHECKS, accept={"rows": 20, "max_candidates": 60}, allow_missing={"share": 0.1}
        )
    assert good(stage) == 20 and all(reason.startswith("gave_up:") for reason in result.rejected)
