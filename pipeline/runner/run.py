"""Running: all steps that have no result, or one step; each held, staged, checked and committed."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import (
    ExitCode,
    Incomplete,
    Interrupted,
    LostRows,
    PipelineError,
    RunLocked,
    UsageError,
)
from pipeline.core.fanout import open_fanout
from pipeline.core.lineage import Manifest, step_key
from pipeline.core.log import EventLog, show_progress
from pipeline.core.runs import (
    hold_lock,
    hold_run,
    link_artefact,
    link_work,
    lock_step,
    refuse_if_held,
    run_lock,
    share_data,
    unlink_work,
)
from pipeline.core.stage import Context, Fanout, Json, Result, check_cancelled
from pipeline.core.store import MANIFEST, Artefact
from pipeline.core.versions import collect_versions
from pipeline.runner.checks import check_before_start, check_test_rows
from pipeline.runner.keys import checked_input_files, step_parts
from pipeline.runner.session import Session
from pipeline.runner.steps import Step, ancestors, plan_steps, stage_module
from pipeline.runner.terms import check_terms
from pipeline.teacher import watchdog

logger = logging.getLogger(__name__)

WAIT_S = 0.2
"""Seconds between two looks at a lock that another run holds."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step's artefact, and whether this invocation made it."""

    step: Step
    artefact: Artefact
    ran: bool


def run_all(session: Session, until: str | None = None, *, force: bool = False) -> list[Outcome]:
    """Run every step that has no artefact yet, up to and including `until`.

    Args:
        force: run the others too; equal content keeps the old artefact, other content replaces it.

    Raises:
        PipelineError: of the first step that fails; what was committed before stays.
    """
    refuse_if_held(run_lock(session.folder))
    steps = plan_steps()
    if until is not None:
        session = replace(session, invoked=(*session.invoked, "--until", until))
        steps = steps[: [step.name for step in steps].index(until) + 1]
    if force:
        session = replace(session, invoked=(*session.invoked, "--force"))
    for step in steps:
        checked_input_files(session, step)
    check_terms(session, steps)
    check_before_start(session, steps, force=force)
    outcomes: dict[str, Outcome] = {}
    with invocation(session) as events:
        for step in steps:
            artefacts = {name: outcomes[name].artefact for name in step.inputs}
            outcomes[step.name] = run_step(session, step, artefacts, events, force=force)
            record(session, outcomes[step.name])
            if step.kind == "prompts":
                check_test_rows(session, steps, outcomes[step.name].artefact.manifest)
    return list(outcomes.values())


def run_one(session: Session, name: str, *, force: bool = False) -> Outcome:
    """Run one step on the committed artefacts of the steps before it.

    Args:
        force: run it although it has an artefact; equal content keeps the old artefact, other content replaces it.

    Raises:
        UsageError: a step before it has no artefact for this config.
        CorruptArtefact: an artefact before it is not what was committed.
    """
    refuse_if_held(run_lock(session.folder))
    session = replace(session, invoked=(name, "--force") if force else (name,))
    if name == "train":
        _meet_processes(session)
    steps = {step.name: step for step in plan_steps()}
    check_terms(session, [steps[name]])
    check_before_start(session, [steps[name]], force=force)
    with invocation(session) as events:
        found = committed_before(session, name)
        for needed, artefact in found.items():
            record(session, Outcome(steps[needed], artefact, ran=False))
        artefacts = {needed: found[needed] for needed in steps[name].inputs}
        outcome = run_step(session, steps[name], artefacts, events, force=force)
        if name == "train" and not outcome.ran:
            _dismiss_followers(session, outcome)
        record(session, outcome)
    return outcome


@contextmanager
def invocation(session: Session) -> Iterator[EventLog]:
    """Hold the run for the block; the event log's last line says how it ended, with our exit code.

    Raises:
        RunLocked: another process holds the run, or the whole data folder.
        Incomplete: the data folder cannot be written.
        Interrupted, Terminated: the block was interrupted by a signal, by a second one at once.
    """
    with share_data(session.data), hold_run(session.folder, session.secrets) as events:
        events.emit("run_started", command=session.resume_command)
        session.store.sweep()
        clear_servers(session.data)
        try:
            with session.disk_errors(), _named_after_signal(session):
                yield events
        except BaseException as error:
            with suppress(OSError):  # a full disk has its own error on the way already
                code = error.exit_code if isinstance(error, PipelineError) else ExitCode.BUG
                events.emit("run_ended", exit_code=int(code), error=str(error).partition("\n")[0])
            raise
        events.emit("run_ended", exit_code=int(ExitCode.COMPLETE))


def clear_servers(data: Path) -> None:
    """End the vLLM servers that outlived both their run and their watchdog, whatever teacher this run has."""
    for group in watchdog.clear_stale(data / watchdog.RECORDS):
        logger.warning("killed a vLLM server (process group %d) that an earlier run left behind", group)


@contextmanager
def _named_after_signal(session: Session) -> Iterator[None]:
    """Name the error of an interrupted block after the signal; KeyboardInterrupt is the second signal."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        kind = session.stop.error
        if isinstance(error, Interrupted):
            raise kind(error.what, where=error.where, todo=error.todo) from error
        what = "stopped at once; what was committed is kept"
        todo = f"resume with: {session.resume_command}"
        raise kind(what, where=str(session.folder), todo=todo) from error


def leads_launch() -> bool:
    """Whether this process is the only one of its launch, or the first."""
    from pipeline.student.worker import is_first_process  # only `train` needs it

    return is_first_process()


def follow_training(session: Session) -> None:
    """Take part in the training that the first process of this launch leads; holds no lock and commits nothing.

    Raises:
        UsageError, CorruptArtefact: as `run_one`; or the machines of the launch do not share the data folder.
        Interrupted: as `worker.follow`.
    """
    from pipeline.student.worker import follow  # only the other processes of a launch need it
    from pipeline.text.verifiers import VERIFIERS

    _meet_processes(session)
    step = next(step for step in plan_steps() if step.name == "train")
    key = step_key(step_parts(session, step, committed_before(session, "train")))
    follow(session.workdir_of(step, key), session.stop.requested, VERIFIERS)


def _meet_processes(session: Session) -> None:
    """Make sure that the processes of this launch, if there are several, share the data folder and started together."""
    from pipeline.student.nodes import join_launch  # only `train` needs it

    join_launch(session.data, session.stop.requested)


def _dismiss_followers(session: Session, outcome: Outcome) -> None:
    """Let the other processes of this launch go, if there is one: the training was not run."""
    from pipeline.student.worker import dismiss  # only `train` needs it

    dismiss(session.workdir_of(outcome.step, outcome.artefact.manifest.key))


def committed_before(session: Session, name: str, *, asked_by: str | None = None) -> dict[str, Artefact]:
    """The artefacts of all steps that `name` builds on, in the order in which data flows.

    Args:
        asked_by: what messages call whoever needs them; None: the step itself.

    Raises:
        UsageError: one has none for this config.
        CorruptArtefact: one is not what was committed.
    """
    steps = {step.name: step for step in plan_steps()}
    found: dict[str, Artefact] = {}
    for needed in ancestors(steps, name):
        key = step_key(step_parts(session, steps[needed], found))
        artefact = session.store.find(steps[needed].kind, key)
        if artefact is None:
            todo = f"run it first: {session.command(needed)}"
            what = f"{name if asked_by is None else asked_by} needs the rows of {needed}"
            raise UsageError(what, where=session.loaded.run_name, todo=todo)
        found[needed] = artefact
    return found


def run_step(
    session: Session, step: Step, artefacts: Mapping[str, Artefact], events: EventLog, *, force: bool = False
) -> Outcome:
    """Return the step's artefact, running it if there is none (or if `force`).

    Runs of other names may share the step and its workdir: while one of them makes it, this one waits.
    """
    parts = step_parts(session, step, artefacts)
    key = step_key(parts)
    if not force and (hit := _cached(session, step, key, events)) is not None:
        _drop_finished_work(session, step, key)
        return hit
    workdir = session.workdir_of(step, key)
    with show_progress(step.name, quiet=session.quiet) as progress, _fanout(session, step) as fanout:
        ctx = Context(
            step=step.name,
            data=session.data,
            workdir=workdir,
            progress=progress,
            events=events,
            cancel=session.stop.requested,
            fanout=fanout,
            resume_command=session.resume_command,
            run=session.loaded.run_name,
        )
        with hold_lock(workdir.with_name(f"{key}.lock"), wait=_patience(ctx)):
            if not force and (hit := _cached(session, step, key, events)) is not None:
                return hit
            return _make(session, step, parts, artefacts, ctx, force=force)


def _fanout(session: Session, step: Step) -> AbstractContextManager[Fanout]:
    return open_fanout(
        session.loaded.config.fanout,
        step=step.name,
        cancel=session.stop.requested,
        resume_command=session.resume_command,
    )


def _cached(session: Session, step: Step, key: str, events: EventLog) -> Outcome | None:
    hit = session.store.find_sound(step.kind, key)
    if hit is None:
        return None
    if session.locked is not None:
        session.locked.check(step, key, hit.manifest.content, events)
    logger.info("%s: cached (%s)", step.name, key[:12])
    session.digests.save()  # weights that were only touched are hashed once, not in every run
    events.emit("step_cached", step=step.name, key=key)
    return Outcome(step, hit, ran=False)


def _drop_finished_work(session: Session, step: Step, key: str) -> None:
    """Remove what a process left that was killed between its commit and its clearing up."""
    unlink_work(session.folder, step.name)
    workdir = session.workdir_of(step, key)
    if workdir.is_dir():
        with suppress(RunLocked), hold_lock(workdir.with_name(f"{key}.lock")):  # held: another run is at it (--force)
            shutil.rmtree(workdir, ignore_errors=True)


def _patience(ctx: Context) -> Callable[[str], None]:
    """Called again and again while another run makes the step: says so once a holder, and can be interrupted."""
    told: set[str] = set()

    def wait(holder: str) -> None:
        if holder not in told:
            told.add(holder)
            logger.info("%s: waiting for %s, which makes the same step", ctx.step, holder)
        ctx.cancel.wait(WAIT_S)
        check_cancelled(ctx)

    return wait


def _make(
    session: Session,
    step: Step,
    parts: dict[str, Json],
    inputs: Mapping[str, Artefact],
    ctx: Context,
    *,
    force: bool,
) -> Outcome:
    """Run the stage into a staging folder, commit what it wrote and link it; only then its work is finished."""
    key = step_key(parts)
    logger.info("%s: running (%s)", step.name, key[:12])
    ctx.events.emit("step_started", step=step.name, key=key)
    with session.store.staging(step.kind) as staged:
        ctx.workdir.mkdir(parents=True, exist_ok=True)
        link_work(session.folder, step.name, ctx.workdir)
        check_cancelled(ctx)
        with _unchanged(inputs, ctx):
            result = _run_stage(session, step, inputs, staged, ctx)
        if session.locked is not None:
            session.locked.check(step, key, result.content, ctx.events)
        manifest = Manifest.of(step.kind, key, parts, result, collect_versions())
        artefact = session.store.commit(staged, manifest, replace_other_content=force)
        link_artefact(session.folder, step.name, artefact)
        shutil.rmtree(ctx.workdir, ignore_errors=True)
        unlink_work(session.folder, step.name)
    session.digests.save()
    counts: dict[str, Json] = {**result.rejected}
    ctx.events.emit("step_committed", step=step.name, key=key, content=result.content, rejected=counts)
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in result.rejected.items())
    told = f"{step.name}: {result.rows_in:,} in, {result.rows_out:,} out"
    logger.info("%s%s", told, f", rejected: {rejected}" if rejected else "")
    return Outcome(step, artefact, ran=True)


@contextmanager
def _unchanged(artefacts: Mapping[str, Artefact], ctx: Context) -> Iterator[None]:
    """Refuse what was made of inputs that another run put aside meanwhile (`--force`, or damage).

    Raises:
        Incomplete: an input is not what it was when the block began.
    """
    try:
        yield
    except FileNotFoundError:
        _check_unchanged(artefacts, ctx)
        raise
    _check_unchanged(artefacts, ctx)


def _check_unchanged(artefacts: Mapping[str, Artefact], ctx: Context) -> None:
    for name, artefact in artefacts.items():
        path = artefact.path / MANIFEST
        if not path.is_file() or Manifest.read(path).content != artefact.manifest.content:
            what = f"another run replaced the rows of {name} while {ctx.step} read them"
            raise Incomplete(what, where=str(artefact.path), todo=f"resume with: {ctx.resume_command}")


def _run_stage(session: Session, step: Step, artefacts: Mapping[str, Artefact], staged: Path, ctx: Context) -> Result:
    inputs = {name: artefact.path for name, artefact in artefacts.items()}
    result = stage_module(step.kind).run(session.config_of(step), inputs, staged, ctx)
    if result.rows_in != result.rows_out + sum(result.rejected.values()):
        raise LostRows(f"{step.name}: {result.rows_in} in, {result.rows_out} out, rejected {dict(result.rejected)}")
    return result


def record(session: Session, outcome: Outcome) -> None:
    """Link the artefact into the run's folder and write it into the lock file, unless the run keeps to that."""
    link_artefact(session.folder, outcome.step.name, outcome.artefact)
    if session.loaded.lock_path is not None and session.locked is None:
        lock_step(session.loaded.lock_path, outcome.step.name, outcome.artefact)
