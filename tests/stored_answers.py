"""Answers for tests of the response store's commands: made by hand, stored, and found again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Attempt, Ended, Stored
from pipeline.teacher.walk import answers_by_key
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT


def key(name: str) -> bytes:
    """The request key of a name."""
    return hashlib.sha256(name.encode()).digest()


def body(text: str | None, finish: str = "stop", tokens: tuple[int, int] | None = (7, 3)) -> bytes:
    """A response with a text, or with none."""
    usage = {} if tokens is None else {"usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}}
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}], **usage}).encode()


PLAIN = Stored(key("a"), 64, 1000, "t" * 64, "m", "vllm 1", OPENAI_CHAT.name, 200, None, body("fine"))


def answer(name: str, **changes: object) -> Stored:
    """The answer to the request of a name."""
    return replace(PLAIN, key=key(name), **changes)  # type: ignore[arg-type]


def store(folder: Path, *answers: Stored, fold: bool = True, cost: int | None = None) -> None:
    """Put answers, with an attempt each, into `data/responses`.

    Args:
        fold: into a folded file; else they stay in a segment whose writer has gone.
        cost: of each attempt, in nano-dollars.
    """
    attempts = [Attempt(number, each.key, each.cap, each.stored_ms) for number, each in enumerate(answers, 1)]
    ends = [Ended(attempt.id, "answer", cost=cost) for attempt in attempts]
    with ResponseStore(folder) as responses:
        responses.put(intents=attempts)
        responses.put(answers, outcomes=ends)
        if fold:
            responses.fold()


def stored(folder: Path) -> list[Stored]:
    """All that is stored, in the order of the keys."""
    return [found.stored for _, group in answers_by_key(folder) for found in group]


def by_key(answers: Sequence[Stored]) -> list[Stored]:
    """In the order in which they are stored."""
    return sorted(answers, key=lambda each: (each.key, each.stored_ms))
