"""The course of a training: what is trained in which order, and the loss curve that comes of it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.core.errors import UsageError
from pipeline.core.stage import Json
from pipeline.student.arguments import Schedule
from pipeline.student.checkpoints import Checkpoint, Training
from pipeline.student.jobs import TrainJob
from pipeline.student.order import Indices
from pipeline.student.process import Report

REPORT_S: Final = 0.5
"""Seconds between two reports of progress, at least."""


@dataclass(frozen=True, slots=True)
class Course:
    """What is trained in which order.

    Attributes:
        plan: see `Schedule`.
        order: index of the row at each place; whole batches.
        rows: rows of the data set, so that `step * batch_size / rows` is the epoch.
        step_tokens: tokens of each step's rows.
        epoch_ends: steps after which the validation loss is measured.
        training: what its checkpoints are labelled with.
        start: the checkpoint that it goes on from; None: from the beginning.
    """

    plan: Schedule
    order: Indices
    rows: int
    step_tokens: Indices
    epoch_ends: frozenset[int]
    training: Training
    start: Checkpoint | None


@dataclass(slots=True)
class Curve(TrainerCallback):
    """Collects the loss curve, reports progress and stops on a loss that is no number.

    The trainer logs every step and this averages, since the trainer forgets in a checkpoint what it has summed up
    since its last point.

    Attributes:
        validation_loss: measures the loss on the validation rows; None where there are none.
        points: {step, epoch, loss, grad_norm, learning_rate}, and {step, epoch, eval_loss} at the end of each epoch.
        loss_sum, loss_steps: of the steps after the last point.
    """

    job: TrainJob
    course: Course
    report: Callable[[Report], None]
    validation_loss: Callable[[], float] | None = None
    points: list[dict[str, float]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_steps: int = 0
    reported_at: float = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Measure at the end of an epoch, report progress."""
        step, steps = state.global_step, self.course.plan.steps
        if self.validation_loss is not None and step in self.course.epoch_ends:
            self._add({"eval_loss": self.validation_loss()}, state)
        if state.is_world_process_zero and (step == steps or time.monotonic() - self.reported_at >= REPORT_S):
            self.reported_at = time.monotonic()
            self.report({"step": step, "tokens": int(self.course.step_tokens[:step].sum())})
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Count the step in; a point is the first step, every `log_steps`-th and the last."""
        state.log_history.clear()  # a list of all steps, which nobody reads, would be in every checkpoint
        if logs is None or "loss" not in logs:
            return
        values = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate")}
        self._require_finite(values, state)
        self.loss_sum, self.loss_steps = self.loss_sum + values["loss"], self.loss_steps + 1
        if state.global_step in (1, self.course.plan.steps) or state.global_step % self.job.train.log_steps == 0:
            values["loss"] = self.loss_sum / self.loss_steps
            self.loss_sum, self.loss_steps = 0.0, 0
            self._add(values, state)

    def facts(self) -> dict[str, Json]:
        """What a checkpoint keeps of it."""
        points: list[Json] = [{**point} for point in self.points]
        return {"points": points, "loss_sum": self.loss_sum, "loss_steps": self.loss_steps}

    def restore(self, facts: dict[str, Any]) -> None:
        """Go on from what `facts` gave."""
        self.points, self.loss_sum, self.loss_steps = facts["points"], facts["loss_sum"], facts["loss_steps"]

    def _add(self, values: dict[str, float], state: TrainerState) -> None:
        self._require_finite(values, state)
        epoch = state.global_step * self.job.train.batch_size / self.course.rows
        self.points.append({"step": state.global_step, "epoch": round(epoch, 6), **values})
        if state.is_world_process_zero:
            self.report({"point": {**self.points[-1]}})

    def _require_finite(self, values: dict[str, float], state: TrainerState) -> None:
        """Refuse values that are infinite or no number.

        Raises:
            UsageError: training diverged.
        """
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if bad:
            todo = "lower train.learning_rate, raise train.warmup_share, or train in float32"
            what = f"training diverged at step {state.global_step}: {bad}"
            raise UsageError(what, where=self.job.student.model, todo=todo)
