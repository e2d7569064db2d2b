"""Whether an answer has the form that was asked for, whatever the engine promised.

Time is bounded: patterns run on RE2, in time linear in the text (Arrow brings it); JSON is parsed in linear time, and
what is longer than `MAX_CHARS` or nested deeper than `MAX_DEPTH` fits no schema. Not bounded: a schema that branches
(`anyOf`) at every level of a recursion takes time that doubles with each level; `MAX_DEPTH` alone limits it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config_response import ChoiceResponse, JsonSchemaResponse, RegexResponse, ResponseForm, whole

BAD_STRUCTURE: Final = "bad_structure"
"""Reason of rows whose answer does not have the form."""
MAX_CHARS: Final = 1_000_000
MAX_DEPTH: Final = 64


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
        return cls(form, _validator_class()(form.json_schema))

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


def _validator_class() -> Any:
    """JSON Schema's draft 2020-12, but for two keywords whose usual checks take more than linear time."""
    from jsonschema import Draft202012Validator, validators  # only a run with a schema pays for it

    return validators.extend(Draft202012Validator, {"pattern": _check_pattern, "uniqueItems": _check_unique})


def _check_pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(value, str) and not _matches(pattern, value):
        yield ValidationError("does not match the pattern")


def _check_unique(_: Any, unique: bool, value: Any, __: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if unique and isinstance(value, list) and len({_canonical(item) for item in value}) < len(value):
        yield ValidationError("has equal items")


def _canonical(value: Any) -> bytes:
    """Equal for values that JSON Schema holds equal, of which 1 and 1.0 are some."""
    return orjson.dumps(_with_plain_numbers(value), option=orjson.OPT_SORT_KEYS)


def _with_plain_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _with_plain_numbers(item) for key, item in value.items()}
    return [_with_plain_numbers(item) for item in value] if isinstance(value, list) else value
