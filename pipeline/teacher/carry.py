"""Stored answers in one file, to go with a data set: exported in equal bytes, imported only if all of it is sound.

A file of answers is parquet: the columns of the response store sorted by key, and a sha256 a row. Its footer holds the
version of the format, the counts, and a sha256 over those of the rows. Nothing else goes along: no attempts, no paths.

Not covered: whether the teacher gave these answers; import only what you would train on.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from pipeline.core.errors import PipelineError, UsageError, disk_errors
from pipeline.core.runs import share_data
from pipeline.core.store import make_folder
from pipeline.teacher.answer_files import new_file
from pipeline.teacher.carried import FACTS, Counts, Reader, carried_schema, read_facts, row_sha256
from pipeline.teacher.logprobs import held_logprobs
from pipeline.teacher.responses import ANSWER_SCHEMA, is_hit, outcome_of
from pipeline.teacher.segment import Stored
from pipeline.teacher.verdict import FORBIDDEN
from pipeline.teacher.walk import Check, answers_by_key, never

# ---------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written.

    Attributes:
        path: the file.
        bytes: its size.
        sha256: of the file, 64 hex digits.
        answers: usable answers in it.
        rejected: reason -> refusals in it.
        unreadable: stored bodies that were left out, since they are no longer understood as answers.
        keys: different requests that they answer.
        withheld: refusals that concern this account only, and stay here.
    """

    path: Path
    bytes: int
    sha256: str
    answers: int
    rejected: dict[str, int]
    unreadable: int
    keys: int = 0
    withheld: int = 0


OF_THIS_ACCOUNT = frozenset({FORBIDDEN, "bad_request"})
"""Refusals that are not about the prompt alone."""


def every_answer(folder: Path, check: Check = never) -> Iterator[Stored]:
    """All that is stored, sorted by (key, time).

    Raises:
        CorruptArtefact, Incomplete: as `answers_by_key`.
    """
    for _, group in answers_by_key(folder, check):
        yield from (found.stored for found in group)


def export(answers: Iterable[Stored], path: Path) -> Exported:
    """Write answers, sorted by key, into a new file, or over an earlier one of the same kind. Equal answers give equal
    bytes for one version of pyarrow. What an API refused this account (`forbidden`, `bad_request`) stays here: its
    words may name the account, and another account may be answered.

    Raises:
        UsageError: something else lies there, its folder is missing, or there is nothing to write.
        Incomplete: the disk is full or does not take writes.
    """
    _check_place(path)
    counts, content, keys, withheld, last = Counts(), hashlib.sha256(), 0, 0, b""
    with disk_errors(str(path), "make room or give write access, then run the same command again"):
        with new_file(path.parent, carried_schema(), 0o666) as file:
            for stored in answers:
                outcome = outcome_of(stored)
                if outcome is not None and outcome.rejected in OF_THIS_ACCOUNT:
                    withheld += 1
                    continue
                if not counts.add(stored):
                    continue
                keys, last = keys + (stored.key != last), stored.key
                row = row_sha256(stored)
                content.update(row)
                file.add((*_values(stored), row), len(stored.body))
            if file.rows == 0:
                todo = "run generate first, or export from another --data folder"
                raise UsageError("there is no stored answer to export", where=str(path), todo=todo)
            file.publish(path.name, {FACTS: json.dumps(counts.facts(content.hexdigest()), sort_keys=True)})
        with path.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        size = path.stat().st_size
    rejected = dict(sorted(counts.rejected.items()))
    return Exported(path, size, sha256, counts.answers, rejected, counts.unreadable, keys, withheld)


def _values(stored: Stored) -> tuple[object, ...]:
    return tuple(getattr(stored, name) for name in ANSWER_SCHEMA.names)


def _check_place(path: Path) -> None:
    todo = "give another name, or move away what lies there"
    if path.is_dir():
        raise UsageError("a folder, not a file", where=str(path), todo=todo)
    if not path.parent.is_dir():
        raise UsageError("no such folder", where=str(path.parent), todo="make it, or correct the path")
    if (path.parent.parent / "segments").is_dir() and path.parent.name in ("answers", "attempts"):
        todo = "write the file somewhere else"
        raise UsageError("this folder belongs to the response store", where=str(path), todo=todo)
    if path.exists():
        try:
            read_facts(path)
        except PipelineError as error:
            raise UsageError("something else lies there", where=str(path), todo=todo) from error


# ---------------------------------------------------------------------------------------------------------- import


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did.

    Attributes:
        path: the file it read.
        answers: rows in it.
        requests: different request keys in it.
        added: rows that are new in the store.
        present: rows that were there, or whose request has an answer in the store that serves it.
    """

    path: Path
    answers: int
    requests: int
    added: int
    present: int


def import_answers(path: Path, data: Path, check: Check = never) -> Imported:
    """Add the answers of a file that the response store of `data` lacks: all of them by one rename, or none.

    An answer is added if nothing stored stands for the request that it answered; so what is there never gives way. It
    is added as later than what is stored for its key, so that what that stands for stays the same.

    Args:
        data: the data folder; made if missing.
        check: called between answers; what it raises ends the import.

    Raises:
        UsageError: it is no file of answers, or one of a later version.
        CorruptArtefact: it is one and is damaged; or a file of the response store is.
        RunLocked: answers or results are being removed from the data folder.
        Incomplete: the disk is full or does not take writes.
    """
    facts = read_facts(path)
    folder = data / "responses"
    with share_data(data), disk_errors(str(folder), "make room or give write access, then run the same command again"):
        for place in (folder, folder / "segments", folder / "answers", folder / "attempts"):
            make_folder(place, 0o700)
        with new_file(folder / "answers", ANSWER_SCHEMA) as file:
            reader = Reader(path, facts)
            for stored in _missing(reader, folder, check):
                file.add(_values(stored), len(stored.body))
            reader.check_end()
            if file.rows > 0:
                file.publish()
            rows = reader.rows
            return Imported(path, rows, reader.counts.requests, file.rows, rows - file.rows)


def _missing(reader: Reader, folder: Path, check: Check) -> Iterator[Stored]:
    """The answers of the file that nothing in the store stands for; both are sorted by key."""
    there = ((key, [found.stored for found in group]) for key, group in answers_by_key(folder, check))
    at, stored = next(there, (None, []))
    for key, group in groupby(reader.answers(check), key=lambda answer: answer.key):
        while at is not None and at < key:
            at, stored = next(there, (None, []))
        old = stored if at == key else []
        latest = max((each.stored_ms for each in old), default=None)
        for answer in group:
            if not any(_serves(each, answer) for each in old):
                yield answer if latest is None else _later(answer, latest)


def _serves(old: Stored, new: Stored) -> bool:
    logprobs = held_logprobs(new.wire, new.body)
    outcome = outcome_of(old, logprobs)
    return outcome is not None and is_hit(old, outcome, new.cap, new.room, new.engine, logprobs)


def _later(answer: Stored, latest: int) -> Stored:
    return replace(answer, stored_ms=max(answer.stored_ms, latest + 1))
