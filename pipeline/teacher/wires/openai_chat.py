"""The OpenAI chat-completions format: the body of a request, and what a response body says."""

from typing import Any

import orjson

from pipeline.core.record import message_dict
from pipeline.teacher.wire import SANITIZED, Ask, Reply, Unusable, Wire, clean, load_json, text_flags, token_count


def request_body(ask: Ask) -> bytes:
    """JSON body of a request. What is at its neutral value is left out where some APIs refuse to see it.

    Lone surrogates in a prompt travel as U+FFFD: JSON in UTF-8 has no form for them.
    """
    sampling = ask.sampling
    body: dict[str, Any] = {
        "model": ask.model,
        "messages": [message_dict(message) for message in ask.messages],
        ask.max_tokens_field: sampling.max_tokens,
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
        prompt_tokens=token_count(usage.get("prompt_tokens")),
        completion_tokens=token_count(usage.get("completion_tokens")),
        flags=flags,
    )


def _url(base_url: str, _: str) -> str:
    return f"{base_url}/chat/completions"


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


OPENAI_CHAT = Wire(name="openai-chat", url=_url, headers=_headers, body=request_body, read=read_body)
