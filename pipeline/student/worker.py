"""What every process of a training does, whichever way it was launched.

Nothing heavy is imported before it is needed: a process that only waits for the first one is light.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pipeline.core.errors import Interrupted
from pipeline.core.stage import Json
from pipeline.student.arguments import schedule
from pipeline.student.checkpoints import FOLDER, Checkpoint, Setting, Training, find_newest
from pipeline.student.jobs import Judge, TrainJob, launch_id
from pipeline.student.order import Indices, count_steps, measured_steps, training_order
from pipeline.student.preflight.before import Before
from pipeline.student.process import OFFLINE, QUIET, Files, Report, Reporter, sigterm_asks, write_json
from pipeline.student.tokenise import read_json

if TYPE_CHECKING:  # it loads transformers
    from pipeline.student.curve import Course

JOB: Final = "worker.json"
WAIT_S: Final = 0.5

Stopping: TypeAlias = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""Entered while a training has something to lose; gives whether somebody asked to stop."""

Judges: TypeAlias = Mapping[str, Judge]
"""`train.evaluation.generate.metric` -> what judges answers."""
NO_JUDGES: Final[Judges] = {}

logger = logging.getLogger(__name__)


def main(path: Path, judges: Judges = NO_JUDGES) -> None:
    """Train as `worker.json` says; the first process writes `worker.result.json` when all is saved."""
    job = TrainJob.read(path)
    job = replace(job, launch=f"{job.launch}:{launch_id()}")  # a launcher may start its processes again
    result = run_job(job, Reporter(Files(path).reports), sigterm_asks, judges)
    if is_first_process():
        write_json(Files(path).beside(".result.json"), result)


def nobody_asks() -> AbstractContextManager[Callable[[], bool]]:
    """For `run_job`: nobody asks to stop."""
    return nullcontext(lambda: False)


def run_job(
    job: TrainJob,
    report: Callable[[Report], None],
    stopping: Stopping = nobody_asks,
    judges: Judges = NO_JUDGES,
) -> dict[str, Json]:
    """Encode, check, train and save; returns the stage's metrics and counts (alike in all processes).

    The first process encodes and looks for a checkpoint; the others wait for that before any process group exists.

    Raises:
        UsageError: the rows, the model or the config are not fit for training.
        Incomplete: a checkpoint or the model cannot be written.
        Interrupted: somebody asked to stop; a checkpoint was written.
    """
    from pipeline.student.layers import begin, keep_base
    from pipeline.student.shards import await_tokens, lengths_of, train_file

    is_offline = is_launched() and job.student.folder is not None  # a process of somebody's own may need the hub
    for name, value in (QUIET | (OFFLINE if is_offline else {})).items():
        os.environ.setdefault(name, value)
    cfg = job.train
    schedule(cfg, steps=1, world_size=job.world_size)  # refuses a batch that cannot be divided, before any work
    job = begin(job, is_first=is_first_process())
    before = Before(job, report)
    if is_first_process():
        before.columns()
    tokens = await_tokens(job, is_first=is_first_process(), check=before.rows)
    lengths, _ = lengths_of(train_file(job))
    order = order_of(job, lengths)
    steps = len(order) // cfg.batch_size
    if is_first_process():
        report({"steps": steps, "rejected": sum(tokens.rejected.values())})
    training = Training(job.workdir.name, steps, len(lengths), _digest(order, lengths[order]))
    start = await_start(job, training, report, is_first=is_first_process())

    import torch

    from pipeline.student.trainer import train

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    course = course_of(job, lengths, order, training, start)
    metrics = train(job, tokens, course, report, stopping, judges, before)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if metrics is None:
        raise Interrupted("stopped by a signal", where="step train", todo="run the same command again to go on")
    if is_first_process():
        keep_base(job)
    rejected: dict[str, Json] = {**tokens.rejected}
    metrics["preflight"] = before.summary()
    return {"metrics": metrics, "rows_in": tokens.rows_in, "rejected": rejected}


def order_of(job: TrainJob, lengths: Indices) -> Indices:
    """The rows in the order in which they are trained, whole batches; see `order.training_order`."""
    cfg = job.train
    steps = count_steps(len(lengths), epochs=cfg.epochs, batch_size=cfg.batch_size, max_steps=cfg.max_steps)
    return training_order(
        lengths, steps=steps, batch_size=cfg.batch_size, seed=cfg.seed, group_by_length=cfg.group_by_length
    )


def course_of(
    job: TrainJob, lengths: Indices, order: Indices, training: Training, start: Checkpoint | None
) -> "Course":
    """What is trained in which order, and what is measured when.

    Args:
        lengths: tokens of each row.
        order: see `order_of`.
        start: the checkpoint that it goes on from; None: from the beginning.
    """
    from pipeline.student.curve import Course

    cfg, steps = job.train, training.steps
    return Course(
        plan=schedule(cfg, steps=steps, world_size=job.world_size),
        order=order,
        rows=len(lengths),
        step_tokens=lengths[order].reshape(steps, cfg.batch_size).sum(axis=1),
        measured=frozenset(
            measured_steps(len(lengths), steps=steps, batch_size=cfg.batch_size, every=cfg.evaluation.steps)
        ),
        training=training,
        start=start,
    )


def _digest(*arrays: Indices) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def await_start(
    job: TrainJob, training: Training, report: Callable[[Report], None], *, is_first: bool
) -> Checkpoint | None:
    """Find the checkpoint to go on from in the first process of a launch; in the others wait for what it says."""
    from pipeline.student.shards import await_file

    path = job.workdir / "start.json"
    if not is_first:
        return await_file(path, lambda value: value["launch"] == job.launch, _start_of)
    path.unlink(missing_ok=True)
    found, ignored = find_newest(job.workdir / FOLDER, training)
    for one in ignored:
        report({"ignored": one.name, "reason": one.reason})
    start: dict[str, Json] = {}
    if found is not None:
        start = {"path": str(found.path), "step": found.step, "setting": asdict(found.setting)}
    write_json(path, {"launch": job.launch, **start})
    return found


def _start_of(value: dict[str, Any]) -> Checkpoint | None:
    if "path" not in value:
        return None
    return Checkpoint(Path(value["path"]), value["step"], Setting(**value["setting"]))


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def is_launched() -> bool:
    """Whether a launcher with several processes started this one (`accelerate launch -m pipeline train …`)."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def follow(workdir: Path, stop: threading.Event, judges: Judges = NO_JUDGES) -> None:
    """Take part in a training that the first process leads: every other process of a launch calls this.

    Waits for the first process's word in this very launch: its `worker.json` in `workdir`, then trains with it, or
    what `dismiss` wrote, then returns. What the store holds says nothing: the first process may train in spite of an
    artefact, or find it damaged. If the first process fails before it said either, the launcher signals the others.

    Args:
        workdir: the work folder of the train step's key; the same for all processes, on a folder they share.
        stop: set by whoever catches signals; looked at while waiting alone, since to stop a training that has begun is
            the first process's to say: the launcher passes a signal on to all of them.

    Raises:
        Interrupted: we were asked to stop while waiting, or the first process was, and wrote a checkpoint.
    """
    job, word = workdir / JOB, _word(workdir, int(os.environ["RANK"]))
    while not stop.is_set():
        if _is_of_this_launch(job):
            run_job(TrainJob.read(job), lambda report: None, judges=judges)
            return
        if _is_of_this_launch(word):
            word.unlink(missing_ok=True)
            return
        stop.wait(WAIT_S)
    raise Interrupted("stopped by a signal", where="step train", todo="run the same command again to go on")


def dismiss(workdir: Path) -> None:
    """Tell the other processes of this launch, which `follow`, that there is nothing to train; the first one does."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    for rank in _others():
        write_json(_word(workdir, rank), {"launch": launch_id()})


def forget_dismissal(workdir: Path) -> None:
    """Remove what followers that were killed have not read."""
    for rank in _others():
        _word(workdir, rank).unlink(missing_ok=True)


def _others() -> range:
    return range(1, int(os.environ.get("WORLD_SIZE", "1")))


def _word(workdir: Path, rank: int) -> Path:
    """One file per follower, which removes it; beside the work folder, which goes when the artefact is there."""
    return workdir.with_name(f"{workdir.name}.rank-{rank}.json")


def _is_of_this_launch(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return bool(read_json(path)["launch"] == launch_id())
    return False
