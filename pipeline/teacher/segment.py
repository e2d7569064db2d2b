"""One writing process's part of the response store: an SQLite file in WAL mode, held by a file lock while it lives."""

import fcntl
import os
import secrets
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SCHEMA = """
CREATE TABLE answers (
  key BLOB NOT NULL, cap INTEGER NOT NULL, stored_ms INTEGER NOT NULL, teacher TEXT NOT NULL, model TEXT NOT NULL,
  engine TEXT NOT NULL, wire TEXT NOT NULL, status INTEGER NOT NULL, rejected TEXT, room INTEGER,
  body BLOB NOT NULL);
CREATE INDEX answers_by_key ON answers (key);
CREATE TABLE attempts (
  id INTEGER PRIMARY KEY, key BLOB NOT NULL, cap INTEGER NOT NULL, sent_ms INTEGER NOT NULL, outcome TEXT);
"""
COLUMNS = "key, cap, stored_ms, teacher, model, engine, wire, status, rejected, body, room"
COMPRESSION_LEVEL = 1
KEYS_PER_QUERY = 500


@dataclass(frozen=True, slots=True)
class Stored:
    """One answer as it came.

    Attributes:
        key: the request key, 32 bytes.
        cap: `max_tokens` it was asked with.
        stored_ms: Unix time in milliseconds; orders answers to one key.
        teacher: identity of the teacher, 64 hex digits.
        model: name of the model as the endpoint was asked for it.
        engine: the server and its version, where known.
        wire: format of the body (`wire.WIRE`).
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


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request that left, or was about to.

    Attributes:
        id: number of the attempt in its segment.
        key, cap: as in `Stored`.
        sent_ms: Unix time in milliseconds.
        outcome: "answer", "reject", "retry:<class>" or "abort"; None: unknown, since the process died before.
    """

    id: int
    key: bytes
    cap: int
    sent_ms: int
    outcome: str | None = None


class Segment:
    """An SQLite file that one process writes. Everything written in one `write` is there after `kill -9`, or nothing.

    Power loss may take the last writes (synchronous=NORMAL), never the file.
    """

    def __init__(self, folder: Path) -> None:
        name = f"{os.getpid()}-{secrets.token_hex(4)}.sqlite"
        self.path = folder / name
        self._lock = os.open(_lock_path(self.path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.close(os.open(self.path, os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite gives -wal and -shm the same mode
        self._db = _connect(self.path)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)

    def write(self, intents: Sequence[Attempt], outcomes: Sequence[tuple[int, str]], answers: Sequence[Stored]) -> None:
        """One transaction: attempts about to leave, (attempt id, outcome) of those that ended, answers."""
        with self._db:
            self._db.execute("BEGIN")
            if intents:
                rows = [(a.id, a.key, a.cap, a.sent_ms, a.outcome) for a in intents]
                self._db.executemany("INSERT INTO attempts VALUES (?, ?, ?, ?, ?)", rows)
            if outcomes:
                self._db.executemany("UPDATE attempts SET outcome = ?2 WHERE id = ?1", outcomes)
            if answers:
                self._db.executemany(
                    f"INSERT INTO answers ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?)", map(_row, answers)
                )

    def close(self) -> None:
        """Stop writing; the file stays and may now be folded by anybody."""
        self._db.close()
        os.close(self._lock)


class DeadSegment:
    """A segment whose writer is gone; nobody else folds it while this object holds its lock."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path) -> "DeadSegment | None":
        """Take a segment over; None if its writer lives, another process is folding it, or it is gone."""
        lock = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if not path.exists():  # folded by somebody between our listing and our lock
            _lock_path(path).unlink(missing_ok=True)
            os.close(lock)
            return None
        return cls(path, lock)

    def release(self, *, remove: bool) -> None:
        """Give the lock back, after removing the file if its content was folded."""
        if remove:
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            _lock_path(self.path).unlink(missing_ok=True)
        os.close(self._lock)


def read_answers(path: Path, keys: Sequence[bytes] | None = None) -> Iterator[Stored]:
    """The answers of a segment sorted by (key, time), or only those to some keys (in no order). A segment that was
    removed meanwhile has none: whoever removed it had folded it before."""
    db = _open_existing(path)
    if db is None:
        return
    try:
        if keys is None:
            yield from map(_stored, db.execute(f"SELECT {COLUMNS} FROM answers ORDER BY key, stored_ms"))
            return
        for start in range(0, len(keys), KEYS_PER_QUERY):
            some = keys[start : start + KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            yield from map(_stored, db.execute(f"SELECT {COLUMNS} FROM answers WHERE key IN ({marks})", some))
    finally:
        db.close()


def read_attempts(path: Path) -> Iterator[Attempt]:
    """The attempts of a segment sorted by (key, number)."""
    db = _open_existing(path)
    if db is None:
        return
    try:
        for row in db.execute("SELECT id, key, cap, sent_ms, outcome FROM attempts ORDER BY key, id"):
            yield Attempt(*row)
    finally:
        db.close()


def segment_paths(folder: Path) -> list[Path]:
    """All segments in a folder, of living and dead writers."""
    return sorted(folder.glob("*.sqlite"))


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)


def _open_existing(path: Path) -> sqlite3.Connection | None:
    """A reading connection; None if the file is gone or its writer died before it made the tables."""
    if not path.exists():
        return None
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=60)
    try:
        made = db.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('answers', 'attempts')").fetchone()[0]
    except sqlite3.OperationalError:
        made = 0
    if made == 2:
        return db
    db.close()
    return None


def _lock_path(segment: Path) -> Path:
    """Not the database itself: closing any handle of that would drop SQLite's own locks in this process."""
    return segment.with_suffix(".lock")


def _row(answer: Stored) -> tuple[object, ...]:
    body = zlib.compress(answer.body, COMPRESSION_LEVEL)
    return (
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


def _stored(row: tuple[bytes, int, int, str, str, str, str, int, str | None, bytes, int | None]) -> Stored:
    stored = Stored(*row)
    return replace(stored, body=zlib.decompress(stored.body))
