"""What watches a training and what follows from it: measurements, the best weights, an early end, figures, trackers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import TrainStep
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_train import StudentModel
from pipeline.core.errors import CorruptArtefact, ExitCode, Incomplete, Interrupted, UsageError
from pipeline.core.record import Message
from pipeline.core.stage import Result
from pipeline.stages import train
from pipeline.student.jobs import TrainJob
from pipeline.student.worker import run_job
from pipeline.text.verifiers import VERIFIERS
from tests.support import POLICY, RecordedProgress, make_context
from tests.tiny_models import make_tiny_model
from tests.training.test_resume import files_of_at_most, make_student
from tests.training_rows import small_config, sum_row, write_dataset

STEPS = 12
# A learning rate at which the validation loss falls and then rises, so that the best weights are not the last ones.
COMMON: dict[str, Any] = {"epochs": 2.4, "micro_batch_size": 4, "log_steps": 5, "learning_rate": 3e-2}
BEST: dict[str, Any] = {"evaluation": {"steps": 2, "keep": "best"}}
PATIENT: dict[str, Any] = {"evaluation": {"steps": 1, "keep": "best", "patience": 2}}
LORA: dict[str, Any] = {"tuning": {"kind": "lora", "r": 4, "dropout": 0.2}}
TRAINS = [sum_row(number, answer=str(number + 1)) for number in range(40)]
VALIDATES = [sum_row(number, answer=str(number + 1)) for number in range(40, 46)]


@dataclass
class Attempt:
    """One attempt at a training in this process; with `stop_after` somebody asks to stop after that step."""

    job: TrainJob
    stop_after: int | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def run(self) -> dict[str, Any]:
        return run_job(self.job, self.reports.append, lambda: nullcontext(self.asked), VERIFIERS)

    def stop(self) -> None:
        with pytest.raises(Interrupted):
            self.run()

    def asked(self) -> bool:
        self.step = (self.step or self.told("started")[0]["resumed_from"] or 0) + 1
        return self.step == self.stop_after

    def told(self, name: str) -> list[Any]:
        return [report[name] for report in self.reports if name in report]

    @property
    def weights(self) -> bytes:
        return (self.job.out / "model" / "model.safetensors").read_bytes()

    @property
    def points(self) -> list[dict[str, float]]:
        points: list[dict[str, float]] = json.loads((self.job.out / "loss.json").read_text())
        return points

    @property
    def measured(self) -> dict[int, float]:
        """Step -> validation loss."""
        return {int(point["step"]): point["eval_loss"] for point in self.points if "eval_loss" in point}

    @property
    def figures(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.job.out / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


CLOCK = ("time", "tokens_per_s", "step_s", "eval_s", "memory_bytes")


def without_clock(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in point.items() if name not in CLOCK} for point in figures]


class Trainings:
    """Trainings on one data set. Attempts with the same `key` are at the same training and share its work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, make_student(folder / "base")
        self.data = write_dataset(folder / "dataset", TRAINS, VALIDATES) / "data"
        self.straight: Callable[[str], tuple[Attempt, dict[str, Any]]] = cache(self._straight)
        self.attempts = 0

    def attempt(self, key: str, stop_after: int | None = None, **changes: Any) -> Attempt:
        self.attempts += 1
        out, work = self.folder / f"out{self.attempts}", self.folder / key
        out.mkdir()
        work.mkdir(exist_ok=True)
        cfg = small_config(**COMMON | changes)
        job = TrainJob(cfg, StudentModel(model=str(self.model)), self.data, out, work, 1, "test", "small")
        return Attempt(job, stop_after)

    def _straight(self, kind: str) -> tuple[Attempt, dict[str, Any]]:
        attempt = self.attempt(f"straight-{kind}", **KINDS[kind])
        return attempt, attempt.run()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"evaluation": {"rows": 0}},
    "best": BEST,
    "patient": PATIENT,
    "best-lora": BEST | LORA,
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


def best_of(measured: dict[int, float]) -> int:
    """The first of the lowest."""
    return min(measured, key=lambda step: (measured[step], step))


class TestMeasuring:
    def test_changes_nothing_of_the_training(self, trainings: Trainings) -> None:
        """The student drops out attention while it is trained: one number drawn by a measurement would change it."""
        generate = {"prompts": 3, "max_tokens": 4}
        changes: dict[str, Any] = {"evaluation": {"steps": 1, "generate": generate}}
        watched = trainings.attempt("watched", **changes)
        watched.run()
        plain, _ = trainings.straight("plain")
        assert watched.weights == plain.weights
        assert [point for point in watched.points if "loss" in point] == plain.points
        measured = [point for point in watched.points if "loss" not in point]
        assert [(point["step"], {*point}) for point in measured] == [
            (step, {"step", "epoch", "eval_loss", "accuracy"}) for step in range(1, STEPS + 1)
        ]

    def test_by_steps_and_always_at_the_end(self, trainings: Trainings) -> None:
        attempt = trainings.attempt("by-steps", max_steps=4, evaluation={"steps": 3})
        attempt.run()
        assert [*attempt.measured] == [3, 4]

    def test_the_loss_is_the_mean_over_the_completions_tokens(self, trainings: Trainings) -> None:
        """Whatever the batches are: six rows in batches of 4 and 2, or all at once."""
        losses = []
        for size in (4, 8):
            # The weights hardly move: dropout draws other masks for other batches.
            attempt = trainings.attempt(f"size-{size}", max_steps=1, micro_batch_size=size, learning_rate=1e-9)
            attempt.run()
            losses.append(attempt.measured[1])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_without_references_no_answers_are_asked_for(self, trainings: Trainings, tmp_path: Path) -> None:
        rows = [sum_row(number) for number in range(10)]
        data = write_dataset(tmp_path / "dataset", rows, rows) / "data"
        attempt = trainings.attempt("no-references", evaluation={"generate": {}})
        attempt.job = replace(attempt.job, data=data)
        with pytest.raises(UsageError, match="no validation prompt has a reference") as caught:
            attempt.run()
        assert caught.value.exit_code is ExitCode.USAGE

    def test_without_validation_rows_no_answers_are_asked_for(self, trainings: Trainings, tmp_path: Path) -> None:
        data = write_dataset(tmp_path / "dataset", TRAINS) / "data"
        attempt = trainings.attempt("nobody-to-ask", evaluation={"generate": {}})
        attempt.job = replace(attempt.job, data=data)
        with pytest.raises(UsageError, match="the data set has no validation row") as caught:
            attempt.run()
        assert caught.value.where == "train.evaluation.generate"
        assert caught.value.todo == "raise prompts.validation, or take generate out"

    def test_stopping_early_is_not_called_choosing_weights(self, trainings: Trainings, tmp_path: Path) -> None:
        data = write_dataset(tmp_path / "dataset", TRAINS) / "data"
        attempt = trainings.attempt("no-patience", evaluation={"patience": 2})
        attempt.job = replace(attempt.job, data=data)
        with pytest.raises(UsageError, match="nothing tells when to stop early: ") as caught:
            attempt.run()
        assert caught.value.todo == "raise prompts.validation, or take patience out"

    def test_what_decides_must_be_there(self, trainings: Trainings, tmp_path: Path) -> None:
        data = write_dataset(tmp_path / "dataset", TRAINS) / "data"
        attempt = trainings.attempt("no-validation", **BEST)
        attempt.job = replace(attempt.job, data=data)
        with pytest.raises(UsageError, match="which weights are the best: the data set has no validation row"):
            attempt.run()


class TestAnswers:
    def test_a_student_that_learned_its_answer_is_right(self, tmp_path: Path) -> None:
        """All answers are "Monday"; three of four references are."""
        trainings = Trainings(tmp_path)
        monday = (Message("assistant", "Monday"),)
        rows = [sum_row(number, completion=monday, answer="Monday") for number in range(44)]
        validates = [*rows[40:43], replace(rows[43], answer="Tuesday"), replace(rows[0], answer=None)]
        data = write_dataset(tmp_path / "mondays", rows[:40], validates) / "data"
        changes: dict[str, Any] = {"learning_rate": 1e-2, "epochs": 8, "tuning": {"kind": "full"}}
        evaluation = {"steps": 20, "rows": 0, "generate": {"max_tokens": 8}, "keep": "best", "by": "accuracy"}
        attempt = trainings.attempt("mondays", **changes, evaluation=evaluation)
        attempt.job = replace(attempt.job, data=data)
        found = attempt.run()
        told = [point["accuracy"] for point in attempt.points if "accuracy" in point]
        assert told[-1] == 0.75
        assert found["metrics"]["accuracy"] == 0.75
        assert found["metrics"]["eval_loss"] is None
        assert found["metrics"]["best_step"] == 20 * (1 + told.index(0.75)), "the first of equal ones"


class TestTheBestWeights:
    def test_become_the_student(self, trainings: Trainings) -> None:
        attempt, found = trainings.straight("best")
        best = best_of(attempt.measured)
        assert best < STEPS, "or the test shows nothing"
        short = trainings.attempt("until-best", best, **BEST)
        short.stop()
        from safetensors.torch import load_file

        kept = load_file(short.job.workdir / "checkpoints" / f"step-{best}" / "best" / "trained.safetensors")
        saved = load_file(attempt.job.out / "model" / "model.safetensors")
        assert all(saved[name].equal(kept[name]) for name in saved)
        metrics = found["metrics"]
        assert (metrics["best_step"], metrics["eval_loss"]) == (best, attempt.measured[best])
        assert (metrics["steps"], metrics["stopped_early"]) == (STEPS, False)

    def test_and_the_last_ones_do_without(self, trainings: Trainings) -> None:
        plain, _ = trainings.straight("plain")
        best, _ = trainings.straight("best")
        assert plain.weights != best.weights

    @pytest.mark.parametrize("kind", ["best", "best-lora"])
    @pytest.mark.parametrize(
        "steps", [(5, 9), *(pytest.param((step,), marks=pytest.mark.soak) for step in range(1, STEPS))]
    )
    def test_survive_interruptions(self, trainings: Trainings, kind: str, steps: tuple[int, ...]) -> None:
        straight, found = trainings.straight(kind)
        key = f"stopped-{kind}-{'-'.join(map(str, steps))}"
        for step in steps:
            trainings.attempt(key, step, **KINDS[kind]).stop()
        last = trainings.attempt(key, **KINDS[kind])
        assert last.run() == found
        assert (last.weights, last.points) == (straight.weights, straight.points)
        assert without_clock(last.figures) == without_clock(straight.figures)

    def test_are_those_of_the_checkpoint_when_a_later_one_is_lost(self, trainings: Trainings) -> None:
        """Killed after a better measurement than the checkpoint's: what was kept for it goes, and is made again."""
        straight, found = trainings.straight("best")
        for step in (3, 5):
            trainings.attempt("lost", step, **BEST).stop()
        folder = trainings.folder / "lost" / "checkpoints"
        shutil.rmtree(folder / "step-5")
        assert [path.name for path in folder.glob("best-*")] == ["best-4"]
        last = trainings.attempt("lost", **BEST)
        assert last.run() == found
        assert last.weights == straight.weights

    def test_damaged_ones_are_never_saved(self, trainings: Trainings) -> None:
        attempt = trainings.attempt("damaged", **BEST)

        def damage() -> bool:
            for path in (attempt.job.workdir / "checkpoints").glob("best-*/trained.safetensors"):
                path.write_bytes(path.read_bytes()[:-1] + b"\xff")
            return False

        attempt.asked = damage  # type: ignore[method-assign]
        with pytest.raises(CorruptArtefact, match="the best weights cannot be used"):
            attempt.run()
        assert not (attempt.job.out / "model").exists()

    def test_on_a_full_disk_the_checkpoints_are_kept(self, trainings: Trainings) -> None:
        straight, found = trainings.straight("best")
        trainings.attempt("full", 3, **BEST).stop()
        with files_of_at_most(50_000), pytest.raises(Incomplete, match="the best weights cannot be written"):
            trainings.attempt("full", **BEST).run()
        last = trainings.attempt("full", **BEST)
        assert last.run() == found
        assert last.told("started")[0]["resumed_from"] == 3
        assert last.weights == straight.weights


class TestAnEarlyEnd:
    def test_comes_when_patience_has_run_out_and_is_told(self, trainings: Trainings) -> None:
        attempt, found = trainings.straight("patient")
        metrics, measured = found["metrics"], attempt.measured
        best = best_of(measured)
        assert [*measured] == [*range(1, best + 3)]
        assert best + 2 < STEPS, "or the test shows nothing"
        assert (metrics["steps"], metrics["planned_steps"]) == (best + 2, STEPS)
        assert (metrics["stopped_early"], metrics["best_step"]) == (True, best)
        assert attempt.told("ended_early") == [best + 2]
        assert metrics["rows_seen"] == 8 * (best + 2)
        assert metrics["tokens_seen"] == attempt.figures[-1]["tokens"]
        assert metrics["epochs"] == 8 * (best + 2) / 40
        assert attempt.points[-1]["step"] == best + 2 and "loss" in attempt.points[-1], "the last step is a point"

    def test_comes_at_the_same_step_after_interruptions(self, trainings: Trainings) -> None:
        straight, found = trainings.straight("patient")
        end = found["metrics"]["steps"]
        for step in (1, end - 1):
            trainings.attempt("patient", step, **PATIENT).stop()
        last = trainings.attempt("patient", **PATIENT)
        assert last.run() == found
        assert (last.weights, last.points) == (straight.weights, straight.points)

    @pytest.mark.soak
    def test_comes_at_the_same_step_wherever_it_was_interrupted(self, trainings: Trainings) -> None:
        straight, found = trainings.straight("patient")
        for step in range(1, found["metrics"]["steps"]):
            trainings.attempt(f"patient-{step}", step, **PATIENT).stop()
            last = trainings.attempt(f"patient-{step}", **PATIENT)
            assert last.run() == found
            assert last.weights == straight.weights


class TestFigures:
    def test_are_one_line_a_point(self, trainings: Trainings) -> None:
        attempt, found = trainings.straight("best")
        figures = attempt.figures
        assert [point["step"] for point in figures] == [1, 2, 4, 5, 6, 8, 10, 12]
        trained, measured = {"loss", "grad_norm", "learning_rate"}, {"eval_loss", "eval_s"}
        always = {"step", "epoch", "time", "tokens", "tokens_per_s", "step_s", "memory_bytes"}
        for point in figures:
            step = point["step"]
            wanted = always | (trained if step in (1, 5, 10, 12) else set()) | (measured if step % 2 == 0 else set())
            assert {*point} == wanted, step
        assert figures[-1]["tokens"] == found["metrics"]["tokens_seen"]
        assert 10**6 < figures[-1]["memory_bytes"] < 10**11

    def test_can_be_read_while_the_training_runs(self, trainings: Trainings) -> None:
        attempt = trainings.attempt("live", max_steps=3, log_steps=1)
        seen: list[int] = []

        def look() -> bool:
            seen.append(len(read_lines(attempt.job.workdir / "metrics.jsonl")))
            return False

        attempt.asked = look  # type: ignore[method-assign]
        attempt.run()
        assert seen == [0, 1], "asked before a step's own point is written, and not after the last step"

    def test_hold_each_step_once_after_a_kill(self, trainings: Trainings) -> None:
        """A killed process leaves points of steps that its checkpoint does not hold, and half a line."""
        straight, _ = trainings.straight("best")
        trainings.attempt("killed", 5, **BEST).stop()
        with (trainings.folder / "killed" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 6, "loss": 1.0}) + '\n{"step": 7, "lo')
        last = trainings.attempt("killed", **BEST)
        last.run()
        assert without_clock(last.figures) == without_clock(straight.figures)

    def test_reports_say_how_far_it_is(self, trainings: Trainings) -> None:
        trainings.attempt("reports", 5).stop()
        attempt = trainings.attempt("reports")
        attempt.run()
        (begun,) = [report for report in attempt.reports if "begun" in report]
        steps = [report for report in attempt.reports if "step" in report]
        assert begun["begun"] == 5
        assert 0 < begun["tokens"] < steps[0]["tokens"] <= steps[-1]["tokens"]
        assert {*steps[-1]} == {"step", "tokens", "loss", "memory_bytes"}
        assert steps[-1]["step"] == STEPS


class TestTensorBoard:
    def test_has_the_points_once_after_an_interruption(self, trainings: Trainings) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        changes = {**BEST, "trackers": ["tensorboard"]}
        trainings.attempt("board", 5, **changes).stop()
        attempt = trainings.attempt("board", **changes)
        attempt.run()
        (path,) = (attempt.job.out / "tensorboard").iterdir()
        assert re.fullmatch(r"events\.out\.tfevents\.\d", path.name), "the machine's name is not in it"
        events = EventAccumulator(str(path.parent))
        events.Reload()
        for name in ("loss", "eval_loss", "learning_rate", "tokens"):
            wanted = [(point["step"], point[name]) for point in attempt.figures if name in point]
            found = [(event.step, event.value) for event in events.Scalars(name)]
            assert found == [(step, pytest.approx(value)) for step, value in wanted]


def run_stage(folder: Path, model: Path, dataset: Path, **changes: Any) -> tuple[Path, Result, RecordedProgress]:
    """Train as a user does, by processes that Accelerate launches."""
    (folder / "out").mkdir(parents=True)
    ctx = make_context(folder)
    policy = PolicyConfig.model_validate(POLICY)
    cfg = TrainStep(train=small_config(**changes), student=StudentModel(model=str(model)), policy=policy)
    result = train.run(cfg, {"dataset": dataset}, folder / "out", ctx)
    assert isinstance(ctx.progress, RecordedProgress)
    return folder / "out", result, ctx.progress


def test_two_processes_measure_like_one(tmp_path: Path) -> None:
    """Five prompts and six rows, in batches of 4, so that one process has none left in the last round."""
    model, dataset = make_tiny_model(tmp_path / "model"), write_dataset(tmp_path / "dataset", TRAINS, VALIDATES)
    evaluation = {"steps": 2, "generate": {"prompts": 5, "max_tokens": 4}, "keep": "best"}
    changes: dict[str, Any] = {"max_steps": 4, "micro_batch_size": 4, "evaluation": evaluation}
    losses = {}
    for processes in (1, 2):
        folder = tmp_path / f"{processes}"
        out, result, progress = run_stage(folder, model, dataset, **changes, processes=processes)
        points = read_lines(out / "metrics.jsonl")
        assert [point["step"] for point in points] == [1, 2, 3, 4], "one process writes them"
        losses[processes] = [point["eval_loss"] for point in points if "eval_loss" in point]
        assert len(losses[processes]) == 2
        assert all(0 <= point["accuracy"] <= 1 for point in points if "eval_loss" in point)
        assert (result.metrics["world_size"], result.metrics["best_step"]) == (processes, 4)
        assert (progress.done, progress.total) == (4, 4)
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)
