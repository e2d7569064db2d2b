"""What is stored already of what is to be asked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import Outcome, ResponseStore

LOOKUP_ROWS = 65_536
"""Requests that are looked up at a time. Each look-up reads the whole store: their keys lie anywhere in it."""


@dataclass(frozen=True, slots=True)
class Looked:
    """A chunk of requests after the look-up in the response store; `cut` are those of the answered that a cap ended."""

    misses: list[Request]
    answered: int
    rejected: int
    cut: int = 0


def look_up(
    store: ResponseStore, asked: Asked, requests: Sequence[Request], *, keep_logprobs: bool = False
) -> list[Outcome | None]:
    """What is stored for each request that stands for it; None: nothing.

    Args:
        keep_logprobs: as in `ResponseStore.get_many`.
    """
    keys = [bytes.fromhex(request.key) for request in requests]
    caps = dict.fromkeys(keys, asked.sampling.max_tokens)
    found = store.get_many(caps, asked.room, asked.logprobs, keep_logprobs=keep_logprobs)
    outcomes = [found.get(key) for key in keys]
    return [
        None if outcome is None else outcome.as_asked(offers_tools=request.tools is not None)
        for request, outcome in zip(requests, outcomes, strict=True)
    ]


def look_up_all(store: ResponseStore, asked: Asked, requests: Iterable[Request]) -> Iterator[Looked]:
    """The same for any number of requests, chunk by chunk."""
    rest = iter(requests)
    while chunk := list(islice(rest, LOOKUP_ROWS)):
        outcomes = look_up(store, asked, chunk)
        hits = [outcome for outcome in outcomes if outcome is not None]
        yield Looked(
            misses=[request for request, outcome in zip(chunk, outcomes, strict=True) if outcome is None],
            answered=sum(outcome.rejected is None for outcome in hits),
            rejected=sum(outcome.rejected is not None for outcome in hits),
            cut=sum(outcome.is_cut for outcome in hits),
        )
