"""The state of a run: which results are there, which the config has left behind and why, who works on it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import CorruptArtefact, UsageError
from pipeline.core.lineage import Change, Manifest, changes, step_key
from pipeline.core.runs import lock_holder, read_lock, run_lock
from pipeline.core.stage import Json
from pipeline.core.store import Artefact
from pipeline.runner.keys import checked_input_files, step_parts, step_recipe
from pipeline.runner.links import linked_artefact, work_links
from pipeline.runner.session import Session
from pipeline.runner.steps import Step, plan_steps

State = Literal["done", "stale", "missing", "corrupt", "waiting"]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Work on a step that was begun and not committed.

    Attributes:
        path: its folder.
        resumes: `run` goes on with it; False: it was begun for other settings, files or inputs; None: not known
            before the steps before it are done.
    """

    path: Path
    resumes: bool | None


@dataclass(frozen=True, slots=True)
class StepStatus:
    """The state of a step.

    Attributes:
        step: its name.
        state: "done" (its result for this config is there), "stale" (a result is there, but for other settings, files
            or inputs), "missing" (there is none), "corrupt" (its files are not those that were committed), "waiting"
            (there is none, and a step before it is not done, so its key is not known yet).
        key: key for this config, None while a step before it is not done.
        linked_key: key of the result that the run's folder links, None where it links none that can be read.
        reasons: why it would run, for people: `filter.min_chars: 1 -> 5`, `follows filter`.
        changes: what of it differs from the linked result, or without one from the lock file.
        unfinished: work on it that was begun and not committed.
        held_by: the process that makes it at this moment, for this run or another, as "pid 12 on host".
        rows_in, rows_out, rejected: of the result for this config, or else of the linked one; None without either.
        path: the link to the linked result.
    """

    step: str
    state: State
    key: str | None
    linked_key: str | None
    reasons: tuple[str, ...]
    changes: tuple[Change, ...]
    unfinished: Unfinished | None
    held_by: str | None
    rows_in: int | None
    rows_out: int | None
    rejected: Mapping[str, int] | None
    path: Path | None


@dataclass(frozen=True, slots=True)
class LastRun:
    """The last invocation that worked on a run, as its `events.jsonl` tells.

    Attributes:
        state: "running", "ended" (it said so itself, see `exit_code`) or "killed" (it could not).
        command: what was typed; None if the file is damaged there.
        started: UTC time, ISO 8601.
        ended: likewise; None unless it said so itself.
        exit_code: its exit code, 0 for complete; None unless it ended.
        error: its error's first line; None where it had none.
    """

    state: Literal["running", "ended", "killed"]
    command: str | None
    started: str | None
    ended: str | None
    exit_code: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The state of a run.

    Attributes:
        run: its name.
        folder: where it lies.
        steps: in the order in which data flows.
        held_by: the process that works on it, as "pid 12 on host"; None: nobody.
        last_run: None where nothing ever ran.
        next_command: what makes or links what is not done; None: all is, or a process works on it.
    """

    run: str
    folder: Path
    steps: tuple[StepStatus, ...]
    held_by: str | None
    last_run: LastRun | None
    next_command: str | None


@dataclass(frozen=True, slots=True)
class _Found:
    """What the config says of a step: its state, its key, and its artefact if it has one."""

    state: State
    key: str | None
    artefact: Artefact | None
    reasons: tuple[str, ...]
    changes: tuple[Change, ...] = ()


def status(session: Session) -> RunStatus:
    """Look at a run without writing anything, not even what was learned about files: a folder that may not be written
    can be looked at, at the price of hashing weights anew where no run has. Of results the file sizes are compared, not
    the contents: that is what `verify` does.

    Raises:
        UsageError: a file that the config names is missing, the lock file is damaged, or the data folder is a file.
        Incomplete: the data folder cannot be read.
    """
    with session.disk_errors():
        _refuse_a_file(session.data)
        done: dict[str, Artefact] = {}
        held_by = lock_holder(run_lock(session.folder))
        steps = tuple(_step_status(session, step, done) for step in plan_steps())
        complete = all(step.state == "done" and step.linked_key == step.key for step in steps)
        return RunStatus(
            run=session.loaded.run_name,
            folder=session.folder,
            steps=steps,
            held_by=held_by,
            last_run=_last_run(session.folder, held_by),
            next_command=None if complete or held_by is not None else session.command("run"),
        )


def _refuse_a_file(data: Path) -> None:
    """Refuse a data folder that neither is nor can be made one, as `run` does."""
    place = data
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError("not a folder", where=f"--data {data}", todo="choose another folder with --data")


def _step_status(session: Session, step: Step, done: dict[str, Artefact]) -> StepStatus:
    """The state of one step; its artefact is added to `done` if it has one for this config."""
    linked = linked_artefact(session.folder, step.name)
    old = None if linked is None else linked.manifest
    found = _find(session, step, done, old)
    if found.artefact is not None:
        done[step.name] = found.artefact
    shown = old if found.artefact is None else found.artefact.manifest
    return StepStatus(
        step=step.name,
        state=found.state,
        key=found.key,
        linked_key=None if old is None else old.key,
        reasons=_reasons(session, step, found, old),
        changes=found.changes,
        unfinished=_unfinished(session, step, found),
        held_by=_maker(session, step, found),
        rows_in=None if shown is None else shown.rows_in,
        rows_out=None if shown is None else shown.rows_out,
        rejected=None if shown is None else shown.rejected,
        path=None if old is None else session.folder / step.name,
    )


def _find(session: Session, step: Step, done: Mapping[str, Artefact], linked: Manifest | None) -> _Found:
    missing = [name for name in step.inputs if name not in done]
    before = linked.parts if linked is not None else _locked_parts(session, step)
    absent: State = "stale" if linked is not None else "waiting" if missing else "missing"
    if missing:
        changed = _recipe_changes(session, step, before)
        return _Found(absent, None, None, (f"follows {', '.join(missing)}",), changed)
    parts = step_parts(session, step, done)
    key = step_key(parts)
    try:
        artefact = session.store.glance(step.kind, key)
    except CorruptArtefact as error:
        return _Found("corrupt", key, None, (f"{error.what} ({error.where})",))
    if artefact is not None:
        return _Found("done", key, artefact, ())
    if before is None:
        return _Found(absent, key, None, ("never ran",))
    changed = tuple(changes(before, parts))
    return _Found(absent, key, None, () if changed else ("its result is not in the store",), changed)


def _recipe_changes(session: Session, step: Step, before: Mapping[str, Json] | None) -> tuple[Change, ...]:
    """What differs apart from the inputs, which are not made yet."""
    if before is None:
        checked_input_files(session, step)
        return ()
    recipe = step_recipe(session, step)
    return tuple(changes({name: part for name, part in before.items() if name != "inputs"}, recipe))


def _locked_parts(session: Session, step: Step) -> dict[str, Json] | None:
    entry = read_lock(session.loaded.base_lock_path).get(step.name)
    return None if entry is None else entry["parts"]


def _reasons(session: Session, step: Step, found: _Found, linked: Manifest | None) -> tuple[str, ...]:
    link = session.folder / step.name
    told = (*found.reasons, *map(str, found.changes))
    if found.state == "done":
        unlinked = "of another run, not linked here yet" if linked is None else f"{link} links another result"
        return told if linked is not None and linked.key == found.key else (unlinked,)
    if linked is None and link.is_symlink() and found.state != "corrupt":
        gone = f"{link} links a result that is {'damaged' if link.exists() else 'gone'}"
        return (*told, gone) if found.changes or found.key is None else (gone,)
    return told


def _unfinished(session: Session, step: Step, found: _Found) -> Unfinished | None:
    link = next((link for link in work_links(session.folder) if link.path.name == step.name), None)
    if link is None or link.dangles:
        return None
    resumes = None if found.key is None else found.state != "done" and link.place == (step.kind, found.key)
    return Unfinished(session.data / "work" / Path(*link.place), resumes)


def _maker(session: Session, step: Step, found: _Found) -> str | None:
    if found.key is None or found.state == "done":
        return None
    return lock_holder(session.workdir_of(step, found.key).with_name(f"{found.key}.lock"))


# ---------------------------------------------------------------------------------------------------- events.jsonl


def _last_run(folder: Path, held_by: str | None) -> LastRun | None:
    started: Mapping[str, Any] | None = None
    ended: Mapping[str, Any] = {}
    events = folder / "events.jsonl"
    if not events.is_file():
        return None
    with events.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            event = _event(line)
            if event.get("event") == "run_started":
                started, ended = event, {}
            elif event.get("event") == "run_ended":
                ended = event
    if started is None:
        return None
    code = ended.get("exit_code")
    error = _text(ended, "error")
    has_ended = isinstance(code, int)
    is_held = held_by is not None or lock_holder(run_lock(folder)) is not None  # again: it may have begun meanwhile
    return LastRun(
        state="ended" if has_ended else "running" if is_held else "killed",
        command=_text(started, "command"),
        started=_text(started, "time"),
        ended=_text(ended, "time") if has_ended else None,
        exit_code=code if has_ended else None,
        error=None if error is None else error.removeprefix("error: "),
    )


def _event(line: str) -> Mapping[str, Any]:
    """The event of a line if it is one about a whole run; nothing for others and for torn or foreign lines."""
    if '"run_started"' not in line and '"run_ended"' not in line:
        return {}
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _text(event: Mapping[str, Any], name: str) -> str | None:
    value = event.get(name)
    return value if isinstance(value, str) else None
