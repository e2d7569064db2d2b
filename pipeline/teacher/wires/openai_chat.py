"""The OpenAI chat-completions format: the body of a request, and what a response body says."""

from typing import Any

from pipeline.core.record import message_dict
from pipeline.teacher.wire import Ask, Reply, Unusable, Wire, dump_json, load_json, make_reply, token_count


def request_body(ask: Ask) -> bytes:
    """JSON body of a request. What is at its neutral value is left out where some APIs refuse to see it."""
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
    if ask.thinking.effort is not None:
        body["reasoning_effort"] = ask.thinking.effort
    return dump_json(body)


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
    if isinstance(choice.get("error"), dict):  # OpenRouter says so where a provider behind it failed
        return Unusable("error", choice["error"])
    if finish_reason == "content_filter":
        return Unusable("content_filter")
    if not isinstance(message, dict) or not isinstance(finish_reason, str) or not finish_reason:
        return Unusable("bad_payload")
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        return Unusable("refusal")
    text, reasoning = _parts(message.get("content"))
    reasoning = message.get("reasoning_content") or message.get("reasoning") or reasoning
    if text is None and isinstance(reasoning, str) and finish_reason == "length":
        text = ""  # cut while it was thinking: an answer that later stages judge by its finish reason
    if text is None:
        return Unusable("empty")
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        return Unusable("bad_payload")
    usage = usage if isinstance(usage, dict) else {}
    tokens = token_count(usage.get("prompt_tokens")), token_count(usage.get("completion_tokens"))
    total = token_count(usage.get("total_tokens"))
    return make_reply(text, reasoning, finish_reason, tokens, repaired=repaired, total_tokens=total)


def _parts(content: Any) -> tuple[Any, str | None]:
    """Text and thinking of a content that is a list of parts, as Mistral's reasoning models give it; other contents
    are given back as they are."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content, None
    texts = [part["text"] for part in content if part.get("type") == "text" and isinstance(part.get("text"), str)]
    inner = [_parts(part.get("thinking"))[0] for part in content if part.get("type") == "thinking"]
    thinking = "".join(text for text in inner if isinstance(text, str))
    return "".join(texts) if texts else None, thinking or None


def _url(base_url: str, _: str) -> str:
    return f"{base_url}/chat/completions"


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


OPENAI_CHAT = Wire(name="openai-chat", url=_url, headers=_headers, body=request_body, read=read_body)
