"""A training that was interrupted, in whatever way, ends with the bytes of one that was not."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_train import StudentModel
from pipeline.core.errors import ExitCode, Incomplete, Interrupted
from pipeline.student.checkpoints import MARKER
from pipeline.student.jobs import TrainJob
from pipeline.student.worker import run_job
from tests.support import cli_env, read_events, run_cli, wait_for, write_project
from tests.tiny_models import make_tiny_model
from tests.training_rows import ROOT, is_alive, small_config, sum_row, write_dataset

STEPS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"tuning": {"kind": "full"}},
    "lora": {"tuning": {"kind": "lora", "dropout": 0.2, "modules_to_save": ["embed_tokens"]}},
}
# A point of the loss curve averages over 5 steps, so that most stops are between two points; epochs end after 5 and 10.
COMMON: dict[str, Any] = {"epochs": 2.4, "micro_batch_size": 4, "log_steps": 5}


def make_student(folder: Path) -> Path:
    """A tiny model whose attention drops out while it is trained, so that random states count in full tuning too."""
    model = make_tiny_model(folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return model


@dataclass
class Attempt:
    """One attempt at a training in this process, which somebody asks to stop after a step."""

    job: TrainJob
    stop_after: int | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def run(self) -> dict[str, Any]:
        return run_job(self.job, self.reports.append, lambda: nullcontext(self.asked))

    def stop(self) -> None:
        with pytest.raises(Interrupted):
            self.run()

    def asked(self) -> bool:
        """Called once a step."""
        self.step = (self.step or self.started["resumed_from"] or 0) + 1
        return self.step == self.stop_after

    @property
    def started(self) -> dict[str, Any]:
        return next(report["started"] for report in self.reports if "started" in report)

    @property
    def ignored(self) -> list[str]:
        return [report["reason"] for report in self.reports if "ignored" in report]

    @property
    def written(self) -> tuple[bytes, bytes]:
        """The weights and the loss curve."""
        return (self.job.out / "model" / "model.safetensors").read_bytes(), (self.job.out / "loss.json").read_bytes()


class Trainings:
    """Trainings on one data set. Attempts with the same `key` are at the same training and share its work folder."""

    def __init__(self, folder: Path) -> None:
        rows = [sum_row(number) for number in range(44)]
        self.folder, self.model = folder, make_student(folder / "base")
        self.data = write_dataset(folder / "dataset", rows[:40], rows[40:]) / "data"
        self.straight = cache(self._straight)
        self.attempts = 0

    def attempt(self, key: str, stop_after: int | None = None, **changes: Any) -> Attempt:
        self.attempts += 1
        out, work = self.folder / f"out{self.attempts}", self.folder / key
        out.mkdir()
        work.mkdir(exist_ok=True)
        cfg = small_config(**COMMON | changes)
        return Attempt(TrainJob(cfg, StudentModel(model=str(self.model)), self.data, out, work, 1, "test"), stop_after)

    def _straight(self, kind: str) -> tuple[Attempt, dict[str, Any]]:
        attempt = self.attempt(f"straight-{kind}", **SETTINGS[kind])
        return attempt, attempt.run()


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


def checkpoints(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "checkpoints").iterdir())


def equals_straight(trainings: Trainings, kind: str, attempt: Attempt) -> None:
    straight, found = trainings.straight(kind)
    assert attempt.run() == found
    assert attempt.written == straight.written


class TestAResumedTraining:
    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_stopped_three_times(self, trainings: Trainings, kind: str) -> None:
        for before, step in ((None, 1), (1, 7), (7, 11)):
            attempt = trainings.attempt(f"thrice-{kind}", step, **SETTINGS[kind])
            attempt.stop()
            assert attempt.started == {"world_size": 1, "steps": STEPS, "resumed_from": before, "changed": []}
        last = trainings.attempt(f"thrice-{kind}", **SETTINGS[kind])
        equals_straight(trainings, kind, last)
        assert last.started["resumed_from"] == 11
        assert checkpoints(last.job.workdir) == ["step-11", "step-7"]

    @pytest.mark.soak
    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_stopped_after_each_step(self, trainings: Trainings, kind: str) -> None:
        for step in range(1, STEPS):
            trainings.attempt(f"after-{step}-{kind}", step, **SETTINGS[kind]).stop()
            equals_straight(trainings, kind, trainings.attempt(f"after-{step}-{kind}", **SETTINGS[kind]))

    def test_asked_in_its_last_step_it_ends(self, trainings: Trainings) -> None:
        equals_straight(trainings, "full", trainings.attempt("last", STEPS, **SETTINGS["full"]))

    def test_a_checkpoint_holds_what_is_trained_and_no_more(self, trainings: Trainings) -> None:
        from safetensors.torch import load_file

        attempt = trainings.attempt("adapters", 2, tuning={"kind": "lora", "r": 4})
        attempt.stop()
        folder = attempt.job.workdir / "checkpoints" / "step-2"
        assert {path.name for path in folder.iterdir()} == {
            *("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "curve.json"),
            *("trainer_state.json", "metrics.jsonl", MARKER),
        }
        tensors = load_file(folder / "trained.safetensors")
        assert len(tensors) == 2 * 2 * 7, "A and B of 7 linear modules in 2 layers"
        assert all("lora_" in name for name in tensors)

    def test_checkpoints_by_count_and_by_clock_change_nothing(self, trainings: Trainings) -> None:
        often = trainings.attempt("often", checkpoint={"minutes": 1e-9, "keep": 1}, **SETTINGS["lora"])
        equals_straight(trainings, "lora", often)
        steps = [report["checkpoint"]["step"] for report in often.reports if "checkpoint" in report]
        assert steps == [*range(1, STEPS)], "none after the last step"
        counted = trainings.attempt("counted", checkpoint={"minutes": None, "steps": 5}, **SETTINGS["lora"])
        equals_straight(trainings, "lora", counted)
        assert checkpoints(counted.job.workdir) == ["step-10", "step-5"]


class TestACheckpointThatMayNotBeUsed:
    def test_after_a_flipped_bit_the_one_before_is_used(self, trainings: Trainings) -> None:
        for step in (3, 8):
            trainings.attempt("flipped", step, **SETTINGS["full"]).stop()
        path = trainings.folder / "flipped" / "checkpoints" / "step-8" / "optimizer.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 8
        path.write_bytes(content)
        attempt = trainings.attempt("flipped", **SETTINGS["full"])
        equals_straight(trainings, "full", attempt)
        assert attempt.started["resumed_from"] == 3
        assert attempt.ignored == [f"optimizer.pt is damaged: its sha256 is not the one in {MARKER}"]

    def test_one_of_another_training_is_not_used(self, trainings: Trainings) -> None:
        trainings.attempt("theirs", 3, **SETTINGS["full"], seed=1).stop()
        shutil.copytree(trainings.folder / "theirs" / "checkpoints", trainings.folder / "ours" / "checkpoints")
        attempt = trainings.attempt("ours", **SETTINGS["full"])
        equals_straight(trainings, "full", attempt)
        assert attempt.started["resumed_from"] is None
        assert attempt.ignored == ["it is of another training: key theirs and not ours"]

    def test_weights_that_do_not_fit_are_never_loaded_in_part(self, trainings: Trainings) -> None:
        from safetensors.torch import load_file, save_file

        from pipeline.core.errors import UsageError
        from pipeline.student.initial import load_base
        from pipeline.student.saver import load_trained

        trainings.attempt("renamed", 1, **SETTINGS["full"]).stop()
        path = trainings.folder / "renamed" / "checkpoints" / "step-1" / "trained.safetensors"
        tensors = load_file(path)
        save_file({f"new.{name}": tensor for name, tensor in tensors.items()}, path)
        with pytest.raises(UsageError, match="the checkpoint's weights do not fit the model"):
            load_trained(load_base(trainings.attempt("renamed").job), path)


class TestOtherSettings:
    def test_another_micro_batch_is_told_and_trains_the_same_rows(self, trainings: Trainings) -> None:
        # The model has no dropout here: two divisions of a batch draw different masks.
        plain: dict[str, Any] = {"tuning": {"kind": "lora"}, "micro_batch_size": 8}
        student = StudentModel(model=str(make_tiny_model(trainings.folder / "plain-base")))
        straight = trainings.attempt("plain", **plain)
        first = trainings.attempt("divided", 7, **plain)
        second = trainings.attempt("divided", **plain | {"micro_batch_size": 2})
        for attempt in (straight, first, second):
            attempt.job = replace(attempt.job, student=student)
        straight.run()
        first.stop()
        second.run()
        assert second.started["resumed_from"] == 7
        assert second.started["changed"] == ["micro_batch_size: 8 -> 2"]
        losses = [
            [point.get("loss", point.get("eval_loss")) for point in json.loads(one.written[1])]
            for one in (straight, second)
        ]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as it does on a full disk, for torch and safetensors too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestADiskThatIsFull:
    @pytest.mark.parametrize("size", [50_000, 500_000], ids=["weights", "optimizer"])
    def test_the_checkpoint_before_is_kept_and_resumed(self, trainings: Trainings, size: int) -> None:
        key = f"full-disk-{size}"
        trainings.attempt(key, 4, **SETTINGS["full"]).stop()
        attempt = trainings.attempt(key, checkpoint={"steps": 6}, **SETTINGS["full"])
        with files_of_at_most(size), pytest.raises(Incomplete, match="a checkpoint cannot be written") as caught:
            attempt.run()
        assert caught.value.exit_code is ExitCode.INCOMPLETE
        assert "earlier checkpoints are kept" in caught.value.todo
        assert checkpoints(attempt.job.workdir) == ["step-4"]
        equals_straight(trainings, "full", trainings.attempt(key, **SETTINGS["full"]))

    def test_a_model_that_cannot_be_written_is_a_matter_of_the_disk_and_leaves_it_room(
        self, trainings: Trainings
    ) -> None:
        attempt = trainings.attempt("full-disk-model", max_steps=1)
        with files_of_at_most(50_000), pytest.raises(Incomplete, match="the model cannot be written") as caught:
            attempt.run()
        assert "make room" in caught.value.todo
        assert not (attempt.job.out / "model").exists()

    def test_so_is_a_loss_curve(self, trainings: Trainings) -> None:
        attempt = trainings.attempt("full-disk-curve", max_steps=1)
        (attempt.job.out / "loss.json").mkdir()
        with pytest.raises(Incomplete, match="the loss curve cannot be written"):
            attempt.run()
        assert not (attempt.job.out / "model").exists()


# -------------------------------------------------------------------------------------------------- killed processes

# Kills itself before the n-th event of a kind that Python's audit hooks tell, on a path that holds the given text.
SUICIDE = """
import os, signal, sys
from pathlib import Path
from pipeline.student.jobs import TrainJob
from pipeline.student.worker import run_job

job, event, text, left = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def watch(name, args):
    global left
    if name == event and text in str(args[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
run_job(TrainJob.read(job), lambda report: None)
"""


class TestAKilledTraining:
    @pytest.mark.parametrize(
        ("event", "text", "count"),
        [
            ("open", f".step-6/{MARKER}", 1),  # a checkpoint without its marker
            pytest.param("os.rename", ".step-", 3, marks=pytest.mark.soak),  # all written, not visible yet
            pytest.param("os.mkdir", ".step-9", 1, marks=pytest.mark.soak),
            pytest.param("open", ".step-3/curve.json", 1, marks=pytest.mark.soak),
            pytest.param("open", ".step-6/optimizer.pt", 1, marks=pytest.mark.soak),
            pytest.param("open", "model/config.json", 1, marks=pytest.mark.soak),  # after the last step
        ],
    )
    def test_while_it_writes(self, trainings: Trainings, event: str, text: str, count: int) -> None:
        kind, key = "lora", f"killed-{event}-{text.replace('/', '-')}"
        changes = {**SETTINGS[kind], "checkpoint": {"steps": 3}}
        attempt = trainings.attempt(key, **changes)
        path = attempt.job.workdir / "job.json"
        attempt.job.write(path)
        done = subprocess.run(
            [sys.executable, "-c", SUICIDE, str(path), event, text, str(count)],
            cwd=ROOT,
            env=cli_env({"OMP_NUM_THREADS": "1"}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        last = trainings.attempt(key, **changes)
        equals_straight(trainings, kind, last)
        assert last.ignored == []
        assert last.started["resumed_from"] is None or last.started["resumed_from"] % 3 == 0


@dataclass
class Project:
    """A project whose rows exist, so that `train` can be run, killed and run again as a user does."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "data" / "runs" / "small"

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run) if event["event"] == name]

    def signalled(self, number: int) -> subprocess.CompletedProcess[str]:
        """Start `train`, send a signal when it has written another checkpoint, and wait for its end."""
        before, log = len(self.events("checkpoint_saved")), self.folder / "stderr.txt"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "train", "run.yaml"], cwd=self.folder, env=cli_env(), stderr=stderr
            )
            while len(self.events("checkpoint_saved")) == before and process.poll() is None:
                time.sleep(0.1)
            process.send_signal(number)
            process.wait()
        return subprocess.CompletedProcess(process.args, process.returncode, stderr=log.read_text())

    def worker(self) -> int:
        """The process id of the worker that was started last."""
        return int(next(self.folder.glob("data/work/train/*/worker.pid")).read_text())


def a_project(folder: Path, **train: Any) -> Project:
    make_student(folder / "base")
    cpu = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    settings = small_config(**train, accelerate=cpu).model_dump(mode="json")
    write_project(
        folder,
        student={"model": "./base"},
        train=settings,
        prompts={"sets": {"sums": {"source": {"kind": "jsonl", "path": "rows.jsonl"}}}, "validation": 0.1, "test": 0},
    )
    rows = [{"id": f"p{n:03d}", "prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_cli("run", "run.yaml", "--until", "dataset", cwd=folder)
    assert done.returncode == 0, done.stderr
    return Project(folder)


def test_killed_then_stopped_then_finished_by_the_same_command(tmp_path: Path) -> None:
    # One row a forward pass makes the steps slow enough to be interrupted.
    settings: dict[str, Any] = {"epochs": 20, "micro_batch_size": 1, "log_steps": 7, "checkpoint": {"steps": 30}}
    project = a_project(tmp_path / "project", **settings)

    assert project.signalled(signal.SIGKILL).returncode == -signal.SIGKILL
    wait_for(lambda: not is_alive(project.worker()), "the worker to die with its parent")

    stopped = project.signalled(signal.SIGTERM)
    told = stopped.stderr
    assert (stopped.returncode, is_alive(project.worker())) == (ExitCode.TERMINATED, False)
    assert "going on after step" in told and "resume with: python -m pipeline" in told
    last = project.events("checkpoint_saved")[-1]["step"]
    assert last % 30 != 0, "stopped after the step in flight"
    assert not (project.run / "train").exists()

    done = run_cli("train", "run.yaml", cwd=project.folder, timeout=300)
    assert done.returncode == 0, done.stderr
    resumed = [event["resumed_from"] for event in project.events("train_started")]
    assert resumed[0] is None and resumed[1] % 30 == 0 and resumed[2] == last
    assert not any((project.folder / "data" / "work" / "train").glob("*/")), "checkpoints go with the work folder"

    (tmp_path / "out").mkdir()
    (tmp_path / "straight").mkdir()
    student = StudentModel(model=str(project.folder / "base"))
    data = project.run / "dataset" / "data"
    straight = Attempt(
        TrainJob(small_config(**settings), student, data, tmp_path / "out", tmp_path / "straight", 1, "test")
    )
    straight.run()
    artefact = project.run / "train"
    written = (artefact / "model" / "model.safetensors").read_bytes(), (artefact / "loss.json").read_bytes()
    assert written == straight.written
