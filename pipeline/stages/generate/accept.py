"""Asks until enough rows are good: which candidates there are, in which order, and where to stop.

Candidates are taken by sample, then by row id. The result is the shortest beginning of that list that holds the rows
wanted, so it does not depend on who answered first. A wave never has more candidates than are still wanted, or than
twice as many as would do at the rate seen so far, so few answers are paid for that are not used.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.core.config import FilterConfig
from pipeline.core.config_accept import Accept
from pipeline.core.lineage import row_id
from pipeline.core.record import RECORD_SCHEMA, to_table
from pipeline.core.stage import Context, Json, check_cancelled
from pipeline.stages.generate.requests import AskedFor, Requests
from pipeline.stages.generate.rows import Licenses, answered_rows
from pipeline.teacher.ask import Asker
from pipeline.teacher.request import Request
from pipeline.text.judge import judge

log = logging.getLogger(__name__)


class Chosen:
    """Some of the stage's rows; each pass makes them anew.

    Args:
        places: their (position of the prompt, teacher, sample).
    """

    def __init__(self, requests: Requests, places: set[tuple[int, str, int]]) -> None:
        self._requests, self._places = requests, places
        self._positions = {position for position, _, _ in places}

    def __len__(self) -> int:
        return len(self._places)

    def rows(self) -> Iterator[AskedFor]:
        """The rows, in the order of the stage."""
        rows = self._requests.all_rows(only=self._positions)
        return (row for row in rows if place_of(row) in self._places)

    def of(self, teacher: str) -> "ChosenOf":
        """The requests among them to one teacher."""
        return ChosenOf(self, teacher)


@dataclass(frozen=True, slots=True)
class ChosenOf:
    """The requests to one teacher among chosen rows; each pass makes them anew."""

    chosen: Chosen
    teacher: str

    def __iter__(self) -> Iterator[Request]:
        rows = (row for row in self.chosen.rows() if row.teacher == self.teacher)
        return (row.request for row in rows if row.checked.reason is None)


def place_of(row: AskedFor) -> tuple[int, str, int]:
    """Where a row stands: position of its prompt, teacher, sample."""
    return row.position, row.teacher, row.request.sample


class Candidates:
    """All rows that may be taken, in the order in which they are: 32 bytes each in memory."""

    def __init__(self, requests: Requests, most: int) -> None:
        self._names = [*requests.asked]
        kind = np.dtype([("id", "S16"), ("position", "i8"), ("teacher", "i4"), ("sample", "i4")])
        numbers = {name: number for number, name in enumerate(self._names)}
        found = np.fromiter(
            ((_id_bytes(row), row.position, numbers[row.teacher], row.request.sample) for row in requests.all_rows()),
            dtype=kind,
        )
        self._rows = found[np.lexsort((found["id"], found["sample"]))][:most]

    def __len__(self) -> int:
        return len(self._rows)

    def places(self, start: int, stop: int) -> list[tuple[int, str, int]]:
        """Where the candidates from `start` to before `stop` stand, in order."""
        some = self._rows[start:stop]
        columns = (some[name].tolist() for name in ("position", "teacher", "sample"))
        return [(position, self._names[teacher], sample) for position, teacher, sample in zip(*columns, strict=True)]


def _id_bytes(row: AskedFor) -> bytes:
    return bytes.fromhex(row_id(row.prompt.prompt_set, row.prompt.prompt_id, row.request.key))


@dataclass(frozen=True, slots=True)
class Taken:
    """The candidates that were taken, and what the manifest says of them."""

    chosen: Chosen
    metrics: dict[str, Json]


def take(
    accept: Accept,
    checks: FilterConfig,
    requests: Requests,
    askers: Mapping[str, Asker],
    licenses: Licenses,
    ctx: Context,
) -> Taken:
    """Ask for candidates until enough of them pass the checks, or there are no more.

    Raises:
        Incomplete, UsageError, Interrupted: as `Asker.fetch`.
    """
    candidates = Candidates(requests, accept.max_candidates)
    ctx.progress.start(len(candidates), "candidates")
    taken: list[tuple[int, str, int]] = []
    good = 0
    while good < accept.rows and len(taken) < len(candidates):
        size = wave_size(accept.rows - good, good, len(taken))
        places = candidates.places(len(taken), len(taken) + size)
        passed = _ask(Chosen(requests, {*places}), checks, askers, licenses, ctx)
        for place in places:
            taken.append(place)
            good += place in passed
            if good == accept.rows:
                break
    if good < accept.rows:
        log.warning("%d of %d candidates pass the checks; %d rows were wanted", good, len(taken), accept.rows)
    metrics: dict[str, Json] = {"wanted": accept.rows, "good": good, "candidates": len(taken)}
    return Taken(Chosen(requests, {*taken}), {"accept": metrics})


def wave_size(wanted: int, good: int, seen: int) -> int:
    """How many candidates to ask next: as many as rows are wanted, which can never be too many, or half of what would
    do at the rate seen so far where that is more."""
    rate = good / seen if seen > 0 else 1.0
    return max(wanted, math.ceil(wanted / (2 * max(rate, 0.01))))


def _ask(
    chosen: Chosen,
    checks: FilterConfig,
    askers: Mapping[str, Asker],
    licenses: Licenses,
    ctx: Context,
) -> set[tuple[int, str, int]]:
    """Ask for one wave; where those stand that pass. Several teachers take turns: they share the budget and, if they
    are served here, this machine's memory."""
    for name, asker in askers.items():
        check_cancelled(ctx)
        asker.fetch(chosen.of(name))
        if len(askers) > 1:
            asker.rest()
    passed: set[tuple[int, str, int]] = set()
    for rows in answered_rows(chosen.rows(), askers, licenses):
        there = [row for row in rows if row.answer.rejected is None]
        reasons = judge(checks, to_table(RECORD_SCHEMA, [row.record for row in there])).reasons
        passed.update(place_of(row.asked_for) for row, why in zip(there, reasons, strict=True) if why is None)
    return passed
