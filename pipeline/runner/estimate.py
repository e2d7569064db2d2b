"""What the steps that ask a teacher will ask and may cost, before anything is sent; `plan` shows it.

Only rows that are committed are counted: `plan` writes nothing, so it does not make the prompts. What is asked comes
from the stages' own functions, its keys from the one that defines them, hits from the rule of the response store.
"""

import gc
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.core.config import EvaluateStep, GenerateStep
from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_base import LocalModel
from pipeline.core.config_length import Continue, Raise
from pipeline.core.config_limits import Limits
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import ReplayTeacher
from pipeline.core.record import Message
from pipeline.core.store import Artefact
from pipeline.runner.funds import Alarm, Fund, alarms, funds_of
from pipeline.runner.plan import Planned
from pipeline.runner.session import Session
from pipeline.teacher.endpoint import Endpoint, api_endpoints, open_gate
from pipeline.teacher.experience import experience_with
from pipeline.teacher.forecast import Forecast, Load, forecast
from pipeline.teacher.hits import Distinct, Standing, standings
from pipeline.teacher.launch import VLLM_NAME
from pipeline.teacher.prices import Price, batch_price_of, price_of
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.seeds import wants_seeds
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

Paid = LocalServer | ApiTeacher
ASKING = ("generate", "evaluate")
"""Kinds of steps that ask a teacher through the response store."""


@dataclass(slots=True)
class Asking:
    """What one step asks one teacher.

    Attributes:
        teacher: its name in the config.
        config: its config.
        keys: of all requests in order, 32 bytes each.
        sizes: bytes of each body.
        frame: of these what a body takes without a prompt.
        blocked: requests that must not leave, beside those.
        again: caps under which an answer that is cut is asked for again.
        target: rows that are enough; None: all are needed.
    """

    step: str
    teacher: str
    config: Paid
    asked: Asked
    blocked: int = 0
    again: tuple[int, ...] = ()
    target: int | None = None
    in_batches: bool | None = False
    keys: bytearray = field(default_factory=bytearray)
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    frame: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one step's requests to one teacher come to. `requests` is the sum of `answered`, `refused`, `to_ask` and
    `shared`.

    Attributes:
        step, teacher: their names.
        model: as the teacher's config names it.
        requests: rows that need an answer.
        answered, refused: of them those whose answer, or refusal, is stored.
        to_ask: requests that would be sent.
        cut: of these, those to which an answer is stored that a smaller cap cut.
        shared: rows whose request is sent for another row.
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
            _estimate(session, asking) for step in known for asking in _asking(session, step, prompts.path / "rows")
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


# ------------------------------------------------------------------------------------------------- what is asked


def _asking(session: Session, planned: Planned, rows: Path) -> list[Asking]:
    """What a step asks, one a teacher."""
    config = session.config_of(planned.step)
    if isinstance(config, GenerateStep):
        return _asked_to_generate(planned.step.name, config, rows, session.data)
    assert isinstance(config, EvaluateStep)
    return _asked_to_evaluate(planned.step.name, config, rows, session)


def _asked_to_generate(step: str, config: GenerateStep, rows: Path, data: Path) -> list[Asking]:
    """All teachers in one pass over the prompts."""
    from pipeline.stages.generate.requests import requests_of  # stages load heavy libraries

    requests, again = requests_of(config, rows, data), _again(config)
    target = None if config.generate.accept is None else config.generate.accept.rows
    in_batches = _in_batches(config)
    asking = {
        name: Asking(step, name, teacher, requests.asked[name], again=again, target=target, in_batches=in_batches)
        for name, teacher in config.teachers.items()
        if not isinstance(teacher, ReplayTeacher)
    }
    measure = {name: _measure(each) for name, each in asking.items()}
    for row in requests.all_rows(teachers=[*asking]):
        if row.checked.reason is None:
            measure[row.teacher](row.request)
        else:
            asking[row.teacher].blocked += 1
    return [*asking.values()]


def _in_batches(config: GenerateStep) -> bool | None:
    if config.generate.mode != "batch":
        return False
    return True if config.generate.batch.stragglers == "wait" else None


def _again(config: GenerateStep) -> tuple[int, ...]:
    match config.generate.on_length:
        case Raise(caps=caps):
            return caps
        case Continue(times=times):
            return (config.generate.sampling.max_tokens,) * times
        case _:
            return ()


def _asked_to_evaluate(step: str, config: EvaluateStep, rows: Path, session: Session) -> list[Asking]:
    from pipeline.stages.evaluate.answers import requests_to_teacher  # stages load heavy libraries

    assert isinstance(config.teacher, ApiTeacher)
    asked, requests, blocked = requests_to_teacher(config, rows, session.data)
    asking = Asking(step, session.loaded.config.generate.teacher, config.teacher, asked, blocked)
    measure = _measure(asking)
    for request in requests:
        measure(request)
    return [asking]


def _measure(asking: Asking) -> Callable[[Request], None]:
    """What notes a request's key and size."""
    endpoint, sampling = _endpoint_of(asking.config), asking.asked.sampling
    endpoint.sends_seeds = wants_seeds(asking.asked, asking.config.kind)
    asking.frame = len(endpoint.body(asking.asked.request("", "", 0, (Message("user", ""),)), sampling))
    last: tuple[Message, ...] | None = None
    size = 0

    def measure(request: Request) -> None:
        nonlocal last, size
        if request.messages is not last or endpoint.sends_seeds:  # else a prompt's samples differ in their keys alone
            last = request.messages
            size = len(endpoint.body(request, sampling))
        asking.keys.extend(bytes.fromhex(request.key))
        asking.sizes.append(size)

    return measure


def _endpoint_of(teacher: Paid) -> Endpoint:
    """Where the requests would go; a server of our own is not started for it."""
    if isinstance(teacher, ApiTeacher):
        return api_endpoints(teacher)[0]
    return Endpoint("", OPENAI_CHAT, VLLM_NAME, "", None, open_gate(1, Limits()))


# ------------------------------------------------------------------------------------------------ what it comes to


def _estimate(session: Session, asking: Asking) -> Estimate:
    asked, responses = asking.asked, session.data / "responses"
    wanted, cap = Distinct.of(asking.keys), asked.sampling.max_tokens
    found = standings(responses, wanted, cap, asked.room, logprobs=asked.logprobs)
    is_asked = found <= Standing.CUT
    first = wanted.first[is_asked]
    answered, to_ask = int(wanted.rows[found == Standing.ANSWERED].sum()), len(first)
    seen = experience_with(responses, asked.identity, cap) if to_ask else None
    least = None if asking.target is None else max(0, asking.target - answered)
    sizes = np.array(asking.sizes, np.int64)[first]
    texts = np.maximum(sizes - asking.frame, 0)
    load = Load(to_ask, int(sizes.sum()), int(texts.sum()), cap, asking.again, least)
    return Estimate(
        step=asking.step,
        teacher=asking.teacher,
        model=_model_of(asking.config),
        requests=len(asking.sizes),
        answered=answered,
        refused=int(wanted.rows[found == Standing.REFUSED].sum()),
        to_ask=to_ask,
        cut=int((found == Standing.CUT).sum()),
        shared=int(wanted.rows[is_asked].sum()) - to_ask,
        blocked=asking.blocked,
        target=asking.target,
        forecast=forecast(load, seen, *_prices(asking)),
        attempts=0 if seen is None else seen.attempts,
        seconds=None if seen is None or seen.per_second is None else to_ask / seen.per_second,
    )


def _prices(asking: Asking) -> tuple[Price | None, Price | None]:
    """What a token costs at most, and in batch jobs where these are not all."""
    if asking.in_batches is False or not isinstance(asking.config, ApiTeacher):
        return price_of(asking.config), None
    in_batches = batch_price_of(asking.config)
    return (in_batches, None) if asking.in_batches else (price_of(asking.config), in_batches)


def _model_of(teacher: Paid) -> str:
    return teacher.folder.name if isinstance(teacher, LocalModel) and teacher.folder is not None else teacher.model
