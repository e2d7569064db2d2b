"""A row in the forms of other trainers. A form that cannot say all of a row refuses it; nothing is dropped in silence.

Forms as their readers document them: TRL (conversational, `messages`), axolotl (`chat_template`), LLaMA-Factory
(`data/README.md`: sharegpt and alpaca), Unsloth (any of these).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeAlias

from pipeline.core.record import Message, ToolCall, message_dict, message_of, read_shard

BATCH_ROWS: Final = 1024
"""Rows that are Python objects at the same time."""
MESSAGES: Final = ("prompt", "completion")
ROLES: Final = {"user": "human", "assistant": "gpt", "tool": "observation"}
"""Roles and what sharegpt calls them; a call of functions is said by "function_call"."""

Entry: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that a form cannot say whole, and why: a word or a few, joined by `_`."""

    reason: str


class _Unsaid(Exception):
    """Raised inside a form; its text is the reason."""


Form: TypeAlias = Callable[["Row"], Entry]
"""Makes an entry of a row, or raises `_Unsaid`."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the data set.

    Attributes:
        plain: all its columns, without the fields of messages that it does not use.
        prompt, completion: its conversation.
        tools: JSON of the functions that it offers; None: none.
    """

    plain: Mapping[str, Any]
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    tools: str | None

    @property
    def row_id(self) -> str:
        """Its id, by which it is found in the data set again."""
        return str(self.plain["row_id"])


def entries(shard: Path, form: Form) -> Iterator[tuple[str, Entry | Refused]]:
    """Row id and entry of each row of a shard, in their order.

    Raises:
        CorruptArtefact: it is not readable.
    """
    table = read_shard(shard)
    for start in range(0, table.num_rows, BATCH_ROWS):
        for plain in table.slice(start, BATCH_ROWS).to_pylist():
            row = _row(plain)
            try:
                yield row.row_id, form(row)
            except _Unsaid as unsaid:
                yield row.row_id, Refused(str(unsaid))


def _row(plain: dict[str, Any]) -> Row:
    prompt, completion = (tuple(message_of(message) for message in plain[name]) for name in MESSAGES)
    used = {"prompt": [*map(message_dict, prompt)], "completion": [*map(message_dict, completion)]}
    return Row({**plain, **used}, prompt, completion, plain.get("tools"))


# ------------------------------------------------------------------------------------------------- forms that say all


def as_jsonl(row: Row) -> Entry:
    """The row as it is: `prompt` and `completion`, which TRL trains on, and all its columns."""
    return dict(row.plain)


def as_messages(row: Row) -> Entry:
    """One list of messages; `tools` as JSON text where there are any. Where the completion begins is not said."""
    tools = {} if row.tools is None else {"tools": row.tools}
    return {"row_id": row.row_id, "messages": [*row.plain["prompt"], *row.plain["completion"]], **tools}


# ------------------------------------------------------------------------------------------------------------ sharegpt


def as_sharegpt(row: Row) -> Entry:
    """`conversations` of `from` and `value`, system prompt and tools apart; reasoning inside `<think>`."""
    system, turns = _conversation(row)
    said = [_turn(message) for message in turns]
    for at, turn in enumerate(said):
        expected = ("gpt", "function_call") if at % 2 else ("human", "observation")
        if turn["from"] not in expected:
            raise _Unsaid("turns_do_not_alternate")
    if len(said) % 2:
        raise _Unsaid("ends_without_an_answer")
    return {"row_id": row.row_id, "conversations": said, "system": system, "tools": _functions(row.tools)}


def _turn(message: Message) -> dict[str, str]:
    if not message.tool_calls:
        return {"from": ROLES[message.role], "value": _with_reasoning(message)}
    if message.content.strip() or message.reasoning_content:
        raise _Unsaid("text_beside_a_tool_call")
    calls = [{"name": call.name, "arguments": _arguments(call)} for call in message.tool_calls]
    return {"from": "function_call", "value": _json(calls[0] if len(calls) == 1 else calls)}


def _arguments(call: ToolCall) -> dict[str, Any]:
    """Its reader encodes them again, so they are no text here."""
    value = _exact(call.arguments, "arguments")
    if not isinstance(value, dict):
        raise _Unsaid("arguments_are_no_json_object")
    return value


def _exact(text: str, what: str) -> Any:
    """A JSON text's value, if all of the text is in it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise _Unsaid(f"{what}_hold_a_key_twice")
        return value

    def number(said: str) -> float:
        value = float(said)
        if not math.isfinite(value) or Decimal(said) != Decimal(repr(value)):
            raise _Unsaid(f"{what}_hold_a_number_that_would_change")
        return value

    try:
        value = json.loads(text, object_pairs_hook=once, parse_float=number, parse_constant=number)
        _json(value).encode()
    except (ValueError, ArithmeticError, RecursionError):  # half of a surrogate pair is no text either
        raise _Unsaid(f"{what}_are_no_json_object") from None
    return value


def _functions(tools: str | None) -> str:
    """The functions without the wrapper that says that they are functions, which older readers do not know."""
    if tools is None:
        return ""
    return _json([_function(tool) for tool in _exact(tools, "tools")])


def _function(tool: dict[str, Any]) -> Any:
    if "function" not in tool:
        return tool
    if not tool.keys() <= {"type", "function"} or tool.get("type", "function") != "function":
        raise _Unsaid("tools_say_more_than_functions")
    return tool["function"]


# -------------------------------------------------------------------------------------------------------------- alpaca


def as_alpaca(row: Row) -> Entry:
    """`instruction`, `input`, `output`, `system` and `history`: no tools, and one answer to the last question."""
    if row.tools is not None:
        raise _Unsaid("has_tools")
    system, turns = _conversation(row)
    if any(message.tool_calls or message.role == "tool" for message in turns):
        raise _Unsaid("has_tool_turns")
    roles = [message.role for message in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise _Unsaid("turns_do_not_alternate")
    if len(row.completion) != 1:
        raise _Unsaid("more_than_one_turn_to_learn")
    said = [_with_reasoning(message) for message in turns]
    history = [[question, answer] for question, answer in zip(said[:-2:2], said[1:-2:2], strict=True)]
    last = {"instruction": said[-2], "input": "", "output": said[-1]}
    return {"row_id": row.row_id, **last, "system": system, "history": history}


# --------------------------------------------------------------------------------------------------------- both of them


def _conversation(row: Row) -> tuple[str, Sequence[Message]]:
    """The system prompt, and the turns after it."""
    turns: Sequence[Message] = (*row.prompt, *row.completion)
    system = turns[0].content if turns[0].role == "system" else ""
    turns = turns[1:] if turns[0].role == "system" else turns
    for message in turns:
        if message.role == "system":
            raise _Unsaid("system_prompt_not_at_the_beginning")
        if message.role not in ROLES:
            raise _Unsaid("unknown_role")
        if message.name is not None and message.role != "tool":
            raise _Unsaid("named_participant")
    return system, turns


def _with_reasoning(message: Message) -> str:
    """The text, behind the reasoning as models of this kind write it themselves."""
    if message.reasoning_content is None:
        return message.content
    if "</think>" in message.reasoning_content or "<think>" in message.reasoning_content:
        raise _Unsaid("reasoning_holds_its_own_mark")
    return f"<think>\n{message.reasoning_content}\n</think>\n\n{message.content}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


FORMS: Final[Mapping[str, Form]] = {
    "jsonl": as_jsonl,
    "messages": as_messages,
    "sharegpt": as_sharegpt,
    "alpaca": as_alpaca,
}

INDEX: Final[Mapping[str, Mapping[str, Any]]] = {
    "sharegpt": {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
    },
    "alpaca": {
        "formatting": "alpaca",
        "columns": {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "system": "system",
            "history": "history",
        },
    },
}
"""What LLaMA-Factory's `dataset_info.json` says of a file in these forms."""
