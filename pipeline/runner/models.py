"""The models that were trained on a data set, and how they were measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pipeline.core.stage import Json
from pipeline.runner.catalogue import Catalogue, Held, part


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation of a model.

    Attributes:
        path: its artefact.
        runs: names of the runs that hold it.
        metric: name of the metric.
        questions: how many test prompts were asked.
        accuracy, ci95: of the model; None where the manifest does not say.
        retained: share of the teacher's accuracy.
    """

    path: Path
    runs: tuple[str, ...]
    metric: str | None
    questions: int | None
    accuracy: float | None
    ci95: tuple[float, ...] | None
    retained: float | None


@dataclass(frozen=True, slots=True)
class Model:
    """One trained model.

    Attributes:
        path: its folder.
        runs: names of the runs that hold it; none: they went on to another one.
        content: digest of its files.
        steps: of the optimiser.
        rows: of the training split that it was trained on.
        evaluations: of it.
    """

    path: Path
    runs: tuple[str, ...]
    content: str
    steps: int | None
    rows: int
    evaluations: tuple[Evaluated, ...]


def models_on(catalogue: Catalogue, content: str) -> tuple[Model, ...]:
    """The models that were trained on a data set of this content, those of runs first."""
    return tuple(model_of(catalogue, train) for train in catalogue.made_of("train", "dataset", content))


def model_of(catalogue: Catalogue, train: Held) -> Model:
    """The model of a training."""
    manifest = train.manifest
    return Model(
        path=train.path / "model",
        runs=train.runs,
        content=manifest.content,
        steps=cast(int | None, manifest.metrics.get("steps")),
        rows=manifest.rows_out,
        evaluations=tuple(map(_evaluated, catalogue.made_of("evaluate", "train", manifest.content))),
    )


def _evaluated(held: Held) -> Evaluated:
    metrics: Json = held.manifest.metrics
    interval = cast(list[float] | None, part(metrics, "student", "ci95"))
    return Evaluated(
        path=held.path,
        runs=held.runs,
        metric=cast(str | None, part(metrics, "metric")),
        questions=cast(int | None, part(metrics, "n")),
        accuracy=cast(float | None, part(metrics, "student", "accuracy")),
        ci95=None if interval is None else tuple(interval),
        retained=cast(float | None, part(metrics, "retained")),
    )
