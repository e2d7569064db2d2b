"""One writing process's part of the response store: an SQLite file in WAL mode, held by a file lock while it lives."""

import fcntl
import os
import secrets
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptArtefact, Incomplete

SCHEMA = """
CREATE TABLE answers (
  key BLOB NOT NULL, cap INTEGER NOT NULL, stored_ms INTEGER NOT NULL, teacher TEXT NOT NULL, model TEXT NOT NULL,
  engine TEXT NOT NULL, wire TEXT NOT NULL, status INTEGER NOT NULL, rejected TEXT,
  body BLOB NOT NULL, room INTEGER, check_sum INTEGER NOT NULL);
CREATE INDEX answers_by_key ON answers (key);
CREATE TABLE attempts (
  id INTEGER PRIMARY KEY, key BLOB NOT NULL, cap INTEGER NOT NULL, sent_ms INTEGER NOT NULL, outcome TEXT,
  run TEXT, teacher TEXT, reserved INTEGER, reserved_tokens INTEGER, status INTEGER, input_tokens INTEGER,
  output_tokens INTEGER, cost INTEGER, request_id TEXT);
"""
COLUMNS = "key, cap, stored_ms, teacher, model, engine, wire, status, rejected, body, room, check_sum"
"""In the order of the table: rows are also read from its pages (salvage.py)."""
BODY_AT = 9
OLD_ATTEMPT_COLUMNS = ("id", "key", "cap", "sent_ms", "outcome")
"""Of segments that were written before attempts were priced; what they lack is None."""
ATTEMPT_COLUMNS = (
    *OLD_ATTEMPT_COLUMNS,
    *("run", "teacher", "reserved", "reserved_tokens"),
    *("status", "input_tokens", "output_tokens", "cost", "request_id"),
)
"""In the order of the table, as above."""
INSERT_ATTEMPT = f"INSERT INTO attempts VALUES ({', '.join('?' * len(ATTEMPT_COLUMNS))})"
END_ATTEMPT = """UPDATE attempts SET outcome = ?2, status = ?3, input_tokens = ?4, output_tokens = ?5, cost = ?6,
  request_id = ?7 WHERE id = ?1"""
DAMAGE = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_MISMATCH})
"""SQLite's codes for a file that is not what was written; `SQLITE_ERROR` says so of its tables and columns."""
SUFFIXES = ("-shm", "-wal", "-journal", "")
"""Of a segment's files, in the order in which they can be removed: what is left is still a segment."""
COMPRESSION_LEVEL = 1
PAGE_BYTES = 4096
KEYS_PER_QUERY = 500


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Stored:
    """One answer as it came.

    Attributes:
        key: the request key, 32 bytes.
        cap: `max_tokens` it was asked with.
        stored_ms: Unix time in milliseconds; orders answers to one key.
        teacher: identity of the teacher, 64 hex digits.
        model: name of the model as the endpoint was asked for it.
        engine: the server and its version, where known.
        wire: format of the body (`Wire.name`).
        status: HTTP status.
        rejected: reason for which the row is refused, where the body alone does not tell; else None.
        body: the raw response.
        room: most tokens of prompt and completion together; None: the model's own limit, or unknown.
    """

    key: bytes
    cap: int
    stored_ms: int
    teacher: str
    model: str
    engine: str
    wire: str
    status: int
    rejected: str | None
    body: bytes
    room: int | None = None


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Attempt:
    """One request that left, or was about to.

    Attributes:
        id: number of the attempt in its segment.
        key, cap: as in `Stored`.
        sent_ms: Unix time in milliseconds.
        outcome: "answer", "reject", "retry:<class>" or "abort"; None: unknown, since the process died before.
        run, teacher: names of the run that asked and of the teacher in its config.
        reserved, reserved_tokens: its worst case in nano-dollars (None: there is no price) and in tokens.
        status, input_tokens, output_tokens, cost, request_id: as in `Ended`.
    """

    id: int
    key: bytes
    cap: int
    sent_ms: int
    outcome: str | None = None
    run: str | None = None
    teacher: str | None = None
    reserved: int | None = None
    reserved_tokens: int | None = None
    status: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: int | None = None
    request_id: str | None = None


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Ended:
    """How an attempt ended.

    Attributes:
        id, outcome: as in `Attempt`.
        status: HTTP status; None: there was no complete response.
        input_tokens, output_tokens: what it used; None: unknown.
        cost: nano-dollars; None: unknown, as it is for every attempt without a price.
        request_id: under which the provider knows it.
    """

    id: int
    outcome: str
    status: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: int | None = None
    request_id: str | None = None


class Segment:
    """An SQLite file that one process writes. Everything written in one `write` is there after `kill -9`, or nothing.

    Power loss may take the last writes (synchronous=NORMAL), never the file.
    """

    def __init__(self, folder: Path) -> None:
        name = f"{os.getpid()}-{secrets.token_hex(4)}.sqlite"
        self.path = folder / name
        self._lock = _own_lock(lock_path(self.path))
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite gives -wal and -shm the same mode
            self._db = _connect(self.path)
            self._db.execute(f"PRAGMA page_size={PAGE_BYTES}")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(SCHEMA)
        except BaseException:
            os.close(self._lock)  # whoever folds next removes what was made
            raise

    def write(self, intents: Sequence[Attempt], outcomes: Sequence[Ended], answers: Sequence[Stored]) -> None:
        """One transaction: attempts about to leave, those that ended, answers."""
        with self._db:
            self._db.execute("BEGIN")
            if intents:
                self._db.executemany(INSERT_ATTEMPT, map(attempt_values, intents))
            if outcomes:
                self._db.executemany(END_ATTEMPT, map(_ended_values, outcomes))
            if answers:
                self._db.executemany(
                    f"INSERT INTO answers ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", map(_row, answers)
                )

    def close(self) -> None:
        """Stop writing; the file stays and may now be folded by anybody.

        Raises:
            Incomplete: the disk fails; what was written before is safe.
        """
        try:
            with _reading(self.path):
                self._db.close()
        finally:
            os.close(self._lock)


class DeadSegment:
    """A segment whose writer is gone; nobody else folds it while this object holds its lock."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path) -> "DeadSegment | None":
        """Take a segment over; None if its writer lives, another process is folding it, or it is gone."""
        lock = os.open(lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        segment = cls(path, lock)
        if path.exists():
            return segment
        with closing(segment):  # it was folded between our listing and our lock, or its writer died before it made it
            segment.remove()
        return None

    def remove(self) -> None:
        """Remove the files: their content was folded."""
        for suffix in SUFFIXES:
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        lock_path(self.path).unlink(missing_ok=True)

    def move(self, folder: Path) -> None:
        """Move the files into another folder."""
        folder.mkdir(exist_ok=True, mode=0o700)
        for suffix in SUFFIXES:
            with suppress(FileNotFoundError):
                name = self.path.name + suffix
                self.path.with_name(name).rename(folder / name)
        lock_path(self.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)


def read_answers(path: Path, keys: Sequence[bytes] | None = None) -> Iterator[Stored]:
    """The answers of a segment sorted by (key, time), or only those to some keys (in no order). A segment that was
    removed meanwhile has none: whoever removed it had folded it before.

    Raises:
        Incomplete: the disk fails, or somebody else keeps the file for too long.
        CorruptArtefact: the file is damaged.
    """
    with open_segment(path) as db:
        if db is None:
            return
        if keys is None:
            yield from map(stored_of, db.execute(f"SELECT {COLUMNS} FROM answers ORDER BY key, stored_ms"))
            return
        for start in range(0, len(keys), KEYS_PER_QUERY):
            some = keys[start : start + KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            yield from map(stored_of, db.execute(f"SELECT {COLUMNS} FROM answers WHERE key IN ({marks})", some))


def read_attempts(path: Path) -> Iterator[Attempt]:
    """The attempts of a segment sorted by (key, number).

    Raises:
        Incomplete, CorruptArtefact: as `read_answers`.
    """
    with open_segment(path) as db:
        for row in () if db is None else db.execute(f"SELECT {attempt_columns(db)} FROM attempts ORDER BY key, id"):
            yield Attempt(*row)


def attempt_columns(db: sqlite3.Connection, wanted: Sequence[str] = ATTEMPT_COLUMNS) -> str:
    """Columns of attempts for a SELECT; those that an older segment lacks are NULL."""
    there = {name for _, name, *_ in db.execute("PRAGMA table_info(attempts)")}
    return ", ".join(name if name in there else f"NULL AS {name}" for name in wanted)


def segment_paths(folder: Path) -> list[Path]:
    """All segments in a folder, of living and dead writers; also where no more than the lock is there."""
    return sorted({path.with_suffix(".sqlite") for pattern in ("*.sqlite", "*.lock") for path in folder.glob(pattern)})


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)


@contextmanager
def open_segment(path: Path) -> Iterator[sqlite3.Connection | None]:
    """A reading connection; None if the file is gone or its writer died before it made the tables.

    Raises:
        Incomplete, CorruptArtefact: as `read_answers`.
    """
    if not path.exists():
        yield None
        return
    with _reading(path):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=60)
        try:
            db.text_factory = text_of
            tables = "SELECT count(*) FROM sqlite_master WHERE name IN ('answers', 'attempts')"
            try:
                made = db.execute(tables).fetchone()[0]
            except sqlite3.OperationalError:
                if path.exists():
                    raise
                made = 0
            yield db if made == 2 else None
        finally:
            db.close()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """SQLite's errors as ours: those of the disk or of another process that is busy, and those of the file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # without its detail
        if code in DAMAGE:
            raise damaged(path, str(error)) from error
        todo = "see to the disk, then run the same command again; the answers in the file are kept"
        raise Incomplete(f"stored answers cannot be read: {error}", where=str(path), todo=todo) from error


def damaged(path: Path, why: str) -> CorruptArtefact:
    """What a person is told of a segment that is not as it was written."""
    todo = "run the same command again: what is intact in it is kept, the rest is asked for again"
    return CorruptArtefact(f"a file of stored answers is damaged: {why}", where=str(path), todo=todo)


def _own_lock(path: Path) -> int:
    """Make a lock file and hold it; whoever sweeps may have removed it between the two."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink > 0:
            return lock
        os.close(lock)


def is_held(segment: Path) -> bool:
    """Whether a process writes or folds a segment."""
    try:
        with lock_path(segment).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def lock_path(segment: Path) -> Path:
    """Not the database itself: closing any handle of that would drop SQLite's own locks in this process."""
    return segment.with_suffix(".lock")


attempt_values = attrgetter(*ATTEMPT_COLUMNS)
_ended_values = attrgetter("id", "outcome", "status", "input_tokens", "output_tokens", "cost", "request_id")


def _row(answer: Stored) -> tuple[object, ...]:
    body = zlib.compress(answer.body, COMPRESSION_LEVEL)
    row = (
        answer.key,
        answer.cap,
        answer.stored_ms,
        answer.teacher,
        answer.model,
        answer.engine,
        answer.wire,
        answer.status,
        answer.rejected,
        body,
        answer.room,
    )
    return (*row, _check_sum(row))


def stored_of(row: Sequence[Any]) -> Stored:
    """The answer of a row of `COLUMNS`.

    Raises:
        sqlite3.DatabaseError: the row is not as it was written: SQLite itself keeps no check sums.
    """
    if _check_sum(row[:-1]) != row[-1]:
        raise sqlite3.DatabaseError("the check sum of an answer does not match")
    values = [*row[:-1]]
    values[BODY_AT] = zlib.decompress(values[BODY_AT])
    return Stored(*values)


def text_of(raw: bytes) -> str:
    """Text that may be damaged: it is compared with its check sum, so it need only be different."""
    return raw.decode("utf-8", "surrogateescape")


def _check_sum(row: Sequence[object]) -> int:
    """CRC-32 over a row; the body, which is the ninth value, as it is stored."""
    *facts, body, room = row
    sum_of_body = zlib.crc32(body) if isinstance(body, bytes) else -1
    return zlib.crc32(repr((facts, room, sum_of_body)).encode("utf-8", "surrogatepass"))
