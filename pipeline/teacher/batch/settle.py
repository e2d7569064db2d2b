"""The results of a job into the response store: each line once, whatever the number of times they are read.

What a line came to:

- it was answered: the usage that the provider tells, at the batch price;
- it was not run (the job expired or was cancelled before), or the provider documents that it bills nothing for lines
  that end like this: nothing;
- anything else (no usage, a 5xx, a line that is missing from a completed job, a lost job): its worst case, for ever.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.teacher.accounts import check_attempts
from pipeline.teacher.batch.provider import Line, Provider
from pipeline.teacher.batch.tracker import Job, key_in
from pipeline.teacher.budget import Amount, surely_free, worst_tokens
from pipeline.teacher.drift import Drift
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.logprobs import with_logprobs
from pipeline.teacher.prices import Price
from pipeline.teacher.recorder import Recorder, now_ms
from pipeline.teacher.responses import ResponseStore, is_hit, outcome_of
from pipeline.teacher.segment import Attempt, Ended, Stored, attempt_columns, open_segment, segment_paths
from pipeline.teacher.spending import Hold, Purse
from pipeline.teacher.transport import REQUEST_ID_CHARS, blot, most_bytes
from pipeline.teacher.verdict import Action, Verdict, about_this_row, judge
from pipeline.teacher.wire import Reply, clean, load_json

log = logging.getLogger(__name__)

STRIKES: Final = 3
"""Completions without usable content after which a row is rejected."""
OTHER_CAP: Final = "another_cap"
OTHER_LOGPROBS: Final = "without_logprobs"
EARLIER: Final = frozenset({OTHER_CAP, OTHER_LOGPROBS})
"""Why answers to what an earlier config asked are none to what is asked today; they are stored all the same."""
GROUP_LINES: Final = 256
"""Lines per transaction."""


@dataclass(slots=True)
class Open:
    """A job in the hands of this process.

    Attributes:
        job: as it is on disk.
        sizes: request key -> bytes of the body, for the lines that are not settled.
        counts: whether it counts in our purse.
        shown: lines that the progress has counted already, since the provider said that they are done.
        collected: how many lines were done when partial results were read last.
        is_cancelled: we have asked for its end.
    """

    job: Job
    sizes: dict[bytes, int]
    counts: bool
    shown: int = 0
    collected: int = 0
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What one line came to for this run.

    Attributes:
        key: the request key.
        rejected: the reason, if the row is refused.
        again: why it is to be asked again; None: it is settled.
        tokens: completion tokens of an answer.
        is_cut: whether it ended at its cap.
    """

    key: bytes
    rejected: str | None = None
    again: str | None = None
    tokens: int = 0
    is_cut: bool = False


@dataclass(slots=True)
class Settler:
    """Reads results into the store.

    Attributes:
        provider, endpoint: how and from where they come.
        proven: whether the teacher has answered anything yet; until then a `bad_request` may be the config's fault,
            and a stored refusal would outlive its correction.
        cap, room: what is asked today, as in `segment.Stored`.
        strikes: completions without usable content after which a row is rejected.
        drift: hears every answer.
        held: refusals that are not believed yet.
        abort: the first verdict that stops everything; raised when the job is settled.
        secret: blotted out of what is stored.
    """

    provider: Provider
    endpoint: Endpoint
    store: ResponseStore
    recorder: Recorder
    purse: Purse
    proven: bool
    secret: str | None
    cap: int
    room: int | None
    strikes: int = STRIKES
    drift: Drift | None = None
    held: list[Stored] = field(default_factory=list)
    abort: Verdict | None = None
    _strikes: dict[bytes, int] = field(default_factory=dict)

    def read(self, opened: Open, path: Path) -> Iterator[Result]:
        """Settle the lines in a file of results; lines that are settled already, or foreign, are passed over."""
        group: dict[bytes, Line] = {}
        for line in _lines(path, self.secret):
            read = self.provider.read(line)
            key = key_in(read.custom_id, opened.job.token)
            if key is None or key not in opened.sizes or key in group:
                continue
            group[key] = read
            if len(group) == GROUP_LINES:
                yield from self._settle(opened, group)
                group = {}
        yield from self._settle(opened, group)

    def close(self, opened: Open, reason: str, *, is_free: bool) -> Iterator[Result]:
        """Settle the lines that the results say nothing of.

        Args:
            is_free: whether it is certain that they were not billed.
        """
        line = Line(None, None, reason=reason, is_free=is_free)
        keys = list(opened.sizes)
        for start in range(0, len(keys), GROUP_LINES):
            yield from self._settle(opened, dict.fromkeys(keys[start : start + GROUP_LINES], line))

    def let_go(self, opened: Open) -> None:
        """Give back what was held for lines that the provider never had."""
        for size in opened.sizes.values():
            if opened.counts:
                self.purse.release(hold_of(opened.job, size))
        opened.sizes.clear()

    def write_off(self, opened: Open) -> None:
        """Count what is held for lines that nobody here will settle as spent."""
        for size in opened.sizes.values() if opened.counts else ():
            self.purse.write_off(hold_of(opened.job, size))

    def believe(self) -> None:
        """Store the refusals that were held back."""
        if self.held:
            self.store.put(self.held)
            self.held = []

    def _settle(self, opened: Open, group: dict[bytes, Line]) -> Iterator[Result]:
        """One transaction; only then what was held for its lines is free."""
        intents: list[Attempt] = []
        outcomes: list[tuple[Hold, Ended]] = []
        answers: list[Stored] = []
        results: list[Result] = []
        replies: list[Reply] = []
        for key, line in group.items():
            verdict = self._judge(opened.job, line)
            replies += [] if verdict.reply is None else [verdict.reply]
            result, stored = self._conclude(opened.job, key, line, verdict)
            hold, ended = self._ended(opened, key, line, verdict, result)
            why_not = None if stored is None else self._why_not(opened.job, stored)
            if why_not is not None:
                result = Result(key, again=why_not)
            intents.append(_attempt(opened.job, ended.id, key, hold))
            outcomes.append((hold, ended))
            results.append(result)
            answers += [] if stored is None else [stored]
        if intents:
            self.store.put(answers, intents=intents, outcomes=[ended for _, ended in outcomes])
        if self.proven:
            self.believe()
        for key, (hold, ended) in zip(group, outcomes, strict=True):
            del opened.sizes[key]
            if opened.counts:
                self.purse.settle(hold, ended)
        yield from results
        if self.drift is not None:
            for reply in replies:
                self.drift.hear(self.endpoint, reply)

    def _why_not(self, job: Job, stored: Stored) -> str | None:
        """Why an answer to a job of an earlier config is none to what is asked today; None: it is one."""
        wanted = self.endpoint.logprobs
        if (job.cap, job.room) == (self.cap, self.room) and asks_for(job, wanted):
            return None
        outcome = outcome_of(stored)
        if outcome is None or not is_hit(stored, outcome, self.cap, self.room):
            return OTHER_CAP
        outcome = outcome_of(stored, wanted)
        stands = outcome is not None and is_hit(stored, outcome, self.cap, self.room, logprobs=wanted)
        return None if stands else OTHER_LOGPROBS

    def _judge(self, job: Job, line: Line) -> Verdict:
        if line.status is None:
            return Verdict(Action.RETRY, line.reason)
        if len(line.body) > most_bytes(job.cap, logprobs_of(job)):
            return Verdict(Action.REJECT, "oversize")
        wanted = self.endpoint.logprobs
        verdict = judge(self.endpoint.wire.read, line.status, {}, line.body)
        if asks_for(job, wanted):  # of another job nobody could expect them: its answers are good ones without
            verdict = with_logprobs(verdict, self.endpoint.wire.name, line.body, wanted)
        return about_this_row(verdict) if self.proven else verdict

    def _conclude(self, job: Job, key: bytes, line: Line, verdict: Verdict) -> tuple[Result, Stored | None]:
        match verdict.action:
            case Action.ANSWER:
                self.proven = True
                return _answered(key, verdict.reply), _stored(job, key, line, None)
            case Action.REJECT:
                explicit = verdict.reason if verdict.reason in ("oversize", "forbidden") else None
                stored = _stored(job, key, line, explicit)
                if verdict.reason == "bad_request" and not self.proven:
                    self.held.append(stored)
                    return Result(key, rejected=verdict.reason), None
                return Result(key, rejected=verdict.reason), stored
            case Action.STRIKE:
                self._strikes[key] = self._strikes.get(key, 0) + 1
                if self._strikes[key] >= self.strikes:
                    return Result(key, rejected=verdict.reason), _stored(job, key, line, verdict.reason)
            case Action.ABORT if self.abort is None:
                self.abort = verdict
        return Result(key, again=verdict.reason), None

    def _ended(self, opened: Open, key: bytes, line: Line, verdict: Verdict, result: Result) -> tuple[Hold, Ended]:
        job, reply = opened.job, verdict.reply
        hold = hold_of(job, opened.sizes[key])
        used = (None, None) if reply is None else (reply.prompt_tokens, reply.output_tokens)
        is_free = line.is_free or (line.status is not None and surely_free(line.status, verdict.reason))
        if reply is None and is_free:
            used = (0, 0)
        outcome = "answer" if reply is not None else "reject" if result.again is None else f"retry:{result.again}"
        if verdict.action is Action.ABORT:
            outcome = "abort"
        known = clean(line.request_id or "")
        request_id = f"{job.name}/{known}"[:REQUEST_ID_CHARS]
        number = self.recorder.number()
        return hold, Ended(number, outcome, line.status, *used, cost_of(job, *used), request_id)


def _answered(key: bytes, reply: Reply | None) -> Result:
    if reply is None:
        return Result(key)
    return Result(key, tokens=reply.completion_tokens or 0, is_cut=reply.finish_reason == "length")


def logprobs_of(job: Job) -> LogprobsAsked | None:
    """What the lines of a job ask for; None: no logprobs."""
    return None if job.logprobs is None else LogprobsAsked(job.logprobs, job.logprobs, job.token_ids)


def asks_for(job: Job, wanted: LogprobsAsked | None) -> bool:
    """Whether the lines of a job ask for these logprobs, or for more."""
    if wanted is None:
        return True
    return job.logprobs is not None and job.logprobs >= wanted.sent and job.token_ids == wanted.ids


def hold_of(job: Job, body_bytes: int) -> Hold:
    """The worst case of one line."""
    price = price_in(job)
    tokens = worst_tokens_of(body_bytes)
    nano = None if price is None else price.cost(tokens, job.cap)
    return Hold(Amount(nano or 0, tokens + job.cap, 1), nano)


def worst_tokens_of(body_bytes: int) -> int:
    """Most tokens that the prompt in a body of this size can be."""
    return worst_tokens(b"") + body_bytes


def price_in(job: Job) -> Price | None:
    """What the job's tokens cost, discount taken off; None: unknown."""
    if job.price_input is None or job.price_output is None:
        return None
    return Price(job.price_input, job.price_output)


def cost_of(job: Job, input_tokens: int | None, output_tokens: int | None) -> int | None:
    """Nano-dollars of a line; None: unknown."""
    price = price_in(job)
    if price is None or input_tokens is None or output_tokens is None:
        return None
    return price.cost(input_tokens, output_tokens)


def recorded(responses: Path, job: Job) -> set[bytes]:
    """Request keys of the job's lines whose end is in the response store already: a process died between two of its
    transactions, or before it could note that all were done.

    Raises:
        CorruptArtefact: a file of attempts is damaged.
    """
    if job.job_id is None:
        return set()
    start = f"{job.job_id}/"
    keys: set[bytes] = set()
    for path in segment_paths(responses / "segments"):
        with open_segment(path) as db:
            if db is not None:
                selected = attempt_columns(db, ["key", "request_id"])
                query = f"SELECT key FROM (SELECT {selected} FROM attempts) WHERE substr(request_id, 1, ?) = ?"
                keys.update(row[0] for row in db.execute(query, (len(start), start)))
    for path in sorted((responses / "attempts").glob("*.parquet")):
        check_attempts(path)
        if "request_id" in pq.read_schema(path).names:
            found = pq.read_table(path, columns=["key", "request_id"])
            mask = pc.fill_null(pc.starts_with(found["request_id"], start), False)
            keys.update(found.filter(mask)["key"].to_pylist())
    return keys


def _attempt(job: Job, number: int, key: bytes, hold: Hold) -> Attempt:
    sent_ms = job.created_ms or job.intended_ms
    return Attempt(number, key, job.cap, sent_ms, None, job.run, job.teacher, hold.nano, hold.worst.tokens)


def _stored(job: Job, key: bytes, line: Line, rejected: str | None) -> Stored:
    return Stored(
        key=key,
        cap=job.cap,
        stored_ms=now_ms(),
        teacher=job.identity,
        model=job.model,
        engine="",
        wire=job.wire,
        status=line.status or 0,
        rejected=rejected,
        body=b"" if rejected == "oversize" else line.body,
        room=job.room,
    )


def _lines(path: Path, secret: str | None) -> Iterator[dict[str, Any]]:
    """The lines of a file of results; what is no JSON object (a line that was cut off) is passed over."""
    with path.open("rb") as file:
        for raw in file:
            line = blot(raw, secret)
            parsed, _ = load_json(line, exact=True)
            if isinstance(parsed, dict):
                yield parsed
            elif line.strip():
                log.warning("%s: a line of the results is no JSON object", path.name)
