"""What a stage receives and returns. A stage is a module with `VERSION`, `input_files` and `run`; see runner.py."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from pydantic import BaseModel

from pipeline.core.errors import Interrupted

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

S = TypeVar("S")
R = TypeVar("R")


class Progress(Protocol):
    """How a stage says how far it is. Rates and the remaining time are computed by the implementation."""

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        """Begin counting `total` things called `unit` ("rows", "steps"), of which `done` were done in an earlier
        attempt, so that they say nothing of the rate; resets the counters below."""

    def advance(self, count: int = 1, *, tokens: int = 0, rejected: int = 0, note: str = "") -> None:
        """Count `count` more things done, the tokens they cost and how many of them were rejected; `note` says in a few
        characters what else there is to watch ("loss 1.234")."""


class Events(Protocol):
    """The run's `events.jsonl`."""

    def emit(self, event: str, **fields: Json) -> None:
        """Append one event; `event` is a snake_case name, the fields are JSON values without secrets."""


class Fanout(Protocol):
    """Maps a function over shards; see fanout.py for the implementations."""

    def __call__(self, function: Callable[[S], R], shards: Iterable[S]) -> Iterator[R]:
        """Yield `function(shard)` for each shard, in the order of the shards."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the runner lends to a stage while it runs.

    Attributes:
        step: the step's name in the plan ("generate").
        data: the data folder; only `generate` and `evaluate` use it, for `data/responses`.
        workdir: a folder of this step's key that survives a crash and is removed after the commit.
        progress: see `Progress`.
        events: see `Events`.
        cancel: set when a signal asked us to stop; a stage finishes what is in flight and raises `Interrupted`
            through `check_cancelled`.
        fanout: see `Fanout`.
        resume_command: the command that resumes this run, for error messages.
        run: the run's name.
    """

    step: str
    data: Path
    workdir: Path
    progress: Progress
    events: Events
    cancel: threading.Event
    fanout: Fanout
    resume_command: str
    run: str = "run"


@dataclass(frozen=True, slots=True)
class Result:
    """What a stage did. The runner refuses it unless `rows_in == rows_out + sum(rejected.values())`.

    Attributes:
        rows_in: rows (or requests, or questions) that entered.
        rows_out: rows that left.
        rejected: reason -> count of rows that did not.
        content: 64 hex digits, the digest of what downstream stages read (content.py).
        metrics: facts for the manifest and the report; JSON only, no secrets.
    """

    rows_in: int
    rows_out: int
    rejected: Mapping[str, int]
    content: str
    metrics: Mapping[str, Json] = field(default_factory=dict)


def check_cancelled(ctx: Context) -> None:
    """Raise if a signal asked us to stop; call it between shards.

    Raises:
        Interrupted: `ctx.cancel` is set.
    """
    if ctx.cancel.is_set():
        raise Interrupted("stopped by a signal", where=f"step {ctx.step}", todo=f"resume with: {ctx.resume_command}")


class StageModule(Protocol):
    """The three names that a stage module has."""

    VERSION: int

    def input_files(self, cfg: BaseModel) -> dict[str, Path]:
        """Files outside the store whose bytes count, by the config path that names them."""

    def run(self, cfg: BaseModel, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
        """Read the committed inputs, write into the empty folder `out`."""
