"""The course of a training: what is trained in which order, and the curve of figures that comes of it."""

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
from pipeline.student.metrics import MetricsFile, Pace, peak_memory, utc_now
from pipeline.student.order import Indices
from pipeline.student.process import Report
from pipeline.student.selection import Selection
from pipeline.student.trackers import Trackers

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
        measured: steps after which the student is measured on the validation split; the last one is among them.
        training: what its checkpoints are labelled with.
        start: the checkpoint that it goes on from; None: from the beginning.
    """

    plan: Schedule
    order: Indices
    rows: int
    step_tokens: Indices
    measured: frozenset[int]
    training: Training
    start: Checkpoint | None

    def tokens(self, step: int) -> int:
        """Tokens of the rows of all steps up to this one."""
        return int(self.step_tokens[:step].sum())


@dataclass(slots=True)
class Curve(TrainerCallback):
    """Collects the figures, reports progress, and ends the training when measurements stop getting better.

    The trainer logs every step and this averages, since the trainer forgets in a checkpoint what it has summed up
    since its last point.

    Attributes:
        measure: measures the student: `eval_loss`, `accuracy`, as the config asks; None where there is nothing.
        keep_best: keeps the weights, of a measurement that is the best so far; None where they are not asked for.
        metrics, trackers: where the first process sends the points.
        selection: which measurement is the best one.
        points: {step, epoch, loss, grad_norm, learning_rate}, and {step, epoch, eval_loss, accuracy} of measurements:
            nothing that a clock decides.
        loss_sum, loss_steps: of the steps after the last point.
        last_step: the step after which the training ended, or will.
        pace, pending: of the point of `metrics.jsonl` that is being gathered; sent_step: of the one before.
    """

    job: TrainJob
    course: Course
    report: Callable[[Report], None]
    selection: Selection
    measure: Callable[[], dict[str, float]] | None = None
    keep_best: Callable[[], None] | None = None
    metrics: MetricsFile | None = None
    trackers: Trackers | None = None
    points: list[dict[str, float]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_steps: int = 0
    last_step: int = 0
    reported_at: float = 0.0
    pace: Pace = field(default_factory=Pace)
    pending: dict[str, Json] = field(default_factory=dict)
    sent_step: int = 0

    def __post_init__(self) -> None:
        """The last step, unless patience runs out."""
        self.last_step = self.course.plan.steps

    @property
    def is_early(self) -> bool:
        """Whether patience has run out before the last planned step."""
        return self.last_step < self.course.plan.steps

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say where the training begins, so that rates count from there."""
        self.sent_step = state.global_step
        if state.is_world_process_zero:
            self.report({"begun": state.global_step, "tokens": self.course.tokens(state.global_step)})

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock, which what follows a step (a checkpoint) has no part in."""
        self.pace.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Measure the student if it is time, keep it if it is the best so far, and end when patience has run out."""
        self.pace.end()
        if self.measure is not None and state.global_step in self.course.measured:
            values = self.measure()
            self._add(values, state)
            self.pending |= values
            if self.selection.config.decides:
                is_best = self.selection.take(state.global_step, values)
                if is_best and self.keep_best is not None:
                    self.keep_best()
                if self.selection.is_over:
                    self.last_step = state.global_step
                    control.should_training_stop = True
                    if state.is_world_process_zero:
                        self.report({"ended_early": self.last_step, "best_step": self.selection.best_step})
            self.pace.measured()
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
        self._report_step(state, values["loss"])
        self.loss_sum, self.loss_steps = self.loss_sum + values["loss"], self.loss_steps + 1
        if state.global_step in (1, self.last_step) or state.global_step % self.job.train.log_steps == 0:
            values["loss"] = self.loss_sum / self.loss_steps
            self.loss_sum, self.loss_steps = 0.0, 0
            self._add(values, state)
            self.pending |= values
        if self.pending:
            self._send(state)

    def facts(self) -> dict[str, Json]:
        """What a checkpoint keeps of it."""
        points: list[Json] = [{**point} for point in self.points]
        sums: dict[str, Json] = {"loss_sum": self.loss_sum, "loss_steps": self.loss_steps}
        return {"points": points, **sums, "selection": self.selection.facts()}

    def restore(self, facts: dict[str, Any]) -> None:
        """Go on from what `facts` gave."""
        self.points, self.loss_sum, self.loss_steps = facts["points"], facts["loss_sum"], facts["loss_steps"]
        self.selection.restore(facts["selection"])

    def _add(self, values: dict[str, float], state: TrainerState) -> None:
        self._require_finite(values, state)
        self.points.append({**self._place(state), **values})
        if state.is_world_process_zero:
            self.report({"point": {**self.points[-1]}})

    def _place(self, state: TrainerState) -> dict[str, float]:
        epoch = state.global_step * self.job.train.batch_size / self.course.rows
        return {"step": state.global_step, "epoch": round(epoch, 6)}

    def _report_step(self, state: TrainerState, loss: float) -> None:
        """Report how far the training is, not too often."""
        step, now = state.global_step, time.monotonic()
        if state.is_world_process_zero and (step == self.last_step or now - self.reported_at >= REPORT_S):
            self.reported_at = now
            tokens = self.course.tokens(step)
            self.report({"step": step, "tokens": tokens, "loss": loss, "memory_bytes": peak_memory()})

    def _send(self, state: TrainerState) -> None:
        """Send what was gathered of this step: to `metrics.jsonl` and the trackers."""
        pending, self.pending = self.pending, {}
        if self.metrics is None:
            return
        step = state.global_step
        tokens = self.course.tokens(step)
        facts: dict[str, Json] = {**self._place(state), "time": utc_now(), "tokens": tokens, **pending}
        facts |= self.pace.take(tokens - self.course.tokens(self.sent_step))
        facts["memory_bytes"] = peak_memory()
        self.sent_step = step
        self.metrics.append(facts)
        if self.trackers is not None:
            self.trackers.log(facts)

    def _require_finite(self, values: dict[str, float], state: TrainerState) -> None:
        """Refuse values that are infinite or no number. Those of a step were looked at before it was taken (sft.py), so
        that they are a measurement's, after a step that spoilt the weights.

        Raises:
            UsageError: training diverged.
        """
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if bad:
            todo = "lower train.learning_rate, raise train.warmup_share, or train in float32"
            what = f"training diverged at step {state.global_step}: {bad}"
            raise UsageError(what, where=self.job.student.model, todo=todo)
