"""What is wrong with a config, in words: pydantic's findings as short sentences with the nearest valid name."""

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

KeyPath: TypeAlias = tuple[int | str, ...]

SHOWN_CHARS = 30
"""Longer values are not repeated in a message: a key in the wrong place would be."""

GIVE: Final = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a text (in quotes if it looks like a number, a date, yes or no)",
    "path_type": "a path",
    "tuple_type": "a list, such as [a, b]",
    "list_type": "a list, such as [a, b]",
    "dict_type": "lines of `key: value`, indented below it",
    "model_type": "lines of `key: value`, indented below it",
    "model_attributes_type": "lines of `key: value`, indented below it",
}
"""Type of finding -> what to give instead."""
BOUNDS: Final = {
    "greater_than_equal": "a number of at least {ge}",
    "greater_than": "a number above {gt}",
    "less_than_equal": "a number of at most {le}",
    "less_than": "a number below {lt}",
    "string_too_long": "a text of at most {max_length} characters",
    "string_too_short": "a text of at least {min_length} characters",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
}
PATTERNS: Final = {
    "env:": "a reference such as ${env:API_KEY}; a key itself does not belong in a file",
    "https?://": "a URL that begins with https:// and has no ? or # in it",
    ".:/+": "a name of letters, digits and the signs .:/+_- without spaces (at most 150)",
    "A-Za-z0-9": "a name of letters, digits, `.`, `_` and `-` that begins with a letter or digit (at most 100)",
}
"""Part of a pattern -> what to give instead."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake in a file.

    Attributes:
        path: keys and list positions that lead to it; empty: the file as a whole.
        what: what is wrong, one sentence that does not repeat the path.
        absent: the last key of the path is what the file lacks.
    """

    path: KeyPath
    what: str
    absent: bool = False

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.what}" if self.path else self.what


def mistakes_in(model: type[BaseModel], data: Any, error: ValidationError) -> list[Mistake]:
    """The mistakes of a value that a model refused, one for each place, in the order of the file's keys.

    Args:
        data: the YAML's value, as it was validated.
    """
    found: dict[KeyPath, list[Mistake]] = {}
    for details in error.errors(include_url=False, include_input=False):
        mistake = _mistake(model, data, details)
        found.setdefault(mistake.path, []).append(mistake)
    return [Mistake(path, _joined([each.what for each in same]), same[0].absent) for path, same in found.items()]


def booleans_as_numbers(data: Any, read: Any, path: KeyPath = ()) -> Iterator[Mistake]:
    """Where a YAML yes or no stands for a number: pydantic takes true for 1, and a reader of the file would not.

    Args:
        data: the YAML's value.
        read: what it was validated to: a model, a container or a value.
    """
    if isinstance(data, dict):
        for name, item in data.items():
            child = getattr(read, name) if isinstance(read, BaseModel) else read[name]
            yield from booleans_as_numbers(item, child, (*path, name))
    elif isinstance(data, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        yield Mistake(path, "give a number, not yes or no")


def nearest(word: str, valid: Sequence[str]) -> str:
    """The hint for a word that is none of the valid ones: the nearest of them, or all."""
    near = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(valid)}"


def _joined(whats: Sequence[str]) -> str:
    """One sentence for one place; alternatives of a union are joined."""
    different = [*dict.fromkeys(whats)]
    if all(what.startswith("give ") for what in different):
        return "give " + " or ".join(what.removeprefix("give ") for what in different)
    return different[0]


_REQUIRED: Final[Mapping[tuple[int | str, ...], str]] = {
    ("policy",): "is required: what are the rows and the student for? For example"
    " policy: {intended_use: research, release: {dataset: internal, model: internal}}"
}


def _mistake(model: type[BaseModel], data: Any, details: ErrorDetails) -> Mistake:
    kind, context = details["type"], details.get("ctx", {})
    path = _real_path(data, details["loc"], missing=kind == "missing")
    if kind == "extra_forbidden":
        return Mistake(path, f"unknown key; {nearest(str(path[-1]), _valid_names(model, data, path[:-1]))}")
    if kind == "missing":
        return Mistake(path, _REQUIRED.get(path, "is required"), absent=True)
    if kind == "union_tag_not_found":
        return Mistake((*path, "kind"), "is required", absent=True)
    if kind in ("union_tag_invalid", "literal_error"):
        path = (*path, "kind") if kind == "union_tag_invalid" else path
        valid = re.findall(r"'([^']*)'", str(context.get("expected_tags", context.get("expected"))))
        return Mistake(path, _no_such_value(_value_at(data, path), valid))
    return Mistake(path, _advice(kind, context, details["msg"]))


def _no_such_value(value: Any, valid: Sequence[str]) -> str:
    if not isinstance(value, str) or len(value) > SHOWN_CHARS:
        return f"not a valid value; valid here: {', '.join(valid)}"
    return f"{value!r} is not a valid value; {nearest(value, valid)}"


def _advice(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind in GIVE:
        return f"give {GIVE[kind]}"
    if kind in BOUNDS:
        return f"give {BOUNDS[kind].format(**context)}"
    if kind == "string_pattern_mismatch":
        pattern = str(context.get("pattern"))
        return f"give {next((advice for part, advice in PATTERNS.items() if part in pattern), 'another text')}"
    return message.removeprefix("Value error, ")


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(data, list) and isinstance(part, int):
            data = data[part]
        else:
            data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _real_path(data: Any, location: KeyPath, *, missing: bool) -> KeyPath:
    """Pydantic's location without the union tags it puts between the keys; `missing`: its last part is not there."""
    path: list[int | str] = []
    current: Any = data
    for position, part in enumerate(location):
        if isinstance(current, Mapping) and part in current:
            current = current[part]
        elif isinstance(current, Sequence) and not isinstance(current, str) and isinstance(part, int):
            current = current[part] if part < len(current) else None
        elif not missing or position != len(location) - 1:
            continue
        path.append(part)
    return tuple(path)


def _valid_names(model: type[BaseModel], data: Any, path: KeyPath) -> list[str]:
    """Names of the fields that may stand at `path`; empty where the place is not a model."""
    candidates: list[Any] = [model]
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
        kind = data.get("kind") if isinstance(data, Mapping) else None
        candidates = [model for each in candidates for model in _children(each, part)]
        candidates = [each for each in candidates if _accepts_kind(each, kind)]
    return sorted({name for each in candidates if _is_model(each) for name in each.model_fields})


def _children(annotation: Any, part: int | str) -> list[Any]:
    """The types that a key or index of `annotation` may have, unions and containers opened."""
    if _is_model(annotation):
        field = annotation.model_fields.get(str(part))
        return [] if field is None else _open(field.annotation)
    arguments = [each for each in get_args(annotation) if each is not Ellipsis]  # of tuple[X, ...]
    return _open(arguments[-1]) if arguments else []


def _open(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _open(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [each for argument in get_args(annotation) for each in _open(argument)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _accepts_kind(annotation: Any, kind: Any) -> bool:
    if kind is None or not _is_model(annotation) or "kind" not in annotation.model_fields:
        return True
    return kind in get_args(annotation.model_fields["kind"].annotation)
