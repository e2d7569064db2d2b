"""The figures of a training: which measurement is the best, when it ends early, its pace, and the file of them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_train import CourseEvaluation
from pipeline.core.errors import Incomplete
from pipeline.student.metrics import MetricsFile, Pace, peak_memory
from pipeline.student.order import measured_steps
from pipeline.student.selection import Selection


def taken(values: list[float], **config: Any) -> Selection:
    """What is selected of measurements after steps 1, 2, …, until patience runs out."""
    config = {"keep": "best", "generate": {}, **config}
    selection = Selection(CourseEvaluation.model_validate(config))
    for step, value in enumerate(values, start=1):
        selection.take(step, {selection.config.by: value})
        if selection.is_over:
            break
    return selection


class TestSelection:
    def test_the_lowest_loss_is_the_best_and_the_highest_accuracy(self) -> None:
        assert taken([3.0, 1.0, 2.0]).best_step == 2
        assert taken([0.1, 0.2, 0.9, 0.3], by="accuracy").best_step == 3

    def test_the_first_of_equal_ones_stays(self) -> None:
        assert taken([2.0, 1.0, 1.0]).best_step == 2

    def test_better_is_by_more_than_min_delta(self) -> None:
        """Against the best one, so that many small gains do not add up unseen: 1.75 is 0.25 below 2, 1.5 is more."""
        assert taken([2.0, 1.75, 1.5], min_delta=0.25).best_step == 3
        assert taken([2.0, 1.75], min_delta=0.25).best_step == 1
        assert taken([0.5, 0.75], by="accuracy", min_delta=0.25).best_step == 1

    def test_patience_counts_measurements_in_a_row_without_a_better_one(self) -> None:
        selection = taken([3.0, 3.1, 2.0, 2.1, 2.2, 1.0], patience=2)
        assert (selection.is_over, selection.best_step, selection.since) == (True, 3, 2)

    def test_without_patience_it_never_ends(self) -> None:
        assert not taken([1.0, *[2.0] * 100]).is_over

    def test_goes_on_from_what_a_checkpoint_kept(self) -> None:
        before = taken([3.0, 2.0, 2.5], patience=2)
        after = Selection(before.config)
        after.restore(json.loads(json.dumps(before.facts())))
        assert after == before
        after.take(4, {"eval_loss": 2.2})
        assert after.is_over


class TestMeasuredSteps:
    def test_are_each_so_many_steps_and_the_last_one(self) -> None:
        assert measured_steps(40, steps=12, batch_size=8, every=5) == {5, 10, 12}
        assert measured_steps(40, steps=3, batch_size=8, every=5) == {3}

    def test_are_the_ends_of_epochs_if_nothing_else_is_said(self) -> None:
        assert measured_steps(40, steps=12, batch_size=8, every=None) == {5, 10, 12}


class TestPace:
    def test_leaves_out_what_lies_between_steps(self) -> None:
        pace = Pace()
        for _ in range(2):
            pace.begin()
            pace.end()
            time.sleep(0.05)
            pace.measured()
        facts = pace.take(1000)
        step_s, eval_s, speed = facts["step_s"], facts["eval_s"], facts["tokens_per_s"]
        assert isinstance(step_s, float) and isinstance(eval_s, float) and isinstance(speed, float)
        assert step_s < 0.05 < 0.1 <= eval_s
        assert speed > 1000 / eval_s

    def test_begins_anew_after_each_point(self) -> None:
        pace = Pace(steps=4, step_s=2.0, eval_s=1.0)
        assert pace.take(100) == {"tokens_per_s": 50.0, "step_s": 0.5, "eval_s": 1.0}
        assert pace.take(100) == {}


class TestTheFile:
    def test_has_a_json_object_a_line_at_once(self, tmp_path: Path) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl", None)
        file.append({"step": 1, "loss": 2.5})
        assert file.points() == [{"step": 1, "loss": 2.5}]
        file.append({"step": 2, "grad_norm": math.inf})
        assert (tmp_path / "metrics.jsonl").read_text().splitlines()[1] == '{"step": 2, "grad_norm": null}'

    def test_goes_on_from_what_a_checkpoint_kept_and_from_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        (tmp_path / "kept.jsonl").write_text('{"step": 1}\n')
        path.write_text('{"step": 1}\n{"step": 2}\n{"st')
        assert MetricsFile(path, tmp_path / "kept.jsonl").points() == [{"step": 1}]
        assert MetricsFile(path, None).points() == []

    def test_that_cannot_be_written_is_a_matter_of_the_disk(self, tmp_path: Path) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl", None)
        file.path.unlink()
        file.path.mkdir()
        with pytest.raises(Incomplete, match="the figures of the training cannot be written"):
            file.append({"step": 1})


def test_memory_is_told_in_bytes() -> None:
    assert 10**7 < peak_memory() < 10**11
