"""Models that answer, in a process of their own: `python -m pipeline.student.answer answer.json`.

Answers go to `answer.result.json` when all are given. Greedy throughout.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipeline.student.jobs import Answer, AnswerJob, Exam, Examined, Question, Speed, write_examined
from pipeline.student.process import Files, Report, Reporter, run_as_worker
from pipeline.student.weights import Weights, stored_weights

if TYPE_CHECKING:
    from pipeline.student.engines import Examinee

REPORT_QUESTIONS: Final = 256
"""Questions between two reports of progress; vLLM is given all questions at once."""
VALUE_BYTES: Final = {"float32": 4, "bfloat16": 2}
"""Bytes of a parameter in each of the job's number formats."""


def main(path: Path) -> None:
    """Answer as `answer.json` says."""
    job = AnswerJob.read(path)
    if job.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(job.threads)  # read when torch loads
    write_examined(Files(path).beside(".result.json"), run_job(job, Reporter(Files(path).reports)))


def run_job(job: AnswerJob, report: Callable[[Report], None]) -> dict[str, Examined]:
    """Let each model answer its questions, one after the other, then measure speed with all of them loaded.

    Speed is left out where they do not fit on a GPU together: then each needs a job of its own.

    Raises:
        UsageError: a model cannot be loaded.
    """
    if job.threads is not None:
        import torch

        torch.set_num_threads(job.threads)
    answers = {exam.name: _answers(job, exam, report) if job.answers else {} for exam in job.exams}
    passes = {} if job.speed is None else _measure(job, job.speed, report)
    return {exam.name: _examined(exam, answers[exam.name], passes.get(exam.name, ())) for exam in job.exams}


def _answers(job: AnswerJob, exam: Exam, report: Callable[[Report], None]) -> dict[str, tuple[Answer, ...]]:
    from pipeline.student.engines import GPU_SHARE, load_examinee

    examinee = load_examinee(job, exam, gpu_share=GPU_SHARE)
    try:
        return {name: tuple(_in_parts(job, examinee, questions, report)) for name, questions in exam.questions.items()}
    finally:
        examinee.engine.close()


def _in_parts(
    job: AnswerJob, examinee: "Examinee", questions: Sequence[Question], report: Callable[[Report], None]
) -> list[Answer]:
    """Answers in order. Transformers gets large sorted parts: one batch then holds prompts of similar length."""
    size = max(1, len(questions) if job.engine == "vllm" else max(REPORT_QUESTIONS, 8 * job.batch_size))
    answers: list[Answer] = []
    for start in range(0, len(questions), size):
        part = examinee.answer(questions[start : start + size])
        report({"answers": len(part), "tokens": sum(answer.tokens for answer in part)})
        answers += part
    return answers


def _measure(job: AnswerJob, speed: Speed, report: Callable[[Report], None]) -> Mapping[str, list[float]]:
    """Answers per second of each model: one pass each to warm up, then passes in turn, all on equal prompts.

    All models stay loaded, so that what disturbs the machine disturbs all of them alike. Nothing is measured where
    they do not fit on a GPU together.
    """
    from pipeline.student.engines import fit_together, gpu_memory, gpu_need, gpu_shares, load_examinee

    gpus = {exam.name: exam.tensor_parallel_size if job.engine == "vllm" else 1 for exam in job.exams}
    needs = {exam.name: gpu_need(_loaded_bytes(job, exam), gpus[exam.name]) for exam in job.exams}
    if not fit_together(needs, gpu_memory()):
        return {}
    shares = gpu_shares(needs)
    examinees = {
        exam.name: (
            load_examinee(job, exam, gpu_share=shares[exam.name]),
            exam.questions[speed.questions][: speed.limit],
        )
        for exam in job.exams
    }
    passes: dict[str, list[float]] = {name: [] for name in examinees}
    for turn in range(speed.passes + 1):
        for name, (examinee, questions) in examinees.items():
            start = time.perf_counter()
            examinee.answer(questions)
            if turn > 0:
                passes[name].append(len(questions) / (time.perf_counter() - start))
            report({"answers": len(questions), "tokens": 0})
    return passes


def _examined(exam: Exam, answers: dict[str, tuple[Answer, ...]], passes: Sequence[float]) -> Examined:
    weights = _weights(exam)
    parameters, size = (None, None) if weights is None else (weights.parameters, weights.bytes)
    return Examined(answers, parameters, size, tuple(passes))


def _loaded_bytes(job: AnswerJob, exam: Exam) -> int | None:
    """Bytes of the weights in the job's number format, or as stored where that is more (packed values, say)."""
    weights = _weights(exam)
    return None if weights is None else max(weights.bytes, weights.parameters * VALUE_BYTES[job.precision])


def _weights(exam: Exam) -> Weights | None:
    """The size of the stored weights; None where they are not safetensors."""
    folder = Path(exam.model).expanduser()
    if exam.revision is not None:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(exam.model, revision=exam.revision, allow_patterns=patterns))
    return stored_weights(folder)


if __name__ == "__main__":
    run_as_worker(main, sys.argv)
