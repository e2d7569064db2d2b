"""Writes checkpoints out of a running training and loads them: when it is time, and when a signal asks to stop."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from accelerate.utils import save_fsdp_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.fsdp import get_fsdp_ckpt_kwargs
from trl import SFTTrainer

from pipeline.core.config_train import CheckpointConfig
from pipeline.core.errors import Incomplete, PipelineError, UsageError, boundary
from pipeline.core.stage import Json
from pipeline.student.checkpoints import (
    Checkpoint,
    Setting,
    Training,
    best_staging,
    check_best,
    commit,
    commit_best,
    link_best,
    prune,
    restore_best,
    size_of,
    staging,
)
from pipeline.student.curve import Curve
from pipeline.student.process import Report

WEIGHTS: Final = "trained.safetensors"
CURVE: Final = "curve.json"
TRAINER_STATE: Final = "trainer_state.json"
"""The trainer's name for it."""


@dataclass(slots=True)
class Saver(TrainerCallback):
    """Decides after each step, for all processes alike, whether to write a checkpoint and whether to stop.

    Attributes:
        folder: where checkpoints lie.
        config: when they are written.
        training, setting: what they are labelled with.
        start: the one that this training goes on from.
        asked: whether somebody asked to stop; one process that was asked suffices.
        accelerator: the trainer's.
        is_stopping: a checkpoint was written because somebody asked to stop.
    """

    folder: Path
    config: CheckpointConfig
    training: Training
    setting: Setting
    start: Checkpoint | None
    curve: Curve
    report: Callable[[Report], None]
    asked: Callable[[], bool]
    accelerator: Any
    saved_at: float = 0.0
    is_stopping: bool = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report how many processes take part (each counts itself) and from where the training goes on."""
        self.saved_at = time.monotonic()
        (processes,) = self._sum([1])
        if self.accelerator.is_main_process:
            before = None if self.start is None else self.start.step
            changed: list[Json] = [] if self.start is None else [*changes(self.start.setting, self.setting)]
            self.report(
                {
                    "started": {
                        "world_size": processes,
                        "steps": self.training.steps,
                        "resumed_from": before,
                        "changed": changed,
                    }
                }
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for a checkpoint if one is due or somebody asked to stop; clocks differ, so the first process decides.

        After the last step neither matters: the model itself is saved next.
        """
        if state.global_step == self.curve.last_step:
            return control
        due = self._is_due(state.global_step) and self.accelerator.is_main_process
        saves, stops = self._sum([due, self.asked()])
        self.is_stopping = stops > 0
        control.should_save = saves > 0 or self.is_stopping
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop after the checkpoint, if it was written for that."""
        control.should_training_stop = control.should_training_stop or self.is_stopping
        return control

    def save(self, trainer: SFTTrainer) -> None:
        """Write and commit a checkpoint; called in all processes, all of which leave when it is committed.

        Raises:
            Incomplete: it cannot be written; earlier checkpoints are untouched.
        """
        begun, step = time.monotonic(), trainer.state.global_step
        staged = staging(self.folder, step)
        with _writing_checkpoint(staged):
            self._write(trainer, staged)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with _writing_checkpoint(staged):
                checkpoint = commit(self.folder, step, self.training, self.setting)
                prune(self.folder, self.config.keep)
            seconds = round(time.monotonic() - begun, 3)
            self.report({"checkpoint": {"step": step, "bytes": size_of(checkpoint), "seconds": seconds}})
        # A process that ended now, with an error of its own, would make the launcher end the first one as well.
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _write(self, trainer: SFTTrainer, staged: Path) -> None:
        staged.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            if not trainer.is_fsdp_enabled:
                save_trained(self.accelerator.unwrap_model(trainer.model), staged / WEIGHTS)
            trainer.state.save_to_json(str(staged / TRAINER_STATE))
            (staged / CURVE).write_text(json.dumps(self.curve.facts()), "utf-8")
            if self.curve.metrics is not None:
                self.curve.metrics.copy_to(staged)
            if self.best_step is not None:
                link_best(self.folder, self.best_step, staged)
        # With FSDP this writes the model as well. The random states are each process's own.
        trainer._save_optimizer_and_scheduler(str(staged))
        trainer._save_rng_state(str(staged))

    @property
    def best_step(self) -> int | None:
        """The step whose weights are kept as the best so far."""
        return None if self.curve.keep_best is None else self.curve.selection.best_step

    def keep_best(self, trainer: SFTTrainer) -> None:
        """Keep the weights as they are: those of the best measurement so far; called in all processes.

        Raises:
            Incomplete: they cannot be written; those before and the checkpoints are untouched.
        """
        step = trainer.state.global_step
        staged = best_staging(self.folder, step)
        with _writing_best(staged):
            if self.accelerator.is_main_process:
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            if trainer.is_fsdp_enabled:
                plugin = self.accelerator.state.fsdp_plugin
                save_fsdp_model(plugin, self.accelerator, trainer.model, str(staged), **get_fsdp_ckpt_kwargs())
            elif self.accelerator.is_main_process:
                save_trained(self.accelerator.unwrap_model(trainer.model), staged / WEIGHTS)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with _writing_best(staged):
                commit_best(self.folder, step, self.training, self.setting)

    def restore_best(self) -> None:
        """Take the best weights back from the checkpoint that the training goes on from.

        Raises:
            Incomplete: they cannot be written.
        """
        if self.accelerator.is_main_process:
            with writing("the best weights", best_staging(self.folder, self.best_step or 0)):
                restore_best(self.folder, self.start, self.best_step)

    def load_best(self, trainer: SFTTrainer) -> None:
        """Put the best weights into the model, for it to be saved; called in all processes.

        Raises:
            CorruptArtefact: they are not what was written.
        """
        step = self.best_step
        if step is None or step == trainer.state.global_step:
            return
        self.accelerator.wait_for_everyone()
        path = check_best(self.folder, step, self.training)
        trainer._load_from_checkpoint(str(path), trainer.model)

    def _is_due(self, step: int) -> bool:
        """Whether it is time."""
        minutes, steps = self.config.minutes, self.config.steps
        by_clock = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        return by_clock or (steps is not None and step % steps == 0)

    def _sum(self, numbers: list[int]) -> list[int]:
        """Sums over all processes."""
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self.accelerator.device)
        sums: list[int] = self.accelerator.reduce(tensor, reduction="sum").tolist()
        return sums


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong while `folder` is written into `Incomplete` and give the disk its room back.

    Torch and safetensors say a full disk in errors of their own (RuntimeError, SafetensorError), not as OSError. A
    ValueError is about what is written.

    Args:
        what: subject of the sentence "… cannot be written".
    """
    todo = "make room or give write access, then run the same command again; earlier checkpoints are kept"
    told = f"{what} cannot be written"
    try:
        with boundary(Incomplete, told, where=str(folder.parent), todo=todo):
            try:
                yield
            except ValueError as error:
                fix = "correct what is named, then run the same command again; checkpoints are kept"
                raise Incomplete(f"{told}: {error}", where=str(folder.parent), todo=fix) from error
    except PipelineError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


_writing_checkpoint = partial(writing, "a checkpoint")
_writing_best = partial(writing, "the best weights")


def setting_of(trainer: SFTTrainer) -> Setting:
    """How this trainer trains."""
    return Setting(
        world_size=trainer.accelerator.num_processes,
        micro_batch_size=trainer.args.per_device_train_batch_size,
        sharded=bool(trainer.is_fsdp_enabled),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def changes(before: Setting, now: Setting) -> list[str]:
    """`world_size: 2 -> 1` for each difference."""
    old, new = asdict(before), asdict(now)
    return [f"{name}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]


def require_fitting(start: Checkpoint, setting: Setting) -> None:
    """Refuse a checkpoint whose files this launch cannot read.

    Raises:
        UsageError: one launch shares the model among its processes (FSDP), the other does not.
    """
    if start.setting.sharded != setting.sharded:
        how = "by processes that shared one model (FSDP)" if start.setting.sharded else "without FSDP"
        todo = f"launch it as before, or remove {start.path.parent} to train from the beginning"
        raise UsageError(f"the checkpoint was written {how}, unlike this launch", where=str(start.path), todo=todo)


# ----------------------------------------------------------------------------------------------------------- weights


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that are trained, and the buffers; tied ones once. They share the model's memory."""
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in wanted}


def save_trained(model: Any, path: Path) -> None:
    """Write what is trained of a model."""
    save_file({name: tensor.contiguous() for name, tensor in trained_tensors(model).items()}, path)


def load_trained(model: Any, path: Path) -> None:
    """Put the tensors of a checkpoint into the model, all of them and no others.

    Raises:
        UsageError: the model has other tensors.
    """
    tensors, trained = load_file(path), trained_tensors(model)
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in trained.items()}:
        todo = f"install the versions that wrote it, or remove {path.parents[1]} to train from the beginning"
        raise UsageError("the checkpoint's weights do not fit the model", where=str(path), todo=todo)
    for name, tensor in tensors.items():
        trained[name].copy_(tensor)
