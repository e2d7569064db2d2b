"""Stage `train` as a user runs it, and its model where a user takes it: transformers and vLLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import TrainStep
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_train import StudentModel
from pipeline.core.errors import ExitCode
from pipeline.core.lineage import DigestCache, path_digest
from pipeline.core.record import Message
from pipeline.core.runs import hold_lock, run_lock
from pipeline.core.stage import Result
from pipeline.stages import train
from pipeline.student.jobs import AnswerJob, Exam, Question
from tests.support import (
    POLICY,
    RecordedEvents,
    RecordedProgress,
    cli_env,
    make_context,
    read_events,
    run_cli,
    write_project,
)
from tests.tiny_models import make_tiny_model
from tests.training_rows import ROOT, small_config, sum_row, write_dataset

MONDAYS = [sum_row(number, completion=(Message("assistant", "Monday"),)) for number in range(48)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", MONDAYS[:41], MONDAYS[41:])


def run_stage(folder: Path, base: Path, dataset: Path, **changes: object) -> tuple[Result, RecordedProgress]:
    cfg = TrainStep(
        train=small_config(**changes), student=StudentModel(model=str(base)), policy=PolicyConfig.model_validate(POLICY)
    )
    (folder / "out").mkdir(parents=True)
    ctx = make_context(folder)
    result = train.run(cfg, {"dataset": dataset}, folder / "out", ctx)
    assert isinstance(ctx.progress, RecordedProgress) and isinstance(ctx.events, RecordedEvents)
    return result, ctx.progress


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, dataset: Path) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("trained")
    settings = {"epochs": 12, "learning_rate": 1e-2, "micro_batch_size": 4}
    result, progress = run_stage(folder, base, dataset, **settings)
    assert progress.done == progress.total == result.metrics["steps"]
    return folder / "out", result


def ask(model: Path, engine: str, folder: Path) -> list[dict[str, object]]:
    """What a model answers in a process of its own."""
    questions = tuple(Question(messages=({"role": "user", "content": f"What is {n} + 1?"},)) for n in (7, 123))
    exam = Exam("student", str(model), None, {"test": questions})
    job = folder / "answer.json"
    AnswerJob(engine, "float32", 20, 8, 1, (exam,), None).write(job)  # type: ignore[arg-type]
    code = "import sys, pathlib; from pipeline.student.answer import main; main(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, object]] = json.loads((folder / "answer.result.json").read_text())["student"]["answers"][
        "test"
    ]
    return answers


def test_the_stage_accounts_for_its_rows(trained: tuple[Path, Result]) -> None:
    out, result = trained
    assert (result.rows_in, result.rows_out, result.rejected) == (41, 41, {})
    assert result.content == path_digest(out / "model", DigestCache(out / "none.json"))
    metrics = result.metrics
    assert (metrics["steps"], metrics["world_size"], metrics["validation_rows"]) == (62, 1, 7)
    assert metrics["student"] == {"model": "local", "revision": None, "license": "unknown"}
    points = json.loads((out / "loss.json").read_text())
    steps = [point["step"] for point in points if "loss" in point]
    assert steps == list(range(1, 63))
    assert len([point for point in points if "eval_loss" in point]) == 12


def test_no_torch_in_the_parent(tmp_path: Path, base: Path, root: Path) -> None:
    code = "import sys, pipeline.stages.train, pipeline.stages.evaluate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"


def test_the_student_answers_and_stops_in_transformers(trained: tuple[Path, Result], tmp_path: Path) -> None:
    answers = ask(trained[0] / "model", "transformers", tmp_path)
    assert [(answer["text"], answer["finish_reason"]) for answer in answers] == [("Monday", "stop")] * 2


@pytest.mark.vllm
def test_the_student_answers_and_stops_in_vllm(trained: tuple[Path, Result], tmp_path: Path) -> None:
    answers = ask(trained[0] / "model", "vllm", tmp_path)
    assert [(answer["text"], answer["finish_reason"]) for answer in answers] == [("Monday", "stop")] * 2


def test_two_processes_train_like_one(tmp_path: Path, base: Path, dataset: Path) -> None:
    settings = {"max_steps": 4, "micro_batch_size": 4}
    one, _ = run_stage(tmp_path / "one", base, dataset, **settings)
    two, _ = run_stage(tmp_path / "two", base, dataset, processes=2, **settings)
    assert (one.metrics["world_size"], two.metrics["world_size"]) == (1, 2)
    curves = {
        name: [
            point.get("loss", point.get("eval_loss"))
            for point in json.loads((tmp_path / name / "out/loss.json").read_text())
        ]
        for name in ("one", "two")
    }
    assert len(curves["one"]) == 5
    assert curves["two"] == pytest.approx(curves["one"], abs=1e-5)


# --------------------------------------------------------------------------------------------- two processes, as a user


@dataclass
class Project:
    """A project whose rows exist; each data folder starts anew from there."""

    folder: Path

    def command(self, how: str, data: str, *overrides: str) -> list[str]:
        """Train with two processes: `pipeline` launches them, or `accelerate` does and each of them is a pipeline."""
        sets = [word for override in overrides for word in ("--set", override)]
        arguments = ["-m", "pipeline", "train", "run.yaml", "--data", data, *sets]
        if how == "pipeline":
            return [sys.executable, *arguments, "--set", "train.processes=2"]
        flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        return [sys.executable, "-m", "accelerate.commands.launch", *flags, "--main_process_port", "0", *arguments]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        env = cli_env({"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
        with (self.folder / "log.txt").open("wb") as log:
            return subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def events(self, data: str, name: str) -> list[dict[str, Any]]:
        """Of all runs in the data folder: overrides make runs of other names."""
        folders = (self.folder / data / "runs").glob("*/")
        return [event for folder in folders for event in read_events(folder) if event["event"] == name]

    def written(self, data: str) -> tuple[bytes, bytes]:
        """Weights and loss curve of the one artefact of `train`."""
        (artefact,) = (self.folder / data / "store" / "train").iterdir()
        return (artefact / "model" / "model.safetensors").read_bytes(), (artefact / "loss.json").read_bytes()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    make_tiny_model(folder / "base")
    cpu = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    settings = small_config(epochs=60, micro_batch_size=1, log_steps=4, checkpoint={"steps": 5}, accelerate=cpu)
    write_project(folder, student={"model": "./base"}, train=settings.model_dump(mode="json"))
    for data in ("straight", "resumed"):
        done = run_cli("run", "run.yaml", "--until", "dataset", "--data", data, cwd=folder)
        assert done.returncode == 0, done.stderr
    return Project(folder)


def test_two_processes_are_one_training_however_they_are_launched(project: Project) -> None:
    straight = project.start(*project.command("accelerate", "straight"))
    assert straight.wait() == 0, project.log()
    (started,) = project.events("straight", "train_started")
    assert (started["world_size"], started["steps"], started["resumed_from"]) == (2, 90, None)
    assert len(project.events("straight", "run_started")) == 2, "only the first process took the run's lock"
    assert len(project.events("straight", "step_committed")) == 6
    lock = json.loads((project.folder / "run.lock.json").read_text())
    assert [lock["train"]["key"]] == [path.name for path in (project.folder / "straight/store/train").iterdir()]

    stopped = project.start(*project.command("accelerate", "resumed"))
    while not project.events("resumed", "checkpoint_saved") and stopped.poll() is None:
        time.sleep(0.1)
    stopped.terminate()  # the launcher, which passes it on
    assert stopped.wait() != 0
    assert "resume with: python -m pipeline train" in project.log()
    ended = [event["exit_code"] for event in project.events("resumed", "run_ended")]
    assert ended == [ExitCode.COMPLETE, ExitCode.TERMINATED]
    step = project.events("resumed", "checkpoint_saved")[-1]["step"]
    assert step > 5

    last = project.start(*project.command("pipeline", "resumed"))
    assert last.wait() == 0, project.log()
    both = project.events("resumed", "train_started")
    assert sorted((event["world_size"], event["resumed_from"] or 0) for event in both) == [(2, 0), (2, step)]
    assert project.written("resumed") == project.written("straight")


def test_all_processes_of_a_launch_agree_on_whether_to_train(project: Project) -> None:
    """A follower that waits for a training which does not come, or misses one that does, would hang the launch."""

    def launch(*words: str) -> tuple[int, int]:
        """Exit code, and how often this was trained so far."""
        process = project.start(*project.command("accelerate", "again", "train.max_steps=2"), *words)
        return process.wait(timeout=300), len(project.events("again", "train_started"))

    shutil.copytree(project.folder / "straight", project.folder / "again", symlinks=True)
    shutil.rmtree(project.folder / "again" / "runs")
    assert launch() == (0, 1), project.log()
    assert launch() == (0, 1), project.log()  # cached
    assert launch("--force") == (0, 2), project.log()
    (run,) = (project.folder / "again/runs").iterdir()
    with hold_lock(run_lock(run)):  # the first process fails before it tells the other one anything
        code, trained = launch("--force")
    assert (code != 0, trained) == (True, 2)
    assert "held by" in project.log()
    assert not list((project.folder / "again/work").rglob("*.rank-*"))
