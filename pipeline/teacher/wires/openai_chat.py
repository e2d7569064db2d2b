"""The OpenAI chat-completions format: the body of a request, and what a response body says."""

from typing import Any

import orjson

from pipeline.core.config_response import ChoiceResponse, JsonSchemaResponse, RegexResponse, ResponseForm
from pipeline.core.record import message_dict
from pipeline.teacher.wire import (
    Ask,
    Reply,
    Unusable,
    Wire,
    dump_json,
    load_json,
    make_reply,
    read_calls,
    token_count,
    total,
)


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
    if ask.seed is not None:
        body["seed"] = ask.seed
    if ask.messages[-1].role == "assistant":  # vLLM's names for going on where an answer was cut
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    if ask.tools is not None:
        body["tools"] = orjson.loads(ask.tools)
    return dump_json(body | _form(ask) | _logprobs(ask))


def _logprobs(ask: Ask) -> dict[str, Any]:
    """What asks for logprobs. Two accounts of vLLM's token ids, so that one can be checked with the other."""
    if ask.logprobs is None:
        return {}
    ids = {"return_tokens_as_token_ids": True, "return_token_ids": True} if ask.logprobs.ids else {}
    return {"logprobs": True, "top_logprobs": ask.logprobs.sent, **ids}


def _form(ask: Ask) -> dict[str, Any]:
    """What tells the server of the answer's form; what OpenAI's format does not know, config_refusals.py refuses."""
    if ask.structured_outputs == "vllm":
        return {} if ask.form is None else {"structured_outputs": _constraint(ask.form)}
    if not isinstance(ask.form, JsonSchemaResponse):
        return {}
    schema = {"name": ask.form.name, "schema": ask.form.json_schema, "strict": ask.form.strict}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _constraint(form: ResponseForm) -> dict[str, Any]:
    """The fields of vLLM's `StructuredOutputsParams`."""
    match form:
        case JsonSchemaResponse(json_schema=schema):
            return {"json": schema}
        case RegexResponse(pattern=pattern):
            return {"regex": pattern}
        case ChoiceResponse(choices=choices):
            return {"choice": [*choices]}


@total
def read_body(body: bytes) -> Reply | Unusable:
    """What a response body of status 200 says; never raises, whatever the bytes."""
    plain = _without_logprobs(body)
    parsed, repaired = load_json(plain, exact=b'"tool_calls"' in plain)
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
    return _read_choice(choice, parsed, repaired)


def _without_logprobs(body: bytes) -> bytes:
    """A body without the logprobs that vLLM writes into it, which are nearly all of it and cost 100 times as much to
    parse as the rest; other bodies as they are. Both marks hold bare quotes, so that no text can hold them."""
    start = body.find(b'"logprobs":{"content":[{')
    end = -1 if start < 0 else body.find(b']},"finish_reason":', start)
    return body if end < 0 else b'%b"logprobs":null%b' % (body[:start], body[end + 2 :])


def _read_choice(choice: dict[str, Any], parsed: dict[str, Any], repaired: bool) -> Reply | Unusable:
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
    calls = read_calls(message.get("tool_calls"))
    if text is None and calls:
        text = ""
    if text is None:
        return Unusable("empty")
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        return Unusable("bad_payload")
    usage = parsed["usage"] if isinstance(parsed.get("usage"), dict) else {}
    tokens = token_count(usage.get("prompt_tokens")), token_count(usage.get("completion_tokens"))
    total = token_count(usage.get("total_tokens"))
    return make_reply(
        text,
        reasoning,
        finish_reason,
        tokens,
        repaired=repaired,
        total_tokens=total,
        model=parsed.get("model"),
        fingerprint=parsed.get("system_fingerprint"),
        tool_calls=calls,
    )


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
