"""Whether the data folder can hold what runs write: room, rights, locks, SQLite, and servers left behind."""

import fcntl
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from pipeline.runner.doctor.finding import Finding, State
from pipeline.runner.doctor.machine import GIB

SMALL_DISK: Final = 10 * GIB
FULL_DISK: Final = GIB // 4
FEW_FILES: Final = 10_000
NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "virtiofs"}
)
MEMORY: Final = frozenset({"tmpfs", "ramfs"})
ELSEWHERE: Final = "choose a folder on a local disk with --data"


def check_folder(data: Path) -> tuple[list[Finding], float | None]:
    """All checks of this module, and the modification time of a file that was written there just now.

    Where the folder does not exist yet, the nearest one above it that does stands for it. What is written is removed.
    """
    place = nearest_folder(data)
    findings, written = [check_place(data, place), check_room(place), check_inodes(place)], None
    mounts = Path("/proc/self/mounts")
    if mounts.is_file():
        findings.append(check_file_system(place, mounts.read_text("utf-8", "replace")))
    try:
        with _scratch(place) as scratch:
            written = _write(scratch / "file")
            findings += [check_locks(scratch), check_sqlite(scratch)]
    except OSError as error:
        detail = f"{place}: cannot be written: {error.strerror}"
        findings.append(Finding("writing", "fail", detail, "give write access, make room, or choose another --data"))
    return [*findings, check_servers(data / "cache" / "servers")], written


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    absolute = path.absolute()
    return next((each for each in (absolute, *absolute.parents) if is_there(each)), Path("/"))


def is_there(path: Path) -> bool:
    """Whether a path exists; False where we may not look."""
    try:
        return path.exists()
    except OSError:
        return False


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _write(path: Path) -> float:
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_mtime


def check_place(data: Path, place: Path) -> Finding:
    """Whether the data folder is one, or can be made."""
    if not place.is_dir():
        return Finding("data folder", "fail", f"{place} is not a folder", "choose another folder with --data")
    exists = data.is_dir()
    return Finding("data folder", "ok", f"{data}" if exists else f"{data} (the first run makes it)")


def check_room(place: Path) -> Finding:
    """Whether the disk has room."""
    try:
        facts = os.statvfs(place)
    except OSError as error:
        return Finding("disk", "warn", f"{place}: {error.strerror}", ELSEWHERE)
    free, total = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
    return judge_room(free, total)


def judge_room(free: int, total: int) -> Finding:
    """Whether so many free bytes are enough."""
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < FULL_DISK:
        return Finding("disk", "fail", detail, f"make room, or {ELSEWHERE}")
    if free < SMALL_DISK:
        return Finding("disk", "warn", detail, "enough for tiny models; checkpoints of large ones need more")
    return Finding("disk", "ok", detail)


def check_inodes(place: Path) -> Finding:
    """Whether the disk can hold more files."""
    try:
        facts = os.statvfs(place)
    except OSError as error:
        return Finding("files", "warn", f"{place}: {error.strerror}", ELSEWHERE)
    return judge_inodes(facts.f_favail, facts.f_files)


def judge_inodes(free: int, total: int) -> Finding:
    """Whether so many free inodes are enough; a file system without a limit says 0 of 0."""
    if total == 0:
        return Finding("files", "ok", "as many as the disk has room for")
    state: State = "fail" if free < 100 else "warn" if free < FEW_FILES else "ok"
    todo = None if state == "ok" else f"delete files, or {ELSEWHERE}"
    return Finding("files", state, f"{free:,} of {total:,} inodes free", todo)


def check_file_system(place: Path, mounts: str) -> Finding:
    """What kind of file system it is: stored answers lie in SQLite files, whose WAL needs a local disk.

    Args:
        mounts: the text of /proc/self/mounts.
    """
    kind = file_system(place, mounts)
    name = kind.removeprefix("fuse.")
    if kind in NETWORK or kind.startswith("fuse.") or name in NETWORK:
        detail = f"{kind}: over a network or through a program; stored answers may be damaged, locks may not hold"
        return Finding("file system", "warn", detail, ELSEWHERE)
    if kind in MEMORY:
        return Finding("file system", "warn", f"{kind}: in memory, gone after a restart", ELSEWHERE)
    return Finding("file system", "ok", kind)


def file_system(place: Path, mounts: str) -> str:
    """Kind of the file system that holds a folder: of the longest mount point above it, the last one mounted there."""
    found, kind = Path("/"), "unknown"
    real = place.resolve()
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        if real.is_relative_to(point) and len(point.parts) >= len(found.parts):
            found, kind = point, fields[2]
    return kind


def check_locks(scratch: Path) -> Finding:
    """Whether file locks work and exclude: they keep two processes from one run."""
    path = scratch / "lock"
    with path.open("wb") as mine, path.open("rb") as other:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("locks", "fail", f"flock: {error.strerror}", ELSEWHERE)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return Finding("locks", "ok", "flock excludes")
    return Finding("locks", "fail", "flock is granted twice: two runs could write at once", ELSEWHERE)


def check_sqlite(scratch: Path) -> Finding:
    """Whether SQLite can write in WAL mode, as the stored answers are."""
    database = None
    try:
        database = sqlite3.connect(scratch / "wal.sqlite")
        (mode,) = database.execute("PRAGMA journal_mode=WAL").fetchone()
        database.execute("CREATE TABLE t (x)")
        database.execute("INSERT INTO t VALUES (1)")
        database.commit()
    except sqlite3.Error as error:
        return Finding("SQLite", "fail", f"{type(error).__name__}: {error}", ELSEWHERE)
    finally:
        if database is not None:
            database.close()
    if mode != "wal":
        return Finding("SQLite", "fail", f"this file system cannot hold a WAL (mode {mode})", ELSEWHERE)
    return Finding("SQLite", "ok", f"{sqlite3.sqlite_version}, WAL works")


def check_servers(records: Path) -> Finding:
    """Whether a watchdog was killed and may have left a vLLM server running. Kills nothing."""
    running = stale = 0
    for path in records.glob("*.json"):
        with suppress(OSError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                stale += 1
            except BlockingIOError:
                running += 1
    if stale:
        todo = "the next run that starts a server ends them; until then they may hold memory and GPUs"
        return Finding("vLLM servers", "warn", f"{stale} left behind by runs that were killed", todo)
    return Finding("vLLM servers", "ok", f"{running} running" if running else "none running, none left behind")
