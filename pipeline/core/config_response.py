"""Config of the form that answers must have: a JSON schema, a regular expression, or one of some texts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote

from pydantic import Field, StringConstraints, field_validator, model_validator

from pipeline.core.config_base import OPERATIONAL, ConfigModel
from pipeline.core.errors import UsageError
from pipeline.core.stage import Json

DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"
MAX_SCHEMA_BYTES: Final = 1_000_000
SAMPLES_OF_ALL_TYPES: Final[tuple[Any, ...]] = (None, True, 0, "", [], {})
REFUSED_KEYWORDS: Final = frozenset({"patternProperties", "$anchor", "$dynamicAnchor", "$dynamicRef"})
"""Keywords that could make checking slow, or lead out of the schema; no provider's structured outputs take them."""
MAPS_OF_SCHEMAS: Final = ("properties", "$defs", "definitions", "dependentSchemas")
LISTS_OF_SCHEMAS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMAS: Final = (
    "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
IN_PLACE: Final = ("if", "then", "else", "not")
LISTS_IN_PLACE: Final = ("allOf", "anyOf", "oneOf")
"""Keywords whose schemas look at the very value that theirs does, as `$ref` and `dependentSchemas` do: a circle of
these alone has no end."""
WHERE: Final = "generate.response"


class JsonSchemaResponse(ConfigModel):
    """Answers are JSON that fits a schema of draft 2020-12. References stay inside the schema (`#/$defs/…`), patterns
    are RE2's; `format` is not checked."""

    kind: Literal["json_schema"]
    """JSON."""
    json_schema: dict[str, Any] | None = None
    """The schema itself, or else `path`. The order of its properties counts: models write them in this order."""
    path: Annotated[Path | None, OPERATIONAL] = None
    """JSON file with the schema, instead of `json_schema`. It counts by its content."""
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "answer"
    """Name of the schema; OpenAI wants one."""
    strict: bool = True
    """OpenAI's strict mode, which holds the model to the schema but takes a part of JSON Schema only. Answers are
    checked against the whole schema either way."""

    @model_validator(mode="after")
    def _there_is_one_schema(self) -> "JsonSchemaResponse":
        if (self.json_schema is None) == (self.path is None):
            raise ValueError("give `json_schema` or `path`, one of the two")
        problem = None if self.json_schema is None else schema_problem(self.json_schema)
        if problem is not None:
            raise ValueError(f"json_schema: {problem}")
        return self


class RegexResponse(ConfigModel):
    """Answers match a regular expression from their beginning to their end."""

    kind: Literal["regex"]
    """A regular expression."""
    pattern: Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
    """In RE2's syntax, which takes time linear in the text: no look-around, no back references."""

    @field_validator("pattern")
    @classmethod
    def _is_re2(cls, pattern: str) -> str:
        problem = pattern_problem(pattern)
        if problem is not None:
            raise ValueError(problem)
        return pattern


class ChoiceResponse(ConfigModel):
    """Answers are one of some texts, to the letter."""

    kind: Literal["choice"]
    """One of some texts."""
    choices: Annotated[tuple[Annotated[str, StringConstraints(min_length=1)], ...], Field(min_length=1)]
    """The texts."""

    @field_validator("choices")
    @classmethod
    def _each_once(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(choices)) < len(choices):
            raise ValueError("a choice is given twice")
        return choices


ResponseForm = Annotated[JsonSchemaResponse | RegexResponse | ChoiceResponse, Field(discriminator="kind")]


def form_that_counts(form: ResponseForm | None) -> dict[str, Json]:
    """What of a form counts in a key; nothing where answers are free text. Schemas count as text, since canonical JSON
    would forget the order of their properties; a schema's file counts by its bytes, not here."""
    match form:
        case None:
            return {}
        case JsonSchemaResponse(json_schema=schema):
            text = None if schema is None else schema_text(schema)
            return {"kind": form.kind, "schema": text, "name": form.name, "strict": form.strict}
        case RegexResponse(pattern=pattern):
            return {"kind": form.kind, "pattern": pattern}
        case ChoiceResponse(choices=choices):
            return {"kind": form.kind, "choices": [*choices]}


def form_files(form: ResponseForm | None) -> dict[str, Path]:
    """The schema's file, if it has one, for a stage's `input_files`."""
    return {f"{WHERE}.path": form.path} if isinstance(form, JsonSchemaResponse) and form.path is not None else {}


def loaded_form(form: ResponseForm | None) -> ResponseForm | None:
    """The form with its schema's file read into it, so that it is the same as one written into the config.

    Raises:
        UsageError: the file cannot be read, or holds no schema that is taken.
    """
    if not isinstance(form, JsonSchemaResponse) or form.path is None:
        return form
    todo = "give a file with a JSON Schema of draft 2020-12"
    try:
        with form.path.open("rb") as file:
            text = file.read(MAX_SCHEMA_BYTES + 1)
        schema = json.loads(text) if len(text) <= MAX_SCHEMA_BYTES else None
    except OSError as error:
        what = f"cannot read the schema: {error.strerror}"
        raise UsageError(what, where=str(form.path), todo="check the path in generate.response") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}", where=str(form.path), todo=todo) from error
    if not isinstance(schema, dict):
        raise UsageError("not a JSON object of less than 1 MB", where=str(form.path), todo=todo)
    problem = schema_problem(schema)
    if problem is not None:
        raise UsageError(f"the schema cannot be used: {problem}", where=str(form.path), todo=todo)
    return form.model_copy(update={"json_schema": schema, "path": None})


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as compact JSON, its keys in their order."""
    return json.dumps(schema, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def schema_problem(schema: dict[str, Any]) -> str | None:
    """Why a schema cannot be used, in one line; None: it can."""
    from jsonschema import SchemaError  # only a config with a schema pays for it

    try:
        if json.loads(schema_text(schema)) != schema:
            return "it holds what JSON cannot"
        found = next(_problems(schema), None)
        if found is not None:
            return found
        if _has_circle(schema):
            return "it refers to itself without end"
        for value in SAMPLES_OF_ALL_TYPES:
            list(schema_validator(schema, {}).iter_errors(value))
    except SchemaError as error:
        return f"no JSON Schema of draft 2020-12: {error.message[:200]} (at {error.json_path})"
    except RecursionError:
        return "it refers to itself without end, or is nested too deeply"
    except (TypeError, ValueError):
        return "it holds what JSON cannot"
    return None


def schema_validator(schema: Mapping[str, Any], keywords: Mapping[str, Any]) -> Any:
    """A validator of jsonschema's for draft 2020-12, which fetches nothing from anywhere.

    Args:
        schema: one that `schema_problem` takes.
        keywords: checks that stand in the place of the usual ones.
    """
    from jsonschema import Draft202012Validator, validators  # only a run with a schema pays for it
    from referencing import Registry

    return validators.extend(Draft202012Validator, keywords)(schema, registry=Registry())


def _problems(root: dict[str, Any]) -> Iterator[str]:
    """What is refused anywhere in a schema, or in what it refers to, be it at a place where JSON Schema knows none.

    Raises:
        jsonschema.SchemaError: the schema, or what it refers to, is none.
    """
    from jsonschema import Draft202012Validator

    seen: set[int] = set()
    targets: list[Any] = [root]
    while targets:
        target = targets.pop()
        if id(target) in seen:
            continue
        Draft202012Validator.check_schema(target)
        inside = [target]
        while inside:
            schema = inside.pop()
            if not isinstance(schema, dict) or id(schema) in seen:
                continue
            seen.add(id(schema))
            yield from _own_problems(schema, root)
            inside.extend(_subschemas(schema))
            if "$ref" in schema:
                targets.append(_target(schema["$ref"], root))


def _own_problems(schema: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    """What is refused in a valid schema, without those inside it."""
    for keyword in sorted(REFUSED_KEYWORDS & schema.keys()):
        yield f"`{keyword}` is not taken"
    if schema.get("$schema", DRAFT).rstrip("#") != DRAFT:
        yield f"its `$schema` is not {DRAFT}"
    if "$id" in schema and schema is not root:
        yield "a schema inside it has an `$id` of its own"
    if "$ref" in schema and _target(schema["$ref"], root) is None:
        yield f"the reference {schema['$ref']!r} leads to nothing in the schema itself"
    if "pattern" in schema and (problem := pattern_problem(schema["pattern"])) is not None:
        yield f"pattern {schema['pattern']!r}: {problem}"


def _subschemas(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword in MAPS_OF_SCHEMAS:
        yield from schema.get(keyword, {}).values()
    for keyword in LISTS_OF_SCHEMAS:
        yield from schema.get(keyword, ())
    for keyword in SCHEMAS:
        yield schema.get(keyword)


def _has_circle(root: dict[str, Any]) -> bool:
    """Whether a schema comes back to itself without a step into the value that it looks at."""
    done: set[int] = set()
    for start in _all_schemas(root):
        open_ids: set[int] = set()
        steps: list[tuple[bool, dict[str, Any]]] = [(True, start)]
        while steps:
            enters, schema = steps.pop()
            if not enters:
                open_ids.discard(id(schema))
                done.add(id(schema))
            elif id(schema) in open_ids:
                return True
            elif id(schema) not in done:
                open_ids.add(id(schema))
                steps.append((False, schema))
                steps.extend((True, inner) for inner in _in_place(schema, root) if isinstance(inner, dict))
    return False


def _all_schemas(root: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema, those inside it, and those that they refer to."""
    found: dict[int, dict[str, Any]] = {}
    waiting: list[Any] = [root]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, dict) and id(schema) not in found:
            found[id(schema)] = schema
            waiting += [*_subschemas(schema), *_in_place(schema, root)]
    return [*found.values()]


def _in_place(schema: dict[str, Any], root: dict[str, Any]) -> Iterator[Any]:
    """The schemas of a schema that look at the same value as it does."""
    if "$ref" in schema:
        yield _target(schema["$ref"], root)
    for keyword in LISTS_IN_PLACE:
        yield from schema.get(keyword, ())
    yield from (schema.get(keyword) for keyword in IN_PLACE)
    yield from schema.get("dependentSchemas", {}).values()


def _target(reference: str, root: dict[str, Any]) -> Any:
    """The schema below `root` that a reference leads to as a JSON pointer; None: it leads to none. Nothing is fetched
    from anywhere."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    found: Any = root
    for part in unquote(reference[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            is_index = name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < len(found)
            found = found[int(name)] if is_index else None
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict | bool) else None


def pattern_problem(pattern: str) -> str | None:
    """Why a regular expression is none of RE2's; None: it is one."""
    from pyarrow import ArrowInvalid, array  # it brings RE2; only a config with a pattern pays for it
    from pyarrow.compute import match_substring_regex

    try:
        for form in (pattern, whole(pattern)):
            match_substring_regex(array([""]), pattern=form)
    except ArrowInvalid as error:
        return f"no regular expression of RE2's syntax ({str(error).removeprefix('Invalid regular expression: ')})"
    except UnicodeEncodeError:
        return "it holds a lone surrogate"
    return None


def whole(pattern: str) -> str:
    """The expression that matches where another matches from beginning to end."""
    return rf"\A(?:{pattern})\z"
