"""What all formats of requests and responses share: a wire, the answer that is read from it, and cleaning of text."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from operator import ne
from typing import Any

import orjson

from pipeline.core.config_api import StructuredOutputs
from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.config_response import ResponseForm
from pipeline.core.config_teacher import Sampling
from pipeline.core.record import Message, ToolCall

SANITIZED = "sanitized"
NUL = "nul"
NAME_CHARS = 200
"""Most characters that are kept of a name that a provider gives."""

MAX_DEPTH = 200
"""Deepest nesting of arguments that are sent as an object; orjson writes 254 levels, all of the request included."""

_SURROGATES = re.compile("[\ud800-\udfff]")
_LONG_INTEGER = re.compile(rb"[0-9]{19}")
"""What may be an integer that takes more than 64 bits; orjson reads these as floats."""


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Reply:
    """A usable answer.

    Attributes:
        text: the completion; may be empty (the model ended at once, or was cut while reasoning).
        reasoning_content: the thinking before the text, where the server tells it apart.
        finish_reason: as the server names it ("stop", "length", …).
        prompt_tokens, completion_tokens: None where the server does not count.
        flags: `sanitized`: a lone surrogate or invalid UTF-8 became U+FFFD; `nul`: the text holds NUL.
        apart_tokens: output that is billed beside `completion_tokens`: some servers count reasoning only in the total.
        model, fingerprint: of what answered, in the provider's words; None where it does not say.
        tool_calls: functions that the model calls; the text is empty then, or what it says beside.
    """

    text: str
    reasoning_content: str | None
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    flags: tuple[str, ...]
    apart_tokens: int = 0
    model: str | None = None
    fingerprint: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def is_only_calls(self) -> bool:
        """Whether the model calls functions and says nothing: no answer to a request that offered none."""
        return bool(self.tool_calls) and not self.text

    @property
    def output_tokens(self) -> int | None:
        """All output tokens that are billed."""
        return None if self.completion_tokens is None else self.completion_tokens + self.apart_tokens


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
class Thinking:
    """How much a model is asked to think before it answers; each API takes one of the two.

    Attributes:
        tokens: budget, part of the cap on completion tokens; 0: none at all. None: not told.
        effort: in the API's own words. None: not told.
    """

    tokens: int | None = None
    effort: str | None = None


DEFAULT_THINKING = Thinking()
"""As the model is used to."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request asks, before it is put into a format.

    Attributes:
        model: the model's name at the endpoint.
        messages: the conversation that ends with the user's turn.
        sampling: how tokens are drawn, and the cap on them.
        max_tokens_field: name under which an OpenAI-compatible server takes the cap.
        thinking: how much it is to think.
        tools: JSON of the functions that it may call, in OpenAI's form; None: none.
        form: what form the answer must have, its schema read into it; None: free text.
        structured_outputs: how an OpenAI-compatible server is told of the form.
        seed: of the draw; None: not told, or the API knows none.
        logprobs: how many are asked for, and in which form; None: none.
    """

    model: str
    messages: Sequence[Message]
    sampling: Sampling
    max_tokens_field: str = "max_tokens"
    thinking: Thinking = DEFAULT_THINKING
    tools: str | None = None
    form: ResponseForm | None = None
    structured_outputs: StructuredOutputs = "openai"
    seed: int | None = None
    logprobs: LogprobsAsked | None = None

    @property
    def system(self) -> str | None:
        """The system messages in one, for APIs that take them apart from the conversation; None without any."""
        texts = [message.content for message in self.messages if message.role == "system"]
        return "\n\n".join(texts) if texts else None

    @property
    def functions(self) -> list[dict[str, Any]]:
        """What the tools say of their functions: name, description, parameters."""
        return [] if self.tools is None else [tool["function"] for tool in orjson.loads(self.tools)]

    @property
    def turns(self) -> list[Message]:
        """The conversation without its system messages."""
        return [message for message in self.messages if message.role != "system"]


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


def total(read: Callable[[bytes], Reply | Unusable]) -> Callable[[bytes], Reply | Unusable]:
    """A reader of bodies that never raises: what is nested deeper than Python can follow is no completion."""

    @wraps(read)
    def guarded(body: bytes) -> Reply | Unusable:
        try:
            return read(body)
        except RecursionError:
            return Unusable("bad_payload")

    return guarded


def load_json(body: bytes, *, exact: bool = False) -> tuple[Any, bool]:
    """A body as JSON (None when it is none), and whether invalid UTF-8 had to be replaced.

    orjson refuses escaped lone surrogates, which models do produce; the slower parser takes them.

    Args:
        exact: integers of more than 64 bits are kept, too; else they become floats.
    """
    try:
        loaded = orjson.loads(body)
        return (_exact(body, loaded) if exact and _LONG_INTEGER.search(body) else loaded), False
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


def _exact(body: bytes, otherwise: Any) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # more digits or levels than Python takes
        return otherwise


def dump_json(body: Any) -> bytes:
    """A request's body. Lone surrogates travel as U+FFFD: JSON in UTF-8 has no form for them.

    Raises:
        RecursionError: it is nested deeper than Python can follow.
    """
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        return clean(_json_text(body)).encode()


def body_in_line(body: Any) -> bytes:
    """A response's body that came inside a line of a batch's results, as a body of its own: null where it is nested
    deeper than Python can follow."""
    try:
        return json.dumps(body, separators=(",", ":")).encode()
    except RecursionError:
        return b"null"


def _json_text(value: Any) -> str:
    """A value as JSON, whatever orjson makes of it: lone surrogates (they stay), integers of more than 64 bits, and
    more than 254 levels. What is no number becomes null, as orjson has it."""
    try:
        return _dumps(value)
    except ValueError:
        return _dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def make_reply(
    text: str,
    reasoning: str | None,
    finish_reason: str,
    tokens: tuple[int | None, int | None],
    *,
    repaired: bool,
    total_tokens: int | None = None,
    model: Any = None,
    fingerprint: Any = None,
    tool_calls: Sequence[ToolCall] = (),
) -> Reply:
    """A reply whose texts Arrow can hold, with the flags that say what was odd about them.

    Args:
        tokens: of the prompt and of the completion.
        repaired: invalid UTF-8 had to be replaced in the body.
        total_tokens: of prompt and completion, where the server counts it on its own.
        model, fingerprint: as the body says; what is no text, or an empty one, counts as unsaid.
        tool_calls: as `tool_call` gives them; of their texts, too, a replaced one is flagged.
    """
    flags = text_flags(text, reasoning)
    cleaned = tuple(map(_clean_call, tool_calls))
    repaired = repaired or any(map(ne, tool_calls, cleaned))
    prompt, completion = tokens
    known = None not in (prompt, completion, total_tokens)
    if repaired and SANITIZED not in flags:
        flags = tuple(sorted((*flags, SANITIZED)))
    return Reply(
        text=clean(text),
        reasoning_content=None if reasoning is None else clean(reasoning),
        finish_reason=clean(finish_reason),
        prompt_tokens=prompt,
        completion_tokens=completion,
        flags=flags,
        apart_tokens=max(0, (total_tokens or 0) - (prompt or 0) - (completion or 0)) if known else 0,
        model=name_or_none(model),
        fingerprint=name_or_none(fingerprint),
        tool_calls=cleaned,
    )


def _clean_call(call: ToolCall) -> ToolCall:
    call_id = None if call.id is None else clean(call.id)
    return replace(call, name=clean(call.name), arguments=clean(call.arguments), id=call_id)


def tool_call(name: Any, arguments: Any, call_id: Any) -> ToolCall | None:
    """A call as an answer gives it, lone surrogates included; None for what names no function.

    Args:
        arguments: JSON text, kept as it is, or what such a text would say.

    Raises:
        RecursionError: the arguments are nested deeper than Python can follow.
    """
    if not isinstance(name, str) or not name:
        return None
    text = arguments if isinstance(arguments, str) else _arguments_text({} if arguments is None else arguments)
    return ToolCall(name, text, call_id if isinstance(call_id, str) and call_id else None)


def _arguments_text(arguments: Any) -> str:
    try:
        return orjson.dumps(arguments).decode()
    except orjson.JSONEncodeError:
        return _json_text(arguments)


def read_calls(given: Any) -> list[ToolCall]:
    """The calls in a message of OpenAI's form that name a function."""
    calls = [call for call in given if isinstance(call, dict)] if isinstance(given, list) else []
    named = [(call.get("id"), call["function"]) for call in calls if isinstance(call.get("function"), dict)]
    read = (tool_call(function.get("name"), function.get("arguments"), call_id) for call_id, function in named)
    return [call for call in read if call is not None]


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """A call's arguments for APIs that take an object; what is none, or nested too deeply to be sent as one, stands
    under one name, as it was written."""
    parsed, _ = load_json(call.arguments.encode("utf-8", "surrogatepass"), exact=True)
    taken = isinstance(parsed, dict) and not _is_deeper_than(parsed, MAX_DEPTH)
    return parsed if taken else {"arguments": call.arguments}


def _is_deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        items = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def name_or_none(value: Any) -> str | None:
    """A provider's name for something, as Arrow can hold it; None for what is none."""
    return clean(value)[:NAME_CHARS] if isinstance(value, str) and value else None


def text_flags(text: str, reasoning: str | None = None) -> tuple[str, ...]:
    """What is odd about a completion before it is cleaned, sorted."""
    both = text if reasoning is None else text + reasoning
    flags = [NUL] if "\0" in both else []
    is_odd = not both.isascii() and _SURROGATES.search(both) is not None
    return (*flags, SANITIZED) if is_odd else tuple(flags)


def clean(text: str) -> str:
    """Text that Arrow and UTF-8 can hold: each lone surrogate becomes U+FFFD; NUL stays."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def token_count(value: Any) -> int | None:
    """A token count that fits the schema's int32, or None."""
    return value if type(value) is int and 0 <= value < 2**31 else None


def token_sum(usage: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The sum of those counts that a server gives, or None where it gives none of them."""
    counts = [count for name in names if (count := token_count(usage.get(name))) is not None]
    return token_count(sum(counts)) if counts else None
