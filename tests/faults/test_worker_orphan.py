"""A training worker dies with the pipeline, even if the pipeline is killed and can do nothing about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.training_rows import is_alive

WORKER = (
    "import sys, time, os; from pipeline.student.process import *\n"
    "def main(path):\n"
    "    Files(path).beside('.pid').write_text(str(os.getpid()))\n"
    "    time.sleep(300)\n"
    "run_as_worker(main, sys.argv)"
)
PARENT = (
    "import sys, pathlib; from pipeline.student.process import run_process; from tests.support import make_context\n"
    "path = pathlib.Path(sys.argv[2])\n"
    "run_process([sys.executable, '-c', sys.argv[1], str(path)], path, make_context(path.parent), print, {})"
)


def wait_for(condition: object, seconds: float = 60) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_killed_parent_leaves_no_worker(tmp_path: Path, root: Path) -> None:
    job, pid = tmp_path / "job.json", tmp_path / "job.pid"
    job.write_text("{}")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, WORKER, str(job)], cwd=root)
    wait_for(lambda: pid.is_file() and pid.read_text())
    worker = int(pid.read_text())
    assert is_alive(worker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not is_alive(worker))


def test_a_launcher_that_outlived_its_parent_starts_no_worker_beside_the_next_run_s(tmp_path: Path, root: Path) -> None:
    job, pid, go = tmp_path / "job.json", tmp_path / "job.pid", tmp_path / "go"
    job.write_text("{}")
    late = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n{WORKER}"
    first = subprocess.Popen([sys.executable, "-c", PARENT, late, str(job)], cwd=root)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    wait_for(lambda: len(children.read_text().split()) == 1)
    launcher = int(children.read_text())
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = subprocess.Popen([sys.executable, "-c", PARENT, WORKER, str(job)], cwd=root)
    try:
        wait_for(lambda: pid.is_file() and pid.read_text())
        worker = int(pid.read_text())
        go.touch()
        wait_for(lambda: not is_alive(launcher))
        assert is_alive(worker)
    finally:
        second.kill()
        second.wait()
