"""Stage `train`: the student is fine-tuned by a worker that Accelerate launches; this process loads no torch."""

import json
import logging
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from pipeline.core.config import TrainStep
from pipeline.core.config_train import AdapterTuning, StudentModel, TrainConfig
from pipeline.core.errors import CorruptArtefact, Interrupted, UsageError, boundary
from pipeline.core.lineage import DigestCache, path_digest
from pipeline.core.record import count_rows
from pipeline.core.stage import Context, Json, Result, check_cancelled
from pipeline.stages.train.card import write_student_card
from pipeline.stages.train.leakage import compare_splits
from pipeline.student.arguments import schedule
from pipeline.student.jobs import TrainJob, launch_id
from pipeline.student.needed import lm_head_error
from pipeline.student.process import OFFLINE, Files, Report, run_process
from pipeline.student.trackers import require_trackers
from pipeline.student.worker import JOB, forget_dismissal, is_launched, run_job
from pipeline.terms.declared import declared_student, source_of
from pipeline.terms.training import check_dataset, today
from pipeline.text.verifiers import VERIFIERS

VERSION = 2

WORKER: Final = "pipeline.stages.train.worker"

logger = logging.getLogger(__name__)


def input_files(cfg: TrainStep) -> dict[str, Path]:
    """Accelerate's config, and the student's folder."""
    files = {"train.accelerate": cfg.train.accelerate}
    return files if cfg.student.folder is None else {**files, "student.model": cfg.student.folder}


def run(cfg: TrainStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Write `model/` with its card, `loss.json` and `rejects/` (ids and reason of the rows that were not trained).

    Where a launcher with several processes started us, this process is the first of them and trains itself, and the
    others call `worker.follow`; else the worker is launched. Either way the rows of the training split are counted,
    and training goes on from the newest checkpoint in `ctx.workdir`, whose name is the step's key.

    Raises:
        PolicyRefused: the rows' terms forbid what the policy means to do with the student.
        UsageError: config, model or rows are not fit for training, or training diverged.
        Incomplete: the worker failed, or a checkpoint or the model cannot be written.
        Interrupted: a signal asked us to stop; a checkpoint was written if training had begun.
    """
    train = cfg.train
    require_trainable(train)
    student = source_of(declared_student(cfg.student))
    judged = check_dataset(inputs["dataset"], student, cfg.policy, today(), ctx.resume_command)
    ctx.events.emit("terms_judged", outcome=judged.verdict.outcome, dataset=judged.manifest_sha256)
    data = inputs["dataset"] / "data"
    rows = count_rows(data.glob("train-*.parquet"))
    if rows == 0:
        todo = "run again: it will be rebuilt"
        raise CorruptArtefact("the data set has no training shard", where=str(data), todo=todo)
    is_inside = is_launched()
    world_size = int(os.environ["WORLD_SIZE"]) if is_inside else train.processes
    schedule(train, steps=1, world_size=world_size)
    job = TrainJob(train, cfg.student, data, out, ctx.workdir, world_size, launch_id(), ctx.run)
    progress = Progress(ctx)
    ctx.progress.start(rows, "rows")
    compare_splits(data, ctx.workdir, lambda: check_cancelled(ctx))
    found = run_here(job, ctx, progress) if is_inside else launch(job, ctx, progress)
    result = _result(found, cfg, out, ctx)
    metrics, trained = result.metrics, result.rows_out
    write_student_card(out / "model", cfg, inputs["dataset"], judged, metrics, trained, ctx.resume_command)
    return result


def launch(job: TrainJob, ctx: Context, progress: "Progress") -> dict[str, Any]:
    """Let Accelerate start the worker's processes, and return what the first of them says of the training."""
    path = ctx.workdir / JOB
    job = replace(job, launch=secrets.token_hex(8))  # what the processes of an earlier launch left is not ours
    job.write(path)
    accelerate = read_accelerate(job.train.accelerate)
    _refuse_several_machines(job.train.accelerate, accelerate)
    command = launch_command(job.train, accelerate, path)
    env = environment(job.student, accelerate)
    ctx.events.emit("worker_started", processes=job.world_size, log=Files(path).log.name)
    run_process(command, path, ctx, progress.report, env)
    found: dict[str, Any] = json.loads(Files(path).beside(".result.json").read_text("utf-8"))
    return found


def environment(student: StudentModel, accelerate: Mapping[str, Any]) -> dict[str, str]:
    """Variables for a process that loads the student: on a CPU if Accelerate's config says so, and offline if the
    student is a folder."""
    cpu = {"ACCELERATE_USE_CPU": "true"} if accelerate.get("use_cpu", False) else {}
    return cpu if student.folder is None else cpu | OFFLINE


def run_here(job: TrainJob, ctx: Context, progress: "Progress") -> dict[str, Any]:
    """Train in this process, the first one of a launch, and let the others know by `worker.json` that they can.

    A launcher of several processes passes SIGINT and SIGTERM on and kills what still runs 30 s later: a checkpoint
    that takes longer is lost, and the one before counts.
    """
    path = ctx.workdir / JOB
    forget_dismissal(ctx.workdir)
    job.write(path)
    try:
        return {**run_job(job, progress.report, lambda: nullcontext(ctx.cancel.is_set), VERIFIERS)}
    except Interrupted:
        check_cancelled(ctx)  # the same, with the command that resumes
        raise
    finally:
        path.unlink(missing_ok=True)


def read_accelerate(path: Path) -> dict[str, Any]:
    """Accelerate's config file.

    Raises:
        UsageError: it is missing or no YAML mapping.
    """
    todo = "give a file that `accelerate config` wrote, or one of configs/accelerate/"
    with boundary(UsageError, "Accelerate's config cannot be read", where=f"train.accelerate: {path}", todo=todo):
        value = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise UsageError("Accelerate's config is no mapping", where=f"train.accelerate: {path}", todo=todo)
    return value


def require_trainable(cfg: TrainConfig) -> None:
    """Refuse what the config alone tells.

    Raises:
        UsageError: lm_head has an adapter, or the package of a tracker is missing.
    """
    _refuse_lm_head(cfg)
    require_trackers(cfg.trackers)


def _refuse_several_machines(path: Path, accelerate: Mapping[str, Any]) -> None:
    machines = accelerate.get("num_machines", 1)
    if machines != 1:
        what = f"Accelerate's config is for {machines} machines, and this command would start processes on one"
        start = f"accelerate launch --config_file {path} --machine_rank RANK --main_process_ip FIRST"
        todo = f"run on every machine: {start} -m pipeline train CONFIG"
        raise UsageError(what, where=f"train.accelerate: {path}", todo=todo)


def launch_command(cfg: TrainConfig, accelerate: Mapping[str, Any], job: Path) -> list[str]:
    """The command that starts exactly `cfg.processes` workers.

    A config for one device starts one process whatever number is asked (`--cpu` likewise), so more than one need
    `--multi_gpu`, on a CPU too: there it means one process each and gloo between them.
    """
    flags = ["--config_file", str(cfg.accelerate), "--num_processes", str(cfg.processes)]
    if cfg.processes > 1:
        flags += ["--main_process_port", "0"]
        if accelerate.get("distributed_type", "NO") == "NO":
            flags += ["--multi_gpu"]
    flags += ["--mixed_precision", "bf16" if cfg.precision == "bfloat16" else "no", "--dynamo_backend", "no"]
    if cfg.threads is not None:
        flags += ["--num_cpu_threads_per_process", str(cfg.threads)]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", WORKER, str(job)]


def _refuse_lm_head(cfg: TrainConfig) -> None:
    if isinstance(cfg.tuning, AdapterTuning):
        targets = cfg.tuning.target_modules
        if "lm_head" in ([targets] if isinstance(targets, str) else targets):
            raise lm_head_error()


@dataclass(slots=True)
class Progress:
    """Turns the worker's reports into progress (steps, tokens, loss, memory) and events (points of the loss curve)."""

    ctx: Context
    steps: int = 0
    rejected: int = 0
    step: int = 0
    tokens: int = 0

    def report(self, line: Report) -> None:
        """Take one report; every report of the worker is one of these."""
        match line:
            case {"steps": int(steps), "rejected": int(rejected)}:
                self.steps, self.rejected = steps, rejected
                self._begin(0, 0)
            case {"begun": int(step), "tokens": int(tokens)}:
                self._begin(step, tokens)
            case {"step": int(step), "tokens": int(tokens), "loss": float(loss), "memory_bytes": int(memory)}:
                note = f"loss {loss:.3f}, {memory / 1e9:.1f} GB"
                self.ctx.progress.advance(step - self.step, tokens=tokens - self.tokens, note=note)
                self.step, self.tokens = step, tokens
            case {"point": dict(point)}:
                self.ctx.events.emit("train_point", **point)
            case {"memory": dict(facts), "told": str(told)}:
                logger.info("%s: %s", self.ctx.step, told)
                self.ctx.events.emit("memory_estimated", **facts)
            case {"preflight": dict(found), "findings": list(findings)}:
                for finding in findings:
                    logger.warning("%s: pre-flight %s", self.ctx.step, finding)
                self.ctx.events.emit("preflight", **found)
            case {"started": dict(started)}:
                self._started(started)
            case {"checkpoint": dict(facts)}:
                self.ctx.events.emit("checkpoint_saved", **facts)
            case {"ended_early": int(step), "best_step": int(best)}:
                logger.info(
                    "%s: ended after step %d of %d: the best was step %d", self.ctx.step, step, self.steps, best
                )
                self.ctx.events.emit("train_ended_early", step=step, best_step=best)
            case {"tracker": str(name), "failure": str(failure)}:
                logger.warning("%s: %s; the training goes on without it", self.ctx.step, failure)
                self.ctx.events.emit("tracker_failed", tracker=name, failure=failure)
            case {"ignored": str(name), "reason": str(reason)}:
                logger.warning("%s: the checkpoint %s is not used: %s", self.ctx.step, name, reason)
                self.ctx.events.emit("checkpoint_ignored", name=name, reason=reason)
            case _:
                raise ValueError(f"a report that nobody knows: {sorted(line)}")

    def _begin(self, step: int, tokens: int) -> None:
        """Count from here: what came before (an earlier attempt, loading the model) says nothing of the rate."""
        self.step, self.tokens = step, tokens
        self.ctx.progress.start(self.steps, "steps", done=step)
        self.ctx.progress.advance(0, rejected=self.rejected)

    def _started(self, started: dict[str, Json]) -> None:
        self.ctx.events.emit("train_started", **started)
        match started:
            case {"resumed_from": int(step), "steps": steps, "changed": list(changed)}:
                logger.info("%s: going on after step %d of %d", self.ctx.step, step, steps)
                if changed:
                    told = ", ".join(map(str, changed))
                    logger.warning("%s: since the checkpoint: %s; equal up to rounding only", self.ctx.step, told)


def _result(found: Mapping[str, Any], cfg: TrainStep, out: Path, ctx: Context) -> Result:
    cache = DigestCache(ctx.workdir / "digests.json")
    rejected: dict[str, int] = found["rejected"]
    student = cfg.student
    name = student.model if student.folder is None else "local"
    facts: dict[str, Json] = {"model": name, "revision": student.revision, "license": student.license}
    metrics: dict[str, Json] = {**found["metrics"], "student": facts}
    rows_in = found["rows_in"]
    content = path_digest(out / "model", cache)
    return Result(rows_in, rows_in - sum(rejected.values()), rejected, content, metrics)
