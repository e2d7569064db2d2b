"""What `run` would do and why, without doing it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import explain, step_key
from pipeline.core.runs import read_lock
from pipeline.core.stage import Json
from pipeline.core.store import Artefact
from pipeline.runner.keys import checked_input_files, step_parts
from pipeline.runner.session import Session
from pipeline.runner.steps import Step, plan_steps


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

    def forced(self) -> "Planned":
        """The same step when it runs although it has a result."""
        return replace(self, state="run", reasons=("--force",))


def plan(session: Session, *, force: bool = False) -> list[Planned]:
    """What `run` would do with each step.

    Args:
        force: as `run --force` would.

    Raises:
        UsageError: a file that the config names is missing.
        Incomplete: the data folder cannot be read.
    """
    with session.disk_errors():
        found: dict[str, Artefact] = {}
        planned = [_plan_step(session, step, found) for step in plan_steps()]
        session.digests.save()
    return [each.forced() if force and each.state == "cached" else each for each in planned]


def _plan_step(session: Session, step: Step, found: dict[str, Artefact]) -> Planned:
    """Plan one step; an artefact that it has is added to `found`."""
    missing = [name for name in step.inputs if name not in found]
    if missing:
        checked_input_files(session, step)
        return Planned(step, "unknown", None, (f"needs {', '.join(missing)}",))
    parts = step_parts(session, step, found)
    key = step_key(parts)
    try:
        artefact = session.store.find(step.kind, key)
    except CorruptArtefact as error:
        return Planned(step, "run", key, (f"corrupt: {error.what} ({error.where})",))
    if artefact is None:
        return Planned(step, "run", key, tuple(explain(_locked_parts(session, step), parts)))
    found[step.name] = artefact
    return Planned(step, "cached", key, ())


def _locked_parts(session: Session, step: Step) -> dict[str, Json] | None:
    entry = read_lock(session.loaded.base_lock_path).get(step.name)
    return None if entry is None else entry["parts"]


def until(planned: Sequence[Planned], name: str | None) -> list[Planned]:
    """The planned steps up to and including `name`; all of them if None."""
    names = [each.step.name for each in planned]
    return [*planned] if name is None else [*planned[: names.index(name) + 1]]
