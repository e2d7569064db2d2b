"""What the steps that ask a teacher will ask and may cost, before anything is sent; `plan` shows it.

Only rows that are committed are counted: `plan` writes nothing, so it does not make the prompts. What is asked comes
from the stages' own functions, its keys from the one that defines them, hits from the rule of the response store.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from pipeline.core.config import EvaluateStep, GenerateStep
from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_base import LocalModel
from pipeline.core.config_teacher import ReplayTeacher
from pipeline.core.store import Artefact
from pipeline.runner.asking import Asking, Paid, asking_of
from pipeline.runner.found import Found, look_up
from pipeline.runner.funds import Alarm, Fund, alarms, funds_of
from pipeline.runner.plan import Planned
from pipeline.runner.session import Session
from pipeline.teacher.experience import experience_with
from pipeline.teacher.forecast import Forecast, forecast
from pipeline.teacher.prices import Price, batch_price_of, price_of

ASKING = ("generate", "evaluate")
"""Kinds of steps that ask a teacher through the response store."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one step's requests to one teacher come to. `requests` is the sum of `answered`, `refused`, `to_ask`,
    `shared` and `in_jobs`.

    Attributes:
        step, teacher: their names.
        model: as the teacher's config names it.
        requests: rows that need an answer; with a target the candidates among which they are sought.
        answered, refused: of them those whose answer, or refusal, is stored.
        to_ask: requests that would be sent.
        cut: of these, those to which an answer is stored that a smaller cap cut.
        shared: rows whose request is sent for another row.
        in_jobs: rows whose request an open batch job holds, so that it is not sent again.
        continued: requests among `answered` whose answer was cut and may be continued (`generate.on_length`); how many
            of them were continued before is not known.
        blocked: rows that must not leave this machine, beside `requests`.
        target: rows that are enough (`generate.accept`), so that not all may be asked; None: all are needed.
        forecast: what `to_ask` may come to.
        attempts: answered requests of this teacher that the forecast comes from; 0: it is a guess.
        seconds: how long `to_ask` takes at the pace that was seen; None: none was.
    """

    step: str
    teacher: str
    model: str
    requests: int
    answered: int
    refused: int
    to_ask: int
    cut: int
    shared: int
    in_jobs: int
    continued: int
    blocked: int
    target: int | None
    forecast: Forecast
    attempts: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Unknown:
    """A step whose requests cannot be counted yet: why, and what to do about it."""

    step: str
    why: str
    todo: str


@dataclass(frozen=True, slots=True)
class Estimates:
    """What a plan comes to.

    Attributes:
        estimates: one a step and teacher.
        unknown: steps that cannot be counted yet.
        funds: the caps of the budget, and what counts against them already.
        alarms: which of them may, or will, stop the run.
    """

    estimates: tuple[Estimate, ...]
    unknown: tuple[Unknown, ...]
    funds: tuple[Fund, ...]
    alarms: tuple[Alarm, ...]


def estimate(session: Session, planned: Sequence[Planned]) -> Estimates:
    """Count what the planned steps would ask, and what that may come to; asks nobody and writes nothing.

    Raises:
        UsageError: the teacher's files cannot be read, or the price table is not valid.
        CorruptArtefact: a file of stored answers or attempts is damaged.
        Incomplete: the disk fails.
    """
    steps = [each for each in planned if each.step.kind in ASKING and each.state != "cached"]
    steps = [each for each in steps if _asks(session, each)]
    with session.disk_errors():
        unknown = tuple(each for each in (_why_unknown(session, planned, step) for step in steps) if each is not None)
        known = [step for step in steps if step.step.name not in {each.step for each in unknown}]
        prompts = _artefact(session, planned, "prompts") if known else None
        gc.freeze()  # a million small objects come and go: what is loaded need not be looked through each time
        estimates = [] if prompts is None else [
            each for step in known for each in _estimates(session, asking_of(session, step, prompts.path / "rows"))
        ]  # fmt: skip
        funds = funds_of(session) if steps else ()
        session.digests.save()
    forecasts = [(each.teacher, each.forecast) for each in estimates]
    return Estimates(tuple(estimates), unknown, funds, tuple(alarms(funds, forecasts)))


def _asks(session: Session, planned: Planned) -> bool:
    """Whether a step sends requests: nobody is asked for completions that exist, and for an evaluation local models
    answer in a worker."""
    return any(True for _ in _asked_teachers(session, planned))


def _asked_teachers(session: Session, planned: Planned) -> Iterator[Paid]:
    config = session.config_of(planned.step)
    if isinstance(config, EvaluateStep):
        if isinstance(config.teacher, ApiTeacher):
            yield config.teacher
        return
    assert isinstance(config, GenerateStep)
    yield from (teacher for teacher in config.teachers.values() if not isinstance(teacher, ReplayTeacher))


def _why_unknown(session: Session, planned: Sequence[Planned], step: Planned) -> Unknown | None:
    if _artefact(session, planned, "prompts") is None:
        return Unknown(step.step.name, "unknown until the prompts are made", session.command("prompts"))
    for teacher in _asked_teachers(session, step):
        if isinstance(teacher, LocalModel) and not is_fetched(teacher):
            why = f"unknown until the weights of {teacher.model} are here; they are fetched when it is asked"
            return Unknown(step.step.name, why, session.command("generate"))
    return None


def _artefact(session: Session, planned: Sequence[Planned], name: str) -> Artefact | None:
    """The committed result of a step, which the plan has verified."""
    step = next(each for each in planned if each.step.name == name)
    return session.store.glance(step.step.kind, step.key) if step.state == "cached" and step.key is not None else None


def is_fetched(model: LocalModel) -> bool:
    """Whether a model's files are on this machine: a folder, or in the hub's cache. Nothing is fetched."""
    if model.folder is not None:
        return True
    from huggingface_hub import snapshot_download  # not needed for local folders
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(model.model, revision=model.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ what it comes to


def _estimates(session: Session, asking: Sequence[Asking]) -> list[Estimate]:
    """What a step comes to, one a teacher."""
    found = [look_up(session.data / "responses", each) for each in asking]
    bound = sure_candidates(found)
    return [_estimate(session, each, bound) for each in found]


def sure_candidates(found: Sequence[Found]) -> int | None:
    """How many candidates are asked for at least, the first ones: as if each of them were good that may be; None: there
    is no target."""
    if not found or found[0].asking.target is None:
        return None
    hopeful = np.frombuffer(found[0].asking.hopeful, np.uint8).copy()
    for each in found:
        hopeful[each.refused_ranks] = 0
    enough = np.nonzero(np.cumsum(hopeful) >= found[0].asking.target)[0]
    return int(enough[0]) + 1 if len(enough) > 0 else len(hopeful)


def _estimate(session: Session, found: Found, bound: int | None) -> Estimate:
    asking, responses = found.asking, session.data / "responses"
    caps = {part.caps[0] for part in found.parts if part.requests > 0}
    seen = {cap: experience_with(responses, asking.asked.identity, cap) for cap in sorted(caps)}
    prices = _prices(asking)
    forecasts = [forecast(part.load(asking, bound), seen.get(part.caps[0]), *prices) for part in found.parts]
    known = next((each for each in seen.values() if each is not None), None)
    to_ask, per_second = found.to_ask, None if known is None else known.per_second
    return Estimate(
        step=asking.step,
        teacher=asking.teacher,
        model=_model_of(asking.config),
        requests=len(asking.sizes),
        answered=found.answered,
        refused=found.refused,
        to_ask=to_ask,
        cut=found.cut,
        shared=found.shared,
        in_jobs=found.in_jobs,
        continued=found.continued,
        blocked=asking.blocked,
        target=asking.target,
        forecast=reduce(Forecast.__add__, forecasts),
        attempts=0 if known is None else known.attempts,
        seconds=None if per_second is None or to_ask == 0 else to_ask / per_second,
    )


def _prices(asking: Asking) -> tuple[Price | None, Price | None]:
    """What a token costs at most, and in batch jobs where these are not all."""
    if asking.in_batches is False or not isinstance(asking.config, ApiTeacher):
        return price_of(asking.config), None
    in_batches = batch_price_of(asking.config)
    return (in_batches, None) if asking.in_batches else (price_of(asking.config), in_batches)


def _model_of(teacher: Paid) -> str:
    return teacher.folder.name if isinstance(teacher, LocalModel) and teacher.folder is not None else teacher.model
