"""The one door through which stages get answers from a teacher."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_batch import BatchConfig
from pipeline.core.config_budget import Spending
from pipeline.core.config_drift import Canaries
from pipeline.core.config_length import Drop, Keep, LengthPolicy
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import ReplayTeacher, Retry, Teacher
from pipeline.core.errors import Incomplete
from pipeline.core.record import ToolCall
from pipeline.core.stage import Context, check_cancelled
from pipeline.core.targets import TokenLogprobs
from pipeline.teacher.fetcher import Fetcher
from pipeline.teacher.launch import installed_engine
from pipeline.teacher.reasoning import split_reasoning, tags_of
from pipeline.teacher.replay import Replayed
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import Outcome, ResponseStore
from pipeline.teacher.rounds import READ_ROWS, cut_requests, resolve, rounds_of
from pipeline.teacher.temperature import Scale, stored_scale

NOBODYS = Spending()
KEEP = Keep(kind="keep")


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Answer:
    """What became of one request.

    Attributes:
        key: the request's key.
        rejected: reason for which the teacher gives no answer to it; None if there is one.
        text, reasoning_content, finish_reason, prompt_tokens, completion_tokens, flags, tool_calls: as in `wire.Reply`,
            except that thinking inside the text is split off where the teacher declares `reasoning_tags`; empty for a
            rejected request.
        model, fingerprint: of what answered, as an API names them; None for a server of our own, which we name.
        logprobs: of its tokens, where `Asked.logprobs` wants them.
    """

    key: str
    rejected: str | None
    text: str = ""
    reasoning_content: str | None = None
    finish_reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    flags: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    model: str | None = None
    fingerprint: str | None = None
    logprobs: TokenLogprobs | None = None


class Asker:
    """One teacher and what is asked of it. A context manager: `fetch`, as often as wanted, then `done`, then `answers`.

    Nothing is asked whose answer is stored under `ctx.data`, and no server is started when all are. `ctx.progress` is
    advanced by one per request; the caller starts it.

    Args:
        asked: made with `Asked.of`; the requests' keys come from it.
        spending: whose budget the requests count in.
        on_length: what becomes of answers that end at their cap.
        may_miss: rows that may stay without an answer after `retry.budget_s`: they are rejected as `gave_up:<class>`.
        batch: how jobs are made in batch mode; None: online.
        canaries: how the teacher is watched, and the requests whose first ones are the canaries; None: it is not.
    """

    def __init__(
        self,
        teacher: Teacher,
        asked: Asked,
        retry: Retry,
        ctx: Context,
        spending: Spending = NOBODYS,
        *,
        on_length: LengthPolicy = KEEP,
        may_miss: int = 0,
        batch: BatchConfig | None = None,
        canaries: tuple[Canaries, Iterable[Request]] | None = None,
    ) -> None:
        self._teacher, self._asked, self._ctx, self._on_length = teacher, asked, ctx, on_length
        self._rounds, self._canaries = rounds_of(asked, on_length), canaries
        self._tags = tags_of(teacher)
        self._asking, self._reading = ExitStack(), ExitStack()
        self._replayed: Replayed | None = None
        self._fetcher: Fetcher | None = None
        if not isinstance(teacher, ReplayTeacher):  # one that is replayed is not asked, and makes no folder
            engine = installed_engine(teacher) if isinstance(teacher, LocalServer) else None
            store = ResponseStore(ctx.data / "responses", check=partial(check_cancelled, ctx), engine=engine)
            self._fetcher = Fetcher(store, teacher, retry, ctx, spending, may_miss, batch)

    def __enter__(self) -> "Asker":
        if isinstance(self._teacher, ReplayTeacher):
            self._replayed = self._reading.enter_context(Replayed(self._teacher, self._ctx))
        if self._fetcher is not None:
            self._reading.enter_context(self._fetcher.store)
            self._asking.enter_context(self._fetcher)
        return self

    def __exit__(self, *raised: object) -> None:
        self._asking.close()
        self._reading.close()

    def fetch(self, requests: Iterable[Request]) -> None:
        """Get what is missing, in all rounds that the policy has for answers that were cut.

        Args:
            requests: iterated once a round, so a list or an object that makes a new iterator each time.

        Raises:
            Incomplete: rows stay pending (the teacher is down, a quota or the budget is used up); answers are kept.
            UsageError: the teacher cannot be asked like this: wrong key, URL, model or file.
            Interrupted: a signal asked us to stop.
            CorruptArtefact: a file of stored answers is damaged.
        """
        if iter(requests) is requests:
            raise TypeError("requests are iterated more than once: give a list, not an iterator")
        if self._fetcher is None:
            return
        if self._canaries is not None:
            rules, probes = self._canaries
            self._fetcher.canaries = (rules, [*islice(probes, rules.count)])
            self._canaries = None
        still_cut = self._fetcher.fetch(self._asked, requests).cut
        for number, each in enumerate(self._rounds, start=1):
            if still_cut == 0:
                return
            again = cut_requests(self._fetcher.store, self._asked, self._rounds[:number], requests)
            done = self._fetcher.fetch(each.asked, again, is_first=False)
            still_cut = done.cut + done.rejected  # a round that is refused takes nothing away, and helps nobody

    def rest(self) -> None:
        """Stop servers and give the budget back until `fetch` is called again: somebody else may need them."""
        if self._fetcher is not None:
            self._fetcher.rest()

    def done(self) -> None:
        """Nothing more is asked: servers stop, and what was answered is folded."""
        self._asking.close()
        if self._fetcher is not None:
            self._fetcher.store.fold()

    @property
    def given_up(self) -> int:
        """Rows that stay without an answer."""
        return 0 if self._fetcher is None else self._fetcher.missing

    @property
    def scale(self) -> Scale | None:
        """What the temperature does to this teacher's logprobs; None: it was never tried, or none are asked for."""
        if self._asked.logprobs is None or self._fetcher is None:
            return None
        return stored_scale(self._fetcher.store, self._asked)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """The answer to each request; all are in memory, so give some at a time (`READ_ROWS`).

        Raises:
            Incomplete: an answer is not there.
            CorruptArtefact: a file of stored answers is damaged.
        """
        outcomes: Sequence[Outcome | None] = []
        if self._replayed is not None:
            outcomes = [*self._replayed.outcomes(requests)]
        elif self._fetcher is not None:
            store, given_up = self._fetcher.store, self._fetcher.given_up
            outcomes = resolve(store, self._asked, self._rounds, requests, given_up, keep_logprobs=True)
        return [self._answer(request, outcome) for request, outcome in zip(requests, outcomes, strict=True)]

    def _answer(self, request: Request, outcome: Outcome | None) -> Answer:
        if outcome is None:
            what = "a stored answer has disappeared while it was being read"
            raise Incomplete(what, where=f"request {request.key}", todo="run again: it will be asked for")
        reply = outcome.reply
        if reply is None:
            return Answer(request.key, outcome.rejected)
        if isinstance(self._on_length, Drop) and outcome.is_cut:
            return Answer(request.key, "length")
        text, reasoning = reply.text, reply.reasoning_content
        if self._tags is not None and reasoning is None:
            reasoning, text = split_reasoning(text, reply.finish_reason, self._tags)
        names_itself = isinstance(self._teacher, ApiTeacher)
        return Answer(
            key=request.key,
            rejected=None,
            text=text,
            reasoning_content=reasoning,
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            flags=reply.flags,
            tool_calls=reply.tool_calls,
            model=reply.model if names_itself else None,
            fingerprint=reply.fingerprint if names_itself else None,
            logprobs=outcome.logprobs,
        )


def ask(
    teacher: Teacher,
    asked: Asked,
    retry: Retry,
    requests: Iterable[Request],
    ctx: Context,
    spending: Spending = NOBODYS,
) -> Iterator[Answer]:
    """The answer to each request, in the order of the requests, whatever the order in which they arrived; the first
    comes when all are there. As `Asker`, for those who ask once.

    Raises:
        Incomplete, UsageError, Interrupted, CorruptArtefact: as `Asker.fetch`.
    """
    with Asker(teacher, asked, retry, ctx, spending) as asker:
        asker.fetch(requests)
        asker.done()
        rest = iter(requests)
        while chunk := list(islice(rest, READ_ROWS)):
            yield from asker.answers(chunk)
