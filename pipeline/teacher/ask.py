"""The one door through which stages get answers from a teacher."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from pipeline.core.config_budget import Spending
from pipeline.core.config_teacher import ReplayTeacher, Retry, Teacher
from pipeline.core.errors import Incomplete
from pipeline.core.stage import Context, check_cancelled
from pipeline.teacher.fetch import fetch_missing
from pipeline.teacher.reasoning import split_reasoning, tags_of
from pipeline.teacher.replay import replay
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import Outcome, ResponseStore

NOBODYS = Spending()
READ_ROWS = 16_384
"""Answers in memory at a time; each look-up reads the whole store, so few are better."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request.

    Attributes:
        key: the request's key.
        rejected: reason for which the teacher gives no answer to it; None if there is one.
        text, reasoning_content, finish_reason, prompt_tokens, completion_tokens, flags: as in `wire.Reply`, except
            that thinking inside the text is split off where the teacher declares `reasoning_tags`; empty for a
            rejected request.
    """

    key: str
    rejected: str | None
    text: str = ""
    reasoning_content: str | None = None
    finish_reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    flags: tuple[str, ...] = ()


def ask(
    teacher: Teacher,
    asked: Asked,
    retry: Retry,
    requests: Iterable[Request],
    ctx: Context,
    spending: Spending = NOBODYS,
) -> Iterator[Answer]:
    """The answer to each request, in the order of the requests, whatever the order in which they arrived.

    Nothing is asked whose answer is stored under `ctx.data`, and no server is started when all are. The first answer
    comes when all are there. `ctx.progress` is advanced by one per request; the caller starts it.

    Args:
        asked: made with `Asked.of`; the requests' keys come from it.
        requests: iterated twice, so a list or an object that makes a new iterator each time.
        spending: whose budget the requests count in.

    Raises:
        Incomplete: rows stay pending (the teacher is down, a quota or the budget is used up); answers are kept.
        UsageError: the teacher cannot be asked like this: wrong key, URL, model or file.
        Interrupted: a signal asked us to stop.
        CorruptArtefact: a file of stored answers is damaged.
    """
    if iter(requests) is requests:
        raise TypeError("requests are iterated twice: give a list, not an iterator")
    if isinstance(teacher, ReplayTeacher):
        outcomes = replay(teacher, requests, ctx)
        yield from (_answer(request, outcome, None) for request, outcome in zip(requests, outcomes, strict=True))
        return
    with ResponseStore(ctx.data / "responses", check=partial(check_cancelled, ctx)) as store:
        fetch_missing(store, teacher, asked, retry, requests, ctx, spending)
        store.fold()
        yield from _read(store, asked, requests, tags_of(teacher))


def _read(
    store: ResponseStore, asked: Asked, requests: Iterable[Request], tags: tuple[str, str] | None
) -> Iterator[Answer]:
    rest = iter(requests)
    while chunk := list(islice(rest, READ_ROWS)):
        wanted = {bytes.fromhex(request.key): asked.sampling.max_tokens for request in chunk}
        found = store.get_many(wanted, asked.room)
        for request in chunk:
            outcome = found.get(bytes.fromhex(request.key))
            if outcome is None:
                what = "a stored answer has disappeared while it was being read"
                raise Incomplete(what, where=f"request {request.key}", todo="run again: it will be asked for")
            yield _answer(request, outcome, tags)


def _answer(request: Request, outcome: Outcome, tags: tuple[str, str] | None) -> Answer:
    reply = outcome.reply
    if reply is None:
        return Answer(request.key, outcome.rejected)
    text, reasoning = reply.text, reply.reasoning_content
    if tags is not None and reasoning is None:
        reasoning, text = split_reasoning(text, reply.finish_reason, tags)
    return Answer(
        key=request.key,
        rejected=None,
        text=text,
        reasoning_content=reasoning,
        finish_reason=reply.finish_reason,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        flags=reply.flags,
    )
