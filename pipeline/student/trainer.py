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
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback
from trl import SFTConfig

from pipeline.core.config import LoraTuning
from pipeline.core.errors import UsageError, boundary
from pipeline.core.stage import Json
from pipeline.student.arguments import sft_arguments
from pipeline.student.checkpoints import FOLDER
from pipeline.student.curve import Course, Curve
from pipeline.student.jobs import TrainJob
from pipeline.student.process import Report
from pipeline.student.saver import CURVE, CheckpointedTrainer, Saver, require_fitting, setting_of, writing
from pipeline.student.shards import Tokens, train_file, validation_file
from pipeline.student.tokenise import load_tokenizer


def use_cpu(environ: Mapping[str, str]) -> bool:
    """Whether to train on the CPU: as Accelerate was told, or because there is nothing else."""
    told = environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return told or not torch.accelerator.is_available()


# ----------------------------------------------------------------------------------------------------------- model


def load_base(job: TrainJob) -> Any:
    """The base model in float32, whatever it is stored in: small updates would be lost in bfloat16 weights."""
    todo = "give a model folder (or hub id and revision) that transformers loads as a causal language model"
    with boundary(UsageError, "the student cannot be loaded", where=job.student.model, todo=todo):
        return AutoModelForCausalLM.from_pretrained(
            job.student.model, revision=job.student.revision, dtype=torch.float32, device_map=None
        )


def load_config(job: TrainJob) -> Any:
    """The base's config as it is stored."""
    return AutoConfig.from_pretrained(job.student.model, revision=job.student.revision)


def with_adapters(model: Any, tuning: LoraTuning) -> Any:
    """The model with LoRA adapters.

    Raises:
        UsageError: the config names modules that the model has not, or that cannot be adapted.
    """
    if isinstance(tuning.target_modules, str):
        targets: str | list[str] = tuning.target_modules
    else:
        targets = list(tuning.target_modules)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.r,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        modules_to_save=list(tuning.modules_to_save) or None,
        ensure_weight_tying=tied and bool(tuning.modules_to_save),
        bias="none",
        init_lora_weights=True,
        use_rslora=False,
        use_dora=False,
    )
    todo = 'name linear modules of the model in train.tuning.target_modules, or "all-linear"'
    with boundary(UsageError, "no adapters for these modules", where="train.tuning", todo=todo):
        adapted = get_peft_model(model, config)
    if hasattr(adapted.get_output_embeddings(), "lora_A"):
        raise lm_head_error()
    return adapted


def lm_head_error() -> UsageError:
    """The error for adapters on the output layer."""
    what = "lm_head cannot have an adapter: the loss reads its weight directly, so the adapter would never be trained"
    return UsageError(what, where="train.tuning.target_modules", todo="leave it out, or name it in modules_to_save")


def count_parameters(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters; tied ones count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


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


def measure_loss(trainer: CheckpointedTrainer, rows: Dataset) -> float:
    """Mean loss in nats over the completion tokens of `rows`.

    Every process measures all of them, so that the figure does not depend on how many there are: the trainer's own
    evaluation averages batches, and fills the last ones up with rows it has counted already.
    """
    model, size = trainer.model_wrapped, trainer.args.per_device_train_batch_size
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), size):
            batch = trainer.data_collator([rows[at] for at in range(start, min(start + size, len(rows)))])
            batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
            total -= float(outputs.log_probs.double().sum())
            count += int(outputs.label_mask.sum())
    model.train()
    return total / count


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


# ---------------------------------------------------------------------------------------------------------- saving


def save(trainer: CheckpointedTrainer, job: TrainJob, tokens: Tokens, stored: tuple[Any, Any]) -> None:
    """Write `out/model`: adapters merged, in the number format the base is stored in, with tokenizer and template.

    Called in all processes, since a sharded model is gathered by all; the first one writes.

    Args:
        stored: config and generation config of the base.

    Raises:
        Incomplete: it cannot be written.
    """
    model = _whole(trainer, job)
    if not trainer.accelerator.is_main_process:
        return
    if isinstance(job.train.tuning, LoraTuning):
        model = model.merge_and_unload()
    config, generation = stored
    folder = job.out / "model"
    dtype = stored_dtype(config)
    model = model.to(dtype)
    model.tie_weights()
    generation.eos_token_id = list(tokens.stops) if len(tokens.stops) > 1 else tokens.stops[0]
    if generation.pad_token_id is None:
        generation.pad_token_id = trainer.processing_class.pad_token_id
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    model.config, model.generation_config = config, generation
    tokenizer = load_tokenizer(job.student.model, job.student.revision)
    with writing("the model", folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def stored_dtype(config: Any) -> torch.dtype:
    """The number format of a checkpoint; float32 where its config says nothing."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _whole(trainer: CheckpointedTrainer, job: TrainJob) -> Any:
    """The trained model with all its weights; under FSDP gathered into a model of its own, in the first process."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model_wrapped)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return None
    model = load_base(job)
    if isinstance(job.train.tuning, LoraTuning):
        model = with_adapters(model, job.train.tuning)
    model.load_state_dict(state)
    return model
