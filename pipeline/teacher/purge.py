"""Removing stored answers: the only thing that ever does. A list by default; what is removed is asked for again.

Each folded file that holds some is written anew without them, and the old one goes when the new one is on the disk: a
process that dies in between has lost nothing else, and the same purge goes on. Attempts stay: they are the bill.
Not covered: what was set aside in `damaged/`, and copies elsewhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.core.errors import RunLocked, UsageError, disk_errors
from pipeline.core.mistakes import nearest
from pipeline.core.runs import lock_holder, own_data, run_lock
from pipeline.core.store import sync_folder
from pipeline.teacher.accounts import check_attempts
from pipeline.teacher.answer_files import new_file
from pipeline.teacher.inventory import Kind, Row, Tally, existing_data, reason_of, segments_of
from pipeline.teacher.responses import ANSWER_SCHEMA, ResponseStore, outcome_of
from pipeline.teacher.segment import Attempt, Stored, read_attempts, segment_paths
from pipeline.teacher.walk import Check, answers_by_key, folded_files, never, read_folded

SHORT = 12
"""Digits of an identity that lists show."""
COUNTED = ("id", "key", "cap", "sent_ms", "outcome", "cost")
SETTLED = frozenset({"answer", "reject"})
"""Outcomes of attempts that left an answer or a refusal in the store."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which answers: those for which all that is given holds; None: it does not matter.

    Attributes:
        teacher: identity of the teacher, or the first digits of it.
        model: name of the model.
        rejected: reason of a refusal.
        before_ms: stored before this Unix time in milliseconds.
        keys: answers to these requests, whichever of several is used.
    """

    teacher: str | None = None
    model: str | None = None
    rejected: str | None = None
    before_ms: int | None = None
    keys: frozenset[bytes] | None = None

    def has(self, stored: Stored) -> bool:
        """Whether an answer is one of them."""
        return (
            (self.teacher is None or stored.teacher.startswith(self.teacher))
            and (self.model is None or stored.model == self.model)
            and (self.before_ms is None or stored.stored_ms < self.before_ms)
            and (self.keys is None or stored.key in self.keys)
            and (self.rejected is None or reason_of(outcome_of(stored)) == self.rejected)
        )


@dataclass(frozen=True, slots=True)
class Purge:
    """What would go, or is gone.

    Attributes:
        folder: `data/responses`.
        done: it is gone; False: it was only listed.
        rows: by kind, sorted; `disk_bytes` is not counted.
        total: over all rows.
        cost: what they cost in nano-dollars as far as it is recorded; None: nothing is.
        unpriced: of them those without a recorded cost.
        kept: answers and refusals that stay.
        damaged: segments in `damaged/`, which may hold copies and stay.
    """

    folder: Path
    done: bool
    rows: tuple[Row, ...]
    total: Tally
    cost: int | None
    unpriced: int
    kept: int
    damaged: int


def purge(data: Path, selection: Selection, *, delete: bool = False, check: Check = never) -> Purge:
    """List the selected answers, and remove them if asked.

    Args:
        delete: remove them; the data folder is held alone meanwhile.
        check: called between answers; what it raises ends it, and the same purge goes on.

    Raises:
        UsageError: there is no such data folder, or a name does not occur in it.
        RunLocked: with `delete`, a process works in the data folder.
        CorruptArtefact: a file is damaged; nothing is removed.
        Incomplete: the disk fails; the same purge goes on.
    """
    folder = existing_data(data)
    if not delete:
        return _survey(folder, selection, check, done=False)
    todo = "make room or give write access, then run the same command again"
    with disk_errors(str(folder), todo), _alone(data, folder):
        if folder.is_dir():
            with ResponseStore(folder) as store:
                store.fold()
        found = _survey(folder, selection, check, done=True)
        for path in folded_files(folder):
            check()
            _rewrite(path, selection)
        return found


def _rewrite(path: Path, selection: Selection) -> None:
    """Put a file without the selected answers in the place of one that holds some. One that was written before a
    process died has the same name, and is replaced by its like."""
    if not any(map(selection.has, read_folded(path))):
        return
    with new_file(path.parent, ANSWER_SCHEMA) as file:
        for stored in read_folded(path):
            if not selection.has(stored):
                file.add([getattr(stored, name) for name in ANSWER_SCHEMA.names], len(stored.body))
        if file.rows > 0:
            file.publish()
    path.unlink()
    sync_folder(path.parent)


@contextmanager
def _alone(data: Path, folder: Path) -> Iterator[None]:
    """Have the data folder alone, without any process that writes answers, within a run or outside of one.

    Raises:
        RunLocked: somebody works in it; it says who, as far as that is known.
    """
    try:
        with own_data(data):
            _refuse(_writers(folder), data)
            yield
    except RunLocked:
        runs = [lock_holder(run_lock(run)) for run in sorted((data / "runs").glob("*"))]
        _refuse([holder for holder in runs if holder is not None] or _writers(folder), data)
        raise


def _writers(folder: Path) -> list[str]:
    return [f"pid {segment.pid}, which writes answers" for segment in segments_of(folder) if segment.is_held]


def _refuse(holders: Sequence[str], data: Path) -> None:
    if holders:
        todo = "wait for it to end, or end it; nothing was removed"
        raise RunLocked(f"held by {', '.join(holders)}", where=str(data), todo=todo)


# ---------------------------------------------------------------------------------------------------------- survey


def _survey(folder: Path, selection: Selection, check: Check, *, done: bool) -> Purge:
    survey = _Survey(selection)
    for _, group in answers_by_key(folder, check):
        for found in group:
            survey.see(found.stored)
    survey.check_names(folder)
    total = Tally()
    for tally in survey.tallies.values():
        total.include(tally)
    priced = list(_costs(folder, survey.asked))
    return Purge(
        folder=folder,
        done=done,
        rows=tuple(Row(kind, survey.tallies[kind], 0) for kind in sorted(survey.tallies)),
        total=total,
        cost=sum(priced) if priced else None,
        unpriced=max(0, total.stored - len(priced)),
        kept=survey.seen - total.stored,
        damaged=len([*(folder / "damaged").glob("*.sqlite")]),
    )


class _Survey:
    """What is selected, and which names occur at all.

    Attributes:
        tallies: sums of what is selected, by kind.
        asked: (key, cap) of what is selected.
        seen: answers and refusals in the store.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._teachers: set[str] = set()
        self._models: set[str] = set()
        self._reasons: set[str] = set()
        self.tallies: dict[Kind, Tally] = {}
        self.asked: set[tuple[bytes, int]] = set()
        self.seen = 0

    def see(self, stored: Stored) -> None:
        """Look at one answer."""
        self.seen += 1
        self._teachers.add(stored.teacher)
        self._models.add(stored.model)
        if self._selection.rejected is not None:
            self._reasons.add(reason_of(outcome_of(stored)) or "")
        if self._selection.has(stored):
            self.tallies.setdefault(Kind.of(stored), Tally()).add(stored)
            self.asked.add((stored.key, stored.cap))

    def check_names(self, folder: Path) -> None:
        """Refuse names that no stored answer has: they are misspelt.

        Raises:
            UsageError: one is not there, or stands for several teachers.
        """
        given = self._selection
        teachers = sorted(name for name in self._teachers if given.teacher and name.startswith(given.teacher))
        if len(teachers) > 1:
            what = f"{len(teachers)} teachers have an identity that begins with {given.teacher}"
            raise UsageError(what, where=f"--teacher {given.teacher}", todo="give more of its digits")
        shown = {name[:SHORT] for name in self._teachers}
        if given.teacher is not None and not teachers:
            raise _unknown("teacher", "of teacher", given.teacher, shown, folder)
        if given.model is not None and given.model not in self._models:
            raise _unknown("model", "of model", given.model, self._models, folder)
        if given.rejected is not None and given.rejected not in self._reasons:
            raise _unknown("rejected", "rejected as", given.rejected, self._reasons - {""}, folder)


def _unknown(option: str, what: str, word: str, there: Iterable[str], folder: Path) -> UsageError:
    names = sorted(there)
    hint = nearest(word, names) if names else "there is none"
    todo = f"see what is stored: python -m pipeline responses list --data {folder.parent}"
    return UsageError(f"no stored answer is {what} {word}; {hint}", where=f"--{option}", todo=todo)


def _costs(folder: Path, asked: set[tuple[bytes, int]]) -> Iterator[int]:
    """Recorded costs, in nano-dollars, of the attempts that left these (key, cap) answers; each attempt once."""
    seen: set[tuple[str, int]] = set()
    for name, attempt in _attempts(folder):
        if (attempt.key, attempt.cap) in asked and attempt.outcome in SETTLED and (name, attempt.id) not in seen:
            seen.add((name, attempt.id))
            if attempt.cost is not None:
                yield attempt.cost


def _attempts(folder: Path) -> Iterator[tuple[str, Attempt]]:
    """(segment, attempt) of all files; a fold that was cut off may have written some twice."""
    for path in segment_paths(folder / "segments"):
        yield from ((path.stem, attempt) for attempt in read_attempts(path))
    for path in sorted((folder / "attempts").glob("*.parquet")):
        check_attempts(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = [name for name in COUNTED if name in file.schema_arrow.names]
            if "cost" not in names:  # written before attempts were priced
                continue
            for batch in file.iter_batches(1024, columns=["segment", *names], use_threads=False):
                for row in batch.to_pylist():
                    yield row.pop("segment"), Attempt(**row)
