"""Stage `generate`: the teacher answers every training and validation prompt. Test prompts never enter."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config import GenerateStep
from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_outbound import guard_towards
from pipeline.core.config_teacher import ReplayTeacher, Teacher, VllmTeacher
from pipeline.core.errors import UsageError
from pipeline.core.lineage import DigestCache, row_id
from pipeline.core.record import RECORD_SCHEMA, SHARD_ROWS, Message, Prompt, Record, prompts_of, read_shards
from pipeline.core.sink import RowSink
from pipeline.core.stage import Context, Json, Result, check_cancelled
from pipeline.teacher.ask import Answer, ask
from pipeline.teacher.request import Asked, Request
from pipeline.text.licenses import parse_license
from pipeline.text.outbound import REDACTED, Checked, Guard, Tally

VERSION = 1
SPLITS = ("train", "validation")


def input_files(cfg: GenerateStep) -> dict[str, Path]:
    """The teacher's weights, or the file of completions; an API has none."""
    name, teacher = cfg.generate.teacher, cfg.teacher
    if isinstance(teacher, ReplayTeacher):
        return {f"teachers.{name}.path": teacher.path}
    if isinstance(teacher, VllmTeacher) and teacher.folder is not None:
        return {f"teachers.{name}.model": teacher.folder}
    return {}


def run(cfg: GenerateStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Ask for `samples` completions per prompt and write a record each, in the order of (set, prompt, sample).

    A completion is kept whatever its finish reason; the filter judges it. Rejected: `bad_request`, `oversize`,
    `content_filter`, `refusal`, `bad_payload`, `empty` (see teacher/verdict.py), `no_completion`, and
    `outbound:<kind>`: the prompt holds what must not leave this machine, so it is not asked (text/outbound.py).

    Raises:
        Incomplete, UsageError, Interrupted: see `pipeline.teacher.ask.ask`.
        UsageError: the teacher's licence is blank, or not one prompt was answered.
    """
    license_name = _license(cfg)
    rows = inputs["prompts"] / "rows"
    requests = requests_of(cfg, rows, ctx.data, partial(check_cancelled, ctx))
    asked, scanned = requests.asked, requests.scanned
    rows_in = _count_prompts(rows) * cfg.generate.samples
    ctx.progress.start(rows_in, "rows")
    blocked = scanned.blocked * cfg.generate.samples
    ctx.progress.advance(blocked, rejected=blocked)
    answers = _with_blocked(requests, ask(cfg.teacher, asked, cfg.generate.retry, requests, ctx, cfg.spending))
    totals = _Totals()
    with RowSink(out, RECORD_SCHEMA) as sink:
        while chunk := list(islice(answers, SHARD_ROWS)):
            check_cancelled(ctx)
            records = [_record(cfg, license_name, asked_for, answer) for asked_for, answer in chunk]
            reasons = [answer.rejected for _, answer in chunk]
            sink.keep([record for record, reason in zip(records, reasons, strict=True) if reason is None])
            refused = [(record, reason) for record, reason in zip(records, reasons, strict=True) if reason is not None]
            sink.reject([record for record, _ in refused], [reason for _, reason in refused])
            totals.add(answer for _, answer in chunk)
    metrics = {"teacher": _facts(cfg, license_name, asked), **totals.metrics(), **scanned.metrics}
    result = sink.result(rows_in, metrics)
    if rows_in > 0 and result.rows_out == 0:
        raise _nothing_answered(cfg.generate.teacher, result.rejected)
    return result


def requests_of(cfg: GenerateStep, rows: Path, data: Path, check: Callable[[], None] = lambda: None) -> "Requests":
    """All requests of the stage on the committed prompts in `rows`; `asked` says how they are asked.

    Args:
        check: called now and then while the prompts are scanned; what it raises ends that.

    Raises:
        UsageError: the teacher's files cannot be read.
    """
    digests = DigestCache(data / "cache" / "digests.json")
    asked = Asked.of(cfg.teacher, cfg.generate.sampling, cfg.generate.draw, digests)
    scanned = _scan(rows, Guard(guard_towards(cfg.generate.outbound, cfg.teacher.kind)), check)
    return Requests(rows, asked, cfg.generate.samples, scanned)


def _license(cfg: GenerateStep) -> str:
    """The teacher's licence in the form in which the prompts' are written, so that one licence has one name."""
    try:
        return parse_license(cfg.teacher.license).name
    except ValueError as error:
        where = f"teachers.{cfg.generate.teacher}.license"
        todo = "write an SPDX expression such as MIT or Apache-2.0, the name of the terms, or leave it out"
        raise UsageError(str(error), where=where, todo=todo) from error


def _nothing_answered(teacher: str, rejected: Mapping[str, int]) -> UsageError:
    reason, count = max(rejected.items(), key=lambda item: item[1])
    if reason == "no_completion":
        todo = f"check the path and the columns (prompt_id or prompt, completion) of teachers.{teacher}"
    elif reason.startswith("outbound:"):
        todo = "take it out of the prompts, or say in generate.outbound what may leave this machine"
    else:
        todo = f"ask the teacher one of the prompts by hand, then correct teachers.{teacher} or generate.sampling"
    what = f"no prompt was answered: of {sum(rejected.values()):,} rows {count:,} were rejected as {reason}"
    return UsageError(what, where=f"teachers.{teacher}", todo=todo)


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, slots=True)
class Scanned:
    """What the outbound guard found, one byte a prompt in memory.

    Attributes:
        guard: the guard.
        hits: for each prompt of `SPLITS`, in order, 1 where it found something; empty: it does not act.
        blocked: prompts that must not leave.
        metrics: its counts for the manifest.
    """

    guard: Guard
    hits: bytearray
    blocked: int
    metrics: dict[str, Json]

    def check(self, position: int, prompt: Prompt) -> Checked:
        """What becomes of a prompt; only those are scanned again in which something was found."""
        if not self.hits or not self.hits[position]:
            return Checked(prompt.prompt, (), None)
        return self.guard.check(prompt.prompt)


def _scan(rows: Path, guard: Guard, check: Callable[[], None]) -> Scanned:
    hits, tally, blocked = bytearray(), Tally(), 0
    if not guard.acts:
        return Scanned(guard, hits, blocked, {})
    for checked in (guard.check(prompt.prompt) for prompt in _prompts(rows)):
        if len(hits) % SHARD_ROWS == 0:
            check()
        hits.append(bool(checked.kinds))
        blocked += checked.reason is not None
        tally.add([checked])
    return Scanned(guard, hits, blocked, {"outbound": tally.metrics()})


def _prompts(rows: Path) -> Iterator[Prompt]:
    """The prompts that the teacher answers, in order; one shard in memory."""
    for table in read_shards(rows):
        yield from (prompt for prompt in prompts_of(table) if prompt.split in SPLITS)


@dataclass(frozen=True, slots=True)
class AskedFor:
    """One row before it is answered: its prompt as it leaves this machine, and what the guard says of it."""

    prompt: Prompt
    request: Request
    checked: Checked


@dataclass(frozen=True, slots=True)
class Requests:
    """All requests of the stage in order, without those that must not leave; each iteration reads the prompts anew."""

    rows: Path
    asked: Asked
    samples: int
    scanned: Scanned

    def __iter__(self) -> Iterator[Request]:
        return (row.request for row in self.all_rows() if row.checked.reason is None)

    def all_rows(self) -> Iterator[AskedFor]:
        """Every row of the stage, also those that must not leave."""
        for position, given in enumerate(_prompts(self.rows)):
            checked = self.scanned.check(position, given)
            prompt = replace(given, prompt=checked.messages) if checked.kinds else given
            for sample in range(self.samples):
                request = self.asked.request(prompt.prompt_set, prompt.prompt_id, sample, prompt.prompt)
                yield AskedFor(prompt, request, checked)


def _with_blocked(requests: Requests, answers: Iterator[Answer]) -> Iterator[tuple[AskedFor, Answer]]:
    """Each row with its answer: the teacher's, or for a row that was not asked the guard's reason."""
    for row in requests.all_rows():
        yield row, next(answers) if row.checked.reason is None else Answer(row.request.key, row.checked.reason)
    for _ in answers:  # to its end, where it closes what it has open
        raise ValueError("more answers than requests")


class _Totals:
    """Sums for the manifest; of answers only, so that a rerun from stored answers gives the same."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter({"prompt": 0, "completion": 0})
        self._finish_reasons: Counter[str] = Counter()

    def add(self, answers: Iterator[Answer]) -> None:
        for answer in answers:
            self._tokens["prompt"] += answer.prompt_tokens or 0
            self._tokens["completion"] += answer.completion_tokens or 0
            if answer.rejected is None:
                self._finish_reasons[answer.finish_reason] += 1

    def metrics(self) -> dict[str, Json]:
        return {
            "tokens_in": self._tokens["prompt"],
            "tokens_out": self._tokens["completion"],
            "finish_reasons": {**dict(sorted(self._finish_reasons.items()))},
        }


def _count_prompts(rows: Path) -> int:
    tables = read_shards(rows, columns=["split"])
    return sum(pc.sum(pc.is_in(table["split"], value_set=pa.array(SPLITS))).as_py() or 0 for table in tables)


def _record(cfg: GenerateStep, license_name: str, row: AskedFor, answer: Answer) -> Record:
    prompt, request = row.prompt, row.request
    completion = (Message("assistant", answer.text, answer.reasoning_content),) if answer.rejected is None else ()
    return Record(
        row_id=row_id(prompt.prompt_set, prompt.prompt_id, request.key),
        prompt_set=prompt.prompt_set,
        prompt_id=prompt.prompt_id,
        sample=request.sample,
        split=prompt.split,
        task=prompt.task,
        prompt=prompt.prompt,
        completion=completion,
        answer=prompt.answer,
        also_in=prompt.also_in,
        teacher=cfg.generate.teacher,
        license_set=tuple(sorted({*prompt.license_set, license_name})),
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        verified=None,
        flags=tuple(sorted({*answer.flags, REDACTED})) if row.checked.redacted else answer.flags,
    )


def _facts(cfg: GenerateStep, license_name: str, asked: Asked) -> dict[str, Json]:
    """Who answered, for the manifest. No local path: it may hold a user's name, and the identity says more."""
    return {
        "name": cfg.generate.teacher,
        "kind": cfg.teacher.kind,
        "license": license_name,
        "identity": asked.identity,
        **_source(cfg.teacher),
    }


def _source(teacher: Teacher) -> dict[str, Json]:
    if isinstance(teacher, ReplayTeacher):
        return {"model": None, "origin": teacher.origin}
    if isinstance(teacher, ApiTeacher):
        return {"model": teacher.model, "origin": f"API of {teacher.provider}"}
    if teacher.folder is not None:
        return {"model": teacher.folder.name, "origin": "local weights"}
    return {"model": teacher.model, "origin": f"Hugging Face hub, revision {teacher.revision}"}
