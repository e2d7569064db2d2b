"""This pipeline's whole stage `generate`: every answer committed, folded, read back in order and written as parquet."""

import json
import tempfile
from pathlib import Path

import yaml

import pipeline.stages.generate  # noqa: F401 (imports are no part of the cost of a request)
from benchmarks.clients.measure import Job, measured
from pipeline.cli import main
from pipeline.core.lineage import Manifest


def write_project(folder: Path, job: Job) -> Path:
    """A config and its prompts in `folder`; returns the config's path."""
    prompts = [{"id": f"p{number}", "prompt": prompt} for number, prompt in enumerate(job.prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), "utf-8")
    api = {
        "kind": "openai",
        "base_url": job.url,
        "provider": "bench",
        "model": job.model,
        "concurrency": job.concurrency,
    }
    source = {"kind": "jsonl", "path": str(folder / "prompts.jsonl")}
    config = {
        "name": "bench",
        "policy": {
            "intended_use": "research",
            "release": {"dataset": "none", "model": "none"},
            "allow_unknown": True,
        },
        "teachers": {"api": api},
        "prompts": {"sets": {"bench": {"source": source}}, "validation": 0, "test": 0},
        "generate": {"teacher": "api", "sampling": {"max_tokens": job.max_tokens}},
        "student": {"model": str(folder / "student")},
        "dataset": {"title": "Benchmark"},
        "train": {"accelerate": str(folder / "accelerate.yaml")},
    }
    (folder / "student").mkdir()
    (folder / "accelerate.yaml").touch()
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path


def run(job: Job, folder: Path) -> None:
    """Prepare the prompts, then measure the stage."""
    config, data = write_project(folder, job), folder / "data"
    assert main(["prompts", str(config), "--data", str(data), "--json"]) == 0
    counts: list[int] = []
    with measured(counts):
        assert main(["generate", str(config), "--data", str(data), "--json"]) == 0
        counts.append(Manifest.read(data / "runs" / "bench" / "generate" / "manifest.json").rows_out)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        run(Job.from_arguments(), Path(temporary))
