"""What lies in the response store: sums over all answers, segments not folded yet, damage that was set aside."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.core.errors import UsageError
from pipeline.teacher.responses import Outcome, outcome_of
from pipeline.teacher.segment import Stored, is_held, segment_paths
from pipeline.teacher.walk import Check, answers_by_key, folded_files, never

UNREADABLE: Final = "unreadable"
"""Reason of stored bodies that are no longer understood as answers; a run asks for these again."""


class Kind(NamedTuple):
    """What answers are counted by: identity of the teacher, name of the model, format, and server with its version."""

    teacher: str
    model: str
    wire: str
    engine: str

    @classmethod
    def of(cls, stored: Stored) -> "Kind":
        return cls(stored.teacher, stored.model, stored.wire, stored.engine)


@dataclass(slots=True)
class Tally:
    """Sums over answers.

    Attributes:
        answers: usable ones.
        rejected: reason -> stored refusals; `unreadable`: bodies that are no longer understood.
        cut: of the usable ones those that ended on `length`.
        prompt_tokens, completion_tokens: of the usable ones, where the server counted.
        uncounted: usable ones whose completion tokens the server did not count.
        body_bytes: of all bodies, uncompressed.
        first_ms, last_ms: Unix time in milliseconds of the oldest and the newest; None: there are none.
    """

    answers: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    body_bytes: int = 0
    first_ms: int | None = None
    last_ms: int | None = None

    @property
    def stored(self) -> int:
        """Answers and refusals."""
        return self.answers + self.rejected.total()

    @property
    def days(self) -> tuple[str, str]:
        """The first and the last day, in UTC."""
        return _day(self.first_ms), _day(self.last_ms)

    def add(self, stored: Stored) -> None:
        """Count one more."""
        outcome = outcome_of(stored)
        reply = None if outcome is None else outcome.reply
        if reply is None:
            self.rejected[reason_of(outcome) or UNREADABLE] += 1
        else:
            self.answers += 1
            self.cut += reply.finish_reason == "length"
            self.prompt_tokens += reply.prompt_tokens or 0
            self.completion_tokens += reply.completion_tokens or 0
            self.uncounted += reply.completion_tokens is None
        self.body_bytes += len(stored.body)
        self._span(stored.stored_ms, stored.stored_ms)

    def include(self, other: "Tally") -> None:
        """Count all that another one has counted."""
        self.answers += other.answers
        self.rejected.update(other.rejected)
        self.cut += other.cut
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.uncounted += other.uncounted
        self.body_bytes += other.body_bytes
        if other.first_ms is not None and other.last_ms is not None:
            self._span(other.first_ms, other.last_ms)

    def _span(self, first_ms: int, last_ms: int) -> None:
        self.first_ms = first_ms if self.first_ms is None else min(self.first_ms, first_ms)
        self.last_ms = last_ms if self.last_ms is None else max(self.last_ms, last_ms)


def reason_of(outcome: Outcome | None) -> str | None:
    """Why a stored answer is no usable one; None: it is."""
    return UNREADABLE if outcome is None else outcome.rejected


def _day(milliseconds: int | None) -> str:
    if milliseconds is None:
        return "-"
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):  # beyond the calendar: a clock was wrong
        return "?"


@dataclass(frozen=True, slots=True)
class Row:
    """The answers of one kind.

    Attributes:
        kind, tally: which, and their sums.
        disk_bytes: of the files that hold them, shared out by the size of their bodies.
    """

    kind: Kind
    tally: Tally
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Unfolded:
    """A segment: the answers of one process that are in no folded file yet.

    Attributes:
        path: the file.
        bytes: of it and its write-ahead log.
        pid: process that made it; None: the name does not say.
        is_held: a process writes or folds it.
    """

    path: Path
    bytes: int
    pid: int | None
    is_held: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """What is stored.

    Attributes:
        folder: `data/responses`.
        rows: by kind, sorted.
        total: over all rows.
        requests: different request keys.
        files: folded files with answers.
        disk_bytes: of these and of the segments.
        unfolded: the segments.
        damaged: segments that were set aside since they were damaged; what was intact in them is among the answers.
    """

    folder: Path
    rows: tuple[Row, ...]
    total: Tally
    requests: int
    files: int
    disk_bytes: int
    unfolded: tuple[Unfolded, ...]
    damaged: tuple[Path, ...]


def take_inventory(folder: Path, check: Check = never) -> Inventory:
    """Count everything; parses every body.

    Raises:
        CorruptArtefact, Incomplete: as `answers_by_key`.
    """
    unfolded, sizes = segments_of(folder), _sizes(folder)
    tallies: dict[Kind, Tally] = {}
    bodies: Counter[tuple[Path, Kind]] = Counter()
    requests = 0
    for _, group in answers_by_key(folder, check):
        requests += 1
        for found in group:
            kind = Kind.of(found.stored)
            tallies.setdefault(kind, Tally()).add(found.stored)
            bodies[found.source, kind] += len(found.stored.body) + 1  # a refusal may have none, and takes room too
    shares = _shares(sizes, bodies)
    total = Tally()
    for tally in tallies.values():
        total.include(tally)
    return Inventory(
        folder=folder,
        rows=tuple(Row(kind, tallies[kind], shares[kind]) for kind in sorted(tallies)),
        total=total,
        requests=requests,
        files=len(folded_files(folder)),
        disk_bytes=sum(sizes.values()),
        unfolded=unfolded,
        damaged=tuple(sorted((folder / "damaged").glob("*.sqlite"))),
    )


def _sizes(folder: Path) -> dict[Path, int]:
    segments = [path for path in segment_paths(folder / "segments") if path.exists()]
    return {path: _size(path) for path in (*segments, *folded_files(folder))}


def _size(path: Path) -> int:
    size = 0
    for file in (path, path.with_name(f"{path.name}-wal")):
        try:
            size += file.stat().st_size
        except FileNotFoundError:
            continue
    return size


def _shares(sizes: Mapping[Path, int], bodies: Mapping[tuple[Path, Kind], int]) -> Counter[Kind]:
    """Bytes on disk by kind: each file's, shared out by the size of the bodies."""
    whole: Counter[Path] = Counter()
    for (path, _), size in bodies.items():
        whole[path] += size
    shares: Counter[Kind] = Counter()
    for (path, kind), size in bodies.items():
        shares[kind] += sizes.get(path, 0) * size // whole[path]
    return shares


def segments_of(folder: Path) -> tuple[Unfolded, ...]:
    """The segments of a response store, of living and dead processes."""
    return tuple(
        Unfolded(path, _size(path), _pid(path), is_held(path))
        for path in segment_paths(folder / "segments")
        if path.exists() or is_held(path)
    )


def _pid(segment: Path) -> int | None:
    number = segment.stem.partition("-")[0]
    return int(number) if number.isdecimal() else None


def existing_data(data: Path) -> Path:
    """The response store of a data folder; it may be empty or missing.

    Raises:
        UsageError: there is no such data folder.
    """
    if not data.is_dir():
        raise UsageError("no such data folder", where=str(data), todo="give the folder of a run: --data DIR")
    return data / "responses"
