"""The rows of stage `generate`: each request with its answer as a record, and what the manifest says of them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pipeline.core.config import GenerateStep
from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import ReplayTeacher, Teacher
from pipeline.core.lineage import row_id
from pipeline.core.record import SHARD_ROWS, Message, Record
from pipeline.core.stage import Json
from pipeline.stages.generate.requests import AskedFor
from pipeline.teacher.ask import Answer, Asker
from pipeline.teacher.hashes import hashes_of
from pipeline.teacher.request import Asked
from pipeline.terms.declared import declared_teacher, source_of
from pipeline.text.outbound import REDACTED
from pipeline.text.structure import Structure

READ_ROWS = 2 * SHARD_ROWS
"""Rows in memory at a time: each look-up reads the whole store, so few are better."""
FEW_ROWS = READ_ROWS // 8
"""The same with logprobs: 20 of them for 500 tokens are 80 KB a row."""


Licenses = Mapping[str, tuple[str, ...]]
"""Teacher -> its licences, its own first; all of them hold."""


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Row:
    """One row after it was answered; `answer.rejected` is the reason with which it leaves, or None."""

    asked_for: AskedFor
    answer: Answer
    record: Record


def answered_rows(
    rows: Iterable[AskedFor], askers: Mapping[str, Asker], licenses: Licenses, *, few: bool = False
) -> Iterator[list[Row]]:
    """Rows with their answers, in order, some at a time. What must not leave is answered with the guard's reason.

    Args:
        few: fewer at a time, since their logprobs are in memory too.
    """
    rest = iter(rows)
    while chunk := list(islice(rest, FEW_ROWS if few else READ_ROWS)):
        answers = _answers(chunk, askers)
        yield [
            Row(row, answer, _record(row, answer, licenses[row.teacher]))
            for row, answer in zip(chunk, answers, strict=True)
        ]


def _answers(rows: Sequence[AskedFor], askers: Mapping[str, Asker]) -> Sequence[Answer]:
    answers = [Answer(row.request.key, row.checked.reason) for row in rows]
    for name, asker in askers.items():
        places = [at for at, row in enumerate(rows) if row.teacher == name and row.checked.reason is None]
        structure = Structure.of(next((rows[at].request.form for at in places), None))
        for at, answer in zip(places, asker.answers([rows[at].request for at in places]), strict=True):
            answers[at] = _fitting(answer, structure)
    return answers


def _fitting(answer: Answer, structure: Structure) -> Answer:
    """The answer, rejected where it does not have the form that was asked for. Judged when rows are made, so that
    another way of judging costs no request."""
    if answer.rejected is not None:
        return answer
    reason = structure.reason(answer.text, answer.finish_reason, has_calls=bool(answer.tool_calls))
    return answer if reason is None else replace(answer, rejected=reason)


def _record(row: AskedFor, answer: Answer, licenses: Sequence[str]) -> Record:
    prompt, request = row.prompt, row.request
    said = Message("assistant", answer.text, answer.reasoning_content, answer.tool_calls)
    return Record(
        row_id=row_id(prompt.prompt_set, prompt.prompt_id, request.key),
        prompt_set=prompt.prompt_set,
        prompt_id=prompt.prompt_id,
        sample=request.sample,
        split=prompt.split,
        task=prompt.task,
        prompt=prompt.prompt,
        completion=(said,) if answer.rejected is None or answer.text else (),
        answer=prompt.answer,
        also_in=prompt.also_in,
        teacher=row.teacher,
        license_set=tuple(sorted({*prompt.license_set, *licenses})),
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        verified=None,
        flags=tuple(sorted({*answer.flags, REDACTED})) if row.checked.redacted else answer.flags,
        tools=prompt.tools,
        returned_model=answer.model,
        fingerprint=answer.fingerprint,
    )


class Totals:
    """Sums for the manifest; of answers only, so that a rerun from stored answers gives the same."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter({"prompt": 0, "completion": 0})
        self._finish_reasons: Counter[str] = Counter()
        self.missing = 0

    def add(self, answers: Iterable[Answer]) -> None:
        """Count some."""
        for answer in answers:
            self._tokens["prompt"] += answer.prompt_tokens or 0
            self._tokens["completion"] += answer.completion_tokens or 0
            if answer.rejected is None:
                self._finish_reasons[answer.finish_reason] += 1
            else:
                self.missing += answer.rejected.startswith("gave_up:")

    def metrics(self) -> dict[str, Json]:
        """The sums."""
        return {
            "tokens_in": self._tokens["prompt"],
            "tokens_out": self._tokens["completion"],
            "finish_reasons": {**dict(sorted(self._finish_reasons.items()))},
        }


# --------------------------------------------------------------------------------------------------- who answered


def licenses_of(cfg: GenerateStep) -> dict[str, tuple[str, ...]]:
    """The teachers' licences, and those of the models they were made from, in the form in which the prompts' are
    written, so that one licence has one name.

    Raises:
        UsageError: one is blank, too long or not printable.
    """
    return {name: source_of(declared_teacher(name, teacher)).licenses for name, teacher in cfg.teachers.items()}


def teacher_facts(cfg: GenerateStep, licenses: Licenses, asked: Mapping[str, Asked], data: Path) -> dict[str, Json]:
    """Who answered, for the manifest. No local path: it may hold a user's name, and the identity says more."""
    return {
        name: {
            "kind": cfg.teachers[name].kind,
            "license": licenses[name][0],
            "licenses": [*licenses[name]],
            "identity": how.identity,
            **_source(cfg.teachers[name], data),
        }
        for name, how in asked.items()
    }


def _source(teacher: Teacher, data: Path) -> dict[str, Json]:
    if isinstance(teacher, ReplayTeacher):
        return {"model": None, "origin": teacher.origin}
    if isinstance(teacher, ApiTeacher):
        return {"model": teacher.model, "origin": f"API of {teacher.provider}"}
    return {**_local_source(teacher), "hashes": hashes_of(teacher, data)}


def _local_source(teacher: LocalServer) -> dict[str, Json]:
    if teacher.folder is not None:
        return {"model": teacher.folder.name, "origin": "local weights"}
    return {"model": teacher.model, "origin": f"Hugging Face hub, revision {teacher.revision}"}
