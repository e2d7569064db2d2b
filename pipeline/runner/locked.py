"""`run --locked`: what runs, and what comes out of it, must be what the lock file beside the config says."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.core.errors import LockDrift, UsageError
from pipeline.core.lineage import changes, step_key
from pipeline.core.runs import LockEntry, read_lock
from pipeline.core.stage import Events
from pipeline.runner.keys import checked_input_files, step_recipe
from pipeline.runner.session import Session
from pipeline.runner.steps import Step, ancestors, plan_steps, spec_of

RELOCK = "restore the lock file from version control, or run all steps without --locked, which writes it anew"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drift:
    """A step whose recipe and inputs are the locked ones and whose content is not: an engine computed otherwise.

    Attributes:
        step: its name.
        locked: content digest in the lock file.
        content: content digest of what there is.
    """

    step: str
    locked: str
    content: str


@dataclass(slots=True)
class Locked:
    """The lock file that an invocation keeps to, and what it found different.

    Attributes:
        path: the lock file; it is not written.
        entries: its entries by step.
        drift: steps that drifted; no error, since their stages sample (`StageSpec.samples`).
        by_recipe: steps after these, whose inputs are not the locked ones: only their recipes could be compared.
    """

    path: Path
    entries: Mapping[str, LockEntry]
    drift: list[Drift] = field(default_factory=list)
    by_recipe: list[str] = field(default_factory=list)

    def check(self, step: Step, key: str, content: str, events: Events) -> None:
        """Compare what a step made, or found made, with the lock file.

        Raises:
            LockDrift: equal inputs gave other rows, in a stage that always gives the same ones; or the inputs are
                others although no step before it drifted.
        """
        entry = self.entries[step.name]
        if key != entry["key"]:
            if not self._follows_drift(step):
                what = f"{step.name} has other inputs than the lock file says, and no step before it drifted"
                raise LockDrift(what, where=str(self.path), todo=RELOCK)
            self.by_recipe.append(step.name)
            return
        if content == entry["content"]:
            return
        if not spec_of(step).samples:
            what = f"{step.name} gave other rows than the lock file says, from the same inputs"
            todo = "compare `versions` in the manifests of both; without --locked a run takes the new rows over"
            raise LockDrift(f"{what}: {entry['content'][:12]} -> {content[:12]}", where=str(self.path), todo=todo)
        self.drift.append(Drift(step.name, entry["content"], content))
        told = "%s: drift: the content is %s, the lock file says %s; what follows is compared by recipe only"
        logger.warning(told, step.name, content[:12], entry["content"][:12])
        events.emit("lock_drift", step=step.name, locked=entry["content"], content=content)

    def _follows_drift(self, step: Step) -> bool:
        before = ancestors({each.name: each for each in plan_steps()}, step.name)
        return any(drift.step in before for drift in self.drift)


def lock_to(session: Session, until: str | None = None) -> Session:
    """A session that keeps to the lock file, after comparing the recipes of all steps up to `until` with it.

    A recipe is a stage's version, the settings that count, and the bytes of the files that the config names. With
    overrides it is compared with the same lock file, so that these may change paths and other operational settings.

    Raises:
        UsageError: there is no lock file, it is damaged, or a file that the config names is missing.
        LockDrift: a recipe differs, or the lock file holds entries of two runs; all differences are listed.
    """
    with session.disk_errors():
        path = session.loaded.base_lock_path
        entries = read_lock(path)
        if not entries:
            unlocked = replace(session, loaded=replace(session.loaded, overrides=()))
            todo = f"let a run write it: {unlocked.command('run')}"
            raise UsageError("there is no lock file to keep to", where=str(path), todo=todo)
        names = [step.name for step in plan_steps()]
        steps = plan_steps() if until is None else plan_steps()[: names.index(until) + 1]
        for step in steps:
            checked_input_files(session, step)
        differences = [line for step in steps for line in _differences(session, step, entries)]
        session.digests.save()
    if differences:
        listed = "\n       ".join(dict.fromkeys(differences))  # a teacher's settings count in two steps
        todo = "undo these changes; or leave out --locked: then a run takes them over and writes the lock file"
        what = f"not what the lock file says:\n       {listed}"
        raise LockDrift(what, where=str(path), todo=todo)
    return replace(session, locked=Locked(path, entries), invoked=(*session.invoked, "--locked"))


def foreign_inputs(step: str, entries: Mapping[str, LockEntry]) -> list[str]:
    """The inputs of a locked step that are not what the lock file says of these steps themselves: since a run writes an
    entry after each step, a part of a run, or a merge, leaves entries of two runs."""
    told = entries[step]["parts"].get("inputs")
    if not isinstance(told, dict):
        return []
    known = {name: entries[name] for name in told if name in entries}
    # Some stages count keys too. Which ones did, only the version that wrote the entry knows.
    counted = {name: (entry["content"], f"{entry['content']} {entry['key']}") for name, entry in known.items()}
    return [name for name in sorted(known) if told[name] not in counted[name]]


def _differences(session: Session, step: Step, entries: Mapping[str, LockEntry]) -> Iterator[str]:
    entry = entries.get(step.name)
    if entry is None:
        yield f"{step.name}: not in the lock file"
        return
    if step_key(entry["parts"]) != entry["key"]:
        yield f"{step.name}: its key in the lock file is not made of its parts: the file was edited or merged by hand"
    for name in foreign_inputs(step.name, entries):
        yield f"{step.name}: made of another {name} than the lock file names: its entries are of two runs"
    recipe = {name: part for name, part in entry["parts"].items() if name != "inputs"}
    for change in changes(recipe, step_recipe(session, step)):
        yield f"{step.name}: {change}" if change.kind == "code" else str(change)
