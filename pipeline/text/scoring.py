"""Accuracies with percentile-bootstrap intervals (Efron & Tibshirani 1993, chapter 13). Pure numpy.

Prompts are resampled with replacement, and one resample serves all models, so that ratios of their accuracies are
paired. Where every answer of a model is right, or every one wrong, the bootstrap knows no spread, and the interval of
its accuracy is Wilson's (1927, doi:10.2307/2276774); intervals of ratios are the bootstrap's everywhere. Not covered:
the spread of generation itself (answers are greedy) and of training (one run).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

LEVEL: Final = 0.95
CHUNK: Final = 2_000_000
"""Draws in memory at once."""
MIN_DEFINED: Final = 0.95
"""Share of the resamples in which a ratio must be defined for its interval to be given."""

Bools: TypeAlias = npt.NDArray[np.bool_]
Floats: TypeAlias = npt.NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; None where it is not defined."""

    value: float | None
    ci95: Interval | None


def accuracy(correct: Sequence[bool]) -> float:
    """Share of right answers.

    Raises:
        ValueError: no answers.
    """
    if len(correct) == 0:
        raise ValueError("no answers to score")
    return float(np.mean(np.asarray(correct, dtype=bool)))


def resampled_accuracies(correct: Mapping[str, Sequence[bool]], *, resamples: int, seed: int) -> dict[str, Floats]:
    """Each model's accuracy in each of `resamples` bootstrap samples of the prompts, the same samples for all.

    Args:
        correct: model -> whether its answer to each prompt is right; the same prompts in the same order.

    Raises:
        ValueError: the models answered different numbers of prompts, or none.
    """
    names = list(correct)
    right = np.asarray([np.asarray(correct[name], dtype=bool) for name in names], dtype=np.float64)
    if right.ndim != 2 or right.shape[1] == 0:
        raise ValueError("the models must have answered the same prompts, at least one")
    prompts = right.shape[1]
    generator = np.random.Generator(np.random.PCG64(seed % 2**63))
    step = max(1, CHUNK // prompts)
    parts: list[Floats] = []
    for start in range(0, resamples, step):
        drawn = generator.integers(0, prompts, size=(min(step, resamples - start), prompts))
        parts.append(np.stack([row[drawn].mean(axis=1) for row in right]))
    return dict(zip(names, np.concatenate(parts, axis=1), strict=True))


def percentile_interval(samples: Floats) -> Interval | None:
    """The central 95 % of the samples; None where too many of them are not finite."""
    finite = samples[np.isfinite(samples)]
    if len(finite) < MIN_DEFINED * len(samples) or len(finite) == 0:
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson_interval(right: int, total: int) -> Interval:
    """The 95 % score interval of a share (Wilson 1927)."""
    share, square = right / total, NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    centre = (share + square / (2 * total)) / (1 + square / total)
    spread = math.sqrt(square * (share * (1 - share) / total + square / (4 * total**2))) / (1 + square / total)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def accuracy_interval(correct: Sequence[bool], samples: Floats) -> Interval | None:
    """The percentile interval of a model's accuracy; Wilson's where all its answers are right, or all wrong.

    Args:
        samples: its accuracy in the resamples.
    """
    right, total = sum(correct), len(correct)
    return wilson_interval(right, total) if right in (0, total) else percentile_interval(samples)


def retained(student: float | Floats, teacher: float | Floats) -> Floats:
    """student / teacher; NaN where the teacher is never right."""
    return _divide(np.asarray(student), np.asarray(teacher))


def gap_closed(student: float | Floats, base: float | Floats, teacher: float | Floats) -> Floats:
    """(student − base) / (teacher − base); NaN unless the teacher is better than the base: else there is no gap."""
    return _divide(np.asarray(student) - base, np.asarray(teacher) - base)


def _divide(above: Floats, below: Floats) -> Floats:
    """above / below; NaN unless `below` is above zero."""
    undefined = np.full(np.broadcast(above, below).shape, np.nan)
    ratio: Floats = np.divide(above, below, out=undefined, where=below > 0)
    return ratio


@dataclass(frozen=True, slots=True)
class Scores:
    """What is known of teacher, base and student on one set of prompts.

    Attributes:
        accuracies: model -> accuracy with its interval.
        retained, gap_closed: see the functions.
    """

    accuracies: Mapping[str, Estimate]
    retained: Estimate
    gap_closed: Estimate


def score(
    teacher: Sequence[bool], base: Sequence[bool], student: Sequence[bool], *, resamples: int, seed: int
) -> Scores:
    """Accuracies and how they compare, with intervals.

    Args:
        teacher, base, student: whether the answer to each prompt is right, in the same order.
    """
    correct = {"teacher": teacher, "base": base, "student": student}
    drawn = resampled_accuracies(correct, resamples=resamples, seed=seed)
    seen = {name: accuracy(right) for name, right in correct.items()}
    return Scores(
        accuracies={name: Estimate(seen[name], accuracy_interval(correct[name], drawn[name])) for name in correct},
        retained=_estimate(retained(seen["student"], seen["teacher"]), retained(drawn["student"], drawn["teacher"])),
        gap_closed=_estimate(
            gap_closed(seen["student"], seen["base"], seen["teacher"]),
            gap_closed(drawn["student"], drawn["base"], drawn["teacher"]),
        ),
    )


def _estimate(value: Floats, samples: Floats) -> Estimate:
    if not np.isfinite(value):
        return Estimate(None, None)
    return Estimate(float(value), percentile_interval(samples))


def accuracy_by_task(tasks: Sequence[str | None], correct: Sequence[bool]) -> dict[str, tuple[int, float]]:
    """Task -> (prompts, accuracy), sorted by name; prompts without a task are left out."""
    rows: dict[str, list[bool]] = {}
    for task, right in zip(tasks, correct, strict=True):
        if task is not None:
            rows.setdefault(task, []).append(right)
    return {task: (len(rights), accuracy(rights)) for task, rights in sorted(rows.items())}
