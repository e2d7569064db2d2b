"""What all formats of requests and responses share: a wire, the answer that is read from it, and cleaning of text."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from pipeline.core.config_teacher import Sampling
from pipeline.core.record import Message

SANITIZED = "sanitized"
NUL = "nul"

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Reply:
    """A usable answer.

    Attributes:
        text: the completion; may be empty (the model ended at once, or was cut while reasoning).
        reasoning_content: the thinking before the text, where the server tells it apart.
        finish_reason: as the server names it ("stop", "length", …).
        prompt_tokens, completion_tokens: None where the server does not count.
        flags: `sanitized`: a lone surrogate or invalid UTF-8 became U+FFFD; `nul`: the text holds NUL.
    """

    text: str
    reasoning_content: str | None
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unusable:
    """A body without an answer, and why.

    Attributes:
        reason: `unknown`: not a completion at all (HTML, cut JSON), so perhaps not the model's doing; `bad_payload`: a
            completion without its parts; `empty`: one that says nothing; `content_filter`, `refusal`: the provider will
            not answer this; `error`: an error object.
        error: the error object, for `error`.
    """

    reason: str
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request asks, before it is put into a format.

    Attributes:
        model: the model's name at the endpoint.
        messages: the conversation that ends with the user's turn.
        sampling: how tokens are drawn, and the cap on them.
        max_tokens_field: name under which an OpenAI-compatible server takes the cap.
    """

    model: str
    messages: Sequence[Message]
    sampling: Sampling
    max_tokens_field: str = "max_tokens"


@dataclass(frozen=True, slots=True)
class Wire:
    """One format of requests and responses.

    Attributes:
        name: names the format in the response store, for ever.
        url: URL of a request, from the teacher's base URL and model.
        headers: the headers that carry an API key and what the format wants beside it; None: no key is sent.
        body: JSON of a request.
        read: what a response body of status 200 says; never raises, whatever the bytes.
    """

    name: str
    url: Callable[[str, str], str]
    headers: Callable[[str | None], dict[str, str]]
    body: Callable[[Ask], bytes]
    read: Callable[[bytes], Reply | Unusable]


def load_json(body: bytes) -> tuple[Any, bool]:
    """A body as JSON (None when it is none), and whether invalid UTF-8 had to be replaced.

    orjson refuses escaped lone surrogates, which models do produce; the slower parser takes them.
    """
    try:
        return orjson.loads(body), False
    except orjson.JSONDecodeError:
        pass
    try:
        text, repaired = body.decode("utf-8"), False
    except UnicodeDecodeError:
        text, repaired = body.decode("utf-8", "replace"), True
    try:
        return json.loads(text), repaired
    except (ValueError, RecursionError):
        return None, repaired


def text_flags(text: str, reasoning: str | None = None) -> tuple[str, ...]:
    """What is odd about a completion before it is cleaned, sorted."""
    both = text if reasoning is None else text + reasoning
    flags = [NUL] if "\0" in both else []
    return (*flags, SANITIZED) if _SURROGATES.search(both) else tuple(flags)


def clean(text: str) -> str:
    """Text that Arrow and UTF-8 can hold: each lone surrogate becomes U+FFFD; NUL stays."""
    return _SURROGATES.sub("\ufffd", text)


def token_count(value: Any) -> int | None:
    """A token count that fits the schema's int32, or None."""
    return value if type(value) is int and 0 <= value < 2**31 else None
