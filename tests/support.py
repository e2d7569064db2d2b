"""What many tests need: a `Context` without a terminal, and small rows."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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

    def start(self, total: int, unit: str) -> None:
        self.total, self.done, self.tokens, self.rejected = total, 0, 0, 0

    def advance(self, count: int = 1, *, tokens: int = 0, rejected: int = 0) -> None:
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
    license="MIT",
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
