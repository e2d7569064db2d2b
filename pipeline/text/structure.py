"""Whether an answer has the form that was asked for, whatever the engine promised.

Time is bounded: patterns run on RE2, in time linear in the text (Arrow brings it); JSON is parsed in linear time, and
what is longer than `MAX_CHARS` or nested deeper than `MAX_DEPTH` fits no schema. Not bounded: a schema that branches
(`anyOf`) at every level of a recursion takes time that doubles with each level; `MAX_DEPTH` alone limits it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config_response import (
    ChoiceResponse,
    JsonSchemaResponse,
    RegexResponse,
    ResponseForm,
    schema_validator,
    whole,
)

BAD_STRUCTURE: Final = "bad_structure"
"""Reason of rows whose answer does not have the form."""
MAX_CHARS: Final = 1_000_000
MAX_DEPTH: Final = 64
_LONG_INTEGER: Final = re.compile("[0-9]{19}")
"""What may be an integer of more than 64 bits, which orjson reads as a float. One of more than 308 digits is no JSON to
it."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The form of answers, ready to compare with.

    Attributes:
        form: from the config, its schema read into it (`loaded_form`); None: free text, which everything fits.
    """

    form: ResponseForm | None
    _validator: Any = None

    @classmethod
    def of(cls, form: ResponseForm | None) -> "Structure":
        """Compile a form."""
        if not isinstance(form, JsonSchemaResponse):
            return cls(form)
        assert form.json_schema is not None, "the schema's file is not read"
        return cls(form, schema_validator(form.json_schema, KEYWORDS))

    def reason(self, text: str, finish_reason: str, *, has_calls: bool = False) -> str | None:
        """`bad_structure` for an answer that leaves for its form, else None.

        One that was cut (`length`) is not judged: what it lacks is the rest, and the policy on cut answers decides. Nor
        is one that calls tools instead of saying something.
        """
        if finish_reason == "length" or (has_calls and not text.strip()):
            return None
        return None if self.problem(text) is None else BAD_STRUCTURE

    def problem(self, text: str) -> str | None:
        """In what a text differs from the form, in a few words without anything of the text; None: it fits."""
        match self.form:
            case None:
                return None
            case _ if len(text) > MAX_CHARS:
                return f"longer than {MAX_CHARS:,} characters"
            case ChoiceResponse(choices=choices):
                return None if text in choices else "none of the choices"
            case RegexResponse(pattern=pattern):
                return None if _matches(whole(pattern), text) else "does not match the pattern"
            case JsonSchemaResponse():
                return self._json_problem(text)

    def _json_problem(self, text: str) -> str | None:
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return "not JSON"
        if _is_deeper_than(value, MAX_DEPTH):
            return f"nested deeper than {MAX_DEPTH} levels"
        if _LONG_INTEGER.search(text):
            value = json.loads(text)
        try:
            error = next(self._validator.iter_errors(value), None)
        except RecursionError:
            return "nested too deeply for its schema"
        if error is None:
            return None
        return f"breaks `{error.validator}` at depth {len(error.absolute_path)}"


def _matches(pattern: str, text: str) -> bool:
    return bool(pc.match_substring_regex(pa.array([text]), pattern=pattern)[0].as_py())


def _is_deeper_than(value: Any, depth: int) -> bool:
    level = _containers([value])
    for _ in range(depth):
        if not level:
            return False
        level = _containers(item for each in level for item in (each.values() if isinstance(each, dict) else each))
    return bool(level)


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]


def _check_pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(value, str) and not _matches(pattern, value):
        yield ValidationError("does not match the pattern")


def _check_unique(_: Any, unique: bool, value: Any, __: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if unique and isinstance(value, list) and len({_canonical(item) for item in value}) < len(value):
        yield ValidationError("has equal items")


def _check_multiple(validator: Any, divisor: float, value: Any, __: Any) -> Iterator[Any]:
    """Decimal numbers are what their digits say: 19.99 is a multiple of 0.01, though neither is in binary."""
    from jsonschema import ValidationError

    if validator.is_type(value, "number") and (_fraction(value) / _fraction(divisor)).denominator != 1:
        yield ValidationError("is no multiple")


def _fraction(number: float) -> Fraction:
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))


KEYWORDS: Final = {"pattern": _check_pattern, "uniqueItems": _check_unique, "multipleOf": _check_multiple}
"""Checks in the place of jsonschema's, whose own take more than linear time or are wrong for decimal numbers."""


def _canonical(value: Any) -> str:
    """Equal for values that JSON Schema holds equal, of which 1 and 1.0 are some."""
    return json.dumps(_with_plain_numbers(value), sort_keys=True)


def _with_plain_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(_fraction(value))
    if isinstance(value, dict):
        return {key: _with_plain_numbers(item) for key, item in value.items()}
    return [_with_plain_numbers(item) for item in value] if isinstance(value, list) else value
