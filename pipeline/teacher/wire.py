"""The OpenAI chat-completions format: the body of a request, and what a response body says."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from pipeline.core.config_teacher import Sampling
from pipeline.core.record import Message, message_dict

WIRE = "openai-chat"
"""Name of this format in the response store."""

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


def request_body(
    model: str, messages: Sequence[Message], sampling: Sampling, max_tokens_field: str = "max_tokens"
) -> bytes:
    """JSON body of a request. What is at its neutral value is left out where some APIs refuse to see it.

    Lone surrogates in a prompt travel as U+FFFD: JSON in UTF-8 has no form for them.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [message_dict(message) for message in messages],
        max_tokens_field: sampling.max_tokens,
    }
    if sampling.temperature is not None:
        body["temperature"] = sampling.temperature
    if sampling.top_p is not None:
        body["top_p"] = sampling.top_p
    if sampling.top_k is not None:
        body["top_k"] = sampling.top_k
    if sampling.presence_penalty != 0:
        body["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty != 0:
        body["frequency_penalty"] = sampling.frequency_penalty
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        body["messages"] = [{key: clean(text) for key, text in message.items()} for message in body["messages"]]
        return orjson.dumps(body)


def read_body(body: bytes) -> Reply | Unusable:
    """What a response body of status 200 says; never raises, whatever the bytes."""
    parsed, repaired = load_json(body)
    if not isinstance(parsed, dict):
        return Unusable("unknown")
    if isinstance(parsed.get("error"), dict | str):
        error = parsed["error"]
        return Unusable("error", error if isinstance(error, dict) else {"message": error})
    choices = parsed.get("choices")
    if not isinstance(choices, list):
        return Unusable("unknown")
    choice = choices[0] if choices else None
    if not isinstance(choice, dict):
        return Unusable("empty")
    return _read_choice(choice, parsed.get("usage"), repaired)


def _read_choice(choice: dict[str, Any], usage: Any, repaired: bool) -> Reply | Unusable:
    finish_reason, message = choice.get("finish_reason"), choice.get("message")
    if finish_reason == "content_filter":
        return Unusable("content_filter")
    if not isinstance(message, dict) or not isinstance(finish_reason, str) or not finish_reason:
        return Unusable("bad_payload")
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        return Unusable("refusal")
    text = message.get("content")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if text is None and isinstance(reasoning, str) and finish_reason == "length":
        text = ""  # cut while it was thinking: an answer that later stages judge by its finish reason
    if text is None:
        return Unusable("empty")
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        return Unusable("bad_payload")
    return _reply(text, reasoning, finish_reason, usage if isinstance(usage, dict) else {}, repaired)


def _reply(text: str, reasoning: str | None, finish_reason: str, usage: dict[str, Any], repaired: bool) -> Reply:
    flags = text_flags(text, reasoning)
    if repaired and SANITIZED not in flags:
        flags = tuple(sorted((*flags, SANITIZED)))
    return Reply(
        text=clean(text),
        reasoning_content=None if reasoning is None else clean(reasoning),
        finish_reason=clean(finish_reason),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        flags=flags,
    )


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


def _count(value: Any) -> int | None:
    """A token count that fits the schema's int32, or None."""
    return value if type(value) is int and 0 <= value < 2**31 else None
