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
