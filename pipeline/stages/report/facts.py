"""The numbers of a report, read from the artefacts into plain dataclasses; how they are shown: page.py."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import pyarrow.compute as pc

from pipeline.core.lineage import Manifest
from pipeline.stages.report.artefacts import KINDS, Artefacts

ROW_STAGES = KINDS[:-1]
"""The steps that pass rows on; `evaluate` takes the test prompts, which none of the others sees."""

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Interval:
    """A share with its 95 % confidence interval; None where it is not defined (the teacher is never right)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Model:
    """What was measured of one model. None: not known (an API says neither size nor speed).

    Attributes:
        role: "teacher", "base" or "student".
        accuracy, parameters, bytes: as they are.
        answers_per_second: median of `passes` passes.
        by_task: task -> (prompts, accuracy).
        cut: answers that ended at the cap on tokens.
        prompt_too_long: prompts that left the model no room to answer.
    """

    role: str
    accuracy: Interval
    parameters: int | None
    bytes: int | None
    answers_per_second: float | None
    passes: int
    by_task: Mapping[str, tuple[int, float]]
    cut: int
    prompt_too_long: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`evaluation.json`.

    Attributes:
        n: test prompts.
        metric, engine, precision: how answers were compared and computed.
        bootstrap: resamples behind each interval.
        speed_prompts, batch_size: prompts of a pass of the speed measurement, and how many at once.
        models: teacher, base, student.
        method: the way of asking that served the base best on the validation prompts.
        methods: way of asking -> the base's accuracy on `methods_n` validation prompts; empty where there are none.
        strict_accuracy: the base's accuracy on the test prompts when asked like the student.
        retained: the student's accuracy over the teacher's.
        gap_closed: (student - base) / (teacher - base); undefined unless the teacher is better than the base.
    """

    n: int
    metric: str
    engine: str
    precision: str
    bootstrap: int
    speed_prompts: int
    batch_size: int
    models: tuple[Model, Model, Model]
    method: str
    methods: Mapping[str, float]
    methods_n: int
    strict_accuracy: float
    retained: Interval
    gap_closed: Interval

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, sorted; empty where the prompts have none."""
        return sorted({task for model in self.models for task in model.by_task})


def read_evaluation(artefacts: Artefacts) -> Evaluation:
    """Read `evaluation.json`."""
    found = artefacts.json("evaluate", "evaluation.json")
    base = found["base"]
    has_gap = found["teacher"]["accuracy"] > base["accuracy"]
    return Evaluation(
        n=found["n"],
        metric=found["metric"],
        engine=found["engine"],
        precision=found["precision"],
        bootstrap=found["bootstrap"],
        speed_prompts=found["speed"]["prompts"],
        batch_size=found["speed"]["batch_size"],
        models=(_model("teacher", found["teacher"]), _model("base", base), _model("student", found["student"])),
        method=base["method"],
        methods=base["methods"],
        methods_n=base["methods_n"],
        strict_accuracy=base["strict_accuracy"],
        retained=_interval(found["retained"], found["retained_ci95"]),
        gap_closed=_interval(found["gap_closed"], found["gap_closed_ci95"]) if has_gap else Interval(None, None, None),
    )


def _model(role: str, found: Mapping[str, Any]) -> Model:
    return Model(
        role=role,
        accuracy=_interval(found["accuracy"], found["ci95"]),
        parameters=found["parameters"],
        bytes=found["bytes"],
        answers_per_second=found["answers_per_second"],
        passes=len(found["answers_per_second_passes"]),
        by_task={task: (scored["n"], scored["accuracy"]) for task, scored in found["by_task"].items()},
        cut=found["cut"],
        prompt_too_long=found["prompt_too_long"],
    )


def _interval(value: float | None, ends: list[float | None] | None) -> Interval:
    low, high = ends if ends is not None else (None, None)
    return Interval(value, low, high)


# ------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the run as its manifest tells it; `parts` is the indented JSON of what its key is made of."""

    kind: str
    key: str
    content: str
    rows_in: int
    rows_out: int
    rejected: tuple[tuple[str, int], ...]
    parts: str

    @property
    def lost(self) -> int:
        """Rows that left with a reason."""
        return sum(number for _, number in self.rejected)


def read_steps(artefacts: Artefacts) -> tuple[Step, ...]:
    """All upstream steps in order; reasons by falling count."""
    return tuple(_step(kind, artefacts.manifests[kind]) for kind in KINDS)


def _step(kind: str, manifest: Manifest) -> Step:
    return Step(
        kind=kind,
        key=manifest.key,
        content=manifest.content,
        rows_in=manifest.rows_in,
        rows_out=manifest.rows_out,
        rejected=tuple(sorted(manifest.rejected.items(), key=lambda item: (-item[1], item[0]))),
        parts=json.dumps(manifest.parts, indent=2, sort_keys=True, ensure_ascii=False),
    )


def read_splits(artefacts: Artefacts) -> dict[str, int]:
    """Prompts per split, as stage `prompts` assigned them."""
    splits: Counter[str] = Counter({"train": 0, "validation": 0, "test": 0})
    for table in artefacts.shards("prompts", "rows", ["split"]):
        for item in pc.value_counts(table["split"]).to_pylist():
            splits[item["values"]] += item["counts"]
    return dict(splits)


# ------------------------------------------------------------------------------------------------- loss curve


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Loss by optimizer step: of the training batches, and of the validation rows where it was taken.

    Points that are NaN or infinite are not among them but counted in `not_finite`.
    """

    train: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]
    not_finite: int


def read_loss(artefacts: Artefacts) -> LossCurve:
    """Read `loss.json`: a list of points with `step` and `loss` (a batch) or `eval_loss` (the validation rows)."""
    points = artefacts.json("train", "loss.json")
    train, validation = _series(points, "loss"), _series(points, "eval_loss")
    finite = [tuple(point for point in series if isfinite(point[1])) for series in (train, validation)]
    return LossCurve(finite[0], finite[1], len(train) + len(validation) - len(finite[0]) - len(finite[1]))


def _series(points: list[dict[str, Any]], name: str) -> tuple[tuple[int, float], ...]:
    return tuple((point["step"], point[name]) for point in points if point.get(name) is not None)


# ----------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, slots=True)
class Source:
    """Where prompts or completions come from and under which terms; "unknown" where nothing says it."""

    name: str
    kind: str
    source: str
    revision: str
    license: str
    prompts: int | None
    rows: int | None


def read_sources(artefacts: Artefacts) -> tuple[Source, ...]:
    """The prompt sets by name, then the teachers by name."""
    told = artefacts.json("prompts", "sources.json")
    prompts = _prompts_by_set(artefacts)
    shipped: Any = artefacts.manifests["dataset"].metrics["sources"]
    sets = [_prompt_set(name, told[name], prompts[name], shipped["prompt_sets"][name]["rows"]) for name in sorted(told)]
    teachers = shipped["teachers"]
    facts: Any = artefacts.manifests["generate"].metrics["teachers"]
    return (*sets, *(_teacher(name, facts[name], teachers[name]) for name in sorted(teachers)))


def _prompt_set(name: str, facts: Mapping[str, Any], prompts: int, rows: int) -> Source:
    return Source(name, "prompt set", facts["source"], facts["revision"], facts["license"], prompts, rows)


def _teacher(name: str, facts: Mapping[str, Any], shipped: Mapping[str, Any]) -> Source:
    """A teacher; its revision is the digest of its weights, file or name, which is what its answers are filed under."""
    told = [facts[key] for key in ("model", "origin") if facts[key] is not None]
    licenses = ", ".join(shipped["licenses"])
    return Source(name, "teacher", ", ".join(told) or UNKNOWN, facts["identity"][:12], licenses, None, shipped["rows"])


def _prompts_by_set(artefacts: Artefacts) -> Counter[str]:
    prompts: Counter[str] = Counter()
    for table in artefacts.shards("prompts", "rows", ["prompt_set"]):
        for item in pc.value_counts(table["prompt_set"]).to_pylist():
            prompts[item["values"]] += item["counts"]
    return prompts
