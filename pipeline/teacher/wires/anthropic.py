"""The format of Anthropic's Messages API: the body of a request, and what a response body says."""

from collections.abc import Sequence
from typing import Any, Final

from pipeline.teacher.wire import Ask, Reply, Thinking, Unusable, Wire, dump_json, load_json, make_reply, token_sum

VERSION: Final = "2023-06-01"
FINISH_REASONS: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}
"""Stop reasons by the names they have in our rows; others keep their own."""
PROMPT_TOKENS: Final = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def request_body(ask: Ask) -> bytes:
    """JSON body of a request. The API knows no penalties; config_refusals.py refuses a config that sets one.

    `top_p` of 1 is neutral and left out, since newer models refuse to be given it beside a temperature. Turns of the
    model go without their thinking: the API takes only thinking that it has signed.
    """
    sampling = ask.sampling
    body: dict[str, Any] = {
        "model": ask.model,
        "max_tokens": sampling.max_tokens,
        "messages": [{"role": turn.role, "content": turn.content} for turn in ask.turns],
    }
    if ask.system is not None:
        body["system"] = ask.system
    if sampling.temperature is not None:
        body["temperature"] = sampling.temperature
    if sampling.top_p is not None and sampling.top_p != 1:
        body["top_p"] = sampling.top_p
    if sampling.top_k is not None:
        body["top_k"] = sampling.top_k
    if sampling.stop:
        body["stop_sequences"] = list(sampling.stop)
    return dump_json(body | _thinking(ask.thinking))


def _thinking(thinking: Thinking) -> dict[str, Any]:
    if thinking.tokens is not None:
        return {"thinking": {"type": "enabled", "budget_tokens": thinking.tokens}}
    if thinking.effort is not None:  # newer models leave the text of their thinking out unless it is asked for
        return {
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {"effort": thinking.effort},
        }
    return {}


def read_body(body: bytes) -> Reply | Unusable:
    """What a response body of status 200 says; never raises, whatever the bytes."""
    parsed, repaired = load_json(body)
    if not isinstance(parsed, dict):
        return Unusable("unknown")
    if isinstance(parsed.get("error"), dict):
        return Unusable("error", parsed["error"])
    content, stop_reason = parsed.get("content"), parsed.get("stop_reason")
    if not isinstance(content, list):
        return Unusable("unknown")
    if stop_reason == "refusal":
        return Unusable("refusal")
    if not isinstance(stop_reason, str) or not stop_reason or not all(isinstance(block, dict) for block in content):
        return Unusable("bad_payload")
    finish_reason = FINISH_REASONS.get(stop_reason, stop_reason.lower())
    texts = _texts(content, "text")
    if not texts and finish_reason != "length":
        return Unusable("empty")
    usage = parsed["usage"] if isinstance(parsed.get("usage"), dict) else {}
    tokens = token_sum(usage, PROMPT_TOKENS), token_sum(usage, ["output_tokens"])
    thinking = "\n\n".join(_texts(content, "thinking")) or None
    return make_reply("".join(texts), thinking, finish_reason, tokens, repaired=repaired)


def _texts(content: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """The texts of the blocks of one kind, which is also the name of their field."""
    return [block[kind] for block in content if block.get("type") == kind and isinstance(block.get(kind), str)]


def _url(base_url: str, _: str) -> str:
    return f"{base_url}/messages"


def _headers(key: str | None) -> dict[str, str]:
    return {"anthropic-version": VERSION, **({} if key is None else {"x-api-key": key})}


ANTHROPIC = Wire(name="anthropic-messages", url=_url, headers=_headers, body=request_body, read=read_body)
