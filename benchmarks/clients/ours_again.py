"""This pipeline's stage `generate` once more, when every answer is stored: what of the whole stage is not asking."""

import json
import tempfile
from pathlib import Path

import pipeline.stages.generate  # noqa: F401 (imports are no part of the cost of a request)
from benchmarks.clients.measure import Job, measured
from benchmarks.clients.ours import write_project
from pipeline.cli import main
from pipeline.core.lineage import Manifest


def run(job: Job, folder: Path) -> None:
    """Generate, then measure the stage again."""
    config, data = write_project(folder, job), folder / "data"
    generate = ["generate", str(config), "--data", str(data), "--json"]
    assert main(["prompts", *generate[1:]]) == 0
    assert main(generate) == 0
    counts: list[int] = []
    with measured(counts):
        assert main([*generate, "--force"]) == 0
        counts.append(Manifest.read(data / "runs" / "bench" / "generate" / "manifest.json").rows_out)
    events = (data / "runs" / "bench" / "events.jsonl").read_text("utf-8").splitlines()
    assert sum(json.loads(line)["event"] == "teacher_asked" for line in events) == 1, "nothing is asked again"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        run(Job.from_arguments(), Path(temporary))
