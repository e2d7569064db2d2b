"""The state of a run: which results are there, which the config has left behind and why, who works on it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import Manifest, explain, step_key
from pipeline.core.runs import WORK, lock_holder, read_lock
from pipeline.core.stage import Json
from pipeline.core.store import MANIFEST, Artefact
from pipeline.runner.keys import checked_input_files, step_parts
from pipeline.runner.session import Session
from pipeline.runner.steps import Step, plan_steps

State = Literal["done", "stale", "missing", "corrupt", "waiting"]


@dataclass(frozen=True, slots=True)
class StepStatus:
    """The state of a step.

    Attributes:
        step: its name.
        state: "done" (its result for this config is there), "stale" (a result is there, but for other settings, files
            or inputs), "missing" (there is none), "corrupt" (its files are not those that were committed), "waiting"
            (a step before it is not done, so its key is not known yet).
        key: key for this config, None while a step before it is not done.
        reasons: why it would run: `filter.min_chars: 1 -> 5`.
        unfinished: work on it was begun and will be resumed.
        rows_in, rows_out, rejected: of the result that the run's folder links, whatever its state; None without one.
        path: that result's link in the run's folder.
    """

    step: str
    state: State
    key: str | None
    reasons: tuple[str, ...]
    unfinished: bool
    rows_in: int | None
    rows_out: int | None
    rejected: Mapping[str, int] | None
    path: Path | None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The state of a run.

    Attributes:
        run: its name.
        folder: where it lies.
        steps: in the order in which data flows.
        held_by: the process that works on it, as "pid 12 on host"; None: nobody.
        last_end: exit code of the last invocation that ended; None: none has, or it was killed.
        last_error: its error's first line; None: it had none.
        next_command: what makes the missing and stale steps; None: all are done.
    """

    run: str
    folder: Path
    steps: tuple[StepStatus, ...]
    held_by: str | None
    last_end: int | None
    last_error: str | None
    next_command: str | None


def status(session: Session) -> RunStatus:
    """Look at a run without changing anything. File sizes are compared, not contents: that is what `verify` does.

    Raises:
        UsageError: a file that the config names is missing.
        Incomplete: the data folder cannot be read.
    """
    with session.disk_errors():
        done: dict[str, Artefact] = {}
        steps = tuple(_step_status(session, step, done) for step in plan_steps())
        session.digests.save()
        last_end, last_error = _last_end(session.folder / "events.jsonl")
        return RunStatus(
            run=session.loaded.run_name,
            folder=session.folder,
            steps=steps,
            held_by=lock_holder(session.folder / "run.lock"),
            last_end=last_end,
            last_error=last_error,
            next_command=None if len(done) == len(steps) else session.command("run"),
        )


def _step_status(session: Session, step: Step, done: dict[str, Artefact]) -> StepStatus:
    """The state of one step; its artefact is added to `done` if it has one for this config."""
    linked = _linked(session, step)
    state, key, reasons = _state(session, step, done, linked)
    return StepStatus(
        step=step.name,
        state=state,
        key=key,
        reasons=reasons,
        unfinished=state != "done" and (session.folder / WORK / step.name).is_dir(),
        rows_in=None if linked is None else linked.rows_in,
        rows_out=None if linked is None else linked.rows_out,
        rejected=None if linked is None else linked.rejected,
        path=None if linked is None else session.folder / step.name,
    )


def _state(
    session: Session, step: Step, done: dict[str, Artefact], linked: Manifest | None
) -> tuple[State, str | None, tuple[str, ...]]:
    missing = [name for name in step.inputs if name not in done]
    if missing:
        checked_input_files(session, step)
        return "waiting" if linked is None else "stale", None, (f"follows {', '.join(missing)}",)
    parts = step_parts(session, step, done)
    key = step_key(parts)
    try:
        artefact = session.store.glance(step.kind, key)
    except CorruptArtefact as error:
        return "corrupt", key, (f"{error.what} ({error.where})",)
    if artefact is not None:
        done[step.name] = artefact
        return "done", key, ()
    before = linked.parts if linked is not None else _locked_parts(session, step)
    state: State = "missing" if linked is None else "stale"
    return state, key, tuple(explain(before, parts))


def _linked(session: Session, step: Step) -> Manifest | None:
    """The manifest of the result that the run's folder links, if it can be read."""
    path = session.folder / step.name / MANIFEST
    try:
        return Manifest.read(path) if path.is_file() else None
    except CorruptArtefact:
        return None


def _locked_parts(session: Session, step: Step) -> dict[str, Json] | None:
    entry = read_lock(session.loaded.base_lock_path).get(step.name)
    return None if entry is None else entry["parts"]


def _last_end(events: Path) -> tuple[int | None, str | None]:
    """Exit code and error of the last invocation, as far as it could write them down."""
    code: int | None = None
    error: str | None = None
    if not events.is_file():
        return None, None
    with events.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"run_started"' in line:
                code, error = None, None
            elif '"run_ended"' in line:
                code, error = _ended(line)
    return code, error


def _ended(line: str) -> tuple[int | None, str | None]:
    try:
        event = json.loads(line)
    except ValueError:  # the torn line of a killed process
        return None, None
    return (event["exit_code"], event.get("error")) if event.get("event") == "run_ended" else (None, None)
