"""TRL's trainer with our rows: builds the model, trains it, watches the loss, saves a plain model folder."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig

from pipeline.core.errors import UsageError
from pipeline.core.stage import Json
from pipeline.student.arguments import sft_arguments
from pipeline.student.batches import Collator, Rows, flattens
from pipeline.student.checkpoints import FOLDER
from pipeline.student.curve import Course, Curve
from pipeline.student.initial import Student, load_config, load_student
from pipeline.student.jobs import Judge, TrainJob
from pipeline.student.liger import require_liger, use_liger
from pipeline.student.memory import MemoryEstimate, estimate
from pipeline.student.preflight.before import Before
from pipeline.student.process import Report
from pipeline.student.quantised import kept_as_they_are
from pipeline.student.saver import CURVE, Saver, require_fitting, setting_of, writing
from pipeline.student.saving import save
from pipeline.student.selection import Selection
from pipeline.student.sft import CheckpointedTrainer
from pipeline.student.shards import Tokens, train_file
from pipeline.student.tokenise import load_tokenizer
from pipeline.student.watch import copy_figures, figures_sent, make_measure


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
    judges: Mapping[str, Judge],
    before: Before,
) -> dict[str, Json] | None:
    """Train and, in the first process, write `model/`, `loss.json` and `metrics.jsonl`; returns the stage's metrics.

    Args:
        stopping: entered while there is something to lose; gives whether somebody asked to stop. Then a checkpoint is
            written and None returned; after the last step it is too late for that, and the model is saved.
        before: checks the model in the first process; the others wait for it where they first meet.

    Raises:
        UsageError: the model cannot be loaded or trained as configured, or the loss diverged.
        Incomplete: a checkpoint, the model or the loss curve cannot be written.
    """
    prepared = prepare(job, tokens, course, report, before.memory)
    student, stored, curve, trainer = prepared.student, prepared.stored, prepared.curve, prepared.trainer
    if trainer.accelerator.is_main_process:
        before.model(trainer, tokens, prepared.memory)
    curve.measure = make_measure(trainer, job, tokens, judges)
    with stopping() as asked:
        if not run_steps(trainer, job, course, curve, asked):
            return None
        trainer.saver.load_best(trainer)
        save(trainer, job, tokens, student, stored)
        if trainer.accelerator.is_main_process:
            points = sorted(curve.points, key=itemgetter("step"))
            with writing("the loss curve", job.out / "model"):  # on a full disk the model's room is needed
                (job.out / "loss.json").write_text(json.dumps(points, indent=1) + "\n", "utf-8")
                copy_figures(curve, job.workdir, job.out)
    return {**_metrics(job, tokens, course, curve, student), "memory": prepared.memory.facts()}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A training of which not one step was taken.

    Attributes:
        student: the model.
        stored: config and generation config of the base, as they are stored.
        curve: collects what happens.
        trainer: over the rows in their order.
        memory: that this process will need, estimated before the model was loaded.
    """

    student: Student
    stored: tuple[Any, Any]
    curve: Curve
    trainer: CheckpointedTrainer
    memory: MemoryEstimate


def prepare(
    job: TrainJob,
    tokens: Tokens,
    course: Course,
    report: Callable[[Report], None],
    check: Callable[[MemoryEstimate], None] = lambda memory: None,
) -> Prepared:
    """Load the student and make the trainer; in all processes.

    Args:
        check: told by the first process what will be needed, before anything is loaded; it may refuse.

    Raises:
        UsageError: the model cannot be loaded or trained as configured.
    """
    cpu = use_cpu(os.environ)
    args = SFTConfig(**sft_arguments(job.train, course.plan, scratch=job.workdir / "trainer", use_cpu=cpu))
    _require_world(job, args.world_size)
    memory = estimate(job, longest=int(tokens.checks["longest"]), device=args.device)
    if args.process_index == 0:
        report({"memory": {**memory.facts(), "available": memory.available}, "told": str(memory)})
        check(memory)
    if job.train.liger:
        require_liger(load_config(job), args.device)
    torch.manual_seed(job.train.seed)  # the adapters' initial values, before the trainer seeds for itself
    student = load_student(job, tokens.stops, args.device)
    if job.train.liger:
        use_liger(student.model)
    # Training changes the configs, and loading in float32 hides in what format the weights are stored.
    stored = load_config(job), copy.deepcopy(student.model.generation_config)
    curve = Curve(job, course, report, Selection(job.train.evaluation))
    with kept_as_they_are(student.model):
        trainer = make_trainer(student.model, args, job, course, curve)
    return Prepared(student, stored, curve, trainer, memory)


def make_trainer(model: Any, args: SFTConfig, job: TrainJob, course: Course, curve: Curve) -> CheckpointedTrainer:
    """The trainer over the encoded rows in their order."""
    tokenizer = load_tokenizer(job.student.model, job.student.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    packing = job.train.packing
    trainer = CheckpointedTrainer(
        model=model,
        args=args,
        data_collator=Collator(tokenizer.pad_token_id, packing, flat=packing and flattens(job.train.attention)),
        train_dataset=Dataset.from_file(str(train_file(job))),
        processing_class=tokenizer,
        callbacks=[curve],
    )
    trainer.train_dataset = Rows.open(train_file(job), course.order)  # TRL asks for a `Dataset`, its loop does not
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
    if job.train.evaluation.keep == "best":
        curve.keep_best = partial(trainer.saver.keep_best, trainer)
        trainer.saver.restore_best()
    with figures_sent(curve, job, start) if trainer.accelerator.is_main_process else nullcontext():
        trainer.train(resume_from_checkpoint=None if start is None else str(start.path))
    return not trainer.saver.is_stopping


def _require_world(job: TrainJob, world_size: int) -> None:
    if world_size != job.world_size:
        what = f"{job.world_size} processes were asked for and {world_size} take part"
        todo = "let train.processes and Accelerate's config agree (distributed_type, num_machines)"
        raise UsageError(what, where=str(job.train.accelerate), todo=todo)


def _metrics(job: TrainJob, tokens: Tokens, course: Course, curve: Curve, student: Student) -> dict[str, Json]:
    losses = [point["loss"] for point in curve.points if "loss" in point]
    checks: dict[str, Json] = {**tokens.checks}
    seen = curve.last_step * job.train.batch_size
    return {
        "steps": curve.last_step,
        "planned_steps": course.plan.steps,
        "stopped_early": curve.is_early,
        "best_step": curve.selection.best_step,
        "epochs": round(seen / course.rows, 6),
        "rows_seen": seen,
        "tokens_seen": course.tokens(curve.last_step),
        "final_loss": losses[-1],
        **_measured(curve),
        "validation_rows": tokens.validation_rows,
        "parameters": student.parameters,
        "trainable_parameters": student.trainable,
        "trained_tokens_of_template": [*student.token_texts],
        "world_size": job.world_size,
        "checks": checks,
    }


def _measured(curve: Curve) -> dict[str, Json]:
    """The figures of the weights that became the student: of the best measurement if they were kept, else the last."""
    step = curve.last_step if curve.keep_best is None else curve.selection.best_step
    found = [point for point in curve.points if point["step"] == step and "loss" not in point]
    return {name: found[-1].get(name) if found else None for name in ("eval_loss", "accuracy")}
