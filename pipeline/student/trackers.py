"""Where the points of a training are sent beside `metrics.jsonl`, on request: TensorBoard, trackio, Weights & Biases.

Each tracker has a thread of its own, so that none slows the training; one that fails is told once and left alone.
TensorBoard and trackio write on this machine. Only W&B sends anything over a network.
"""

import importlib.util
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Protocol

from pipeline.core.errors import Incomplete, PipelineError, UsageError, boundary
from pipeline.core.stage import Json
from pipeline.student.jobs import TrainJob
from pipeline.student.process import Report, write_json

Point = Mapping[str, Json]

PACKAGES: Final = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""Tracker -> the package that it needs."""
PROJECT: Final = "pipeline"
"""Under which trackio and W&B list the runs; WANDB_PROJECT names another one for W&B."""
CLOSE_S: Final = 30.0
"""Seconds that a tracker gets at the end to send what it still holds."""
PRIVATE: Final[Mapping[str, Any]] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "host": "unnamed",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""W&B's settings that keep the console, the code, the repository, the machine and its packages from being sent."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed, before anything is done.

    Raises:
        UsageError: one is missing.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            todo = f"pip install {PACKAGES[name]}, or take it out of train.trackers"
            raise UsageError(f"the tracker {name} is not installed", where="train.trackers", todo=todo)


@dataclass(frozen=True, slots=True)
class Tracked:
    """What trackers are told of a training.

    Attributes:
        name: of the run, and the beginning of the training's key: each training is a run of its own.
        config: settings of the training; no paths.
        folder: for files of theirs that belong to the training.
    """

    name: str
    config: dict[str, Json]
    folder: Path

    @classmethod
    def of(cls, job: TrainJob) -> "Tracked":
        """Of a job: a student in a folder is called "local"."""
        student = job.student.model if job.student.folder is None else "local"
        config = job.train.model_dump(mode="json", exclude={"accelerate", "trackers"})
        told = {"student": student, "revision": job.student.revision, "processes": job.world_size}
        return cls(f"{job.run}-{job.workdir.name[:8]}", {**config, **told}, job.workdir)


class Tracker(Protocol):
    """Takes points."""

    def log(self, point: Point) -> None:
        """Send one."""

    def close(self) -> None:
        """Send what is still held."""


# ------------------------------------------------------------------------------------------------------- the three


class TensorBoard:
    """Event files in `tensorboard/` of the work folder, written anew by each attempt from the first point on."""

    def __init__(self, tracked: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = tensorboard_folder(tracked.folder)
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))

    def log(self, point: Point) -> None:
        """See `Tracker`."""
        stamp = point.get("time")
        seconds = datetime.fromisoformat(stamp).timestamp() if isinstance(stamp, str) else None
        for name, value in figures(point).items():
            self._writer.add_scalar(name, value, step_of(point), walltime=seconds)
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


def tensorboard_folder(folder: Path) -> Path:
    """Where TensorBoard's files lie in a work folder or an artefact."""
    return folder / "tensorboard"


def copy_tensorboard(workdir: Path, out: Path) -> None:
    """Copy TensorBoard's files to the artefact, under names that do not tell the machine's."""
    for number, path in enumerate(sorted(tensorboard_folder(workdir).glob("events.out.tfevents.*"))):
        tensorboard_folder(out).mkdir(exist_ok=True)
        shutil.copyfile(path, tensorboard_folder(out) / f"events.out.tfevents.{number}")


class Trackio:
    """A run of trackio's database on this machine (or of the Space that TRACKIO_SPACE_ID names)."""

    def __init__(self, tracked: Tracked) -> None:
        import trackio  # type: ignore[import-not-found]

        self._run = trackio.init(
            project=PROJECT,
            name=tracked.name,
            config=tracked.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )

    def log(self, point: Point) -> None:
        """See `Tracker`."""
        self._run.log(figures(point), step=step_of(point))

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class WeightsAndBiases:
    """A run of W&B: points and settings, nothing else (see `PRIVATE`)."""

    def __init__(self, tracked: Tracked) -> None:
        import wandb  # type: ignore[import-not-found]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=tracked.name,
            id=tracked.name,
            config=tracked.config,
            resume="allow",
            save_code=False,
            settings=wandb.Settings(**PRIVATE),
        )

    def log(self, point: Point) -> None:
        """See `Tracker`."""
        self._run.log(figures(point), step=step_of(point))

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


OPENERS: Final[Mapping[str, Callable[[Tracked], Tracker]]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


def figures(point: Point) -> dict[str, float]:
    """The numbers of a point but its step."""
    return {name: value for name, value in point.items() if isinstance(value, int | float) and name != "step"}


def step_of(point: Point) -> int:
    """The step of a point."""
    step = point["step"]
    assert isinstance(step, int)
    return step


# --------------------------------------------------------------------------------------------------------- feeding


@dataclass(slots=True)
class Feeder:
    """Feeds one tracker from a thread of its own.

    A training that goes on from a checkpoint makes some points again. TensorBoard's files are written anew; others are
    sent no point twice: `<name>.sent.json` in the work folder says up to which step they have them.

    Attributes:
        failure: why it takes no more points; None while it does.
    """

    name: str
    tracked: Tracked
    points: SimpleQueue[Point | None] = field(default_factory=SimpleQueue)
    failure: str | None = None
    is_told: bool = False
    thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the tracker in its thread."""
        self.thread = threading.Thread(target=self._feed, name=self.name, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Let it send what it holds; gives up after `CLOSE_S`."""
        assert self.thread is not None
        self.points.put(None)
        self.thread.join(CLOSE_S)
        if self.thread.is_alive() and self.failure is None:
            self.failure = f"it did not end within {CLOSE_S:.0f} s"

    def _feed(self) -> None:
        try:
            with boundary(Incomplete, f"{self.name} failed", where="train.trackers", todo=""):
                self._pass_on(OPENERS[self.name](self.tracked))
        except PipelineError as error:
            self.failure = error.what

    def _pass_on(self, tracker: Tracker) -> None:
        sent = self.tracked.folder / f"{self.name}.sent.json"
        last = json.loads(sent.read_text("utf-8"))["step"] if self.name != "tensorboard" and sent.is_file() else 0
        while (point := self.points.get()) is not None:
            if step_of(point) > last:
                tracker.log(point)
                last = step_of(point)
                write_json(sent, {"step": last})
        tracker.close()


@dataclass(frozen=True, slots=True)
class Trackers:
    """All trackers of a training."""

    feeders: tuple[Feeder, ...]
    report: Callable[[Report], None]

    @classmethod
    def open(cls, job: TrainJob, before: Sequence[Point], report: Callable[[Report], None]) -> "Trackers":
        """Open those that the config names.

        Args:
            before: the points up to the checkpoint from which the training goes on.

        Raises:
            UsageError: a package is missing.
        """
        require_trackers(job.train.trackers)
        trackers = cls(tuple(Feeder(name, Tracked.of(job)) for name in job.train.trackers), report)
        for feeder in trackers.feeders:
            feeder.start()
        for point in before:
            trackers.log(point)
        return trackers

    def log(self, point: Point) -> None:
        """Hand a point to all of them; does not wait."""
        for feeder in self.feeders:
            feeder.points.put(point)
        self._tell()

    def close(self) -> None:
        """Let them send what they hold."""
        for feeder in self.feeders:
            feeder.stop()
        self._tell()

    def _tell(self) -> None:
        """Report each failure once."""
        for feeder in self.feeders:
            if feeder.failure is not None and not feeder.is_told:
                feeder.is_told = True
                self.report({"tracker": feeder.name, "failure": feeder.failure})
