"""Runs one server in its own session and kills all of it when our pipe closes, however we died.

    python -I watchdog.py RECORD COMMAND…        (standard input: a pipe whose other end only the pipeline holds)

A vLLM server is a family: its engine process outlives a killed API server, so the whole process group has to go, and
who left it for a group of his own. Started as a file and isolated, hence no imports from the pipeline. RECORD is a JSON
file that names the group while it lives; it is locked as long as this process lives, so that others can tell a stale
one (see `clear_stale`). What is not covered: this process killed. The pipeline calls `clear_stale` when it notices; if
both were killed, the next run does.
"""

import ctypes
import fcntl
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

GRACE_S = 5.0
POLL_S = 0.2
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
RECORDS = Path("cache", "servers")
"""Folder of the records in the data folder."""


def main(record: Path, command: list[str]) -> int:
    """Run `command` until it ends or our pipe closes; returns its exit code, 0 after a closed pipe."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server become ours, so that they are reaped
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _close_pipe)
    ours = os.getpid()

    def die_with_us() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != ours:  # we were killed before the system could know that it matters
            os._exit(1)

    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_us)
    lock = _write_record(record, server.pid, command)
    try:
        code = _wait(server)
    finally:
        _kill_group(server)
        _kill_orphans()
        record.unlink(missing_ok=True)
        os.close(lock)
    return code


def _close_pipe(number: int, frame: FrameType | None) -> None:
    """A signal to this process counts as a closed pipe."""
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # reads as end of file


def _wait(server: subprocess.Popen[bytes]) -> int:
    while True:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable and not os.read(0, 1024):
            return 0
        code = server.poll()
        if code is not None:
            return code if code >= 0 else 128 - code


def _kill_group(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, to everything the server started, and wait for it."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _group_lives(server):
            time.sleep(0.02)


def _kill_orphans() -> None:
    """SIGKILL to what the server started outside its group; when it ended these became our children, and theirs do."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] != 0:
                continue
        except ChildProcessError:
            return
        for pid in _processes():
            if _parent_of(pid) == os.getpid():
                _send(os.kill, pid, signal.SIGKILL)
        time.sleep(0.02)


def _group_lives(server: subprocess.Popen[bytes]) -> bool:
    server.poll()
    try:
        while os.waitpid(-server.pid, os.WNOHANG)[0] != 0:
            pass
    except ChildProcessError:
        pass
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _write_record(record: Path, group: int, command: list[str]) -> int:
    """Write who lives where, by rename; returns the handle that holds the lock."""
    temporary = record.with_suffix(f".{os.getpid()}")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    known = {"group": group, "host": platform.node(), "boot": boot_id(), "started": started_at(group)}
    known["names"] = names_of(command)
    os.write(handle, json.dumps(known).encode())
    temporary.replace(record)
    return handle


def clear_stale(folder: Path) -> list[int]:
    """Kill the servers whose watchdog was killed with them still running; returns their process groups.

    Records of other machines that work in the same folder are left alone.
    """
    cleared = []
    for record in sorted(folder.glob("*.json")):
        try:
            file = record.open("rb")
        except FileNotFoundError:  # its watchdog, or another run, was faster
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its watchdog lives
            try:
                known = json.loads(file.read())
            except ValueError:
                known = {}
            names = known.get("names", ["vllm"])
            if known.get("boot") == boot_id() and _is_still_ours(known["group"], known["started"], names):
                _end_group(known["group"])
                cleared.append(known["group"])
            elif known.get("boot") != boot_id() and known.get("host", platform.node()) != platform.node():
                continue
            record.unlink(missing_ok=True)
    return cleared


def _end_group(group: int) -> None:
    """SIGKILL to a group that is not our children's, and wait for it: what comes next needs its memory."""
    _send(os.killpg, group, signal.SIGKILL)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(_is_running(pid) for pid in _members(group)):
        time.sleep(0.02)


def _send(send: Callable[[int, int], None], target: int, number: int) -> None:
    """Send a signal to a process or group that may have ended."""
    try:
        send(target, number)
    except ProcessLookupError:
        pass


def names_of(command: list[str]) -> list[str]:
    """Word by which the processes of a server are known, in lower case: its program, or what Python runs, without
    folders and without what follows the first dot ("vllm" of `python -m vllm.entrypoints.openai.api_server`)."""
    words = [Path(arg).name.partition(".")[0].lower() for arg in command if not arg.startswith("-")]
    return [word for word in words if word and not word.startswith("python")][:1]


def _is_still_ours(group: int, started: int, known_as: list[str]) -> bool:
    """Whether the processes of a group are the recorded server's, and not of a program that got its number later.

    The number cannot be given out again while any process of the group lives; if its leader lives, its start time must
    be the recorded one; if not, the others must be a server's.
    """
    leader = started_at(group)
    if leader != 0:
        return leader == started
    names = [_command_line(pid) for pid in _members(group) if started_at(pid) >= started]
    return any(word in name.lower() for name in names for word in known_as)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _members(group: int) -> list[int]:
    return [pid for pid in _processes() if _group_of(pid) == group]


def started_at(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 if there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def _group_of(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[2]) if fields else 0


def _parent_of(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _is_running(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on ("state"); the name before may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def boot_id() -> str:
    """Changes with each boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
