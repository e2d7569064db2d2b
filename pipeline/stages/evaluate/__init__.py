"""Stage `evaluate`: teacher, base and student answer the same test prompts through the same code, greedily."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from pipeline.core.config import EvaluateConfig, EvaluateStep
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import ReplayTeacher
from pipeline.core.errors import UsageError
from pipeline.core.lineage import digest_json
from pipeline.core.record import PROMPT_SCHEMA, Prompt, ShardWriter, rejects_schema, to_table
from pipeline.core.stage import Context, Json, Result
from pipeline.stages.evaluate.answers import (
    Answered,
    ModelAnswers,
    answer_three_shot,
    ask_teacher,
    examine,
    guard_questions,
    write_answers,
)
from pipeline.stages.evaluate.base import BestWay, choose_way, read_shown
from pipeline.stages.evaluate.questions import Questions, read_questions
from pipeline.teacher.reasoning import tags_of
from pipeline.text.scoring import Estimate, Scores, accuracy_by_task, score

VERSION = 1

MODELS = ("teacher", "base", "student")


def input_files(cfg: EvaluateStep) -> dict[str, Path]:
    """The folders of the local models, or the file of completions."""
    files = {} if cfg.student.folder is None else {"student.model": cfg.student.folder}
    if isinstance(cfg.teacher, LocalServer) and cfg.teacher.folder is not None:
        files["teacher.model"] = cfg.teacher.folder
    if isinstance(cfg.teacher, ReplayTeacher):
        files["teacher.path"] = cfg.teacher.path
    return files


def run(cfg: EvaluateStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Write `evaluation.json`, `answers/` (three rows a prompt) and `rejects/`.

    The test prompts and the base's validation prompts are held in memory. The content digest covers answers and
    scores, not the timings.

    Rejected: `no_reference` (nothing to compare an answer with), `over_max_prompts`, `no_teacher_answer:<reason>`,
    `outbound:<kind>` (the prompt holds what must not leave this machine).

    Raises:
        UsageError: no test prompt has a reference answer, or a model cannot be loaded.
        Incomplete: an API teacher has not answered everything, or a worker failed.
        Interrupted: a signal asked us to stop.
    """
    config = cfg.evaluate
    questions = read_questions(inputs["prompts"] / "rows", config)
    questions, outbound = guard_questions(cfg, questions)
    teacher, refused = ask_teacher(cfg, questions.test, ctx)
    questions = questions.without(refused)
    if not questions.test:
        todo = "give the prompt sets a column of reference answers (columns.answer), or raise prompts.test"
        raise UsageError("no test prompt can be scored", where=f"rejected: {questions.counts()}", todo=todo)
    student = inputs["train"] / "model"
    examined = examine(cfg, student, questions, ctx)
    best = choose_way(examined["base"], questions)
    answered = {
        "teacher": _local_teacher(cfg, examined["teacher"]) if teacher is None else teacher.only(questions.test),
        "base": _base_answers(cfg, student, best, questions, ctx),
        "student": examined["student"].of("test"),
    }
    right = {name: questions.judge(answered[name].texts) for name in MODELS}
    scores = score(right["teacher"], right["base"], right["student"], resamples=config.bootstrap, seed=config.seed)
    evaluation = _evaluation(config, questions, scores, right, answered, best)
    written = write_answers(out / "answers", questions.test, answered, right)
    rejects = _write_rejects(out / "rejects", questions)
    content = digest_json({"evaluation": evaluation, "answers": written, "rejects": rejects})
    timed = _with_timings(evaluation, examined, config)
    (out / "evaluation.json").write_text(json.dumps(timed, indent=2) + "\n", "utf-8")
    n = len(questions.test)
    return Result(n + len(questions.rejected), n, questions.counts(), content, _metrics(evaluation) | outbound)


def _local_teacher(cfg: EvaluateStep, examined: ModelAnswers) -> Answered:
    tags = tags_of(cfg.teacher)
    return examined.of("test") if tags is None else examined.of("test").without_reasoning(tags)


def _base_answers(cfg: EvaluateStep, student: Path, best: BestWay, questions: Questions, ctx: Context) -> Answered:
    if best.answered is not None:
        return best.answered
    return read_shown(best.name, answer_three_shot(cfg, student, questions, ctx))


def _write_rejects(folder: Path, questions: Questions) -> str:
    schema = rejects_schema(PROMPT_SCHEMA)
    with ShardWriter(folder, schema) as writer:
        rows = [row for row, _ in questions.rejected]
        writer.write(to_table(schema, rows, [reason for _, reason in questions.rejected]))
    return writer.written().content


# --------------------------------------------------------------------------------------------------- evaluation.json


def _evaluation(
    config: EvaluateConfig,
    questions: Questions,
    scores: Scores,
    right: Mapping[str, Sequence[bool]],
    answered: Mapping[str, Answered],
    best: BestWay,
) -> dict[str, Json]:
    """Everything in evaluation.json but the timings."""
    models = {name: _model(scores.accuracies[name], right[name], answered[name], questions.test) for name in MODELS}
    methods: dict[str, Json] = {**best.accuracies}
    models["base"] |= {
        "method": best.name,
        "methods": methods,
        "methods_n": len(questions.validation),
        "strict_accuracy": best.strict_accuracy,
    }
    return {
        "n": len(questions.test),
        "metric": config.metric,
        "engine": config.engine,
        "precision": config.precision,
        "max_tokens": config.max_tokens,
        "bootstrap": config.bootstrap,
        **models,
        "retained": scores.retained.value,
        "retained_ci95": _ends(scores.retained),
        "gap_closed": scores.gap_closed.value,
        "gap_closed_ci95": _ends(scores.gap_closed),
    }


def _model(found: Estimate, right: Sequence[bool], answered: Answered, prompts: Sequence[Prompt]) -> dict[str, Json]:
    tasks = accuracy_by_task([prompt.task for prompt in prompts], right)
    return {
        "accuracy": found.value,
        "ci95": _ends(found),
        "parameters": answered.parameters,
        "bytes": answered.bytes,
        "by_task": {task: {"n": n, "accuracy": value} for task, (n, value) in tasks.items()},
        "cut": sum(reason == "length" for reason in answered.finish_reasons),
        "prompt_too_long": sum(reason == "prompt_too_long" for reason in answered.finish_reasons),
    }


def _ends(estimate: Estimate) -> Json:
    return None if estimate.ci95 is None else [*estimate.ci95]


def _with_timings(
    evaluation: Mapping[str, Json], examined: Mapping[str, ModelAnswers], config: EvaluateConfig
) -> dict[str, Json]:
    timed: dict[str, Json] = {**evaluation}
    for name in MODELS:
        figures = examined[name].passes if name in examined else ()
        model = evaluation[name]
        assert isinstance(model, dict)
        timed[name] = {
            **model,
            "answers_per_second": median(figures) if figures else None,
            "answers_per_second_passes": [*figures],
        }
    timed["speed"] = {
        "prompts": config.speed_prompts,
        "batch_size": config.batch_size,
        "threads": config.threads,
        "alternating": all(one.alternating for one in examined.values()),
    }
    return timed


def _metrics(evaluation: Mapping[str, Json]) -> dict[str, Json]:
    """The headline, for the manifest."""
    names = ("n", "metric", "retained", "retained_ci95", "gap_closed", "gap_closed_ci95")
    metrics: dict[str, Json] = {name: evaluation[name] for name in names}
    for name in MODELS:
        model = evaluation[name]
        assert isinstance(model, dict)
        metrics[name] = {"accuracy": model["accuracy"], "ci95": model["ci95"]}
    return metrics
