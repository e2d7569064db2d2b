"""Getting the answers: from local models in worker processes, from an API through the response store."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pyarrow as pa

from pipeline.core.config import EvaluateStep
from pipeline.core.config_base import LocalModel
from pipeline.core.config_outbound import guard_towards
from pipeline.core.config_teacher import Sampling, VllmTeacher
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Prompt, ShardWriter, message_dict
from pipeline.core.stage import Context, Json
from pipeline.stages.evaluate.questions import Questions, read_test_questions
from pipeline.student.jobs import AnswerJob, Exam, Examined, Question, Speed, read_examined
from pipeline.student.layers import BASE
from pipeline.student.process import OFFLINE, Files, Report, run_process
from pipeline.teacher.ask import ask
from pipeline.teacher.reasoning import split_reasoning
from pipeline.teacher.request import Asked, Request
from pipeline.text.outbound import Guard, Tally

WORKER: Final = "pipeline.student.answer"
ANSWERS: Final = pa.schema(
    [
        pa.field("prompt_set", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("task", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
    ]
)
CHUNK: Final = 8192
NEXT_QUESTION: Final = re.compile(r"^\s*Question:", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answered:
    """One model's answers to one list of prompts, in order.

    Attributes:
        texts: what is compared with the references.
        finish_reasons: as in `student.jobs.Answer`, or the API's.
        ids: (set, id) of each prompt; empty where the list is the test prompts as they are.
        parameters, bytes: of the stored weights; None where they are not known.
    """

    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    ids: tuple[tuple[str, str], ...] = ()
    parameters: int | None = None
    bytes: int | None = None

    def first_lines(self) -> "Answered":
        """The first line of each answer that is not blank."""
        return replace(self, texts=tuple(first_line(text) for text in self.texts))

    def before_next_question(self) -> "Answered":
        """Each answer up to where it goes on with a question of its own, as the solved examples taught it to."""
        return replace(self, texts=tuple(before_next_question(text) for text in self.texts))

    def without_reasoning(self, tags: tuple[str, str]) -> "Answered":
        """Each answer without the thinking inside it, as `ask` gives those of a teacher that it asks."""
        pairs = zip(self.texts, self.finish_reasons, strict=True)
        return replace(self, texts=tuple(split_reasoning(text, reason, tags)[1] for text, reason in pairs))

    def only(self, prompts: Sequence[Prompt]) -> "Answered":
        """The answers to these prompts."""
        at = {one: index for index, one in enumerate(self.ids)}
        places = [at[prompt.prompt_set, prompt.prompt_id] for prompt in prompts]
        texts, reasons = [self.texts[place] for place in places], [self.finish_reasons[place] for place in places]
        return replace(self, texts=tuple(texts), finish_reasons=tuple(reasons), ids=())


@dataclass(frozen=True, slots=True)
class ModelAnswers:
    """All that one local model answered, and how fast.

    Attributes:
        passes: answers per second, one figure a warm pass.
        alternating: whether the models took turns; False where they do not fit on a GPU together, so that each was
            measured alone.
    """

    examined: Examined
    passes: tuple[float, ...]
    alternating: bool = True

    def of(self, questions: str) -> Answered:
        """Its answers to a list of questions."""
        answers = self.examined.answers[questions]
        return Answered(
            texts=tuple(answer.text for answer in answers),
            finish_reasons=tuple(answer.finish_reason for answer in answers),
            parameters=self.examined.parameters,
            bytes=self.examined.bytes,
        )


def before_next_question(text: str) -> str:
    """The text up to the next line that begins as the examples of the 3-shot way do, without white space around it."""
    return NEXT_QUESTION.split(text, maxsplit=1)[0].strip()


def first_line(text: str) -> str:
    """The first line that is not blank, without white space around it; "" if there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# ---------------------------------------------------------------------------------------------------- API teachers


def guard_questions(cfg: EvaluateStep, questions: Questions) -> tuple[Questions, dict[str, Json]]:
    """The questions without test prompts that must not leave this machine, and the guard's counts for the manifest.

    A blocked prompt is left out, and a redacted one asked as it is then, for all models alike: they are compared on
    the same questions, and the student was trained on prompts that were treated so. Nothing changes where the teacher
    is asked nothing or runs here. Validation prompts and solved examples are for the base, which runs here.
    """
    guard = Guard(guard_towards(cfg.outbound, cfg.teacher.kind))
    if not guard.acts:
        return questions, {}
    tally = Tally()
    checked = [guard.check(row.prompt) for row in questions.test]
    tally.add(checked)
    pairs = [*zip(questions.test, checked, strict=True)]
    blocked = {(row.prompt_set, row.prompt_id): each.reason for row, each in pairs if each.reason is not None}
    passed = tuple(replace(row, prompt=each.messages) for row, each in pairs)
    return replace(questions, test=passed).without(blocked), {"outbound": tally.metrics()}


def ask_teacher(
    cfg: EvaluateStep, prompts: Sequence[Prompt], ctx: Context
) -> tuple[Answered | None, dict[tuple[str, str], str]]:
    """The answers of a teacher that is not run here, and (set, id) -> reason of the prompts it gives none to.

    (None, {}) for a local teacher: it answers in a worker like the other models.
    """
    if isinstance(cfg.teacher, VllmTeacher):
        return None, {}
    asked, requests = _requests(cfg, prompts, ctx.data)
    ctx.progress.start(len(requests), "answers")
    answers = list(ask(cfg.teacher, asked, cfg.retry, requests, ctx, cfg.spending))
    ids = tuple((row.prompt_set, row.prompt_id) for row in prompts)
    pairs = zip(ids, answers, strict=True)
    refused = {one: f"no_teacher_answer:{answer.rejected}" for one, answer in pairs if answer.rejected is not None}
    texts = tuple(answer.text for answer in answers)
    return Answered(texts, tuple(answer.finish_reason for answer in answers), ids), refused


def _requests(cfg: EvaluateStep, prompts: Sequence[Prompt], data: Path) -> tuple[Asked, list[Request]]:
    how = {} if cfg.greedy_teacher else {"temperature": None, "top_p": None}
    sampling = Sampling.model_validate({"max_tokens": cfg.evaluate.max_tokens, **how})
    asked = Asked.of(cfg.teacher, sampling, 0, DigestCache(data / "cache" / "digests.json"))
    return asked, [asked.request(row.prompt_set, row.prompt_id, 0, row.prompt) for row in prompts]


def requests_to_teacher(cfg: EvaluateStep, rows: Path, data: Path) -> tuple[Asked, list[Request], int]:
    """What a teacher that is not run here is asked on the committed prompts in `rows`, and how many test prompts must
    not leave this machine. Nobody is asked."""
    questions = read_test_questions(rows, cfg.evaluate)
    passed, _ = guard_questions(cfg, questions)
    return *_requests(cfg, passed.test, data), len(questions.test) - len(passed.test)


# ---------------------------------------------------------------------------------------------------- local models


def examine(cfg: EvaluateStep, student: Path, questions: Questions, ctx: Context) -> dict[str, ModelAnswers]:
    """Let the local models answer: the test prompts all of them, and what its way is chosen by the base.

    Speed is measured on the first `speed_prompts` test prompts, with all models loaded; where they do not fit on a
    GPU together, one after the other.
    """
    exams = local_exams(cfg, student, questions)
    speed = Speed("test", cfg.evaluate.speed_prompts, cfg.evaluate.speed_passes)
    timed = min(speed.limit, len(questions.test)) * (speed.passes + 1) * len(exams)
    ctx.progress.start(sum(len(items) for exam in exams for items in exam.questions.values()) + timed, "answers")
    if cfg.evaluate.engine == "transformers":
        found = clocked = run_answers(job_of(cfg, exams, speed), "answer", ctx)
    else:
        # vLLM does not give back all that an engine held, so each model gets a process, and the measurement another.
        found = _each_alone(exams, lambda exam: run_answers(job_of(cfg, (exam,), None), f"answer-{exam.name}", ctx))
        clocked = run_answers(job_of(cfg, exams, speed, answers=False), "speed", ctx)
    alternating = any(one.answers_per_second for one in clocked.values())
    if not alternating:
        clocked = _each_alone(
            exams, lambda exam: run_answers(job_of(cfg, (exam,), speed, answers=False), f"speed-{exam.name}", ctx)
        )
    return {name: ModelAnswers(one, clocked[name].answers_per_second, alternating) for name, one in found.items()}


def _each_alone(exams: Sequence[Exam], run: Callable[[Exam], dict[str, Examined]]) -> dict[str, Examined]:
    return {exam.name: run(exam)[exam.name] for exam in exams}


def answer_three_shot(cfg: EvaluateStep, student: Path, questions: Questions, ctx: Context) -> Answered:
    """The base's whole answers to the test prompts behind the examples: asked for only where that served it best."""
    asked = three_shot(questions, questions.test)
    ctx.progress.start(len(asked), "answers")
    exam = base_exam(cfg, student, {"test_three_shot": asked})
    found = run_answers(job_of(cfg, (exam,), None), "three-shot", ctx)["base"]
    return ModelAnswers(found, ()).of("test_three_shot")


def local_exams(cfg: EvaluateStep, student: Path, questions: Questions) -> tuple[Exam, ...]:
    """The local models and what each is asked."""
    test, validation = chat(questions.test), chat(questions.validation)
    shown = three_shot(questions, questions.validation)
    teacher = cfg.teacher
    return (
        *([_teacher_exam(teacher, {"test": test})] if isinstance(teacher, VllmTeacher) else []),
        base_exam(cfg, student, {"test": test, "validation": validation, "validation_three_shot": shown}),
        Exam("student", str(student.resolve()), None, {"test": test}),
    )


def _teacher_exam(teacher: VllmTeacher, questions: dict[str, tuple[Question, ...]]) -> Exam:
    """The teacher as it answered where the data was made."""
    return replace(
        exam_of("teacher", teacher, questions),
        tensor_parallel_size=teacher.tensor_parallel_size,
        quantization=teacher.quantization,
        max_model_len=teacher.max_model_len,
    )


def exam_of(name: str, model: LocalModel, questions: dict[str, tuple[Question, ...]]) -> Exam:
    """What a model of the config is asked."""
    folder = model.model if model.folder is None else str(model.folder)
    return Exam(name, folder, model.revision, questions)


def base_exam(cfg: EvaluateStep, student: Path, questions: dict[str, tuple[Question, ...]]) -> Exam:
    """What the base is asked: the student's model of the config, or where the training began with something else
    (`student.init`), the folder of that beside the student's."""
    if cfg.student.init is None:
        return exam_of("base", cfg.student, questions)
    return Exam("base", str(student.with_name(BASE).resolve()), None, questions)


def chat(prompts: Sequence[Prompt]) -> tuple[Question, ...]:
    """Prompts for the chat template."""
    return tuple(Question(messages=tuple(message_dict(turn) for turn in row.prompt)) for row in prompts)


def three_shot(questions: Questions, prompts: Sequence[Prompt]) -> tuple[Question, ...]:
    """Prompts as raw text behind the solved examples, the same ones for all."""
    return tuple(Question(text=questions.three_shot_text(row)) for row in prompts)


def job_of(cfg: EvaluateStep, exams: tuple[Exam, ...], speed: Speed | None, *, answers: bool = True) -> AnswerJob:
    """The worker's job."""
    config = cfg.evaluate
    return AnswerJob(
        engine=config.engine,
        precision=config.precision,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
        threads=config.threads,
        exams=exams,
        speed=speed,
        answers=answers,
    )


def run_answers(job: AnswerJob, name: str, ctx: Context) -> dict[str, Examined]:
    """Run a worker on the job and read what its models answered."""
    path = ctx.workdir / f"{name}.json"
    job.write(path)
    env = {} if job.threads is None else {"OMP_NUM_THREADS": str(job.threads)}
    if all(exam.revision is None for exam in job.exams):
        env |= OFFLINE

    def report(line: Report) -> None:
        match line:
            case {"answers": int(count), "tokens": int(tokens)}:
                ctx.progress.advance(count, tokens=tokens)
            case _:
                raise ValueError(f"a report that nobody knows: {sorted(line)}")

    run_process([sys.executable, "-m", WORKER, str(path)], path, ctx, report, env)
    return read_examined(Files(path).beside(".result.json"))


# ----------------------------------------------------------------------------------------------------------- writing


def write_answers(
    folder: Path, prompts: Sequence[Prompt], answered: Mapping[str, Answered], right: Mapping[str, Sequence[bool]]
) -> str:
    """Write one row a prompt and model, in the order of the prompts; returns their content digest."""
    with ShardWriter(folder, ANSWERS) as writer:
        for start in range(0, len(prompts), CHUNK):
            rows = [
                (
                    row.prompt_set,
                    row.prompt_id,
                    row.task,
                    name,
                    found.texts[at],
                    right[name][at],
                    found.finish_reasons[at],
                )
                for at, row in enumerate(prompts[start : start + CHUNK], start)
                for name, found in answered.items()
            ]
            columns = [list(column) for column in zip(*rows, strict=True)]
            writer.write(pa.table(dict(zip(ANSWERS.names, columns, strict=True)), schema=ANSWERS))
    return writer.written().content
