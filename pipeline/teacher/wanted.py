"""Which stored answers the requests of a config use: the very ones that the hit rule picks."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.teacher.responses import Outcome, is_hit, outcome_of, rank
from pipeline.teacher.segment import Stored
from pipeline.teacher.walk import Check, answers_by_key, never


@dataclass(frozen=True, slots=True)
class Wanted:
    """The requests of a config's step `generate`.

    Attributes:
        rows: request key -> how many requests have it; prompts with equal messages share one.
        cap: `max_tokens` asked.
        room: as in `is_hit`.
    """

    rows: Mapping[bytes, int]
    cap: int
    room: int | None


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


def pick(answers: Iterable[Stored], cap: int, room: int | None) -> tuple[Stored, Outcome] | None:
    """Of the answers to one key the one that `ResponseStore.get_many` gives for this cap and room, if any."""
    read = [(stored, outcome_of(stored)) for stored in answers]
    hits = [(stored, outcome) for stored, outcome in read if outcome is not None and is_hit(stored, outcome, cap, room)]
    return min(hits, key=lambda hit: rank(hit[0], cap), default=None)


def chosen(folder: Path, wanted: Wanted, check: Check = never) -> Iterator[Stored]:
    """The stored answers that stand for the wanted requests, one a key, sorted by key.

    Raises:
        CorruptArtefact, Incomplete: as `answers_by_key`.
    """
    for key, group in answers_by_key(folder, check):
        if key in wanted.rows:
            hit = pick((found.stored for found in group), wanted.cap, wanted.room)
            if hit is not None:
                yield hit[0]


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
        hit = pick((found.stored for found in group), wanted.cap, wanted.room)
        if hit is None:
            cut += rows if any(_is_reply(found.stored) for found in group) else 0
        elif hit[1].rejected is None:
            answered += rows
        else:
            refused[hit[1].rejected] += rows
    missing = requests - answered - cut - refused.total()
    return Coverage(requests, answered, dict(sorted(refused.items())), cut, missing)


def _is_reply(stored: Stored) -> bool:
    """Whether it is a usable answer; one that is no hit was cut."""
    outcome = outcome_of(stored)
    return outcome is not None and outcome.reply is not None
