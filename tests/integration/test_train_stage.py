"""Stage `train` as a user runs it, and its model where a user takes it: transformers and vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.config import StudentModel, TrainStep
from pipeline.core.lineage import DigestCache, path_digest
from pipeline.core.record import Message
from pipeline.core.stage import Result
from pipeline.stages import train
from pipeline.student.jobs import AnswerJob, Exam, Question
from pipeline.student.process import Files
from tests.support import RecordedEvents, RecordedProgress, make_context
from tests.tiny_models import make_tiny_model
from tests.training_rows import small_config, sum_row, write_dataset

MONDAYS = [sum_row(number, completion=(Message("assistant", "Monday"),)) for number in range(48)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", MONDAYS[:41], MONDAYS[41:])


def run_stage(folder: Path, base: Path, dataset: Path, **changes: object) -> tuple[Result, RecordedProgress]:
    cfg = TrainStep(train=small_config(**changes), student=StudentModel(model=str(base)))
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
    Files(job).guard.touch()
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


LED = """
import os, sys
from pathlib import Path
from pipeline.core.config import StudentModel, TrainStep
from pipeline.stages import train
from pipeline.student.worker import follow, is_first_process
from tests.support import make_context
from tests.training_rows import small_config

folder, base, dataset = map(Path, sys.argv[1:])
if is_first_process():
    cfg = TrainStep(train=small_config(max_steps=3, micro_batch_size=4), student=StudentModel(model=str(base)))
    ctx = make_context(folder)
    result = train.run(cfg, {"dataset": dataset}, folder / "out", ctx)
    (folder / "world").write_text(str(result.metrics["world_size"]))
else:
    follow(folder / "work", lambda: False)
"""


def test_inside_a_launch_the_first_process_leads_and_the_others_follow(
    tmp_path: Path, base: Path, dataset: Path, root: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    # What a killed launch left behind must not be taken for this one's.
    (tmp_path / "work" / "worker.json").write_text(json.dumps({"launch": "another"}))
    script = tmp_path / "led.py"
    script.write_text(LED)
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--main_process_port", "0"]
    done = subprocess.run(
        [*command, "--dynamo_backend", "no", str(script), str(tmp_path), str(base), str(dataset)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "world").read_text() == "2"
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "work" / "worker.json").exists()
