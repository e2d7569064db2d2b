"""Intervals, ratios and their pairing."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.text.scoring import accuracy, accuracy_by_task, percentile_interval, resampled_accuracies, score


def answers(right: int, total: int) -> list[bool]:
    return [True] * right + [False] * (total - right)


def test_accuracy() -> None:
    assert accuracy([True, True, False, True]) == 0.75
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])


def test_the_interval_is_about_as_wide_as_the_binomial_says() -> None:
    found = score(answers(800, 1000), answers(10, 1000), answers(700, 1000), resamples=4000, seed=0)
    low, high = found.accuracies["teacher"].ci95 or (0, 0)
    spread = 1.96 * (0.8 * 0.2 / 1000) ** 0.5
    assert low == pytest.approx(0.8 - spread, abs=0.003)
    assert high == pytest.approx(0.8 + spread, abs=0.003)


def test_the_interval_covers_the_truth_about_19_times_in_20() -> None:
    draws = np.random.default_rng(1).random((300, 200)) < 0.7
    covered = 0
    for row in draws:
        low, high = percentile_interval(resampled_accuracies({"a": row}, resamples=400, seed=0)["a"]) or (0, 0)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_retained_and_gap_closed() -> None:
    found = score(answers(90, 100), answers(10, 100), answers(80, 100), resamples=500, seed=0)
    assert found.retained.value == pytest.approx(80 / 90)
    assert found.gap_closed.value == pytest.approx(70 / 80)


def test_ratios_are_paired() -> None:
    # The student is right exactly where the teacher is: whatever is drawn, it keeps all of the accuracy.
    same = [at % 3 != 0 for at in range(300)]
    found = score(same, [False] * 300, same, resamples=500, seed=0)
    assert found.retained.ci95 == (1.0, 1.0)
    assert found.gap_closed.ci95 == (1.0, 1.0)
    # Equal accuracy on other prompts is less certain.
    other = [at % 3 != 1 for at in range(300)]
    low, high = score(same, [False] * 300, other, resamples=500, seed=0).retained.ci95 or (1, 1)
    assert low < 0.95 < 1.05 < high


def test_no_gap_closes_nothing() -> None:
    found = score(answers(50, 100), answers(50, 100), answers(60, 100), resamples=200, seed=0)
    assert (found.gap_closed.value, found.gap_closed.ci95) == (None, None)


def test_a_teacher_without_a_right_answer() -> None:
    found = score([False] * 20, [False] * 20, answers(5, 20), resamples=200, seed=0)
    assert found.retained.value is None


def test_gap_closed_needs_a_teacher_that_is_better_than_the_base() -> None:
    # Divided blindly, a student below both would have closed 200 % of the gap.
    found = score(answers(40, 100), answers(50, 100), answers(30, 100), resamples=200, seed=0)
    assert (found.gap_closed.value, found.gap_closed.ci95) == (None, None)


def test_a_gap_that_may_be_none_has_no_interval() -> None:
    teacher, base = [at % 25 < 13 for at in range(100)], [at % 2 == 0 for at in range(100)]
    found = score(teacher, base, answers(51, 100), resamples=400, seed=0)
    assert found.gap_closed.value is not None
    assert found.gap_closed.ci95 is None


def test_an_accuracy_without_spread_gets_wilsons_interval() -> None:
    found = score([True] * 45, [False] * 45, answers(20, 45), resamples=200, seed=0)
    # Worked by hand: z² / (n + z²) = 3.8415 / 48.8415.
    assert found.accuracies["base"].ci95 == pytest.approx((0.0, 0.078652), abs=1e-5)
    assert found.accuracies["teacher"].ci95 == pytest.approx((0.921348, 1.0), abs=1e-5)
    assert found.gap_closed.ci95 is not None


def test_an_interval_of_a_ratio_that_is_often_undefined_is_not_given() -> None:
    assert percentile_interval(np.array([1.0] * 90 + [np.nan] * 10)) is None
    assert percentile_interval(np.array([1.0] * 99 + [np.nan])) == (1.0, 1.0)


def test_the_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = {"a": answers(30, 70)}
    whole = resampled_accuracies(correct, resamples=50, seed=3)["a"]
    monkeypatch.setattr("pipeline.text.scoring.CHUNK", 7 * 70)
    assert np.array_equal(whole, resampled_accuracies(correct, resamples=50, seed=3)["a"])
    assert not np.array_equal(whole, resampled_accuracies(correct, resamples=50, seed=4)["a"])


def test_models_must_have_answered_the_same_prompts() -> None:
    with pytest.raises(ValueError):
        resampled_accuracies({"a": [True, False], "b": [True]}, resamples=10, seed=0)


def test_tasks() -> None:
    found = accuracy_by_task(["b", "a", None, "b"], [True, False, True, False])
    assert found == {"a": (1, 0.0), "b": (2, 0.5)}
