"""Stage `generate`: teachers answer every training and validation prompt. Test prompts never enter."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pipeline.core.config import GenerateStep
from pipeline.core.config_response import form_files
from pipeline.core.config_route import ToAll
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import ReplayTeacher
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.record import RECORD_SCHEMA
from pipeline.core.sink import RowSink
from pipeline.core.stage import Context, Result, check_cancelled
from pipeline.stages.generate.accept import take
from pipeline.stages.generate.requests import AskedFor, Requests, count_prompts, requests_of
from pipeline.stages.generate.rows import Row, Totals, answered_rows, licenses_of, teacher_facts
from pipeline.stages.generate.targets import open_targets
from pipeline.teacher.ask import Asker

VERSION = 2


def input_files(cfg: GenerateStep) -> dict[str, Path]:
    """The teachers' weights, or the files of completions; an API has none. A schema's file."""
    files = form_files(cfg.generate.response)
    for name, teacher in cfg.teachers.items():
        if isinstance(teacher, ReplayTeacher):
            files[f"teachers.{name}.path"] = teacher.path
        elif isinstance(teacher, LocalServer) and teacher.folder is not None:
            files[f"teachers.{name}.model"] = teacher.folder
    return files


def run(cfg: GenerateStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Ask for `samples` completions per prompt and teacher and write a record each, in the order of (set, prompt,
    teacher, sample).

    A completion is kept whatever its finish reason; the filter judges it. Rejected: `bad_request`, `oversize`,
    `content_filter`, `refusal`, `bad_payload`, `empty` (see teacher/verdict.py), `engine_crash` (teacher/poison.py),
    `no_completion`, `length` (where `on_length` drops), `gave_up:<class>` (where `allow_missing` allows it), and
    `outbound:<kind>`: the prompt holds what must not leave this machine, so it is not asked (text/outbound.py).

    Raises:
        Incomplete, UsageError, Interrupted: see `pipeline.teacher.ask.Asker`.
        UsageError: a teacher's licence is blank, two teachers are one model, or not one prompt was answered.
    """
    licenses = licenses_of(cfg)
    rows = inputs["prompts"] / "rows"
    requests = requests_of(cfg, rows, ctx.data, partial(check_cancelled, ctx))
    _check_different(cfg, requests)
    metrics = {"teachers": teacher_facts(cfg, licenses, requests.asked, ctx.data), **requests.scanned.metrics}
    totals = Totals()
    with RowSink(out, RECORD_SCHEMA) as sink, ExitStack() as stack:
        if cfg.generate.accept is None or cfg.checks is None:
            rows_in = _count_rows(cfg, rows)
            ctx.progress.start(rows_in, "rows")
            askers = _ask_all(cfg, requests, _may_miss(cfg, rows_in), stack, ctx)
            wanted: Iterable[AskedFor] = requests.all_rows()
        else:
            may_miss = _may_miss(cfg, cfg.generate.accept.max_candidates)
            askers = {name: stack.enter_context(_asker(cfg, name, requests, may_miss, ctx)) for name in requests.asked}
            taken = take(cfg.generate.accept, cfg.checks, requests, askers, licenses, ctx)
            for asker in askers.values():
                asker.done()
            rows_in, wanted = len(taken.chosen), taken.chosen.rows()
            metrics |= taken.metrics
        targets = stack.enter_context(open_targets(cfg, askers, out))
        for chunk in answered_rows(wanted, askers, licenses, few=cfg.generate.logprobs is not None):
            check_cancelled(ctx)
            _write(chunk, sink)
            targets.write(chunk)
            totals.add(row.answer for row in chunk)
    _check_missing(cfg, totals.missing, rows_in, ctx)
    result = targets.counted_in(sink.result(rows_in, {**metrics, **totals.metrics()}))
    if rows_in > 0 and result.rows_out == 0:
        raise _nothing_answered(cfg, result.rejected)
    return result


def _ask_all(cfg: GenerateStep, requests: Requests, may_miss: int, stack: ExitStack, ctx: Context) -> dict[str, Asker]:
    """Ask the teachers one after the other, so that servers of several never share this machine's memory."""
    askers: dict[str, Asker] = {}
    for name in requests.asked:
        left = may_miss - sum(asker.given_up for asker in askers.values())
        askers[name] = stack.enter_context(_asker(cfg, name, requests, left, ctx))
        askers[name].fetch(requests.of(name))
        askers[name].done()
    return askers


def _asker(cfg: GenerateStep, name: str, requests: Requests, may_miss: int, ctx: Context) -> Asker:
    return Asker(
        cfg.teachers[name],
        requests.asked[name],
        cfg.generate.retry,
        ctx,
        cfg.spending.by(name),
        on_length=cfg.generate.on_length,
        may_miss=may_miss,
        batch=cfg.generate.batch if cfg.generate.mode == "batch" else None,
        canaries=None if cfg.generate.canaries is None else (cfg.generate.canaries, requests.of(name)),
    )


def _write(rows: list[Row], sink: RowSink) -> None:
    sink.keep([row.record for row in rows if row.answer.rejected is None])
    refused = [(row.record, row.answer.rejected) for row in rows if row.answer.rejected is not None]
    sink.reject([record for record, _ in refused], [reason for _, reason in refused])


def _count_rows(cfg: GenerateStep, rows: Path) -> int:
    route = cfg.generate.route
    each = len(route.teachers) if isinstance(route, ToAll) else 1
    return count_prompts(rows) * each * cfg.generate.samples


def _may_miss(cfg: GenerateStep, rows: int) -> int:
    allowed = cfg.generate.allow_missing
    return 0 if allowed is None else int(allowed.share * rows)


def _check_missing(cfg: GenerateStep, missing: int, rows_in: int, ctx: Context) -> None:
    if missing > _may_miss(cfg, rows_in):
        what = f"{missing} of {rows_in} rows have no answer, more than `generate.allow_missing` allows"
        raise Incomplete(what, where="generate", todo=f"resume with: {ctx.resume_command}")


def _check_different(cfg: GenerateStep, requests: Requests) -> None:
    """Two teachers that are one model would give each prompt the same rows twice, under one id."""
    if not isinstance(cfg.generate.route, ToAll):
        return
    seen: dict[str, str] = {}
    for name, asked in requests.asked.items():
        first = seen.setdefault(asked.key(b"[]", 0).hexdigest(), name)
        if first != name:
            what = f"{first} and {name} are the same model, asked in the same way: one answer would count twice"
            raise UsageError(what, where="generate.route.teachers", todo="leave one of them out")


def _nothing_answered(cfg: GenerateStep, rejected: Mapping[str, int]) -> UsageError:
    reason, count = max(rejected.items(), key=lambda item: item[1])
    name = cfg.generate.teachers[0]
    if reason == "no_completion":
        todo = f"check the path and the columns (prompt_id or prompt, completion) of teachers.{name}"
    elif reason.startswith("outbound:"):
        todo = "take it out of the prompts, or say in generate.outbound what may leave this machine"
    else:
        todo = f"ask the teacher one of the prompts by hand, then correct teachers.{name} or generate.sampling"
    what = f"no prompt was answered: of {sum(rejected.values()):,} rows {count:,} were rejected as {reason}"
    return UsageError(what, where=f"teachers.{name}", todo=todo)
