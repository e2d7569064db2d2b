"""The pipeline as a table of stages, and what can be done with it: plan, run, run one stage, lock."""

import importlib
import logging
import shlex
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from pipeline.core import config as c
from pipeline.core.config_base import ConfigModel, identity
from pipeline.core.config_teacher import Teacher
from pipeline.core.errors import CorruptArtefact, LostRows, UsageError, boundary, disk_errors
from pipeline.core.fanout import map_in_process
from pipeline.core.lineage import DigestCache, Manifest, explain, path_digest, step_key
from pipeline.core.load import Loaded, require_test_answers
from pipeline.core.log import EventLog, show_progress
from pipeline.core.runs import hold_lock, hold_run, link_artefact, lock_step, read_lock
from pipeline.core.stage import Context, Json, Result, StageModule, check_cancelled
from pipeline.core.store import Artefact, Store
from pipeline.core.versions import collect_versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A kind of stage: its module is `pipeline.stages.<kind>`.

    Attributes:
        kind: name of the stage.
        after: kinds whose artefacts it reads.
        config: the part of a run's config that it is given.
        shows_manifests: it reads what upstream contents do not cover, so that upstream keys count in its key too.
    """

    kind: str
    after: tuple[str, ...]
    config: Callable[[c.RunConfig], ConfigModel]
    shows_manifests: bool = False


def _teacher(run: c.RunConfig) -> Teacher:
    return run.teachers[run.generate.teacher]


STAGES = (
    StageSpec("prompts", (), lambda run: c.PromptsStep(prompts=run.prompts)),
    StageSpec("generate", ("prompts",), lambda run: c.GenerateStep(generate=run.generate, teacher=_teacher(run))),
    StageSpec("filter", ("generate",), lambda run: c.FilterStep(filter=run.filter)),
    StageSpec("dedup", ("filter",), lambda run: c.DedupStep(dedup=run.dedup)),
    StageSpec("dataset", ("dedup", "prompts"), lambda run: c.DatasetStep(dataset=run.dataset)),
    StageSpec("train", ("dataset",), lambda run: c.TrainStep(train=run.train, student=run.student)),
    StageSpec(
        "evaluate",
        ("train", "prompts"),
        lambda run: c.EvaluateStep(
            evaluate=run.evaluate, teacher=_teacher(run), student=run.student, retry=run.generate.retry
        ),
    ),
    StageSpec(
        "report",
        ("prompts", "generate", "filter", "dedup", "dataset", "train", "evaluate"),
        lambda run: c.ReportStep(report=run.report, name=run.name),
        shows_manifests=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan; its name is its kind until a plan holds two of a kind.

    Attributes:
        name: what the lock, the runs folder and the command line call it.
        kind: which stage it is.
        inputs: names of the steps whose artefacts it reads.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]


def plan_steps() -> list[Step]:
    """The steps of a run, in the order in which data flows."""
    return [Step(spec.kind, spec.kind, spec.after) for spec in STAGES]


def spec_of(step: Step) -> StageSpec:
    """The stage that a step is one of."""
    return next(spec for spec in STAGES if spec.kind == step.kind)


def stage_module(kind: str) -> StageModule:
    """The module of a stage, imported on first use: stages load heavy libraries."""
    return cast(StageModule, importlib.import_module(f"pipeline.stages.{kind}"))


@dataclass(frozen=True, slots=True)
class Session:
    """One invocation on one run: everything that steps share."""

    loaded: Loaded
    data: Path
    store: Store
    digests: DigestCache
    secrets: tuple[str, ...] = ()
    cancel: threading.Event = field(default_factory=threading.Event)
    quiet: bool = False
    until: str | None = None

    @property
    def folder(self) -> Path:
        """`<data>/runs/<name>`."""
        return self.data / "runs" / self.loaded.run_name

    def config_of(self, step: Step) -> ConfigModel:
        """The config that the step is given."""
        return spec_of(step).config(self.loaded.config)


def open_session(loaded: Loaded, data: Path, *, quiet: bool = False) -> Session:
    """A session on the data folder `data`; makes nothing on disk yet."""
    digests = DigestCache(data / "cache" / "digests.json")
    return Session(loaded, data, Store(data / "store"), digests, c.secret_values(loaded.config), quiet=quiet)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step's artefact, and whether this invocation made it."""

    step: Step
    artefact: Artefact
    ran: bool


@dataclass(frozen=True, slots=True)
class Planned:
    """What would happen to a step.

    Attributes:
        step: the step.
        state: "cached", "run" (it would run), or "unknown" (its inputs are not made yet).
        key: its key, None while unknown.
        reasons: why it would run: config fields with old and new value, files, inputs.
    """

    step: Step
    state: Literal["cached", "run", "unknown"]
    key: str | None
    reasons: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------- keys


def step_parts(session: Session, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Json]:
    """Everything that makes a step's key.

    Args:
        inputs: the artefact of each step in `step.inputs`; others are ignored.

    Raises:
        UsageError: a file that the config names is missing or cannot be read.
    """
    module, config = stage_module(step.kind), session.config_of(step)
    digests: dict[str, Json] = {}
    for name, path in sorted(_checked_input_files(session, step).items()):
        where = f"{session.loaded.path}: {name}: {path}"
        with boundary(UsageError, "cannot read", where=where, todo="give read access"):
            digests[name] = path_digest(path, session.digests)
    return {
        "stage": step.kind,
        "version": module.VERSION,
        "config": identity(config),
        "inputs": {name: _counted(step, inputs[name].manifest) for name in step.inputs},
        "files": digests,
    }


def _counted(step: Step, upstream: Manifest) -> str:
    """What of an upstream step counts in the key: its content, so that a rerun with equal rows changes nothing here."""
    return f"{upstream.content} {upstream.key}" if spec_of(step).shows_manifests else upstream.content


def _checked_input_files(session: Session, step: Step) -> dict[str, Path]:
    files = stage_module(step.kind).input_files(session.config_of(step))
    for name, path in files.items():
        if not path.exists():
            where = f"{session.loaded.path}: {name}: {path}"
            raise UsageError("no such file or folder", where=where, todo="correct the path (it is relative to here)")
    return files


def plan(session: Session) -> list[Planned]:
    """What `run` would do, without doing it."""
    locked = {name: entry["parts"] for name, entry in read_lock(session.loaded.base_lock_path).items()}
    found: dict[str, Artefact] = {}
    planned = []
    for step in plan_steps():
        missing = [name for name in step.inputs if name not in found]
        if missing:
            _checked_input_files(session, step)
            planned.append(Planned(step, "unknown", None, (f"needs {', '.join(missing)}",)))
            continue
        parts = step_parts(session, step, found)
        key = step_key(parts)
        try:
            artefact = session.store.find(step.kind, key)
        except CorruptArtefact as error:
            planned.append(Planned(step, "run", key, (f"corrupt: {error.what} ({error.where})",)))
            continue
        if artefact is None:
            planned.append(Planned(step, "run", key, tuple(explain(locked.get(step.name), parts))))
            continue
        found[step.name] = artefact
        planned.append(Planned(step, "cached", key, ()))
    session.digests.save()
    return planned


# ---------------------------------------------------------------------------------------------------- running


def run_all(session: Session, until: str | None = None) -> list[Outcome]:
    """Run every step that has no artefact yet, up to and including `until`.

    Raises:
        PipelineError: of the first step that fails; what was committed before stays.
    """
    session = replace(session, until=until)
    steps = plan_steps()
    if until is not None:
        steps = steps[: [step.name for step in steps].index(until) + 1]
    for step in steps:
        _checked_input_files(session, step)
    if any(step.kind == "evaluate" for step in steps):
        require_test_answers(session.loaded)
    outcomes: dict[str, Outcome] = {}
    with _disk_errors(session), hold_run(session.folder, session.secrets) as events:
        for step in steps:
            artefacts = {name: outcomes[name].artefact for name in step.inputs}
            outcomes[step.name] = run_step(session, step, artefacts, events)
            _record(session, outcomes[step.name])
    return list(outcomes.values())


def run_one(session: Session, name: str, *, force: bool = False) -> Outcome:
    """Run one step on the committed artefacts of the steps before it.

    Args:
        force: run it although it has an artefact; equal content keeps the old artefact, other content replaces it.

    Raises:
        UsageError: a step before it has no artefact for this config.
        CorruptArtefact: an artefact before it is not what was committed.
    """
    steps = {step.name: step for step in plan_steps()}
    with _disk_errors(session), hold_run(session.folder, session.secrets) as events:
        found = _committed_before(session, steps, name)
        for needed, artefact in found.items():
            _record(session, Outcome(steps[needed], artefact, ran=False))
        artefacts = {needed: found[needed] for needed in steps[name].inputs}
        outcome = run_step(session, steps[name], artefacts, events, force=force)
        _record(session, outcome)
    return outcome


def leads_launch() -> bool:
    """Whether this process is the only one of its launch, or the first."""
    from pipeline.student.worker import is_first_process  # only `train` needs it

    return is_first_process()


def follow_training(session: Session) -> None:
    """Take part in the training that the first process of this launch leads; holds no lock and commits nothing.

    Raises:
        UsageError, CorruptArtefact: as `run_one`.
    """
    from pipeline.student.worker import follow  # only the other processes of a launch need it

    steps = {step.name: step for step in plan_steps()}
    key = step_key(step_parts(session, steps["train"], _committed_before(session, steps, "train")))
    final = session.store.path_of("train", key)
    follow(workdir_of(session, steps["train"], key), final.exists)


def _committed_before(session: Session, steps: Mapping[str, Step], name: str) -> dict[str, Artefact]:
    """The artefacts of all steps that `name` builds on, in the order in which data flows."""
    found: dict[str, Artefact] = {}
    for needed in _ancestors(steps, name):
        key = step_key(step_parts(session, steps[needed], found))
        artefact = session.store.find(steps[needed].kind, key)
        if artefact is None:
            todo = f"run it first: {command(session, needed)}"
            raise UsageError(f"{name} needs the rows of {needed}", where=session.loaded.run_name, todo=todo)
        found[needed] = artefact
    return found


def workdir_of(session: Session, step: Step, key: str) -> Path:
    """The folder of a step's key that survives a crash."""
    return session.data / "work" / step.kind / key


def _ancestors(steps: Mapping[str, Step], name: str) -> list[str]:
    """Names of all steps that `name` builds on, in the order in which data flows."""
    wanted = set(steps[name].inputs)
    for step in reversed([*steps.values()]):
        if step.name in wanted:
            wanted.update(step.inputs)
    return [step for step in steps if step in wanted]


def run_step(
    session: Session, step: Step, artefacts: Mapping[str, Artefact], events: EventLog, *, force: bool = False
) -> Outcome:
    """Return the step's artefact, running it if there is none (or if `force`)."""
    parts = step_parts(session, step, artefacts)
    key = step_key(parts)
    if not force and (hit := session.store.find_sound(step.kind, key)) is not None:
        logger.info("%s: cached (%s)", step.name, key[:12])
        events.emit("step_cached", step=step.name, key=key)
        return Outcome(step, hit, ran=False)
    logger.info("%s: running (%s)", step.name, key[:12])
    events.emit("step_started", step=step.name, key=key)
    workdir = workdir_of(session, step, key)
    inputs = {name: artefact.path for name, artefact in artefacts.items()}
    with (
        hold_lock(workdir.with_name(f"{key}.lock")),  # runs of other names may share this step and its workdir
        session.store.staging(step.kind) as staged,
        show_progress(step.name, quiet=session.quiet) as progress,
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        ctx = Context(
            step=step.name,
            data=session.data,
            workdir=workdir,
            progress=progress,
            events=events,
            cancel=session.cancel,
            fanout=map_in_process,
            resume_command=command(session, "run"),
        )
        check_cancelled(ctx)
        result = _run_stage(session, step, inputs, staged, ctx)
        manifest = Manifest.of(step.kind, key, parts, result, collect_versions())
        artefact = session.store.commit(staged, manifest, replace_other_content=force)
        shutil.rmtree(workdir, ignore_errors=True)
    session.digests.save()
    counts: dict[str, Json] = {**result.rejected}
    events.emit("step_committed", step=step.name, key=key, content=result.content, rejected=counts)
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in result.rejected.items())
    logger.info(
        "%s: %s in, %s out%s",
        step.name,
        f"{result.rows_in:,}",
        f"{result.rows_out:,}",
        f", rejected: {rejected}" if rejected else "",
    )
    return Outcome(step, artefact, ran=True)


def _run_stage(session: Session, step: Step, inputs: Mapping[str, Path], staged: Path, ctx: Context) -> Result:
    result = stage_module(step.kind).run(session.config_of(step), inputs, staged, ctx)
    if result.rows_in != result.rows_out + sum(result.rejected.values()):
        raise LostRows(f"{step.name}: {result.rows_in} in, {result.rows_out} out, rejected {dict(result.rejected)}")
    return result


def command(session: Session, name: str) -> str:
    """A command on this run as one types it; `run` goes on where an invocation stopped."""
    words = ["python", "-m", "pipeline", name, str(session.loaded.path), "--data", str(session.data)]
    if name == "run" and session.until is not None:
        words += ["--until", session.until]
    return shlex.join([*words, *(word for override in session.loaded.overrides for word in ("--set", override))])


def _disk_errors(session: Session) -> AbstractContextManager[None]:
    todo = f"make room or give write access, then resume with: {command(session, 'run')}"
    return disk_errors(str(session.data), todo)


def _record(session: Session, outcome: Outcome) -> None:
    """Link the artefact into the run's folder and write it into the lock file."""
    link_artefact(session.folder, outcome.step.name, outcome.artefact)
    if session.loaded.lock_path is not None:
        lock_step(session.loaded.lock_path, outcome.step.name, outcome.artefact)


def step_names() -> Sequence[str]:
    """Names of the steps, for the command line."""
    return [step.name for step in plan_steps()]
