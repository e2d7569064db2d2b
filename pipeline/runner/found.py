"""What the store and the open batch jobs hold of what a step asks, and so what is sent, under which caps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.core.config_api import ApiTeacher
from pipeline.core.errors import CorruptArtefact
from pipeline.runner.asking import Asking
from pipeline.teacher.batch.tracker import Job, Tracker
from pipeline.teacher.forecast import Load
from pipeline.teacher.hits import KEY, Distinct, Keys, Standing, places, standings

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Requests that are sent, or may be, under the same caps.

    Attributes:
        first: of each the position among all requests.
        ranks: of each the first of its rows among the candidates; empty without a target.
        caps: under the first they are sent, under the others as long as their answers are cut.
        is_sure: as in `Load`.
    """

    first: Places
    ranks: Places
    caps: tuple[int, ...]
    is_sure: bool = True

    @property
    def requests(self) -> int:
        """How many."""
        return len(self.first)

    def load(self, asking: Asking, bound: int | None) -> Load:
        """What sending them takes; `bound`: how many candidates are asked for at least, None: there is no target."""
        sizes = np.array(asking.sizes, np.int64)[self.first]
        texts = int(np.maximum(sizes - asking.frame, 0).sum())
        least = None if bound is None else int((self.ranks < bound).sum())
        return Load(self.requests, int(sizes.sum()), texts, self.caps[0], self.caps[1:], least, self.is_sure)


@dataclass(frozen=True, slots=True)
class Found:
    """What one step asks one teacher, and what is there of it.

    Attributes:
        answered, refused, to_ask, cut, shared, in_jobs, continued: as in `Estimate`.
        refused_ranks: of the refused rows their places among the candidates; empty without a target.
        parts: what is sent; at least one.
    """

    asking: Asking
    answered: int
    refused: int
    to_ask: int
    cut: int
    shared: int
    in_jobs: int
    continued: int
    refused_ranks: Places
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Rung:
    """One cap, and which of the wanted keys are to be asked under it, or wait for an answer under it in a job."""

    caps: tuple[int, ...]
    asked: Mask
    in_jobs: Mask


def look_up(responses: Path, asking: Asking) -> Found:
    """Look up what a step asks.

    Raises:
        CorruptArtefact: a file of stored answers, or of a batch job, is damaged.
        Incomplete: the disk fails.
    """
    wanted, asked = Distinct.of(asking.keys), asking.asked
    cap, again = asked.sampling.max_tokens, asking.again
    found = standings(responses, wanted, cap, asked.room, logprobs=asked.logprobs)
    jobs = dict(_jobs(responses, asking))
    rungs = [_rung((cap, *again), found <= Standing.CUT, wanted, jobs)]
    still_cut = found == Standing.AT_CAP
    continued = still_cut if asking.continues else np.zeros_like(still_cut)
    for number, higher in enumerate(() if asking.continues else again):
        at = np.nonzero(still_cut)[0]
        there = standings(responses, wanted.only(at), higher, asked.room, logprobs=asked.logprobs)
        misses = np.zeros_like(still_cut)
        misses[at[there <= Standing.CUT]] = True
        still_cut[at[(there <= Standing.CUT) | (there == Standing.ANSWERED)]] = False
        rungs.append(_rung(again[number:], misses, wanted, jobs))
    is_asked = np.logical_or.reduce([rung.asked for rung in rungs])
    in_jobs = np.logical_or.reduce([rung.in_jobs for rung in rungs])
    to_ask, first_is_cut = int(is_asked.sum()), found == Standing.CUT
    ranks, rank_of_row, place_of_row = _ranks(asking, wanted)
    parts = [
        *((rung.asked, rung.caps, True) for rung in rungs),
        *((rung.in_jobs, rung.caps[1:], False) for rung in rungs),
        (continued, again, False),
    ]
    return Found(
        asking=asking,
        answered=int(wanted.rows[(found >= Standing.AT_CAP) & ~is_asked & ~in_jobs].sum()),
        refused=int(wanted.rows[found == Standing.REFUSED].sum()),
        to_ask=to_ask,
        cut=int((is_asked & (first_is_cut | (found >= Standing.AT_CAP))).sum()),
        shared=int(wanted.rows[is_asked].sum()) - to_ask,
        in_jobs=int(wanted.rows[in_jobs].sum()),
        continued=int(continued.sum()),
        refused_ranks=rank_of_row[(found == Standing.REFUSED)[place_of_row]],
        parts=tuple(
            Part(wanted.first[mask], ranks[mask] if asking.target is not None else ranks, caps, is_sure)
            for number, (mask, caps, is_sure) in enumerate(parts)
            if number == 0 or (caps and mask.any())
        ),
    )


def _rung(caps: tuple[int, ...], misses: Mask, wanted: Distinct, jobs: dict[int, Keys]) -> Rung:
    held = np.zeros_like(misses)
    at = places(wanted.keys, jobs.get(caps[0], np.empty(0, KEY)))
    held[at[at >= 0]] = True
    return Rung(caps, misses & ~held, misses & held)


def _ranks(asking: Asking, wanted: Distinct) -> tuple[Places, Places, Places]:
    """Of each key its least rank; of each row its rank, and the place of its key. All empty without a target."""
    if asking.target is None:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    rank_of_row = np.array(asking.ranks, np.int64)
    place_of_row = places(wanted.keys, np.frombuffer(asking.keys, KEY))
    least = np.full(len(wanted.keys), len(asking.hopeful), np.int64)
    np.minimum.at(least, place_of_row, rank_of_row)
    return least, rank_of_row, place_of_row


# ------------------------------------------------------------------------------------------------ open batch jobs


def _jobs(responses: Path, asking: Asking) -> Iterator[tuple[int, Keys]]:
    """Cap -> keys of the requests that open jobs of the teacher hold; a run takes these jobs up."""
    if not isinstance(asking.config, ApiTeacher):
        return
    tracker = Tracker(responses, asking.asked.identity)
    jobs = [job for job in tracker.open_jobs() if (job.kind, job.base_url) == _where(asking.config)]
    for cap in sorted({job.cap for job in jobs}):
        keys = [key for job in jobs if job.cap == cap for key in _keys(tracker, job)]
        yield cap, np.frombuffer(b"".join(keys), KEY)


def _where(teacher: ApiTeacher) -> tuple[str, str]:
    return teacher.kind, teacher.base_url


def _keys(tracker: Tracker, job: Job) -> list[bytes]:
    """The request keys of a job; none if another process has settled it meanwhile."""
    try:
        return [key for key, _ in tracker.lines(job, 0)]
    except CorruptArtefact:
        if all(other.token != job.token for other in tracker.open_jobs()):
            return []
        raise
