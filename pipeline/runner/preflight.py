"""The checks of a training alone: on the committed data set, in a process of their own, without a run's lock."""

import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.core.config import TrainStep
from pipeline.core.fanout import map_in_process
from pipeline.core.log import show_progress
from pipeline.core.runs import hold_lock
from pipeline.core.stage import Context, Json, check_cancelled
from pipeline.runner.run import committed_before
from pipeline.runner.session import Session
from pipeline.runner.steps import plan_steps

if TYPE_CHECKING:  # it loads Arrow
    from pipeline.student.preflight.worker import Looked

NAME: Final = "preflight"
WORKER: Final = "pipeline.student.preflight.worker"

logger = logging.getLogger(__name__)


class _Unheard:
    """Events of what is no run."""

    def emit(self, event: str, **fields: Json) -> None:
        """Nothing."""


def preflight(session: Session, samples: int) -> "Looked":
    """Make all checks of `train` on the committed data set, and take some rows to look at; nothing else is written.

    Runs may go on meanwhile. Soft targets that the run captured are checked against the rows, too.

    Args:
        samples: rows to take.

    Raises:
        UsageError: the data set, the model or the config cannot be used at all.
        CorruptArtefact: a shard is damaged.
        Interrupted: a signal asked us to stop.
    """
    from pipeline.stages.train import environment, read_accelerate, require_trainable
    from pipeline.stages.train.leakage import compare_splits
    from pipeline.student.jobs import TrainJob, launch_id
    from pipeline.student.preflight.targets import Captured
    from pipeline.student.preflight.worker import Looked, PreflightJob
    from pipeline.student.process import Files, run_process
    from pipeline.student.tokenise import read_json

    step = next(step for step in plan_steps() if step.kind == "train")
    found = committed_before(session, step.name, asked_by=NAME)
    cfg = session.config_of(step)
    assert isinstance(cfg, TrainStep)
    require_trainable(cfg.train)
    accelerate = read_accelerate(cfg.train.accelerate)
    _tell_several_machines(cfg.train.accelerate, accelerate)
    env = environment(cfg.student, accelerate) | one_device(accelerate, os.environ)
    targets = found["generate"].path / "targets"
    captured = None
    if targets.is_dir():
        captured = Captured(targets, session.loaded.config.generate.sampling.temperature)
    data = found["dataset"].path / "data"
    with session.disk_errors(), _workdir(session) as workdir, show_progress(NAME, quiet=session.quiet) as progress:
        ctx = Context(
            step=NAME,
            data=session.data,
            workdir=workdir,
            progress=progress,
            events=_Unheard(),
            cancel=session.stop.requested,
            fanout=map_in_process,
            resume_command=session.command(NAME),
        )
        out = workdir / "out"
        out.mkdir()
        job = TrainJob(cfg.train, cfg.student, data, out, workdir, cfg.train.processes, launch_id())
        path = workdir / "preflight-job.json"
        PreflightJob(job, captured, samples, sharding(accelerate, job.world_size)).write(path)
        compare_splits(data, workdir, lambda: check_cancelled(ctx))
        run_process([sys.executable, "-m", WORKER, str(path)], path, ctx, lambda report: None, env)
        return Looked.of_json(read_json(Files(path).beside(".result.json")))


def one_device(accelerate: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """A variable by which a process sees the first of the training's GPUs alone: with several the trainer would want to
    share each batch among them (`DataParallel`).

    Args:
        accelerate: Accelerate's config; its `gpu_ids` count before what is visible.
    """
    told = str(accelerate.get("gpu_ids") or "all")
    ids = environ.get("CUDA_VISIBLE_DEVICES", "0") if told == "all" else told
    return {"CUDA_VISIBLE_DEVICES": ids.split(",")[0].strip()}


def sharding(accelerate: Mapping[str, Any], processes: int) -> dict[str, str]:
    """What Accelerate would set for the training's processes where they share one model; else nothing."""
    if accelerate.get("distributed_type") != "FSDP":
        return {}
    machines = int(accelerate.get("num_machines") or 1)
    return {"ACCELERATE_USE_FSDP": "true", "LOCAL_WORLD_SIZE": str(max(1, processes // machines))}


def _tell_several_machines(path: Path, accelerate: Mapping[str, Any]) -> None:
    machines = accelerate.get("num_machines", 1)
    if machines != 1:
        what = "train.accelerate: %s is for %s machines; `train` has to be started on each with accelerate launch"
        logger.warning(what, path, machines)


@contextmanager
def _workdir(session: Session) -> Iterator[Path]:
    """A folder for this look alone; the lock beside it keeps `gc` away as long as we live."""
    from shutil import rmtree

    folder = session.data / "work" / NAME / secrets.token_hex(8)
    folder.mkdir(parents=True)
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        with hold_lock(lock):
            yield folder
    finally:
        rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
