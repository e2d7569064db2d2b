"""What stage `generate` asks whom: each prompt's teachers, the outbound guard's word, and the requests."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config import GenerateStep
from pipeline.core.config_outbound import guard_towards
from pipeline.core.config_route import BySet, ByWeight, ToAll
from pipeline.core.config_teacher import GenerateConfig
from pipeline.core.lineage import DigestCache
from pipeline.core.record import SHARD_ROWS, Prompt, prompts_of, read_shards
from pipeline.core.stage import Json
from pipeline.teacher.logprobs import wanted_logprobs
from pipeline.teacher.request import Asked, Request
from pipeline.text.outbound import Checked, Guard, Tally

SPLITS = ("train", "validation")


class Router:
    """Which teachers answer a prompt; see core/config_route.py."""

    def __init__(self, config: GenerateConfig) -> None:
        self._teacher, self._route = config.teacher, config.route

    def teachers(self, prompt: Prompt) -> tuple[str, ...]:
        """Names of the teachers that answer it."""
        match self._route:
            case None:
                return (self._teacher,)
            case BySet(sets=sets):
                return (sets.get(prompt.prompt_set, self._teacher),)
            case ToAll(teachers=teachers):
                return teachers
            case ByWeight():
                names, bounds = self._shares
                return (names[bisect_right(bounds, _fraction(prompt) * bounds[-1], hi=len(bounds) - 1)],)

    @cached_property
    def _shares(self) -> tuple[list[str], list[float]]:
        weights = self._route.weights if isinstance(self._route, ByWeight) else {}
        return [*weights], [*accumulate(weights.values())]


def _fraction(prompt: Prompt) -> float:
    """A number from 0 to below 1 that only the prompt's set and id decide."""
    name = f"{prompt.prompt_set}\0{prompt.prompt_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


@dataclass(frozen=True, slots=True)
class Scanned:
    """What the outbound guard found, one byte a prompt in memory.

    Attributes:
        guard: the guard.
        hits: for each prompt of `SPLITS`, in order, 1 where it found something; empty: it does not act, or nothing
            was scanned yet, and each prompt is when it is wanted.
        away: teachers to whom prompts leave this machine.
        blocked: prompts that must not leave.
        metrics: its counts for the manifest.
    """

    guard: Guard
    hits: bytearray
    away: frozenset[str]
    blocked: int
    metrics: dict[str, Json]

    def check(self, position: int, prompt: Prompt) -> Checked:
        """What becomes of a prompt that leaves; only those are scanned again in which something was found."""
        if not self.guard.acts or (self.hits and not self.hits[position]):
            return Checked(prompt.prompt, (), None, prompt.tools)
        return self.guard.check(prompt.prompt, prompt.tools)


def _scan(rows: Path, cfg: GenerateStep, router: Router, check: Callable[[], None] | None) -> Scanned:
    policies = {name: guard_towards(cfg.generate.outbound, teacher.kind) for name, teacher in cfg.teachers.items()}
    away = frozenset(name for name, policy in policies.items() if policy is not None)
    guard, hits, tally, blocked = Guard(cfg.generate.outbound if away else None), bytearray(), Tally(), 0
    if not guard.acts or check is None:
        return Scanned(guard, hits, away, 0, {})
    for prompt in prompts_asked(rows):
        if len(hits) % SHARD_ROWS == 0:
            check()
        if away.isdisjoint(router.teachers(prompt)):
            hits.append(0)
            continue
        checked = guard.check(prompt.prompt, prompt.tools)
        hits.append(bool(checked.kinds))
        blocked += checked.reason is not None
        tally.add([checked])
    return Scanned(guard, hits, away, blocked, {"outbound": tally.metrics()})


def prompts_asked(rows: Path) -> Iterator[Prompt]:
    """The prompts that teachers answer, in order; one shard in memory."""
    for table in read_shards(rows):
        yield from prompts_of(table.filter(pc.is_in(table["split"], value_set=pa.array(SPLITS))))


def count_prompts(rows: Path) -> int:
    """Their number."""
    tables = read_shards(rows, columns=["split"])
    return sum(pc.sum(pc.is_in(table["split"], value_set=pa.array(SPLITS))).as_py() or 0 for table in tables)


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class AskedFor:
    """One row before it is answered.

    Attributes:
        prompt: as it leaves this machine.
        teacher: who is asked.
        checked: what the guard says; its `reason` is None unless the prompt must not leave.
        position: of its prompt among those that teachers answer.
    """

    prompt: Prompt
    teacher: str
    request: Request
    checked: Checked
    position: int


@dataclass(frozen=True, slots=True)
class Requests:
    """All requests of the stage, in order; each pass reads the prompts anew.

    Attributes:
        asked: teacher -> how it is asked.
        samples: completions of each prompt by each of its teachers.
        scanned: what must not leave, or not as it is.
    """

    rows: Path
    asked: Mapping[str, Asked]
    samples: int
    router: Router
    scanned: Scanned

    def __iter__(self) -> Iterator[Request]:
        return (row.request for row in self.all_rows() if row.checked.reason is None)

    def of(self, teacher: str) -> "RequestsOf":
        """Those that one teacher is asked."""
        return RequestsOf(self, teacher)

    def all_rows(
        self, only: Collection[int] | None = None, teachers: Sequence[str] | None = None
    ) -> Iterator[AskedFor]:
        """Every row of the stage, also those that must not leave: by prompt, then teacher, then sample.

        Args:
            only: positions of the prompts to give; None: all.
            teachers: of these teachers; None: of all.
        """
        for position, given in enumerate(prompts_asked(self.rows)):
            if only is not None and position not in only:
                continue
            for teacher in self.router.teachers(given):
                if teachers is None or teacher in teachers:
                    yield from self._rows_of(position, given, teacher)

    def _rows_of(self, position: int, given: Prompt, teacher: str) -> Iterator[AskedFor]:
        away = teacher in self.scanned.away
        checked = self.scanned.check(position, given) if away else Checked(given.prompt, (), None, given.tools)
        prompt = replace(given, prompt=checked.messages, tools=checked.tools) if checked.kinds else given
        asked = self.asked[teacher]
        for request in asked.requests(prompt.prompt_set, prompt.prompt_id, self.samples, prompt.prompt, prompt.tools):
            yield AskedFor(prompt, teacher, request, checked, position)


@dataclass(frozen=True, slots=True)
class RequestsOf:
    """The requests to one teacher; each pass makes them anew."""

    requests: Requests
    teacher: str

    def __iter__(self) -> Iterator[Request]:
        rows = self.requests.all_rows(teachers=(self.teacher,))
        return (row.request for row in rows if row.checked.reason is None)


def requests_of(cfg: GenerateStep, rows: Path, data: Path, check: Callable[[], None] | None = None) -> Requests:
    """All requests of the stage on the committed prompts in `rows`.

    Args:
        check: called now and then while the prompts are scanned for the outbound guard; what it raises ends that. None:
            each prompt is scanned when its requests are made, for who makes them once and wants no counts.

    Raises:
        UsageError: a teacher's files cannot be read.
    """
    digests = DigestCache(data / "cache" / "digests.json")
    config, router = cfg.generate, Router(cfg.generate)
    asked = {
        name: replace(
            Asked.of(cfg.teachers[name], config.sampling, config.draw, digests).under(config.response, config.seeds),
            logprobs=wanted_logprobs(config.logprobs, cfg.teachers[name]),
        )
        for name in config.teachers
    }
    return Requests(rows, asked, config.samples, router, _scan(rows, cfg, router, check))
