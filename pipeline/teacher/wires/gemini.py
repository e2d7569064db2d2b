"""The format of the Gemini API's `generateContent`: the body of a request, and what a response body says."""

from collections.abc import Sequence
from typing import Any, Final

from pipeline.core.record import Message
from pipeline.teacher.wire import Ask, Reply, Unusable, Wire, dump_json, load_json, make_reply, token_sum

FINISH_REASONS: Final = {"STOP": "stop", "MAX_TOKENS": "length"}
"""Finish reasons by the names they have in our rows; others keep their own, in lower case."""
FILTERED: Final = frozenset(
    {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT"}
)
PROMPT_TOKENS: Final = ("promptTokenCount", "toolUsePromptTokenCount")
COMPLETION_TOKENS: Final = ("candidatesTokenCount", "thoughtsTokenCount")
"""Thinking is billed as output and counts in the cap."""


def request_body(ask: Ask) -> bytes:
    """JSON body of a request. `topP` of 1 is sent: the models' own default is another."""
    body: dict[str, Any] = {"contents": [_content(turn) for turn in ask.turns]}
    if ask.system is not None:
        body["systemInstruction"] = {"parts": [{"text": ask.system}]}
    return dump_json({**body, "generationConfig": _generation_config(ask)})


def _content(turn: Message) -> dict[str, Any]:
    return {"role": "model" if turn.role == "assistant" else "user", "parts": [{"text": turn.content}]}


def _generation_config(ask: Ask) -> dict[str, Any]:
    sampling = ask.sampling
    config: dict[str, Any] = {"maxOutputTokens": sampling.max_tokens}
    if sampling.temperature is not None:
        config["temperature"] = sampling.temperature
    if sampling.top_p is not None:
        config["topP"] = sampling.top_p
    if sampling.top_k is not None:
        config["topK"] = sampling.top_k
    if sampling.presence_penalty != 0:
        config["presencePenalty"] = sampling.presence_penalty
    if sampling.frequency_penalty != 0:
        config["frequencyPenalty"] = sampling.frequency_penalty
    if sampling.stop:
        config["stopSequences"] = list(sampling.stop)
    if ask.thinking.tokens is not None:
        config["thinkingConfig"] = {"thinkingBudget": ask.thinking.tokens, "includeThoughts": ask.thinking.tokens > 0}
    if ask.thinking.effort is not None:
        config["thinkingConfig"] = {"thinkingLevel": ask.thinking.effort, "includeThoughts": True}
    return config


def read_body(body: bytes) -> Reply | Unusable:
    """What a response body of status 200 says; never raises, whatever the bytes."""
    parsed, repaired = load_json(body)
    if not isinstance(parsed, dict):
        return Unusable("unknown")
    if isinstance(parsed.get("error"), dict):
        return Unusable("error", parsed["error"])
    feedback, candidates = parsed.get("promptFeedback"), parsed.get("candidates")
    if isinstance(feedback, dict) and feedback.get("blockReason"):
        return Unusable("content_filter")
    if not isinstance(candidates, list):
        return Unusable("empty" if "usageMetadata" in parsed else "unknown")
    candidate = candidates[0] if candidates else None
    if not isinstance(candidate, dict):
        return Unusable("empty")
    return _read_candidate(candidate, parsed.get("usageMetadata"), repaired)


def _read_candidate(candidate: dict[str, Any], usage: Any, repaired: bool) -> Reply | Unusable:
    reason, content = candidate.get("finishReason"), candidate.get("content")
    if reason in FILTERED:
        return Unusable("content_filter")
    parts = content.get("parts", []) if isinstance(content, dict) else []
    if not isinstance(reason, str) or not reason or not isinstance(parts, list):
        return Unusable("bad_payload")
    texts, thoughts = _texts(parts, thought=False), _texts(parts, thought=True)
    finish_reason = FINISH_REASONS.get(reason, reason.lower())
    if finish_reason == "stop" and any(isinstance(part, dict) and "functionCall" in part for part in parts):
        finish_reason = "tool_calls"
    if not texts and finish_reason != "length":
        return Unusable("empty")
    usage = usage if isinstance(usage, dict) else {}
    tokens = token_sum(usage, PROMPT_TOKENS), token_sum(usage, COMPLETION_TOKENS)
    return make_reply("".join(texts), "".join(thoughts) or None, finish_reason, tokens, repaired=repaired)


def _texts(parts: Sequence[Any], *, thought: bool) -> list[str]:
    """The texts of the parts that are thoughts, or of those that are not."""
    texts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return [part["text"] for part in texts if (part.get("thought") is True) == thought]


def _url(base_url: str, model: str) -> str:
    name = model if "/" in model else f"models/{model}"
    return f"{base_url}/{name}:generateContent"


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"x-goog-api-key": key}  # never `?key=`: URLs are logged


GEMINI = Wire(name="gemini-generate", url=_url, headers=_headers, body=request_body, read=read_body)
