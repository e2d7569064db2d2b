"""The format of Anthropic's Messages API: the body of a request, and what a response body says."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Final

from pipeline.core.config_response import JsonSchemaResponse
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
    model go without their thinking: the API takes only thinking that it has signed. It knows no seeds.
    """
    sampling = ask.sampling
    body: dict[str, Any] = {
        "model": ask.model,
        "max_tokens": sampling.max_tokens,
        "messages": _messages(ask.turns),
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
    if ask.tools is not None:
        body["tools"] = [_tool(function) for function in ask.functions]
    if ask.thinking.tokens is not None:
        body["thinking"] = {"type": "enabled", "budget_tokens": ask.thinking.tokens}
    output_config: dict[str, Any] = {}
    if ask.thinking.effort is not None:  # newer models leave the text of their thinking out unless it is asked for
        body["thinking"] = {"type": "adaptive", "display": "summarized"}
        output_config["effort"] = ask.thinking.effort
    if isinstance(ask.form, JsonSchemaResponse):
        output_config["format"] = {"type": "json_schema", "schema": ask.form.json_schema}
    return dump_json(body | ({"output_config": output_config} if output_config else {}))


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters", {"type": "object", "properties": {}})
    kept = {name: function[name] for name in ("description", "strict") if name in function}
    return {"name": function["name"], **kept, "input_schema": schema}


def _messages(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation. What tools answered belongs to the user's turn: all of it that stands in a row in one turn,
    with the user's words behind it."""
    messages: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    for is_result, group in groupby(_with_call_ids(turns), key=lambda turn: turn.role == "tool"):
        if is_result:
            blocks = [_result(turn) for turn in group]
            messages.append({"role": "user", "content": blocks})
            continue
        for turn in group:
            if turn.role == "user" and blocks:
                blocks.append({"type": "text", "text": turn.content})
            else:
                messages.append({"role": turn.role, "content": _content(turn)})
            blocks = []
    return messages


def _with_call_ids(turns: Sequence[Message]) -> list[Message]:
    """The turns with ids for calls that have none, and for the results that answer them in their order."""
    named: list[Message] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "tool":
            call_id = turn.tool_call_id or (waiting[0] if waiting else "call_0")
            waiting = [each for each in waiting if each != call_id]
            named.append(replace(turn, tool_call_id=call_id))
            continue
        at = len(named)
        calls = tuple(replace(call, id=call.id or f"call_{at}_{nth}") for nth, call in enumerate(turn.tool_calls))
        waiting = [call.id for call in calls if call.id is not None]
        named.append(replace(turn, tool_calls=calls))
    return named


def _content(turn: Message) -> str | list[dict[str, Any]]:
    if not turn.tool_calls:
        return turn.content
    said = [{"type": "text", "text": turn.content}] if turn.content.strip() else []
    calls = (
        {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_of(call)} for call in turn.tool_calls
    )
    return [*said, *calls]


def _result(turn: Message) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": turn.tool_call_id, "content": turn.content}


@total
def read_body(body: bytes) -> Reply | Unusable:
    """What a response body of status 200 says; never raises, whatever the bytes."""
    parsed, repaired = load_json(body, exact=b'"tool_use"' in body)
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
    uses = [block for block in content if block.get("type") == "tool_use"]
    read = [tool_call(block.get("name"), block.get("input"), block.get("id")) for block in uses]
    calls = [call for call in read if call is not None]
    if not texts and not calls and finish_reason != "length":
        return Unusable("empty")
    usage = parsed["usage"] if isinstance(parsed.get("usage"), dict) else {}
    tokens = token_sum(usage, PROMPT_TOKENS), token_sum(usage, ["output_tokens"])
    thinking = "\n\n".join(_texts(content, "thinking")) or None
    model = parsed.get("model")
    return make_reply("".join(texts), thinking, finish_reason, tokens, repaired=repaired, model=model, tool_calls=calls)


def _texts(content: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """The texts of the blocks of one kind, which is also the name of their field."""
    return [block[kind] for block in content if block.get("type") == kind and isinstance(block.get(kind), str)]


def _url(base_url: str, _: str) -> str:
    return f"{base_url}/messages"


def _headers(key: str | None) -> dict[str, str]:
    return {"anthropic-version": VERSION, **({} if key is None else {"x-api-key": key})}


ANTHROPIC = Wire(name="anthropic-messages", url=_url, headers=_headers, body=request_body, read=read_body)
