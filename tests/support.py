"""What many tests need: a `Context` without a terminal, small rows, a small project and its command line."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.config import DatasetStep
from pipeline.core.fanout import map_in_process
from pipeline.core.record import Message, Prompt, Record
from pipeline.core.stage import Context


@dataclass
class RecordedProgress:
    """Counts what a stage reports."""

    total: int = 0
    done: int = 0
    tokens: int = 0
    rejected: int = 0

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        self.total, self.done, self.tokens, self.rejected = total, done, 0, 0

    def advance(self, count: int = 1, *, tokens: int = 0, rejected: int = 0, note: str = "") -> None:
        self.done += count
        self.tokens += tokens
        self.rejected += rejected


@dataclass
class RecordedEvents:
    """Keeps the events a stage emits."""

    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def emit(self, event: str, **fields: Any) -> None:
        self.seen.append((event, fields))


def make_context(folder: Path, step: str = "test") -> Context:
    """A context whose data and work folders lie in `folder`."""
    workdir = folder / "work"
    workdir.mkdir(parents=True, exist_ok=True)
    return Context(
        step=step,
        data=folder / "data",
        workdir=workdir,
        progress=RecordedProgress(),
        events=RecordedEvents(),
        cancel=threading.Event(),
        fanout=map_in_process,
        resume_command="python -m pipeline run configs/test.yaml",
    )


EMPTY_PROMPT = Prompt(
    prompt_set="set",
    prompt_id="p0",
    split="train",
    group_id="g0",
    task=None,
    prompt=(Message("user", "What is 1 + 1?"),),
    answer=None,
    also_in=(),
    license_set=("MIT",),
)

EMPTY_RECORD = Record(
    row_id="0" * 32,
    prompt_set="set",
    prompt_id="p0",
    sample=0,
    split="train",
    task=None,
    prompt=(Message("user", "What is 1 + 1?"),),
    completion=(Message("assistant", "2"),),
    answer=None,
    also_in=(),
    teacher="tiny",
    license_set=("MIT",),
    finish_reason="stop",
    prompt_tokens=5,
    completion_tokens=1,
    verified=None,
    flags=(),
)


def a_prompt(**changes: Any) -> Prompt:
    """A prompt row with some fields changed."""
    return replace(EMPTY_PROMPT, **changes)


def a_record(**changes: Any) -> Record:
    """A record row with some fields changed."""
    return replace(EMPTY_RECORD, **changes)


# ------------------------------------------------------------------------------------ a small run without a model


POLICY: dict[str, Any] = {
    "intended_use": "research",
    "release": {"dataset": "none", "model": "none"},
    "allow_unknown": True,
}
"""Lets through all that tests which are not about terms make up."""


def minimal_config(**sections: Any) -> dict[str, Any]:
    """The config of a run that imports completions which exist already; `sections` replace whole top-level keys."""
    return {
        "name": "small",
        "policy": deepcopy(POLICY),
        "teachers": {"humans": {"kind": "replay", "path": "rows.jsonl", "origin": "people who wrote these tests"}},
        "student": {"model": "./student"},
        "prompts": {"sets": {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}}}, "validation": 0, "test": 0},
        "generate": {"teacher": "humans"},
        "dataset": {"title": "Small"},
        "train": {"accelerate": "accelerate.yaml"},
        **sections,
    }


def dataset_step(**dataset: Any) -> DatasetStep:
    """The config of stage `dataset` for rows whose sources nobody declared."""
    return DatasetStep.model_validate({"dataset": {"title": "t", **dataset}, "policy": POLICY, "declared": []})


def write_project(folder: Path, *, rows: int = 12, **sections: Any) -> Path:
    """A project that runs up to `dataset` in any folder without a model: rows.jsonl, a student's folder (one file),
    and run.yaml, whose path is returned. Paths in it are relative: run it with `folder` as the current folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": f"p{row:03d}", "prompt": f"Name number {row}.", "completion": f"It is number {row}."})
        for row in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
    (folder / "student").mkdir(exist_ok=True)
    (folder / "student" / "config.json").write_text("{}", "utf-8")
    (folder / "accelerate.yaml").write_text("{}\n", "utf-8")
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(minimal_config(**sections), sort_keys=False), "utf-8")
    return config


def pretend_trainable(folder: Path) -> None:
    """Make a project of `write_project` pass what is checked by names before `train` looks at its data set. Nothing can
    be trained with these files."""
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (folder / "student" / name).write_text("{}", "utf-8")
    (folder / "accelerate.yaml").write_text("distributed_type: 'NO'\n", "utf-8")


def run_cli(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline …` as a process of its own, with `cwd` as its current folder."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=cli_env(env), capture_output=True, text=True, timeout=timeout, check=False
    )


def cli_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment in which a child process finds the package."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), **(extra or {})}


# ------------------------------------------------------------------------------- a stage written for one test

PROBE_DRIVER = """
import sys
from pathlib import Path

import pipeline.stages
from pipeline import cli
from pipeline.core.config import FilterStep
from pipeline.runner import steps

pipeline.stages.__path__.append(str(Path(__file__).parent))
steps.STAGES = (steps.StageSpec("probe", (), lambda run: FilterStep(filter=run.filter)),)
if __name__ == "__main__":  # worker processes import this file too
    sys.exit(cli.main())
"""

PROBE_START = """
import os
import time
from pathlib import Path

from pipeline.core.errors import Incomplete
from pipeline.core.stage import Result, check_cancelled

VERSION = 1


def input_files(cfg):
    return {}


def run(cfg, inputs, out, ctx):
    result = Result(1, 1, {}, "c" * 64)
"""


def probe_command(folder: Path, body: str, *arguments: str) -> list[str]:
    """A command that runs the whole program on a plan of one step, `probe`, whose stage is `body`: the lines of its
    `run(cfg, inputs, out, ctx)`, which begin with an ordinary `result`. For what no real stage does on demand."""
    (folder / "probe").mkdir(parents=True, exist_ok=True)
    (folder / "probe" / "driver.py").write_text(PROBE_DRIVER, "utf-8")
    (folder / "probe" / "probe.py").write_text(PROBE_START + textwrap.indent(textwrap.dedent(body), "    "), "utf-8")
    return [sys.executable, str(folder / "probe" / "driver.py"), *arguments]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's folder, without the torn lines of killed processes."""
    path = folder / "events.jsonl"
    events = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not hold after `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.01)


@contextmanager
def logger_is_restored() -> Iterator[None]:
    """Undo what `main` does to the package's logger, which outlives a call of it inside a test."""
    logger = logging.getLogger("pipeline")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before
