"""From a source's row to a prompt: template, messages, id, answer, group, split. Lone surrogates become U+FFFD."""

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.core.config_prompts import PromptsConfig, PromptSet
from pipeline.core.errors import UsageError, boundary
from pipeline.core.lineage import digest_json
from pipeline.core.record import Message, Prompt, message_of
from pipeline.core.stage import Json
from pipeline.stages.prompts.sources import SourceRow, kind_of
from pipeline.stages.prompts.tools import tool_calls, tools_text
from pipeline.text.normalise import normalise, replace_surrogates
from pipeline.text.split import split_of

ROLES: Final = ("system", "user", "assistant", "tool")
FIELDS: Final = frozenset({"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"})


@dataclass(frozen=True, slots=True)
class Renderer:
    """Turns the rows of one prompt set into prompts.

    Attributes:
        name: of the set.
        prompt_set: its config.
        shares: the config of the stage, for the shares of the splits.
        template: the compiled template, or None.
        license: of the set's rows.
    """

    name: str
    prompt_set: PromptSet
    shares: PromptsConfig
    template: Template | None
    license: str

    def render(self, row: SourceRow) -> Prompt:
        """The row's prompt.

        Raises:
            UsageError: a column is missing or holds something else than the config says.
        """
        columns = self.prompt_set.columns
        messages = self._messages(row)
        tools = None
        if columns.tools is not None:
            tools = tools_text(_column(row, columns.tools), f"{row.place}, column {columns.tools!r}")
        answer, task, group = (_optional_text(row, name) for name in (columns.answer, columns.task, columns.group_id))
        if group is None:
            group = hashlib.sha256(conversation_text(messages).encode()).hexdigest()[:32]
        return Prompt(
            prompt_set=self.name,
            prompt_id=_text_id(messages, tools) if columns.id is None else _id(row, columns.id),
            split=split_of(group, validation=self.shares.validation, test=self.shares.test),
            group_id=group,
            task=task,
            prompt=messages,
            answer=answer,
            also_in=(),
            license_set=(self.license,),
            tools=tools,
        )

    def _messages(self, row: SourceRow) -> tuple[Message, ...]:
        if self.template is not None:
            text = _render_template(self.prompt_set.template, self.template, row)
            messages: tuple[Message, ...] = (Message("user", text),)
        else:
            name = self.prompt_set.columns.prompt
            messages = _messages_of(_column(row, name), f"{row.place}, column {name!r}")
        if self.prompt_set.system is None:
            return messages
        if messages[0].role == "system":
            todo = "remove `system` from the config or the system messages from the rows"
            raise UsageError("the row and the config both give a system message", where=row.place, todo=todo)
        return (Message("system", replace_surrogates(self.prompt_set.system)), *messages)


def conversation_text(messages: Sequence[Message]) -> str:
    """What makes prompts the same for splitting: the normalised contents, without system messages (they are shared)."""
    return "\n".join(normalise(message.content) for message in messages if message.role != "system")


def is_blank(prompt: Prompt) -> bool:
    """Whether its last message says nothing."""
    return prompt.prompt[-1].content.strip() == ""


# -------------------------------------------------------------------------------------------------- templates


def load_template(path: Path) -> Template:
    """Compile a template, in Jinja's sandbox: templates come with data sets and may be other people's.

    Raises:
        UsageError: the file is missing or not a template.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, finalize=_refuse_null)
    try:
        return environment.from_string(path.read_text("utf-8-sig"))
    except TemplateSyntaxError as error:
        where = f"{path}:{error.lineno}"
        raise UsageError(f"not a Jinja template: {error.message}", where=where, todo="correct this line") from error
    except UnicodeDecodeError as error:
        raise UsageError("the template is not UTF-8 text", where=str(path), todo="save it as UTF-8") from error
    except OSError as error:
        todo = "check the path; it is taken from the current folder"
        raise UsageError(f"cannot read the template: {error.strerror}", where=str(path), todo=todo) from error


def _refuse_null(value: Any) -> Any:
    """Jinja would write a null as the word None."""
    if value is None:
        raise UndefinedError("a column without a value (null)")
    return value


def _render_template(path: Path | None, template: Template, row: SourceRow) -> str:
    where = f"{path}, for {row.place}"
    with boundary(UsageError, "the template failed", where=where, todo="correct the template or the row"):
        return replace_surrogates(_fill(template, row, where))


def _fill(template: Template, row: SourceRow, where: str) -> str:
    try:
        return template.render({str(name): value for name, value in row.values.items()})
    except UndefinedError as error:
        null = [str(name) for name, value in row.values.items() if value is None]
        named = re.match(r"'(.+?)' is undefined", error.message or "")
        near = difflib.get_close_matches(named.group(1), map(str, row.values), n=1) if named is not None else []
        hint = f"did you mean {near[0]!r}? " if near else ""
        todo = f"{hint}the row's columns: {', '.join(map(str, row.values))}"
        todo += f"; null: {', '.join(null)}" if null else ""
        raise UsageError(f"the template uses what the row lacks: {error.message}", where=where, todo=todo) from error


# -------------------------------------------------------------------------------------------------- columns


def _column(row: SourceRow, name: str) -> Any:
    if name not in row.values:
        near = difflib.get_close_matches(name, map(str, row.values), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(map(str, row.values))}"
        raise UsageError(f"no column {name!r}; {hint}", where=row.place, todo="set `columns` of this prompt set")
    return row.values[name]


def _id(row: SourceRow, name: str) -> str:
    if name not in row.values:
        todo = "set `columns.id` of this prompt set; `id: null` makes ids from the prompts' text"
        raise UsageError(f"no column {name!r} for the prompt's id", where=row.place, todo=todo)
    found = _optional_text(row, name)
    if found is None:
        raise UsageError("the prompt has no id", where=f"{row.place}, column {name!r}", todo="give it one")
    return found


def _text_id(messages: Sequence[Message], tools: str | None) -> str:
    turns: list[Json] = [
        [message.role, message.content, message.reasoning_content, *tool_parts(message)] for message in messages
    ]
    return digest_json([*turns, *([] if tools is None else [tools])])


def tool_parts(message: Message) -> list[str]:
    """What makes a turn that has to do with tools another one than its texts say; nothing for all others. Ids of calls
    do not."""
    called = [part for call in message.tool_calls for part in (call.name, call.arguments)]
    return [*called, *([message.name] if message.name is not None else [])]


def _optional_text(row: SourceRow, name: str | None) -> str | None:
    """A column as text; None where it is not configured, null or blank. Numbers and booleans are written as JSON writes
    them."""
    if name is None:
        return None
    value = _column(row, name)
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif isinstance(value, int | float):
        value = str(value)
    if value is not None and not isinstance(value, str):
        what = f"{kind_of(value)} where a text, a number or a boolean is needed"
        raise UsageError(what, where=f"{row.place}, column {name!r}", todo="name a text column in `columns`")
    return None if value is None or value.strip() == "" else replace_surrogates(value)


def _messages_of(value: Any, where: str) -> tuple[Message, ...]:
    if value is None or isinstance(value, str):
        return (Message("user", replace_surrogates(value or "")),)
    if not isinstance(value, list) or not value:
        what = f"{'an empty list' if value == [] else kind_of(value)} where a text or a list of messages is needed"
        raise UsageError(what, where=where, todo="name the right column in `columns.prompt`, or use a `template`")
    messages = tuple(_message(item, where) for item in value)
    if messages[-1].role not in ("user", "tool"):
        todo = "leave out the answer: a prompt ends with what the teacher is to answer"
        raise UsageError(f"the last message is the {messages[-1].role}'s", where=where, todo=todo)
    return messages


def _message(item: Any, where: str) -> Message:
    given = {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else {}
    calls = tool_calls(given.pop("tool_calls", None), where)
    if calls:
        given.setdefault("content", "")
    if not {"role", "content"} <= set(given) <= FIELDS:
        found = "has " + (", ".join(map(repr, sorted(map(str, given)))) or "no content")
        found = found if isinstance(item, dict) else f"is {kind_of(item)}"
        raise UsageError(f"a message {found}", where=where, todo="a message is {role, content}")
    if not all(isinstance(value, str) for value in given.values()) or given["role"] not in ROLES:
        todo = f"roles are {', '.join(ROLES)}; contents are texts"
        raise UsageError(f"a message of role {given['role']!r} is not understood", where=where, todo=todo)
    if (calls and given["role"] != "assistant") or ("tool_call_id" in given and given["role"] != "tool"):
        todo = "the assistant calls tools (tool_calls), and messages of role tool answer (tool_call_id)"
        raise UsageError(f"a message of role {given['role']!r} has a part in tool calls", where=where, todo=todo)
    return replace(message_of({key: replace_surrogates(value) for key, value in given.items()}), tool_calls=calls)
