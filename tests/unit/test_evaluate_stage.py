"""Which prompts are asked, how the base is asked, and how an API teacher's answers are scored."""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import EvaluateConfig, EvaluateStep
from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_base import identity
from pipeline.core.config_teacher import ReplayTeacher, Retry, VllmTeacher
from pipeline.core.config_train import StudentModel
from pipeline.core.errors import Incomplete, Interrupted, UsageError
from pipeline.core.record import PROMPT_SCHEMA, Message, Prompt
from pipeline.core.sink import RowSink
from pipeline.stages import evaluate
from pipeline.stages.evaluate.answers import Answered, ModelAnswers, ask_teacher, first_line, local_exams
from pipeline.stages.evaluate.base import WAYS, choose_way, read_shown
from pipeline.stages.evaluate.questions import Questions, read_questions
from pipeline.student.engines import GPU_SHARE, batches, fit_together, gpu_need, gpu_shares
from pipeline.student.jobs import Answer, AnswerJob, Examined
from pipeline.student.process import Files, Reporter, run_process
from pipeline.student.weights import Weights, stored_weights
from pipeline.text.verifiers import exact, numeric
from tests.support import RecordedProgress, a_prompt, make_context
from tests.training_rows import is_alive


def prompt(number: int, split: str = "test", answer: str | None = "yes") -> Prompt:
    text = f"Question number {number}?"
    return a_prompt(prompt_id=f"{split}{number}", split=split, prompt=(Message("user", text),), answer=answer)


def write_prompts(folder: Path, rows: Sequence[Prompt]) -> Path:
    with RowSink(folder, PROMPT_SCHEMA) as sink:
        sink.keep(rows)
    return folder / "rows"


def ids(rows: Sequence[Prompt]) -> list[str]:
    return [row.prompt_id for row in rows]


# --------------------------------------------------------------------------------------------------- which prompts


def test_test_rows_without_a_reference_leave_with_a_reason(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path, [prompt(1), prompt(2, answer=None), prompt(3, "train"), prompt(4, "validation")])
    found = read_questions(rows, EvaluateConfig())
    assert ids(found.test) == ["test1"]
    assert found.counts() == {"no_reference": 1}
    assert ids(found.validation) == ["validation4"]
    assert ids(found.examples) == ["train3"]


def test_a_reference_without_a_number_is_none_for_numbers(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path, [prompt(1, answer="42"), prompt(2, answer="many")])
    found = read_questions(rows, EvaluateConfig(metric="numeric"))
    assert (ids(found.test), found.counts()) == (["test1"], {"no_reference": 1})


def test_a_cap_draws_by_id_so_that_more_rows_do_not_reshuffle(tmp_path: Path) -> None:
    some = [prompt(number) for number in range(50)]
    fewer = read_questions(write_prompts(tmp_path / "a", some[:40]), EvaluateConfig(max_prompts=10))
    more = read_questions(write_prompts(tmp_path / "b", some), EvaluateConfig(max_prompts=10))
    assert len(fewer.test) == len(more.test) == 10
    assert fewer.counts() == {"over_max_prompts": 30}
    new = {row.prompt_id for row in some[40:]}
    assert {*ids(more.test)} - new <= {*ids(fewer.test)}


def test_three_shot_shows_solved_training_rows_as_raw_text(tmp_path: Path) -> None:
    rows = [prompt(number, "train", f"a{number}") for number in range(9)] + [prompt(1)]
    found = read_questions(write_prompts(tmp_path, rows), EvaluateConfig())
    text = found.three_shot_text(found.test[0])
    assert text.count("Question: ") == 4
    assert text.count("\nAnswer: a") == 3
    assert text.endswith("\n\nQuestion: Question number 1?\nAnswer:")


# -------------------------------------------------------------------------------------------------------- the base


def base_answers(**texts: str) -> ModelAnswers:
    """A base that gives one answer to each list of questions (of two)."""
    answers = {name: (Answer(text, 1, "stop"),) * 2 for name, text in texts.items()}
    return ModelAnswers(Examined(answers, 10, 20, ()), ())


def two_of_each() -> Questions:
    test, validation = (prompt(1), prompt(2)), (prompt(1, "validation"), prompt(2, "validation"))
    return Questions(test, validation, (), (), exact)


@pytest.mark.parametrize(
    ("chat", "shown", "way"),
    [
        ("yes", "yes\nmore", "strict"),
        ("yes\nand more", "no", "first_line"),
        ("no", "yes\n\nQuestion: And?\nAnswer: no", "three_shot"),
        ("no", "yes\nQuestion:", "three_shot"),
        ("no", "yes\nof course", "three_shot_first_line"),
    ],
)
def test_the_base_is_asked_in_the_way_that_serves_it_best_on_validation(chat: str, shown: str, way: str) -> None:
    # Its test answers are all wrong: they must have no say.
    found = choose_way(base_answers(test="no", validation=chat, validation_three_shot=shown), two_of_each())
    assert found.name == way
    assert found.accuracies[way] == 1.0
    assert set(found.accuracies) == set(WAYS)
    assert found.strict_accuracy == 0.0
    assert (found.answered is None) is way.startswith("three_shot")


def test_an_answer_of_several_lines_behind_the_examples_is_judged_whole() -> None:
    # GSM8K's way of answering: the result stands in the last line.
    worked = " She sold 48/2 = 24 in May.\nTogether 48 + 24 = 72.\n#### 72\n\nQuestion: And 3 + 4?\nAnswer: #### 7"
    solved = tuple(prompt(number, "validation", "#### 72") for number in (1, 2))
    questions = Questions(two_of_each().test, solved, (), (), numeric)
    found = choose_way(base_answers(test="no", validation="no", validation_three_shot=worked), questions)
    assert (found.name, found.accuracies["three_shot"]) == ("three_shot", 1.0)
    assert found.accuracies["three_shot_first_line"] == 0.0
    shown = base_answers(test=worked).of("test")
    assert read_shown("three_shot", shown).texts[0].endswith("\n#### 72")


def test_the_first_line_is_read_for_the_first_line_way() -> None:
    found = choose_way(base_answers(test="\n yes \nno", validation="yes\nx", validation_three_shot=""), two_of_each())
    assert found.answered is not None
    assert found.answered.texts == ("yes", "yes")


def test_without_validation_references_the_base_is_asked_strictly() -> None:
    questions = Questions((prompt(1), prompt(2)), (), (), (), exact)
    found = choose_way(base_answers(test="yes", validation="", validation_three_shot=""), questions)
    assert (found.name, found.accuracies, found.strict_accuracy) == ("strict", {}, 1.0)


def test_first_line() -> None:
    assert [first_line(text) for text in ("a\nb", "\n\n  a \nb", "", " \n ")] == ["a", "a", "", ""]


# -------------------------------------------------------------------------------------------------------- the jobs


def step(tmp_path: Path, teacher: Any, retry: Retry | None = None, **changes: Any) -> EvaluateStep:
    return EvaluateStep(
        evaluate=EvaluateConfig(**changes),
        teacher=teacher,
        student=StudentModel(model="./base"),
        retry=Retry() if retry is None else retry,
    )


def test_all_models_are_asked_the_same(tmp_path: Path) -> None:
    cfg = step(tmp_path, VllmTeacher(kind="vllm", model="./teacher"))
    exams = {exam.name: exam for exam in local_exams(cfg, tmp_path / "model", two_of_each())}
    assert list(exams) == ["teacher", "base", "student"]
    assert exams["teacher"].questions["test"] == exams["base"].questions["test"] == exams["student"].questions["test"]
    assert exams["student"].model == str(tmp_path / "model")
    assert set(exams["base"].questions) == {"test", "validation", "validation_three_shot"}


def test_the_job_survives_its_file(tmp_path: Path) -> None:
    cfg = step(tmp_path, VllmTeacher(kind="vllm", model="org/teacher", revision="abc"))
    exams = local_exams(cfg, tmp_path, two_of_each())
    job = AnswerJob("vllm", "float32", 8, 16, None, exams, None)
    job.write(tmp_path / "answer.json")
    assert AnswerJob.read(tmp_path / "answer.json") == job


GIB = 2**30


def test_gpu_memory_is_divided_by_need() -> None:
    assert gpu_shares({"student": gpu_need(None)}) == {"student": GPU_SHARE}
    found = gpu_shares({"teacher": gpu_need(64 * GIB), "base": gpu_need(GIB), "student": gpu_need(GIB)})
    assert sum(found.values()) == pytest.approx(GPU_SHARE)
    assert found["teacher"] > 7 * found["base"] == 7 * found["student"] > 0.5


def test_a_model_on_several_gpus_needs_a_part_of_each() -> None:
    weights = 132 * GIB
    assert gpu_need(weights, 4) == gpu_need(weights // 4) < 80 * GIB < gpu_need(weights)


def test_models_that_do_not_fit_on_a_gpu_together() -> None:
    needs = {"teacher": gpu_need(132 * GIB, 4), "base": gpu_need(15 * GIB), "student": gpu_need(15 * GIB)}
    assert not fit_together(needs, 80 * GIB)
    assert fit_together(needs, 141 * GIB)
    assert fit_together(needs, None), "a CPU's memory is not divided"
    assert fit_together({"teacher": gpu_need(132 * GIB)}, 80 * GIB), "alone it may try"


def test_a_batch_holds_prompts_of_one_cap() -> None:
    # One prompt near the limit has a cap of its own: it must not cut the answers of others, nor wait for theirs.
    lengths, caps = [30, 511, 20, 10, 40], [99, 1, 99, 99, 99]
    found = batches([[7] * length for length in lengths], caps, 3)
    assert found == [[3, 2, 0], [4], [1]]


def test_the_teacher_is_loaded_as_it_was_served(tmp_path: Path) -> None:
    served = {"tensor_parallel_size": 4, "quantization": "fp8", "max_model_len": 4096}
    teacher = VllmTeacher.model_validate({"kind": "vllm", "model": "./teacher", **served})
    exams = {exam.name: exam for exam in local_exams(step(tmp_path, teacher), tmp_path, two_of_each())}
    assert {name: getattr(exams["teacher"], name) for name in served} == served
    plain = {"tensor_parallel_size": 1, "quantization": None, "max_model_len": None}
    assert {name: getattr(exams["student"], name) for name in served} == plain


def test_an_api_teacher_is_asked_with_the_patience_of_generate(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # takes connections, and never answers
        teacher = OpenAITeacher(
            kind="openai", base_url=f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", provider="x", model="y"
        )
        cfg = step(tmp_path, teacher, Retry(budget_s=0.2, first_wait_s=0.01, timeout_s=0.1))
        start = time.monotonic()
        with pytest.raises(Incomplete):
            ask_teacher(cfg, two_of_each().test, make_context(tmp_path))
    assert time.monotonic() - start < 30


def test_retries_do_not_count(tmp_path: Path) -> None:
    teacher = VllmTeacher(kind="vllm", model="./teacher")
    patient = step(tmp_path, teacher, Retry(timeout_s=1800))
    assert identity(patient) == identity(step(tmp_path, teacher))


def write_weights(path: Path, parameters: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_weights_that_are_stored_in_two_layouts_count_once(tmp_path: Path) -> None:
    assert stored_weights(tmp_path) is None
    write_weights(tmp_path / "consolidated.safetensors", 10)
    assert stored_weights(tmp_path) == Weights(10, 40)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, parameters in zip(names, (6, 4), strict=True):
        write_weights(tmp_path / name, parameters)
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_weights(tmp_path) == Weights(10, 40)
    (tmp_path / "model.safetensors.index.json").unlink()
    for name in names:
        (tmp_path / name).unlink()
    write_weights(tmp_path / "model.safetensors", 10)
    assert stored_weights(tmp_path) == Weights(10, 40)


def test_input_files_name_what_is_read(tmp_path: Path) -> None:
    assert evaluate.input_files(step(tmp_path, VllmTeacher(kind="vllm", model="./teacher"))) == {
        "student.model": Path("base"),
        "teacher.model": Path("teacher"),
    }
    replay = ReplayTeacher(kind="replay", path=Path("answers.jsonl"), origin="people")
    assert evaluate.input_files(step(tmp_path, replay))["teacher.path"] == Path("answers.jsonl")
    hub = VllmTeacher(kind="vllm", model="org/teacher", revision="abc")
    assert set(evaluate.input_files(step(tmp_path, hub))) == {"student.model"}


def test_no_test_prompt_with_a_reference(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts", [prompt(1, answer=None)])
    inputs = {"prompts": tmp_path / "prompts", "train": tmp_path / "train"}
    cfg = step(tmp_path, VllmTeacher(kind="vllm", model="./teacher"))
    with pytest.raises(UsageError, match="no test prompt can be scored"):
        evaluate.run(cfg, inputs, tmp_path / "out", make_context(tmp_path))


def test_prompts_that_an_imported_teacher_never_answered_are_not_scored(tmp_path: Path) -> None:
    rows = [{"id": "test1", "completion": "yes"}, {"id": "test3", "completion": "no"}]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = step(tmp_path, ReplayTeacher(kind="replay", path=path, origin="people"))
    questions = Questions(tuple(prompt(number) for number in (1, 2, 3)), (), (), (), exact)
    found, refused = ask_teacher(cfg, questions.test, make_context(tmp_path))
    kept = questions.without(refused)
    assert kept.counts() == {"no_teacher_answer:no_completion": 1}
    assert found is not None
    assert kept.judge(found.only(kept.test).texts) == [True, False]
    assert (found.parameters, found.bytes) == (None, None)


def test_answers_are_put_to_their_prompts() -> None:
    answered = Answered(("a", "b"), ("stop", "length"), (("set", "test1"), ("set", "test2")))
    assert answered.only([prompt(2)]) == Answered(("b",), ("length",))


# ------------------------------------------------------------------------------------------------ worker processes


@dataclass
class Worker:
    """A script that runs as a worker's process, and what it reported."""

    folder: Path
    seen: list[Any] = field(default_factory=list)

    def run(self, script: str, **env: str) -> None:
        ctx = make_context(self.folder)
        path = ctx.workdir / "job.json"
        path.write_text("{}")
        run_process([sys.executable, "-c", script, str(path)], path, ctx, self.seen.append, env)


def test_a_workers_reports_arrive_in_order(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    worker.run(
        "import sys, pathlib; from pipeline.student.process import *\n"
        "say = Reporter(Files(pathlib.Path(sys.argv[1])).reports)\n"
        "[say({'n': n}) for n in range(300)]"
    )
    assert [report["n"] for report in worker.seen] == list(range(300))


def test_a_workers_error_is_the_stages_error(tmp_path: Path) -> None:
    script = (
        "import sys; from pipeline.student.process import run_as_worker; from pipeline.core.errors import UsageError\n"
        "def main(path): raise UsageError('no such model', where='here', todo='do this')\n"
        "run_as_worker(main, sys.argv)"
    )
    with pytest.raises(UsageError) as caught:
        Worker(tmp_path).run(script)
    assert (caught.value.what, caught.value.where, caught.value.todo) == ("no such model", "here", "do this")


def test_a_worker_on_a_full_disk_asks_for_room_and_for_nothing_else(tmp_path: Path) -> None:
    script = (
        "import errno, sys; from pipeline.student.process import run_as_worker\n"
        "def main(path): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "run_as_worker(main, sys.argv)"
    )
    with pytest.raises(Incomplete, match="No space left on device") as caught:
        Worker(tmp_path).run(script)
    assert caught.value.todo.startswith("make room")


def test_numbers_that_json_does_not_know_are_reported_as_null(tmp_path: Path) -> None:
    path = tmp_path / "job.reports.jsonl"
    Reporter(path)({"point": {"loss": float("nan"), "grad_norm": float("inf"), "step": 3}})
    assert path.read_text() == '{"point": {"loss": null, "grad_norm": null, "step": 3}}\n'


def test_a_worker_that_breaks_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match="exit code 1: RuntimeError: out of something") as caught:
        Worker(tmp_path).run("raise RuntimeError('out of something')")
    log = Path(caught.value.where)
    assert "Traceback" in log.read_text()


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match="ended by signal 9"):
        Worker(tmp_path).run("import os; print('so far', flush=True); os.kill(os.getpid(), 9)")


def test_a_worker_does_not_see_the_launcher_around_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    worker = Worker(tmp_path)
    worker.run(
        "import os, sys, pathlib; from pipeline.student.process import *\n"
        "names = [n for n in os.environ if FOREIGN.fullmatch(n)]\n"
        "Reporter(Files(pathlib.Path(sys.argv[1])).reports)({'names': names, 'given': os.environ['GIVEN']})",
        GIVEN="yes",
    )
    assert worker.seen == [{"names": [], "given": "yes"}]


SLEEPER = (
    "import sys, time, pathlib, subprocess, os; from pipeline.student.process import *\n"
    "def main(path):\n"
    "    child = subprocess.Popen(['sleep', '300'])\n"
    "    Reporter(Files(path).reports)({'pids': [os.getpid(), child.pid]})\n"
    "    time.sleep(300)\n"
    "run_as_worker(main, sys.argv)"
)


def test_cancelling_ends_the_worker_and_its_children(tmp_path: Path) -> None:
    ctx = make_context(tmp_path)
    path = ctx.workdir / "job.json"
    path.write_text("{}")
    pids: list[int] = []

    def cancel(report: Any) -> None:
        pids.extend(report["pids"])
        ctx.cancel.set()

    with pytest.raises(Interrupted):
        run_process([sys.executable, "-c", SLEEPER, str(path)], path, ctx, cancel, {})
    assert len(pids) == 2
    assert [pid for pid in pids if is_alive(pid)] == []


def test_progress_is_counted(tmp_path: Path) -> None:
    progress = make_context(tmp_path).progress
    assert isinstance(progress, RecordedProgress)
    assert Files(tmp_path / "answer.json").beside(".result.json").name == "answer.result.json"
