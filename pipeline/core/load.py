"""From a YAML file to a `RunConfig`: strict reading, and every mistake named at once with its line."""

import difflib
import errno
import stat
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.core.config import RunConfig
from pipeline.core.errors import UsageError
from pipeline.core.lineage import digest_json
from pipeline.core.mistakes import Mistake, booleans_as_numbers, mistakes_in

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
    todo = "correct it; `python -m pipeline schema` prints all valid keys"
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise refusal(path, mistakes_in(RunConfig, data, error), todo, overrides) from None
    if booleans := [*booleans_as_numbers(data, config)]:
        raise refusal(path, booleans, todo, overrides)
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
    return parse_yaml(_read_text(path), path)


def parse_yaml(text: str, path: Path) -> Any:
    """The same for a text that stands in a file.

    Raises:
        UsageError: it is no such document; the place is counted from the text's first line.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader, made stricter)
    except yaml.reader.ReaderError as error:
        where = f"{path}:{text.count(chr(10), 0, error.position) + 1}"
        what = f"not valid YAML: a control character (#x{ord(text[error.position]):04x})"
        raise UsageError(what, where=where, todo="remove it") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
        todo = "correct this line or the one above: spaces before keys (no tabs), `key: value`, quotes around odd text"
        if problem.startswith("duplicate key"):
            todo = "keep one of the two"
        raise UsageError(f"not valid YAML: {problem}", where=place, todo=todo) from error
    except (ValueError, RecursionError) as error:  # a date or number that cannot be, or thousands of brackets
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        todo = "quote the value if it is meant as text"
        raise UsageError(f"not valid YAML: {problem}", where=str(path), todo=todo) from error


def _read_text(path: Path) -> str:
    try:
        if str(path) == "-" or path.parts[:2] in (("/", "dev"), ("/", "proc")) or stat.S_ISFIFO(path.stat().st_mode):
            todo = "save it as a file: the lock file is written beside it, and resuming reads it again"
            raise UsageError("the config is read from a file, not from a stream", where=str(path), todo=todo)
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot read the file: {reason}", where=str(path), todo=_other_file(path, error)) from error
    if len(raw) > MAX_BYTES:
        raise UsageError("the file is larger than 1 MB", where=str(path), todo="a config holds settings, not data")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the file is not UTF-8 text", where=str(path), todo="save it as UTF-8") from error


def _other_file(path: Path, error: OSError | ValueError) -> str:
    """What to do about a file that cannot be read: perhaps one of a similar name was meant."""
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EISDIR:
        return f"name a file in it, such as {next(iter(sorted(path.glob('*.yaml'))), path / 'run.yaml')}"
    if code == errno.EACCES:
        return "give it read access"
    siblings = [each.name for each in path.parent.glob("*.yaml")] if code == errno.ENOENT else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path; it is taken from the current folder"


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


# -------------------------------------------------------------------------------------------- mistakes, placed


def refusal(path: Path, mistakes: Sequence[Mistake], todo: str, overrides: Sequence[str] = ()) -> UsageError:
    """The error about the mistakes in a YAML file, each with its line or with the `--set` that brought it."""
    places = [_place(path, mistake, overrides) for mistake in mistakes]
    if len(mistakes) == 1:
        return UsageError(str(mistakes[0]), where=places[0], todo=todo)
    listed = [f"{mistake} ({place})" for mistake, place in zip(mistakes, places, strict=True)]
    what = "\n       ".join([f"{len(mistakes)} mistakes:", *listed])
    return UsageError(what, where=str(path), todo=todo.replace("correct it", "correct them"))


def _place(path: Path, mistake: Mistake, overrides: Sequence[str]) -> str:
    keys = tuple(map(str, mistake.path))
    names = [override.partition("=")[0] for override in reversed(overrides)]
    line, found = _line_of(path, keys)
    whole = found >= len(keys) - mistake.absent
    for name in names:
        given = tuple(name.split("."))
        if keys[: len(given)] == given or (not whole and given[: found + 1] == keys[: found + 1]):
            return f"--set {name}=…"  # the value may be a secret
    return f"{path}:{line}"


def _line_of(path: Path, keys: Sequence[str]) -> tuple[int, int]:
    """The line of the deepest of these keys that the file has, and how many of them it has."""
    try:
        node = yaml.compose(_read_text(path), Loader=_StrictLoader)
    except (yaml.YAMLError, UsageError):  # it was changed since it was read
        return 1, 0
    line = 1
    for found, key in enumerate(keys):
        if isinstance(node, yaml.MappingNode):
            step = next(((name, value) for name, value in node.value if name.value == key), None)
        elif isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
            step = (node.value[int(key)], node.value[int(key)])
        else:
            step = None
        if step is None:
            return line, found
        line, node = step[0].start_mark.line + 1, step[1]
    return line, len(keys)
