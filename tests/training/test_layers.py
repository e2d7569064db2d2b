"""A student that begins as some layers of a larger model is trained from them, and measured against them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.config import EvaluateConfig, EvaluateStep
from pipeline.core.config_teacher import Retry, VllmTeacher
from pipeline.core.config_train import StudentModel
from pipeline.stages.evaluate.answers import base_exam
from pipeline.student.answer import run_job as run_answers
from pipeline.student.jobs import AnswerJob, Question, TrainJob
from pipeline.student.layers import write_layers
from pipeline.student.weights import Weights, stored_weights
from pipeline.student.worker import run_job
from tests.training_rows import small_config, sum_row, write_dataset
from tests.unit.test_layers import make_larger

KEPT = (0, 2, 4)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_larger(tmp_path_factory.mktemp("larger"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", [sum_row(number) for number in range(24)])


def job_in(folder: Path, dataset: Path, student: StudentModel) -> TrainJob:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return TrainJob(
        train=small_config(max_steps=2),
        student=student,
        data=dataset / "data",
        out=folder / "out",
        workdir=folder / "work",
        world_size=1,
        launch="test",
    )


def with_layers(larger: Path) -> StudentModel:
    return StudentModel.model_validate({"model": str(larger), "init": {"from_teacher_layers": KEPT}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, larger: Path, dataset: Path) -> Path:
    job = job_in(tmp_path_factory.mktemp("trained"), dataset, with_layers(larger))
    run_job(job, lambda report: None)
    return job.out


def test_the_student_has_the_chosen_layers_and_was_trained_from_them(trained: Path, larger: Path) -> None:
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert student.config.num_hidden_layers == len(student.model.layers) == 3
    before = AutoModelForCausalLM.from_pretrained(larger).model.layers
    for new, old in enumerate(KEPT):
        moved = (student.model.layers[new].mlp.up_proj.weight - before[old].mlp.up_proj.weight).abs()
        assert 0 < moved.max() < 0.1, f"layer {new} is layer {old}, two small steps later"


def test_it_is_the_training_of_a_model_that_has_these_layers_only(
    tmp_path: Path, trained: Path, larger: Path, dataset: Path
) -> None:
    write_layers(larger, KEPT, tmp_path / "plain")
    job = job_in(tmp_path, dataset, StudentModel(model=str(tmp_path / "plain")))
    run_job(job, lambda report: None)
    assert (job.out / "loss.json").read_bytes() == (trained / "loss.json").read_bytes()
    weights = "model/model.safetensors"
    assert (job.out / weights).read_bytes() == (trained / weights).read_bytes()
    assert not (job.out / "base").exists(), "a base that exists already is not kept again"


def test_what_an_interrupted_training_wrote_is_used_again(tmp_path: Path, larger: Path, dataset: Path) -> None:
    job = job_in(tmp_path, dataset, with_layers(larger))
    write_layers(larger, (0, 1, 2), job.workdir / "base")  # other layers, to see whether they are taken
    run_job(job, lambda report: None)
    assert stored_weights(job.out / "base") == stored_weights(job.workdir / "base")
    kept = (job.out / "base" / "model.safetensors").read_bytes()
    assert kept == (job.workdir / "base" / "model.safetensors").read_bytes()


def test_stage_evaluate_measures_the_base_that_was_trained(trained: Path, larger: Path) -> None:
    questions = {"test": (Question(messages=({"role": "user", "content": "What is 1 + 1?"},)),)}
    found = {}
    for name, student in (("plain", StudentModel(model=str(larger))), ("layers", with_layers(larger))):
        teacher = VllmTeacher(kind="vllm", model="./teacher")
        cfg = EvaluateStep(evaluate=EvaluateConfig(), teacher=teacher, student=student, retry=Retry())
        exam = base_exam(cfg, trained / "model", questions)
        job = AnswerJob("transformers", "float32", 4, 8, 1, (exam,), None)
        found[name] = run_answers(job, lambda report: None)["base"]
    sizes = {name: Weights(one.parameters or 0, one.bytes or 0) for name, one in found.items()}
    assert sizes == {"plain": stored_weights(larger), "layers": stored_weights(trained / "base")}
    assert sizes["layers"].parameters < sizes["plain"].parameters
    assert found["layers"].answers["test"][0].tokens == 4, "the base answers"
