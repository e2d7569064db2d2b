"""What happens to answers that end at their cap: asked again under a higher one, or continued where they stop.

Each round concerns only what the rounds before it left cut; its answers are stored like all others, so that a resumed
run, or one with another policy, pays for nothing twice.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from pipeline.core.config_length import Continue, LengthPolicy, Raise
from pipeline.core.record import Message
from pipeline.teacher.lookup import look_up
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import Outcome, ResponseStore
from pipeline.teacher.wire import Reply

READ_ROWS = 16_384
"""Answers in memory at a time; each look-up reads the whole store, so few are better."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of asking.

    Attributes:
        asked: how; the cap is the round's own.
        continues: whether the model goes on with what it has written, instead of answering anew.
    """

    asked: Asked
    continues: bool = False

    def request(self, request: Request, outcome: Outcome) -> Request | None:
        """What this round asks for a request whose answer was cut; None: nothing."""
        reply = outcome.reply
        if reply is None or not outcome.is_cut:
            return None
        if not self.continues:
            return request
        if not reply.text:  # it was cut while it was thinking: there is no text to go on from
            return None
        messages = (*request.messages, Message("assistant", reply.text))
        return self.asked.request(request.prompt_set, request.prompt_id, request.sample, messages, request.tools)

    def join(self, before: Outcome, found: Outcome) -> Outcome:
        """What a row has after this round. A round that is refused (a cap beyond the model's length, say) takes nothing
        away."""
        if before.reply is None or found.reply is None:
            return before
        return Outcome(_joined(before.reply, found.reply), None) if self.continues else found


def rounds_of(asked: Asked, policy: LengthPolicy) -> tuple[Round, ...]:
    """The rounds after the first."""
    match policy:
        case Raise(caps=caps):
            return tuple(Round(_with_cap(asked, cap)) for cap in caps)
        case Continue(times=times):
            return (Round(asked, continues=True),) * times
        case _:
            return ()


def _with_cap(asked: Asked, cap: int) -> Asked:
    return replace(asked, sampling=asked.sampling.model_copy(update={"max_tokens": cap}))


def resolve(
    store: ResponseStore,
    asked: Asked,
    rounds: Sequence[Round],
    requests: Sequence[Request],
    given_up: Mapping[str, str] | None = None,
    *,
    keep_logprobs: bool = False,
) -> list[Outcome | None]:
    """What is stored for each request after these rounds; None where the first round has nothing.

    Args:
        given_up: keys that stay without an answer -> class of their failure.
        keep_logprobs: as in `ResponseStore.get_many`.
    """
    missing = given_up or {}
    outcomes = look_up(store, asked, requests, keep_logprobs=keep_logprobs)
    outcomes = [
        Outcome(None, f"gave_up:{missing[request.key]}") if outcome is None and request.key in missing else outcome
        for request, outcome in zip(requests, outcomes, strict=True)
    ]
    for each in rounds:
        further = [
            (at, again)
            for at, (request, outcome) in enumerate(zip(requests, outcomes, strict=True))
            if outcome is not None and (again := each.request(request, outcome)) is not None
        ]
        if not further:
            break
        found = look_up(store, each.asked, [request for _, request in further], keep_logprobs=keep_logprobs)
        for (at, _), outcome in zip(further, found, strict=True):
            before = outcomes[at]
            if before is not None and outcome is not None:
                outcomes[at] = each.join(before, outcome)
    return outcomes


def cut_requests(
    store: ResponseStore, asked: Asked, rounds: Sequence[Round], requests: Iterable[Request]
) -> Iterator[Request]:
    """What the last of the rounds asks: of all requests those that are still cut after the rounds before it."""
    *before, last = rounds
    rest = iter(requests)
    while chunk := list(islice(rest, READ_ROWS)):
        for request, outcome in zip(chunk, resolve(store, asked, before, chunk), strict=True):
            again = None if outcome is None else last.request(request, outcome)
            if again is not None:
                yield again


def _joined(first: Reply, second: Reply) -> Reply:
    """An answer and its continuation as one. The continuation's prompt repeats both, so its tokens do not count."""
    counts = (first.completion_tokens, second.completion_tokens)
    return replace(
        second,
        text=first.text + second.text,
        reasoning_content=first.reasoning_content,
        prompt_tokens=first.prompt_tokens,
        completion_tokens=None if None in counts else sum(count or 0 for count in counts),
        flags=tuple(sorted({*first.flags, *second.flags})),
    )
