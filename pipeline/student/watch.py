"""What watches a training: measurements on the validation split, and where the figures go while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from datasets import Dataset

from pipeline.student.checkpoints import Checkpoint
from pipeline.student.curve import Curve
from pipeline.student.generated import measure_accuracy, read_asked, refuse_sharded
from pipeline.student.jobs import Judge, TrainJob
from pipeline.student.measure import measure_loss
from pipeline.student.metrics import METRICS, MetricsFile
from pipeline.student.sft import CheckpointedTrainer
from pipeline.student.shards import Tokens, validation_file
from pipeline.student.trackers import Trackers, copy_tensorboard

Measure = Callable[[], dict[str, float]]


def make_measure(
    trainer: CheckpointedTrainer, job: TrainJob, tokens: Tokens, judges: Mapping[str, Judge]
) -> Measure | None:
    """What `train.evaluation` asks for, as one function that all processes call; None where it asks for nothing.

    What has to decide is among it: the config asks for answers, and preflight/deciding.py for validation rows.

    Raises:
        UsageError: no answers can be asked for.
    """
    config, parts = job.train.evaluation, dict[str, Callable[[], float]]()
    if tokens.validation_rows > 0:
        parts["eval_loss"] = partial(measure_loss, trainer, Dataset.from_file(str(validation_file(job))))
    if config.generate is not None:
        refuse_sharded(trainer)
        judge = judges[config.generate.metric]
        asked = read_asked(job, config.generate, trainer.processing_class, tokens.stops, judge)
        parts["accuracy"] = partial(measure_accuracy, trainer, asked)
    return None if not parts else lambda: {name: part() for name, part in parts.items()}


@contextmanager
def figures_sent(curve: Curve, job: TrainJob, start: Checkpoint | None) -> Iterator[None]:
    """Within the block the points of this process, the first one, go to `metrics.jsonl` and the trackers.

    Raises:
        UsageError: the package of a tracker is missing.
        Incomplete: the file cannot be written.
    """
    curve.metrics = MetricsFile(job.workdir / METRICS, None if start is None else start.path / METRICS)
    curve.trackers = Trackers.open(job, curve.metrics.points(), curve.report)
    try:
        yield
    finally:
        curve.trackers.close()


def copy_figures(curve: Curve, workdir: Path, out: Path) -> None:
    """Copy to the artefact what was written of the figures; they stay in the work folder until it goes."""
    if curve.metrics is not None:
        curve.metrics.copy_to(out)
        copy_tensorboard(workdir, out)
