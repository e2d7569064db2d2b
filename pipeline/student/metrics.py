"""The figures of a running training: `metrics.jsonl`, a line a point, that can be read while they are written."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch

from pipeline.core.errors import Incomplete, boundary
from pipeline.core.log import finite
from pipeline.core.stage import Json

METRICS: Final = "metrics.jsonl"
"""Its name in the work folder, in a checkpoint and in the artefact."""


@dataclass(slots=True)
class Pace:
    """Seconds that steps took since the last point, without what lies between them (measurements, checkpoints).

    A step that a GPU has not finished counts when the trainer waits for its loss, which it does in every step.

    Attributes:
        steps: steps since the last point.
        step_s, eval_s: seconds of training and of measuring since the last point.
        mark: when the running step began, by the monotonic clock.
    """

    steps: int = 0
    step_s: float = 0.0
    eval_s: float = 0.0
    mark: float = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.mark = time.monotonic()

    def end(self) -> None:
        """The running step is over."""
        now = time.monotonic()
        self.steps, self.step_s, self.mark = self.steps + 1, self.step_s + now - self.mark, now

    def measured(self) -> None:
        """What was done since `end` was measuring."""
        now = time.monotonic()
        self.eval_s, self.mark = self.eval_s + now - self.mark, now

    def take(self, tokens: int) -> dict[str, Json]:
        """The figures since the last point, which this is.

        Args:
            tokens: trained on since then.
        """
        facts: dict[str, Json] = {}
        if self.steps > 0 and self.step_s > 0:
            facts = {
                "tokens_per_s": round(tokens / self.step_s, 1),
                "step_s": round(self.step_s / self.steps, 4),
            }
        if self.eval_s > 0:
            facts["eval_s"] = round(self.eval_s, 4)
        self.steps, self.step_s, self.eval_s = 0, 0.0, 0.0
        return facts


class MetricsFile:
    """Appends points to `metrics.jsonl`; the first process does.

    Args:
        path: the file.
        before: the file that a checkpoint kept, with the points up to it; None: begin with none. What a killed
            process wrote after its last checkpoint goes either way: its steps are trained again.

    Raises:
        Incomplete: it cannot be written.
    """

    def __init__(self, path: Path, before: Path | None) -> None:
        self.path = path
        with _writing(path):
            path.unlink(missing_ok=True)
            if before is None:
                path.touch()
            else:
                shutil.copyfile(before, path)

    def points(self) -> list[dict[str, Json]]:
        """The points so far."""
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]

    def append(self, point: Mapping[str, Json]) -> None:
        """Add one point, with the time, in one write; numbers that are not finite become null.

        Raises:
            Incomplete: it cannot be written.
        """
        line = json.dumps(finite({**point}), allow_nan=False) + "\n"
        with _writing(self.path), self.path.open("ab", buffering=0) as file:
            rest = line.encode()
            while rest:
                rest = rest[file.write(rest) or 0 :]

    def copy_to(self, folder: Path) -> None:
        """Copy it into a folder under its name."""
        shutil.copyfile(self.path, folder / METRICS)


def _writing(path: Path) -> AbstractContextManager[None]:
    todo = "make room or give write access, then run the same command again; earlier checkpoints are kept"
    return boundary(Incomplete, "the figures of the training cannot be written", where=str(path), todo=todo)


def utc_now() -> str:
    """The time as the run's events tell it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def forget_peak_memory() -> None:
    """Count the GPU's peak from here: what the checks before the training took is not the training's.

    A process's own peak (without a GPU) cannot be counted anew.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Bytes: the most that tensors took on this process's GPU (CUDA, ROCm) so far; without one, the process's peak."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
