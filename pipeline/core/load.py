"""From a YAML file to a `RunConfig`: strict reading, and every mistake named at once with the nearest valid name."""

import difflib
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.core.config import RunConfig
from pipeline.core.errors import UsageError
from pipeline.core.lineage import digest_json

MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Loaded:
    """A config with where it came from.

    Attributes:
        config: the validated config.
        path: its YAML file.
        overrides: the `--set` texts, in order.
        run_name: folder of the run: the config's name, plus `+<8 hex>` of the overrides, whatever their order.
    """

    config: RunConfig
    path: Path
    overrides: tuple[str, ...]
    run_name: str

    @property
    def lock_path(self) -> Path | None:
        """The lock file that this run writes; None for a run with overrides, which writes none."""
        return None if self.overrides else self.base_lock_path

    @property
    def base_lock_path(self) -> Path:
        """`<config>.lock.json` beside the YAML: what the run without overrides made last."""
        return self.path.with_name(f"{self.path.stem}.lock.json")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read, override and validate a config.

    Args:
        path: the YAML file, at most 1 MB, without aliases and without duplicate keys.
        overrides: `a.b=c` texts; the value is read as YAML.

    Raises:
        UsageError: the file cannot be read, or any part of it is wrong; all wrong parts are listed.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UsageError("the config is not a mapping", where=str(path), todo="start from configs/quickstart.yaml")
    for override in overrides:
        _apply_override(data, override)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_input=False)
        raise _refusal(path, [_problem(data, details) for details in mistakes]) from None
    if booleans := [*_booleans_as_numbers(data, config)]:
        raise _refusal(path, [f"{name}: give a number, not yes or no" for name in booleans])
    last = {name: value for name, _, value in (override.partition("=") for override in overrides)}
    suffix = f"+{digest_json({**last})[:8]}" if overrides else ""
    return Loaded(config, path, tuple(overrides), config.name + suffix)


def require_test_answers(loaded: Loaded) -> None:
    """Say before anything is paid for that an evaluation would have nothing to compare answers with.

    Raises:
        UsageError: there is no test split, or no prompt set has reference answers.
    """
    prompts = loaded.config.prompts
    if prompts.test == 0:
        todo = "give it a share, or stop before the evaluation: --until train"
        raise UsageError("there is no test split to evaluate on", where=f"{loaded.path}: prompts.test", todo=todo)
    if all(prompt_set.columns.answer is None for prompt_set in prompts.sets.values()):
        where = f"{loaded.path}: prompts.sets.*.columns.answer"
        todo = "name the column of reference answers, or stop before the evaluation: --until train"
        raise UsageError("no prompt set has reference answers to evaluate with", where=where, todo=todo)


def read_yaml(path: Path) -> Any:
    """Read one YAML document from a file: plain data only, no duplicate keys, no aliases.

    Raises:
        UsageError: the file is missing, too large, not UTF-8 or not such a document.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        todo = "check the path; it is taken from the current folder"
        raise UsageError(f"cannot read the file: {error.strerror}", where=str(path), todo=todo) from error
    if len(raw) > MAX_BYTES:
        raise UsageError("the file is larger than 1 MB", where=str(path), todo="a config holds settings, not data")
    try:
        return yaml.load(raw.decode("utf-8"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader, made stricter)
    except UnicodeDecodeError as error:
        raise UsageError("the file is not UTF-8 text", where=str(path), todo="save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"not valid YAML: {problem}", where=place, todo="correct this line") from error
    except (ValueError, RecursionError) as error:  # a date or number that cannot be, or thousands of brackets
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        todo = "quote the value if it is meant as text"
        raise UsageError(f"not valid YAML: {problem}", where=str(path), todo=todo) from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys (PyYAML keeps the last) and aliases (they can grow without bound)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not used here; write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                problem = f"duplicate key {key!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`; a missing parent is made, and the validation then says whether it may exist."""
    path, equals, text = override.partition("=")
    where = f"--set {path}=…"  # the value may be a secret
    if not equals or not all(path.split(".")):
        where = "--set"
        raise UsageError("not of the form a.b=c", where=where, todo="for example --set train.max_steps=4")
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader, made stricter)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError("the value is not valid YAML", where=where, todo="quote it") from error
    *parents, last = path.split(".")
    target: Any = data
    for name in parents:
        target = target.setdefault(name, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise UsageError("the path goes through a value that is no mapping", where=where, todo="check the path")
    target[last] = value


# ------------------------------------------------------------------------------------------ mistakes, explained


def _refusal(path: Path, problems: Sequence[str]) -> UsageError:
    different = [*dict.fromkeys(problems)]
    listed = "\n       ".join(different)
    todo = "correct these keys; `python -m pipeline schema` prints all valid ones"
    return UsageError(f"{len(different)} wrong in the config:\n       {listed}", where=str(path), todo=todo)


def _booleans_as_numbers(data: Any, read: Any, path: str = "") -> Iterator[str]:
    """Paths where a YAML yes or no stands for a number: pydantic takes true for 1, and a reader of the file would not.

    Args:
        data: the YAML's value.
        read: what it was validated to: a model, a container or a value.
    """
    if isinstance(data, dict):
        for name, item in data.items():
            child = getattr(read, name) if isinstance(read, BaseModel) else read[name]
            yield from _booleans_as_numbers(item, child, f"{path}.{name}".lstrip("."))
    elif isinstance(data, bool) and not isinstance(read, bool):
        yield path


def _problem(data: dict[str, Any], details: ErrorDetails) -> str:
    """One line for one mistake: path, message, nearest valid name."""
    path = _real_path(data, details["loc"], missing=details["type"] == "missing")
    shown = ".".join(map(str, path)) or "(top level)"
    if details["type"] == "extra_forbidden":
        names = _valid_names(RunConfig, data, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(names)}"
        return f"{shown}: unknown key; {hint}"
    if details["type"] == "missing":
        return f"{shown}: is required"
    if details["type"] == "union_tag_not_found":
        return f"{shown}.kind: is required"
    if details["type"] == "string_pattern_mismatch" and "env:" in str(details.get("ctx", {}).get("pattern")):
        return f"{shown}: give a reference such as ${{env:API_KEY}}; a key itself does not belong in a file"
    return f"{shown}: {details['msg'].removeprefix('Value error, ')}"


def _real_path(data: Any, location: tuple[int | str, ...], *, missing: bool) -> list[int | str]:
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
    return path


def _valid_names(model: type[BaseModel], data: Any, path: Sequence[int | str]) -> list[str]:
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
    arguments = get_args(annotation)
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
