"""The format of the Gemini API's `generateContent`: the body of a request, and what a response body says."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from pipeline.core.config_response import ChoiceResponse, JsonSchemaResponse
from pipeline.core.record import Message
from pipeline.teacher.wire import (
    Ask,
    Reply,
    Unusable,
    Wire,
    arguments_of,
    dump_json,
    load_json,
    make_reply,
    token_sum,
    tool_call,
    total,
)

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
    body: dict[str, Any] = {"contents": _contents(ask.turns)}
    if ask.system is not None:
        body["systemInstruction"] = {"parts": [{"text": ask.system}]}
    if ask.tools is not None:
        body["tools"] = [{"functionDeclarations": [_declaration(function) for function in ask.functions]}]
    return dump_json({**body, "generationConfig": _generation_config(ask)})


def _declaration(function: Mapping[str, Any]) -> dict[str, Any]:
    declared = {name: function[name] for name in ("name", "description") if name in function}
    return declared | ({"parametersJsonSchema": function["parameters"]} if "parameters" in function else {})


def _contents(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation. What tools answered belongs to the user's turn, all of it that stands in a row in one turn, and
    goes by the name of the function, not by an id. Not covered: thought signatures, which Gemini 3 wants back with the
    calls of an unfinished turn."""
    contents: list[dict[str, Any]] = []
    names: list[tuple[str | None, str]] = []
    for is_result, group in groupby(turns, key=lambda turn: turn.role == "tool"):
        if is_result:
            contents.append({"role": "user", "parts": _results([*group], names)})
            continue
        for turn in group:
            names = [(call.id, call.name) for call in turn.tool_calls]
            contents.append(_content(turn))
    return contents


def _content(turn: Message) -> dict[str, Any]:
    calls = [{"functionCall": {"name": call.name, "args": arguments_of(call)}} for call in turn.tool_calls]
    said = [{"text": turn.content}] if turn.content or not calls else []
    return {"role": "model" if turn.role == "assistant" else "user", "parts": [*said, *calls]}


def _results(turns: Sequence[Message], names: Sequence[tuple[str | None, str]]) -> list[dict[str, Any]]:
    """The results of calls.

    Args:
        names: id and function of the calls before them, in their order.
    """
    by_id = {call_id: name for call_id, name in names if call_id is not None}
    parts = []
    for nth, turn in enumerate(turns):
        in_order = names[nth][1] if nth < len(names) else "tool"
        name = by_id.get(turn.tool_call_id or "") or turn.name or in_order
        answer, _ = load_json(turn.content.encode("utf-8", "surrogatepass"))
        response = answer if isinstance(answer, dict) else {"result": turn.content}
        parts.append({"functionResponse": {"name": name, "response": response}})
    return parts


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
    if ask.seed is not None:
        config["seed"] = ask.seed
    if ask.logprobs is not None:
        config |= {"responseLogprobs": True, "logprobs": ask.logprobs.sent}
    match ask.form:
        case JsonSchemaResponse(json_schema=schema):
            config |= {"responseMimeType": "application/json", "responseJsonSchema": schema}
        case ChoiceResponse(choices=choices):
            config |= {"responseMimeType": "text/x.enum", "responseSchema": {"type": "STRING", "enum": [*choices]}}
    return config


@total
def read_body(body: bytes) -> Reply | Unusable:
    """What a response body of status 200 says; never raises, whatever the bytes."""
    parsed, repaired = load_json(body, exact=b'"functionCall"' in body)
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
    return _read_candidate(candidate, parsed, repaired)


def _read_candidate(candidate: dict[str, Any], parsed: dict[str, Any], repaired: bool) -> Reply | Unusable:
    reason, content = candidate.get("finishReason"), candidate.get("content")
    if reason in FILTERED:
        return Unusable("content_filter")
    parts = content.get("parts", []) if isinstance(content, dict) else []
    if not isinstance(reason, str) or not reason or not isinstance(parts, list):
        return Unusable("bad_payload")
    texts, thoughts = _texts(parts, thought=False), _texts(parts, thought=True)
    finish_reason = FINISH_REASONS.get(reason, reason.lower())
    given = [part["functionCall"] for part in parts if isinstance(part, dict) and "functionCall" in part]
    if finish_reason == "stop" and given:
        finish_reason = "tool_calls"
    read = [tool_call(call.get("name"), call.get("args"), call.get("id")) for call in given if isinstance(call, dict)]
    calls = [call for call in read if call is not None]
    if not texts and not calls and finish_reason != "length":
        return Unusable("empty")
    usage = parsed["usageMetadata"] if isinstance(parsed.get("usageMetadata"), dict) else {}
    tokens = token_sum(usage, PROMPT_TOKENS), token_sum(usage, COMPLETION_TOKENS)
    model = parsed.get("modelVersion")
    thinking = "".join(thoughts) or None
    return make_reply("".join(texts), thinking, finish_reason, tokens, repaired=repaired, model=model, tool_calls=calls)


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
