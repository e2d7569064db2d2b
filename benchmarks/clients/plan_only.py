"""This pipeline's `plan` as a command, after the prompts are imported; nothing is asked."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.clients.measure import Job
from benchmarks.clients.ours import write_project


def run(job: Job, folder: Path) -> None:
    """Import the prompts, then print one JSON line about the command `plan`, its start included."""
    config, data = write_project(folder, job), folder / "data"
    options = [str(config), "--data", str(data), "--json"]
    subprocess.run([sys.executable, "-m", "pipeline", "prompts", *options], check=True, stdout=subprocess.DEVNULL)
    with (folder / "plan.json").open("wb") as out:
        began = time.perf_counter()
        plan = subprocess.Popen([sys.executable, "-m", "pipeline", "plan", *options], stdout=out)
        _, status, usage = os.wait4(plan.pid, 0)
        wall = time.perf_counter() - began
    assert os.waitstatus_to_exitcode(status) == 0
    counted = sum(step["to_ask"] for step in json.loads((folder / "plan.json").read_text("utf-8"))["requests"])
    figures = {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}
    print(json.dumps({"answered": counted, **figures, "pid": plan.pid}), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        run(Job.from_arguments(), Path(temporary))
