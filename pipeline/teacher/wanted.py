"""Which stored answers the requests of a config use: the very ones that the hit rule picks."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.teacher.responses import Outcome, is_hit, outcome_of, rank
from pipeline.teacher.segment import Stored
from pipeline.teacher.walk import Check, answers_by_key, never


@dataclass(frozen=True, slots=True)
class Wanted:
    """The requests of a config's step `generate`.

    Attributes:
        rows: request key -> how many requests have it; prompts with equal messages share one.
        caps: `max_tokens` asked: the first, and those of the rounds after it for answers that are cut.
        rooms: request key -> `room` as in `is_hit`; without those for which it is None.
        logprobs: the same for `logprobs`.
    """

    rows: Mapping[bytes, int]
    caps: tuple[int, ...]
    rooms: Mapping[bytes, int]
    logprobs: Mapping[bytes, LogprobsAsked] = field(default_factory=dict)

    def picked(self, key: bytes, answers: Sequence[Stored]) -> "Picked":
        """What stands for a request in each round, until an answer is not cut. A round after the first that is refused,
        or has nothing yet, takes nothing away, so that the next one is asked all the same."""
        hits: list[tuple[Stored, Outcome]] = []
        missing = 0
        for cap in self.caps:
            hit = pick(answers, cap, self.rooms.get(key), self.logprobs.get(key))
            if hit is None:
                missing += 1
            elif hit not in hits:
                hits.append(hit)
            is_whole = hit is not None and hit[1].reply is not None and not hit[1].is_cut
            if is_whole or not hits or not hits[0][1].is_cut:
                break
        return Picked(tuple(hits), missing)


@dataclass(frozen=True, slots=True)
class Picked:
    """The stored answers that stand for a request.

    Attributes:
        hits: of the rounds, in their order; none twice.
        missing: rounds that are still to be asked.
    """

    hits: tuple[tuple[Stored, Outcome], ...]
    missing: int

    @property
    def rejected(self) -> str | None:
        """Why the request is refused; None: it has an answer."""
        return self.hits[0][1].rejected


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many requests have what.

    Attributes:
        requests: all of them; the others add up to it.
        answered: a usable answer.
        refused: reason -> requests whose refusal is stored, so that they are not asked again.
        cut: nothing but answers that a smaller cap cut, so that they would be asked again.
        missing: nothing of use, so that they would be asked.
    """

    requests: int
    answered: int
    refused: Mapping[str, int]
    cut: int
    missing: int


def pick(
    answers: Iterable[Stored], cap: int, room: int | None, logprobs: LogprobsAsked | None = None
) -> tuple[Stored, Outcome] | None:
    """Of the answers to one key the one that `ResponseStore.get_many` gives for this cap and room, if any."""
    read = [(stored, outcome_of(stored, logprobs)) for stored in answers]
    hits = [
        (stored, replace(outcome, logprobs=None))
        for stored, outcome in read
        if outcome is not None and is_hit(stored, outcome, cap, room, logprobs=logprobs)
    ]
    return min(hits, key=lambda hit: rank(hit[0], cap), default=None)


def chosen(folder: Path, wanted: Wanted, check: Check = never) -> Iterator[Stored]:
    """The stored answers that stand for the wanted requests, sorted by key: one a key, and where it is cut those of
    the rounds after it. Not covered: continuations, which have keys of their own.

    Raises:
        CorruptArtefact, Incomplete: as `answers_by_key`.
    """
    for key, group in answers_by_key(folder, check):
        if key in wanted.rows:
            yield from (stored for stored, _ in wanted.picked(key, [found.stored for found in group]).hits)


def coverage(folder: Path, wanted: Wanted, check: Check = never) -> Coverage:
    """How many of the wanted requests are answered, refused, cut and missing.

    Raises:
        CorruptArtefact, Incomplete: as `answers_by_key`.
    """
    requests = sum(wanted.rows.values())
    refused: Counter[str] = Counter()
    answered = cut = 0
    for key, group in answers_by_key(folder, check):
        rows = wanted.rows.get(key, 0)
        if rows == 0:
            continue
        stored = [found.stored for found in group]
        picked = wanted.picked(key, stored)
        if picked.missing > 0:
            cut += rows if picked.hits or any(map(_is_reply, stored)) else 0
        elif picked.rejected is None:
            answered += rows
        else:
            refused[picked.rejected] += rows
    missing = requests - answered - cut - refused.total()
    return Coverage(requests, answered, dict(sorted(refused.items())), cut, missing)


def _is_reply(stored: Stored) -> bool:
    """Whether it is a usable answer; one that is no hit was cut."""
    outcome = outcome_of(stored)
    return outcome is not None and outcome.reply is not None
