"""Stage `evaluate` with real models of noise: the references are what the teacher says, so it is always right."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import EvaluateConfig, EvaluateStep
from pipeline.core.config_teacher import ReplayTeacher, Retry, VllmTeacher
from pipeline.core.config_train import StudentModel
from pipeline.core.record import PROMPT_SCHEMA, Message, Prompt, read_shards
from pipeline.core.sink import RowSink
from pipeline.core.stage import Result
from pipeline.stages import evaluate
from pipeline.student.answer import run_job
from pipeline.student.engines import Prompter
from pipeline.student.jobs import AnswerJob, Exam, Question
from tests.support import RecordedProgress, a_prompt, make_context
from tests.tiny_models import make_tiny_model

SETTINGS: dict[str, Any] = {
    "max_tokens": 6,
    "batch_size": 8,
    "threads": 1,
    "bootstrap": 200,
    "speed_prompts": 4,
    "speed_passes": 2,
}


def question(number: int) -> str:
    return f"Say something about {'many ' * (number % 5)}{number}."


def make_talkative_model(folder: Path, seed: int) -> None:
    """A tiny model with large weights: with small ones a tied embedding repeats the last token for ever."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(folder, seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.4, generator=generator)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher and base of other weights, and a student that is the teacher's copy."""
    folder = tmp_path_factory.mktemp("models")
    make_talkative_model(folder / "teacher", seed=1)
    make_talkative_model(folder / "base", seed=2)
    shutil.copytree(folder / "teacher", folder / "train" / "model")
    return folder


@pytest.fixture(scope="module")
def said(models: Path) -> list[str]:
    """What the teacher answers, one prompt at a time: batches and padding must not matter."""
    questions = tuple(Question(messages=({"role": "user", "content": question(n)},)) for n in range(30))
    exam = Exam("teacher", str(models / "teacher"), None, {"test": questions})
    job = AnswerJob("transformers", "float32", SETTINGS["max_tokens"], 1, 1, (exam,), None)
    return [answer.text for answer in run_job(job, lambda report: None)["teacher"].answers["test"]]


def test_a_prompt_near_the_models_limit_does_not_cut_its_neighbours(models: Path, said: list[str]) -> None:
    numbers = range(4)
    words = " ".join(["long"] * 200)
    asked = [*(question(n) for n in numbers), words[:490]]
    questions = tuple(Question(messages=({"role": "user", "content": text},)) for text in asked)
    exam = Exam("teacher", str(models / "teacher"), None, {"test": questions})
    prompter = Prompter.of(exam)
    longest = 511 - len(prompter.prompts(questions)[-1])
    assert longest >= 0
    questions = (*questions[:-1], Question(messages=({"role": "user", "content": asked[-1] + "!" * longest},)))
    assert len(prompter.prompts(questions)[-1]) == 511
    exam = replace(exam, questions={"test": questions})
    job = AnswerJob("transformers", "float32", SETTINGS["max_tokens"], 8, 1, (exam,), None)
    answers = run_job(job, lambda report: None)["teacher"].answers["test"]
    assert [answer.text for answer in answers[:-1]] == [said[n] for n in numbers]
    assert answers[-1].tokens == 1


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> Path:
    rows: list[Prompt] = []
    for split, numbers in (("test", range(20)), ("train", range(20, 24)), ("validation", range(24, 30))):
        rows += [
            a_prompt(
                prompt_id=f"p{n:02d}",
                split=split,
                task="ab"[n % 2],
                prompt=(Message("user", question(n)),),
                answer=None if n == 3 else said[n],
            )
            for n in numbers
        ]
    folder = tmp_path_factory.mktemp("prompts")
    with RowSink(folder, PROMPT_SCHEMA) as sink:
        sink.keep(rows)
    return folder


def run_stage(folder: Path, models: Path, prompts: Path, teacher: Any = None, **changes: Any) -> Result:
    local = VllmTeacher(kind="vllm", model=str(models / "teacher"))
    cfg = EvaluateStep(
        evaluate=EvaluateConfig(**{**SETTINGS, **changes}),
        teacher=local if teacher is None else teacher,
        student=StudentModel(model=str(models / "base")),
        retry=Retry(),
    )
    (folder / "out").mkdir(parents=True)
    ctx = make_context(folder)
    result = evaluate.run(cfg, {"prompts": prompts, "train": models / "train"}, folder / "out", ctx)
    assert isinstance(ctx.progress, RecordedProgress)
    assert ctx.progress.done == ctx.progress.total
    return result


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, models: Path, prompts: Path) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, run_stage(folder, models, prompts)


def test_all_models_are_scored_on_the_same_prompts(evaluated: tuple[Path, Result]) -> None:
    folder, result = evaluated
    assert (result.rows_in, result.rows_out, result.rejected) == (20, 19, {"no_reference": 1})
    found = read(folder)
    assert found["n"] == 19
    assert found["teacher"]["accuracy"] == found["student"]["accuracy"] == 1.0, "padding or batching changed answers"
    assert found["base"]["strict_accuracy"] < 0.5
    assert (found["retained"], found["retained_ci95"]) == (1.0, [1.0, 1.0])
    assert found["gap_closed"] == 1.0
    assert found["teacher"]["by_task"] == {"a": {"n": 10, "accuracy": 1.0}, "b": {"n": 9, "accuracy": 1.0}}
    assert set(found["base"]["methods"]) == {"strict", "first_line", "three_shot", "three_shot_first_line"}


def test_size_and_speed_are_measured(evaluated: tuple[Path, Result]) -> None:
    found = read(evaluated[0])
    for name in ("teacher", "base", "student"):
        model = found[name]
        assert model["parameters"] == found["teacher"]["parameters"] > 50_000
        assert model["bytes"] == 4 * model["parameters"]
        assert len(model["answers_per_second_passes"]) == 2
        assert model["answers_per_second"] > 0
    assert found["speed"]["alternating"] is True


def test_every_answer_is_kept(evaluated: tuple[Path, Result]) -> None:
    folder, _ = evaluated
    rows = [row for table in read_shards(folder / "out" / "answers") for row in table.to_pylist()]
    assert Counter(row["model"] for row in rows) == {"teacher": 19, "base": 19, "student": 19}
    right = Counter(row["model"] for row in rows if row["correct"])
    assert right["teacher"] == 19
    assert right["base"] == round(read(folder)["base"]["accuracy"] * 19)


def test_timings_are_no_part_of_the_content(
    evaluated: tuple[Path, Result], tmp_path: Path, models: Path, prompts: Path
) -> None:
    again = run_stage(tmp_path, models, prompts, speed_passes=1)
    assert again.content == evaluated[1].content
    assert again.metrics == evaluated[1].metrics
    other = run_stage(tmp_path / "other", models, prompts, max_tokens=3)
    assert other.content != again.content


def test_an_imported_teacher_has_no_size_and_no_speed(
    tmp_path: Path, models: Path, prompts: Path, said: list[str]
) -> None:
    path = tmp_path / "completions.jsonl"
    rows = [{"id": f"p{n:02d}", "completion": said[n] if n % 2 else "wrong"} for n in range(20) if n != 5]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    teacher = ReplayTeacher(kind="replay", path=path, origin="a file")
    result = run_stage(tmp_path, models, prompts, teacher)
    assert result.rejected == {"no_reference": 1, "no_teacher_answer:no_completion": 1}
    found = read(tmp_path)
    assert found["n"] == 18
    assert found["teacher"]["accuracy"] == pytest.approx(8 / 18)
    assert [found["teacher"][name] for name in ("parameters", "bytes", "answers_per_second")] == [None, None, None]
    assert found["student"]["answers_per_second"] > 0


@pytest.mark.vllm
def test_vllm_answers_like_transformers(
    evaluated: tuple[Path, Result], tmp_path: Path, models: Path, prompts: Path, said: list[str]
) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{n:02d}", "completion": said[n]}) + "\n" for n in range(20)), "utf-8")
    teacher = ReplayTeacher(kind="replay", path=path, origin="a file")
    run_stage(tmp_path, models, prompts, teacher, engine="vllm", speed_passes=1)
    mine, other = read(tmp_path), read(evaluated[0])
    for name in ("base", "student"):
        assert mine[name].pop("answers_per_second") > 0
        assert len(mine[name].pop("answers_per_second_passes")) == 1
        assert mine[name] == {field: other[name][field] for field in mine[name]}
