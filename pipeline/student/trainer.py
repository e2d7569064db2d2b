"""TRL's trainer with our rows: builds the model, trains it, watches the loss, saves a plain model folder."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig

from pipeline.core.config_train import LoraTuning
from pipeline.core.errors import UsageError
from pipeline.core.stage import Json
from pipeline.student.adapters import with_adapters
from pipeline.student.arguments import sft_arguments
from pipeline.student.checkpoints import FOLDER
from pipeline.student.curve import Course, Curve
from pipeline.student.initial import count_parameters, load_base, load_config
from pipeline.student.jobs import TrainJob
from pipeline.student.measure import measure_loss
from pipeline.student.process import Report
from pipeline.student.saver import CURVE, Saver, require_fitting, setting_of, writing
from pipeline.student.saving import save
from pipeline.student.sft import CheckpointedTrainer
from pipeline.student.shards import Tokens, train_file, validation_file
from pipeline.student.tokenise import load_tokenizer


def use_cpu(environ: Mapping[str, str]) -> bool:
    """Whether to train on the CPU: as Accelerate was told, or because there is nothing else."""
    told = environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return told or not torch.accelerator.is_available()


# -------------------------------------------------------------------------------------------------------- training


def train(
    job: TrainJob,
    tokens: Tokens,
    course: Course,
    report: Callable[[Report], None],
    stopping: Callable[[], AbstractContextManager[Callable[[], bool]]],
) -> dict[str, Json] | None:
    """Train and, in the first process, write `model/` and `loss.json`; returns the stage's metrics.

    Args:
        stopping: entered while there is something to lose; gives whether somebody asked to stop. Then a checkpoint is
            written and None returned; after the last step it is too late for that, and the model is saved.

    Raises:
        UsageError: the model cannot be loaded or trained as configured, or the loss diverged.
        Incomplete: a checkpoint, the model or the loss curve cannot be written.
    """
    cpu = use_cpu(os.environ)
    args = SFTConfig(**sft_arguments(job.train, course.plan, scratch=job.workdir / "trainer", use_cpu=cpu))
    _require_world(job, args.world_size)
    torch.manual_seed(job.train.seed)  # the adapters' initial values, before the trainer seeds for itself
    model = load_base(job)
    # Training changes the configs, and loading in float32 hides in what format the weights are stored.
    stored = load_config(job), copy.deepcopy(model.generation_config)
    base_parameters, _ = count_parameters(model)
    if isinstance(job.train.tuning, LoraTuning):
        model = with_adapters(model, job.train.tuning)
    _, trainable = count_parameters(model)
    curve = Curve(job, course, report)
    trainer = make_trainer(model, args, job, course, curve)
    if tokens.validation_rows > 0:
        curve.validation_loss = partial(measure_loss, trainer, Dataset.from_file(str(validation_file(job))))
    with stopping() as asked:
        if not run_steps(trainer, job, course, curve, asked):
            return None
        save(trainer, job, tokens, stored)
        if trainer.accelerator.is_main_process:
            points = sorted(curve.points, key=itemgetter("step"))
            with writing("the loss curve", job.out / "model"):  # on a full disk the model's room is needed
                (job.out / "loss.json").write_text(json.dumps(points, indent=1) + "\n", "utf-8")
    return _metrics(job, tokens, course, curve, base_parameters, trainable)


def make_trainer(model: Any, args: SFTConfig, job: TrainJob, course: Course, curve: Curve) -> CheckpointedTrainer:
    """The trainer over the encoded rows in their order."""
    trainer = CheckpointedTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_file(str(train_file(job))).select(course.order),
        processing_class=load_tokenizer(job.student.model, job.student.revision),
        callbacks=[curve],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_steps(
    trainer: CheckpointedTrainer, job: TrainJob, course: Course, curve: Curve, asked: Callable[[], bool]
) -> bool:
    """Train from the beginning or from `course.start` on; returns False if it was stopped before the end."""
    start, setting = course.start, setting_of(trainer)
    if start is not None:
        require_fitting(start, setting)
        curve.restore(json.loads((start.path / CURVE).read_text("utf-8")))
    trainer.saver = Saver(
        folder=job.workdir / FOLDER,
        config=job.train.checkpoint,
        training=course.training,
        setting=setting,
        start=start,
        curve=curve,
        report=curve.report,
        asked=asked,
        accelerator=trainer.accelerator,
    )
    trainer.add_callback(trainer.saver)
    trainer.train(resume_from_checkpoint=None if start is None else str(start.path))
    return not trainer.saver.is_stopping


def _require_world(job: TrainJob, world_size: int) -> None:
    if world_size != job.world_size:
        what = f"{job.world_size} processes were asked for and {world_size} take part"
        todo = "let train.processes and Accelerate's config agree (distributed_type, num_machines)"
        raise UsageError(what, where=str(job.train.accelerate), todo=todo)


def _metrics(
    job: TrainJob, tokens: Tokens, course: Course, curve: Curve, parameters: int, trainable: int
) -> dict[str, Json]:
    losses = [point["loss"] for point in curve.points if "loss" in point]
    measured = [point["eval_loss"] for point in curve.points if "eval_loss" in point]
    checks: dict[str, Json] = {**tokens.checks}
    return {
        "steps": course.plan.steps,
        "epochs": round(course.plan.steps * job.train.batch_size / course.rows, 6),
        "rows_seen": len(course.order),
        "tokens_seen": int(course.step_tokens.sum()),
        "final_loss": losses[-1],
        "eval_loss": measured[-1] if measured else None,
        "validation_rows": tokens.validation_rows,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "world_size": job.world_size,
        "checks": checks,
    }
