"""The watchdog takes a server's whole family down with us, and a later run finds what even the watchdog left."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.teacher import watchdog

FAMILY = """
import os, subprocess, sys, time
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)  # vllm"
child = subprocess.Popen([sys.executable, "-c", stubborn])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """The watchdog over a process with a child that ignores SIGTERM."""
    run = [sys.executable, "-I", watchdog.__file__, str(folder / "record.json"), *command]
    return subprocess.Popen(run, stdin=subprocess.PIPE, start_new_session=True)


def start_family(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """The watchdog and the process ids of parent and child."""
    process = start(folder, sys.executable, "-c", FAMILY, str(folder / "pids"))
    wait_until(lambda: len(pids_in(folder)) == 2 and (folder / "record.json").exists())
    return process, pids_in(folder)


def pids_in(folder: Path) -> list[int]:
    path = folder / "pids"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["close", "terminate"])
def test_a_closed_pipe_or_a_signal_ends_the_whole_family_even_who_ignores_sigterm(tmp_path, how):
    process, pids = start_family(tmp_path)
    assert process.stdin is not None
    with process.stdin:
        if how == "terminate":
            process.terminate()
            assert process.wait(timeout=20) == 0
    assert process.wait(timeout=20) == 0
    assert [pid for pid in pids if alive(pid)] == []
    assert not (tmp_path / "record.json").exists()


def test_killing_the_holder_of_the_pipe_ends_the_family(tmp_path):
    holder = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.faults.test_watchdog import start_family
process, pids = start_family(Path({str(tmp_path)!r}))
print("up", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        pids = pids_in(tmp_path)
        assert all(alive(pid) for pid in pids)
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_the_exit_code_of_a_server_that_ends_is_passed_on(tmp_path):
    for code, expected in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        process = start(tmp_path, sys.executable, "-c", code)
        assert process.stdin is not None
        with process.stdin:
            assert process.wait(timeout=20) == expected


def test_what_a_killed_watchdog_leaves_is_cleared_by_the_next_run(tmp_path):
    process, (parent, child) = start_family(tmp_path)
    assert watchdog.clear_stale(tmp_path) == [], "its watchdog lives"
    assert alive(child)
    assert process.stdin is not None
    with process.stdin:
        process.kill()
        process.wait()
    wait_until(lambda: not alive(parent))
    assert alive(child), "this is what has to be cleared"
    assert watchdog.clear_stale(tmp_path) == [parent]
    wait_until(lambda: not alive(child))
    assert list(tmp_path.glob("*.json")) == []


def test_a_record_whose_number_belongs_to_another_process_kills_nobody(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        record = {"group": other.pid, "boot": watchdog.boot_id(), "started": watchdog.started_at(other.pid) - 1}
        (tmp_path / "a.json").write_text(json.dumps(record))
        (tmp_path / "b.json").write_text(json.dumps({**record, "boot": "another", "started": record["started"] + 1}))
        (tmp_path / "c.json").write_text("torn")
        assert watchdog.clear_stale(tmp_path) == []
        assert other.poll() is None
        assert os.getpgid(other.pid) == other.pid
    finally:
        other.kill()
        other.wait()


ESCAPED = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def test_who_left_the_group_is_ended_as_well(tmp_path):
    process = start(tmp_path, sys.executable, "-c", ESCAPED, str(tmp_path / "pids"))
    wait_until(lambda: len(pids_in(tmp_path)) == 2)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert [pid for pid in pids_in(tmp_path) if alive(pid)] == []


def test_the_record_of_another_machine_is_left_alone_and_one_of_before_a_restart_is_removed(tmp_path):
    record = {"group": 1, "boot": "another", "started": 1}
    (tmp_path / "theirs.json").write_text(json.dumps({**record, "host": "another"}))
    (tmp_path / "ours.json").write_text(json.dumps({**record, "host": platform.node()}))
    assert watchdog.clear_stale(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.json"]


@pytest.mark.parametrize(("names", "is_killed"), [(["sleeper"], True), (["vllm"], False), ([], False)])
def test_what_is_left_of_a_group_without_its_leader_is_known_by_the_servers_name(tmp_path, names, is_killed):
    family = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', "
    family += "'Sleeper'], stdout=subprocess.DEVNULL).pid)"
    leader = subprocess.Popen([sys.executable, "-c", family], stdout=subprocess.PIPE, start_new_session=True)
    started = watchdog.started_at(leader.pid)
    child = int(leader.communicate(timeout=20)[0])
    try:
        known = {"group": leader.pid, "boot": watchdog.boot_id(), "started": started, "names": names}
        (tmp_path / "a.json").write_text(json.dumps(known))
        assert watchdog.clear_stale(tmp_path) == ([leader.pid] if is_killed else [])
        assert alive(child) is not is_killed
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)
