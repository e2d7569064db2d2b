"""What the steps that ask a teacher ask of it: each request's key and size, and which candidate it is."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.config import EvaluateStep, GenerateStep
from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_length import Continue, Raise
from pipeline.core.config_limits import Limits
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import ReplayTeacher
from pipeline.core.record import Message
from pipeline.runner.plan import Planned
from pipeline.runner.session import Session
from pipeline.teacher.endpoint import Endpoint, api_endpoints, open_gate
from pipeline.teacher.launch import VLLM_NAME
from pipeline.teacher.prepare import prepare
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

if TYPE_CHECKING:  # stages load heavy libraries
    from pipeline.stages.generate.requests import Requests

Paid = LocalServer | ApiTeacher


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
        continues: whether it is continued then, instead of asked for anew.
        target: rows that are enough; None: all are needed.
        in_batches: whether it is asked by batch jobs; None: some of it may still be asked online.
        hopeful: of each candidate of the step, in their order, whether it may be a good row; one list for all its
            teachers. Empty without a target.
        ranks: of each request its place among these candidates; empty without a target.
    """

    step: str
    teacher: str
    config: Paid
    asked: Asked
    blocked: int = 0
    again: tuple[int, ...] = ()
    continues: bool = False
    target: int | None = None
    in_batches: bool | None = False
    keys: bytearray = field(default_factory=bytearray)
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    frame: int = 0
    hopeful: bytearray = field(default_factory=bytearray)
    ranks: "array[int]" = field(default_factory=lambda: array("q"))


def asking_of(session: Session, planned: Planned, rows: Path) -> list[Asking]:
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
    ranks = None if config.checks is None else _ranks(config, requests)
    target = None if ranks is None or config.generate.accept is None else config.generate.accept.rows
    hopeful, in_batches = bytearray(b"\1" * len(ranks or ())), _in_batches(config)
    asking = {
        name: Asking(
            step,
            name,
            teacher,
            requests.asked[name],
            again=again,
            continues=isinstance(config.generate.on_length, Continue),
            target=target,
            in_batches=in_batches,
            hopeful=hopeful,
        )
        for name, teacher in config.teachers.items()
        if not isinstance(teacher, ReplayTeacher)
    }
    measure = {name: _measure(each) for name, each in asking.items()}
    for row in requests.all_rows(teachers=[*asking]):
        rank = None if ranks is None else ranks.get((row.position, row.teacher, row.request.sample))
        if ranks is not None and rank is None:
            continue  # beyond generate.accept.max_candidates
        if row.checked.reason is None:
            measure[row.teacher](row.request)
        else:
            asking[row.teacher].blocked += 1
        if rank is not None and row.checked.reason is None:
            asking[row.teacher].ranks.append(rank)
        elif rank is not None:
            hopeful[rank] = 0
    return [*asking.values()]


def _ranks(config: GenerateStep, requests: "Requests") -> dict[tuple[int, str, int], int] | None:
    """Place of each candidate (as `place_of` says) -> its rank; None: all rows are wanted, not so many good ones."""
    from pipeline.stages.generate.accept import Candidates  # stages load heavy libraries

    if config.generate.accept is None:
        return None
    candidates = Candidates(requests, config.generate.accept.max_candidates)
    return {place: rank for rank, place in enumerate(candidates.places(0, len(candidates)))}


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
    prepare(endpoint, asking.asked, asking.config.kind)
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
