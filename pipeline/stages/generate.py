"""Stage `generate`: the teacher answers every training and validation prompt. Test prompts never enter."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config import GenerateStep
from pipeline.core.config_teacher import OpenAITeacher, ReplayTeacher, Teacher, VllmTeacher
from pipeline.core.errors import UsageError
from pipeline.core.lineage import DigestCache, row_id
from pipeline.core.record import RECORD_SCHEMA, SHARD_ROWS, Message, Prompt, Record, prompts_of, read_shards
from pipeline.core.sink import RowSink
from pipeline.core.stage import Context, Json, Result, check_cancelled
from pipeline.teacher.ask import Answer, ask
from pipeline.teacher.request import Asked, Request
from pipeline.text.licenses import parse_license

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
    `content_filter`, `refusal`, `bad_payload`, `empty` (see teacher/verdict.py) and `no_completion`.

    Raises:
        Incomplete, UsageError, Interrupted: see `pipeline.teacher.ask.ask`.
        UsageError: the teacher's licence is blank, or not one prompt was answered.
    """
    license_name = _license(cfg)
    rows = inputs["prompts"] / "rows"
    asked = Asked.of(
        cfg.teacher, cfg.generate.sampling, cfg.generate.draw, DigestCache(ctx.data / "cache" / "digests.json")
    )
    rows_in = _count_prompts(rows) * cfg.generate.samples
    ctx.progress.start(rows_in, "rows")
    requests = _Requests(rows, asked, cfg.generate.samples)
    answers = zip(requests.with_prompts(), ask(cfg.teacher, asked, cfg.generate.retry, requests, ctx), strict=True)
    totals = _Totals()
    with RowSink(out, RECORD_SCHEMA) as sink:
        while chunk := list(islice(answers, SHARD_ROWS)):
            check_cancelled(ctx)
            records = [_record(cfg, license_name, prompt, request, answer) for (prompt, request), answer in chunk]
            reasons = [answer.rejected for _, answer in chunk]
            sink.keep([record for record, reason in zip(records, reasons, strict=True) if reason is None])
            refused = [(record, reason) for record, reason in zip(records, reasons, strict=True) if reason is not None]
            sink.reject([record for record, _ in refused], [reason for _, reason in refused])
            totals.add(answer for _, answer in chunk)
    result = sink.result(rows_in, {"teacher": _facts(cfg, license_name, asked), **totals.metrics()})
    if rows_in > 0 and result.rows_out == 0:
        raise _nothing_answered(cfg.generate.teacher, result.rejected)
    return result


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
    else:
        todo = f"ask the teacher one of the prompts by hand, then correct teachers.{teacher} or generate.sampling"
    what = f"no prompt was answered: of {sum(rejected.values()):,} rows {count:,} were rejected as {reason}"
    return UsageError(what, where=f"teachers.{teacher}", todo=todo)


@dataclass(frozen=True, slots=True)
class _Requests:
    """All requests of the stage in order; each iteration reads the prompts anew, one shard in memory."""

    rows: Path
    asked: Asked
    samples: int

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in self.with_prompts())

    def with_prompts(self) -> Iterator[tuple[Prompt, Request]]:
        for table in read_shards(self.rows):
            for prompt in prompts_of(table):
                if prompt.split not in SPLITS:
                    continue
                for sample in range(self.samples):
                    yield prompt, self.asked.request(prompt.prompt_set, prompt.prompt_id, sample, prompt.prompt)


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


def _record(cfg: GenerateStep, license_name: str, prompt: Prompt, request: Request, answer: Answer) -> Record:
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
        flags=answer.flags,
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
    if isinstance(teacher, OpenAITeacher):
        return {"model": teacher.model, "origin": f"API of {teacher.provider}"}
    if teacher.folder is not None:
        return {"model": teacher.folder.name, "origin": "local weights"}
    return {"model": teacher.model, "origin": f"Hugging Face hub, revision {teacher.revision}"}
