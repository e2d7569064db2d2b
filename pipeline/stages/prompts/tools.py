"""Tools in prompts: the functions that a prompt offers, and the calls and results inside its conversation."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from pipeline.core.errors import UsageError
from pipeline.core.lineage import canonical_json
from pipeline.core.record import ToolCall
from pipeline.core.stage import Json
from pipeline.stages.prompts.sources import kind_of
from pipeline.text.normalise import replace_surrogates

FUNCTION_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
FUNCTION_FIELDS: Final = frozenset({"name", "description", "parameters", "strict"})
TOOL_TODO: Final = 'a tool is {"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
CALL_TODO: Final = 'a tool call is {"id": …, "type": "function", "function": {"name": …, "arguments": "{…}"}}'


def tools_text(value: Any, where: str) -> str | None:
    """Canonical JSON of the function definitions in a column; None where it is null, blank or an empty list.

    Args:
        value: a list of definitions in OpenAI's form, or JSON text of one. Parquet fills what one definition lacks and
            another has with nulls, so there JSON text is the safer form; nulls in a definition itself are left out.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(value, str):
        value = _parsed(value, where) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise UsageError(f"{kind_of(value)} where a list of tools is needed", where=where, todo=TOOL_TODO)
    functions = [_function(tool, where) for tool in value]
    names = [function["name"] for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two tools are called {name!r}", where=where, todo="give each function its own name")
    try:
        tools: list[Json] = [{"type": "function", "function": function} for function in functions]
        return replace_surrogates(canonical_json(tools).decode("utf-8", "surrogatepass"))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the tools are not JSON: {error}", where=where, todo=TOOL_TODO) from error


def tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    """The calls of an assistant's turn. Arguments are kept as they are written; an object becomes JSON text.

    Raises:
        UsageError: it is no list of calls.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise UsageError(f"{kind_of(value)} where a list of tool calls is needed", where=where, todo=CALL_TODO)
    return tuple(_call(call, where) for call in value)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("the tools are not JSON text", where=where, todo=TOOL_TODO) from error


def _function(tool: Any, where: str) -> dict[str, Any]:
    function = _given(tool.get("function")) if isinstance(tool, dict) else {}
    if not function or set(_given(tool)) != {"type", "function"} or tool["type"] != "function":
        raise UsageError("a tool is no function definition", where=where, todo=TOOL_TODO)
    if set(function) - FUNCTION_FIELDS:
        what = f"a tool's function has {', '.join(map(repr, sorted(set(function) - FUNCTION_FIELDS)))}"
        raise UsageError(what, where=where, todo=TOOL_TODO)
    _check_function(function, where)
    return function


def _check_function(function: Mapping[str, Any], where: str) -> None:
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        todo = "names are up to 128 letters, digits, _, -, . and :"
        raise UsageError(f"a tool's function has the name {name!r}", where=where, todo=todo)
    for field, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        if field in function and not isinstance(function[field], kind):
            what = f"the {field} of function {name!r}: {kind_of(function[field])}"
            raise UsageError(what, where=where, todo=TOOL_TODO)


def _given(value: Any) -> dict[str, Any]:
    """An object without its nulls, which Arrow puts where a row lacks what another has."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}


def _call(call: dict[str, Any], where: str) -> ToolCall:
    given, function = _given(call), _given(call.get("function"))
    call_id, name, arguments = given.get("id"), function.get("name"), function.get("arguments", "{}")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    texts = all(isinstance(text, str) for text in (name, arguments)) and isinstance(call_id, str | None)
    if not texts or not name or not set(given) <= {"id", "type", "function", "index"}:
        raise UsageError("a tool call is not understood", where=where, todo=CALL_TODO)
    return ToolCall(
        replace_surrogates(name),
        replace_surrogates(arguments),
        None if call_id is None else replace_surrogates(call_id),
    )
