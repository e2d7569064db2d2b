"""This pipeline's `plan` as a command, after the prompts are imported; nothing is asked."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.clients.measure import Job
from benchmarks.clients.ours import write_project


def run(job: Job, folder: Path) -> None:
    """Import the prompts, then print one JSON line about the command `plan`, its start included."""
    config, data = write_project(folder, job), folder / "data"
    options = [str(config), "--data", str(data), "--json"]
    subprocess.run([sys.executable, "-m", "pipeline", "prompts", *options], check=True, stdout=subprocess.DEVNULL)
    plan = [sys.executable, "-m", "pipeline", "plan", *options]
    command = [sys.executable, "-m", "benchmarks.clients.child", str(folder / "plan.json"), *plan]
    measured = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    counted = sum(step["to_ask"] for step in json.loads((folder / "plan.json").read_text("utf-8"))["requests"])
    print(json.dumps({"answered": counted, **json.loads(measured.stdout)}), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        run(Job.from_arguments(), Path(temporary))
