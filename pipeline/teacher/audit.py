"""Looks for damage in the response store, and changes nothing in it."""

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.lineage import file_sha256
from pipeline.teacher.segment import COLUMNS, is_held, segment_paths, stored_of, text_of
from pipeline.teacher.wal import committed_frames, is_torn, readable_frames

FOLDED = ("answers", "attempts")
MOVE = "move the file away and run again: what only it held is asked for again"
SALVAGE = "run again: what is intact in it is kept, the rest is asked for again"


@dataclass(frozen=True, slots=True)
class Checked:
    """A file of the response store.

    Attributes:
        path: the file.
        damage: what is wrong with it; None: nothing.
        todo: what to do about damage.
    """

    path: Path
    damage: str | None
    todo: str


def response_files(folder: Path) -> list[Path]:
    """The files that `check` looks at: folded ones, and the segments of processes that are gone."""
    folded = [path for name in FOLDED for path in sorted((folder / name).glob("*.parquet"))]
    segments = [path for path in segment_paths(folder / "segments") if path.exists() and not is_held(path)]
    return [*folded, *segments]


def check(path: Path) -> Checked:
    """Compare a folded file with the sha256 that is its name, or read all of a segment. A file that is gone is no
    damage: a segment is removed when it was folded."""
    if path.suffix == ".sqlite":
        return Checked(path, _segment_damage(path), SALVAGE)
    return Checked(path, _folded_damage(path), MOVE)


def _folded_damage(path: Path) -> str | None:
    try:
        return None if file_sha256(path) == path.stem else "the file's sha256 is not its name"
    except OSError as error:
        return f"the file cannot be read: {error.strerror}" if path.exists() else None


def _segment_damage(path: Path) -> str | None:
    try:
        return next(_problems(path), None)
    except FileNotFoundError:
        return None
    except (sqlite3.Error, zlib.error) as error:
        if not path.exists():
            return None
        return f"the segment cannot be read: {error}"


def _problems(path: Path) -> Iterator[str]:
    """Damage in the write-ahead log, of which SQLite says nothing; what it says of its own structure; then every answer
    is compared with its check sum."""
    log = _log(path)
    wal = log.read_bytes() if log.exists() else b""
    if path.stat().st_size == 0 and wal:
        yield "the segment is empty, its write-ahead log is not"
        return
    committed, readable = committed_frames(wal), readable_frames(wal)
    if readable < committed and not is_torn(wal):
        yield f"of the {committed:,} pages in its write-ahead log only the first {readable:,} can be read"
        return
    with reading(path) as db:
        for (told,) in db.execute("PRAGMA quick_check"):
            if told != "ok":
                yield f"SQLite says: {told}"
        if has_tables(db):
            for row in db.execute(f"SELECT {COLUMNS} FROM answers"):
                stored_of(row)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a segment that writes nothing; without a write-ahead log not even an empty one.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    flags = "" if _log(path).exists() else "&immutable=1"
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro{flags}", uri=True)
    try:
        db.text_factory = text_of
        yield db
    finally:
        db.close()


def has_tables(db: sqlite3.Connection) -> bool:
    """Whether the process that made a segment lived long enough to make its tables."""
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {*FOLDED} <= tables


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")
