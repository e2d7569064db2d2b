"""The response store, `data/responses/`: every answer that was ever received, by request key. Only purge.py deletes.

segments/   one SQLite file per writing process (segment.py), read by everybody
answers/    folded segments: parquet sorted by key, named by the sha256 of the file
attempts/   what was sent, how it ended and what it cost, folded in the same way; null is unknown
damaged/    segments of dead processes that were not as they were written; what was intact in them is folded

Private: files are readable by their owner only. Not covered: merging many small folded files into one; segments on a
network file system (WAL needs a local disk).
"""

import fcntl
import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.errors import Incomplete, boundary
from pipeline.core.lineage import file_sha256
from pipeline.core.store import make_folder
from pipeline.core.targets import TokenLogprobs
from pipeline.teacher.folded import damaged_file, find_answers, write_folded
from pipeline.teacher.logprobs import BAD_LOGPROBS, find_logprobs, is_refused, lacks_logprobs
from pipeline.teacher.salvage import salvage
from pipeline.teacher.segment import (
    Attempt,
    DeadSegment,
    Ended,
    Segment,
    Stored,
    attempt_values,
    read_answers,
    read_attempts,
    segment_paths,
)
from pipeline.teacher.verdict import EMPTY, Action, judge
from pipeline.teacher.wire import Reply
from pipeline.teacher.wires import WIRES

logger = logging.getLogger(__name__)

ENGINE_CRASH = "engine_crash"
"""A row whose prompt ends the engine of a local server (poison.py)."""
PROVIDER_SAYS_NO = frozenset({"content_filter", "refusal", "forbidden"})

_NAMES = pa.dictionary(pa.int32(), pa.string())
ANSWER_SCHEMA = pa.schema(
    [
        ("key", pa.binary(32)),
        ("cap", pa.int32()),
        ("stored_ms", pa.int64()),
        ("teacher", _NAMES),
        ("model", _NAMES),
        ("engine", _NAMES),
        ("wire", _NAMES),
        ("status", pa.int16()),
        ("rejected", _NAMES),
        ("room", pa.int32()),
        ("body", pa.binary()),
    ]
)
ATTEMPT_SCHEMA = pa.schema(
    [
        ("segment", _NAMES),
        ("id", pa.int64()),
        ("key", pa.binary(32)),
        ("cap", pa.int32()),
        ("sent_ms", pa.int64()),
        ("outcome", _NAMES),
        ("run", _NAMES),
        ("teacher", _NAMES),
        ("reserved", pa.int64()),
        ("reserved_tokens", pa.int64()),
        ("status", pa.int16()),
        ("input_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("cost", pa.int64()),
        ("request_id", pa.string()),
    ]
)
"""Files that were written before attempts were priced lack the columns from `run` on."""


answer_row = attrgetter(*ANSWER_SCHEMA.names)
"""The values of a `Stored`, in the order of `ANSWER_SCHEMA`."""


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Outcome:
    """What a stored answer says: a reply, or the reason for which the row is refused. One of the two is None.

    Attributes:
        logprobs: of a reply's tokens, where they were asked for and are all there.
    """

    reply: Reply | None
    rejected: str | None
    logprobs: TokenLogprobs | None = None

    @property
    def is_cut(self) -> bool:
        """Whether it is an answer that ended at its cap."""
        return self.reply is not None and self.reply.finish_reason == "length"

    def as_asked(self, *, offers_tools: bool) -> "Outcome":
        """The outcome where an answer of tool calls alone came to a request that offered no tools: it says nothing."""
        if self.reply is None or offers_tools or not self.reply.is_only_calls:
            return self
        return Outcome(None, EMPTY)


def outcome_of(stored: Stored, logprobs: LogprobsAsked | None = None) -> Outcome | None:
    """Parse a stored answer; None if it is no longer understood as one (then it is asked again).

    Args:
        logprobs: what is wanted beside the text. An answer that was refused for lack of them is one to who wants none.
    """
    if stored.rejected is not None and is_refused(stored.rejected, logprobs):
        return Outcome(None, BAD_LOGPROBS if lacks_logprobs(stored.rejected) else stored.rejected)
    wire = WIRES.get(stored.wire)
    if wire is None:
        return None
    verdict = judge(wire.read, stored.status, {}, stored.body)
    if verdict.action is Action.ANSWER:
        told = None if logprobs is None else find_logprobs(stored.wire, stored.body, logprobs)
        return Outcome(verdict.reply, None, told)
    return Outcome(None, verdict.reason) if verdict.action is Action.REJECT else None


def is_hit(
    stored: Stored,
    outcome: Outcome,
    cap: int,
    room: int | None = None,
    engine: str | None = None,
    logprobs: LogprobsAsked | None = None,
) -> bool:
    """Whether a stored answer stands for a request with `max_tokens = cap` to a model with `room` for prompt and
    completion (None: its own limit, the most there is).

    An answer does if it did not end on `length`, or neither cap nor room was less than now; a room that did not cut it
    does not matter. A refused row does if the provider will not speak of it, or if it was refused with this very cap
    and room: servers refuse caps that do not fit. One that ended an engine is refused by that engine only, as it was
    installed then (`engine`): another version may answer it. Where logprobs are wanted, an answer must hold them.

    Args:
        outcome: of `outcome_of(stored, logprobs)`.
    """
    if outcome.reply is None:
        if outcome.rejected == ENGINE_CRASH and stored.engine != engine:
            return False
        return outcome.rejected in PROVIDER_SAYS_NO or (stored.cap, stored.room) == (cap, room)
    if logprobs is not None and outcome.logprobs is None:
        return False
    if outcome.reply.finish_reason != "length":
        return True
    cut_by_cap = outcome.reply.completion_tokens is not None and outcome.reply.completion_tokens >= stored.cap
    had_room = stored.room is None or (room is not None and stored.room >= room)
    return stored.cap >= cap and (cut_by_cap or had_room)


def rank(stored: Stored, cap: int) -> tuple[bool, bool, int, bytes]:
    """Of several hits the least stands: one that ended no engine and lacked no logprobs, asked with this very cap, then
    the oldest."""
    return (
        stored.rejected == ENGINE_CRASH or lacks_logprobs(stored.rejected),
        stored.cap != cap,
        stored.stored_ms,
        stored.body,
    )


class ResponseStore:
    """The doors to `data/responses`: `put` and `get_many`. A context manager; many processes may use one folder.

    Args:
        folder: made if missing.
        check: called between answers while many are looked up; what it raises ends the look-up.
        engine: the engine as it is installed, which refusals as `engine_crash` are compared with.
    """

    def __init__(self, folder: Path, *, check: Callable[[], None] = lambda: None, engine: str | None = None) -> None:
        self._folder, self._engine = folder, engine
        self._between = check
        self._segments, self._answers, self._attempts = (
            folder / "segments",
            folder / "answers",
            folder / "attempts",
        )
        self._segment: Segment | None = None
        self._sound: set[str] = set()
        """Names of the folded files and dead segments that were compared with their check sums."""
        for path in (folder, self._segments, self._answers, self._attempts):
            make_folder(path, 0o700)

    def __enter__(self) -> "ResponseStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def put(
        self,
        answers: Sequence[Stored] = (),
        *,
        intents: Sequence[Attempt] = (),
        outcomes: Sequence[Ended] = (),
    ) -> None:
        """Keep answers, attempts about to leave, and how others ended, in one transaction.

        When it returns, all of it survives `kill -9`.

        Raises:
            Incomplete: the disk is full or does not take writes.
        """
        todo = "free disk space or correct the permissions, then run again; answers received so far are kept"
        with boundary(Incomplete, "an answer cannot be stored", where=str(self._segments), todo=todo):
            if self._segment is None:
                self._segment = Segment(self._segments)
            self._segment.write(intents, outcomes, answers)

    def get_many(
        self,
        wanted: Mapping[bytes, int],
        room: int | None = None,
        logprobs: LogprobsAsked | None = None,
        *,
        keep_logprobs: bool = False,
    ) -> dict[bytes, Outcome]:
        """The hits among `wanted` (request key -> max_tokens asked) for a model with `room`; keys without one are
        absent. Each call reads all files whose keys may be among them, so that many keys at a time cost less.

        Of several hits the one asked with this very cap wins, then the oldest, so that equal questions find equal
        answers whatever lies beside them.

        Args:
            logprobs: what an answer must tell to be a hit.
            keep_logprobs: whether outcomes hold them: 8 bytes for each of `top_k`, for every token of every answer.

        Raises:
            Incomplete: the disk fails.
            CorruptArtefact: a folded file is damaged. It is left where it is: its answers were paid for, and a copy of
                it may exist.
        """
        best: dict[bytes, tuple[tuple[bool, bool, int, bytes], Outcome]] = {}
        for stored in self._candidates(wanted):
            outcome = outcome_of(stored, logprobs)
            cap = wanted[stored.key]
            if outcome is None or not is_hit(stored, outcome, cap, room, self._engine, logprobs):
                continue
            if outcome.logprobs is not None and not keep_logprobs:
                outcome = replace(outcome, logprobs=None)
            order = rank(stored, cap)
            if stored.key not in best or order < best[stored.key][0]:
                best[stored.key] = (order, outcome)
        return {key: outcome for key, (_, outcome) in best.items()}

    def _candidates(self, wanted: Mapping[bytes, int]) -> Iterator[Stored]:
        """Segments before folded files: what is folded in between is then found in the second place."""
        keys = sorted(wanted)
        if not keys:
            return
        self._set_damaged_aside()
        for path in segment_paths(self._segments):
            yield from self._checked(read_answers(path, keys))
        for path in sorted(self._answers.glob("*.parquet")):
            self._check(path)
            yield from self._checked(find_answers(path, keys))

    def _checked(self, found: Iterable[Stored]) -> Iterator[Stored]:
        self._between()
        for stored in found:
            self._between()
            yield stored

    def _check(self, path: Path) -> None:
        """Compare a folded file with the sha256 that is its name, once: its footer has no other check sum."""
        if path.name not in self._sound and file_sha256(path) != path.stem:
            raise damaged_file(path, "its sha256 is not its name")
        self._sound.add(path.name)

    def _set_damaged_aside(self) -> None:
        """Fold what is intact in damaged segments of dead processes, and move these where nobody reads them."""
        for path in segment_paths(self._segments):
            if path.name in self._sound or (self._segment is not None and path == self._segment.path):
                continue
            segment = DeadSegment.claim(path)
            if segment is None:
                continue
            with closing(segment):
                intact = salvage(path)
                if intact is None:
                    self._sound.add(path.name)
                    continue
                write_folded(self._answers, ANSWER_SCHEMA, map(answer_row, intact.answers))
                write_folded(self._attempts, ATTEMPT_SCHEMA, (_attempt_row(path, each) for each in intact.attempts))
                segment.move(self._folder / "damaged")
            place = self._folder / "damaged" / path.name
            logger.error("a file of stored answers was damaged: %d answers in it are intact and kept, the others are "
                         "asked for again; it was moved to %s", len(intact.answers), place)  # fmt: skip

    def fold(self) -> int:
        """Fold our own segment and those of dead processes into parquet and remove them; returns the answers folded."""
        self.close()
        self._remove_torn_files()
        self._set_damaged_aside()
        with ExitStack() as stack:
            claimed = [DeadSegment.claim(path) for path in segment_paths(self._segments)]
            segments = [stack.enter_context(closing(segment)) for segment in claimed if segment is not None]
            paths = [segment.path for segment in segments]
            answers = heapq.merge(*map(read_answers, paths), key=lambda stored: (stored.key, stored.stored_ms))
            count = write_folded(self._answers, ANSWER_SCHEMA, map(answer_row, answers))
            attempts = heapq.merge(*map(_attempt_rows, paths), key=lambda row: (row[2], row[0], row[1]))
            write_folded(self._attempts, ATTEMPT_SCHEMA, attempts)
            for segment in segments:
                segment.remove()
        return count

    def close(self) -> None:
        """Close our segment; it is read by later runs and folded by one of them."""
        if self._segment is not None:
            self._sound.add(self._segment.path.name)
            self._segment.close()
            self._segment = None

    def _remove_torn_files(self) -> None:
        """Half-written folded files of processes that died; their segments still hold the rows."""
        for path in [*self._answers.glob(".*.tmp"), *self._attempts.glob(".*.tmp")]:
            with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _attempt_rows(path: Path) -> Iterator[tuple[object, ...]]:
    for attempt in read_attempts(path):
        yield _attempt_row(path, attempt)


def _attempt_row(path: Path, attempt: Attempt) -> tuple[object, ...]:
    return (path.stem, *attempt_values(attempt))
