"""Names for contents: canonical JSON, digests, keys, row ids, manifests. Loads no Arrow; tables: content.py."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

import orjson

from pipeline.core.errors import CorruptArtefact
from pipeline.core.stage import Json, Result

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the key and manifest format: bump when either changes its meaning."""

SEAL = "manifest_sha256"
"""The entry of `manifest.json` that covers all its other entries."""

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
"""What a loader reads of a model folder: weights, configs, tokenizer, template."""
CODE_FILES = ("*.py",)
"""Read where a model brings code of its own."""
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")
"""Read only where there are no safetensors."""
OTHER_FORMATS = "original"
"""Folder in which some models lie a second time, in a format of their makers; no loader of ours looks there."""


def canonical_json(value: Json) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8.

    Raises:
        TypeError: a value that JSON does not know (there is no fallback on purpose: `repr` is not an identity), or a
            key that is no text (`json` would turn 1 into "1").
        ValueError: NaN or an infinity.
    """
    _check_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def _check_keys(value: Json) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
            _check_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item)


def digest_json(value: Json) -> str:
    """sha256 (64 hex digits) over `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def canonical_texts(value: Json) -> bytes:
    """`canonical_json` of a value that holds no numbers, many times faster: the two encoders write texts alike, but not
    floats. Texts with lone surrogates take the slow way.

    Raises:
        TypeError: a value that JSON does not know, or a key that is no text.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        return canonical_json(value)


def file_sha256(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_id(prompt_set: str, prompt_id: str, request_key: str) -> str:
    """Id of a row: 32 hex digits over where its prompt came from and what was asked."""
    return hashlib.sha256(canonical_texts([prompt_set, prompt_id, request_key])).hexdigest()[:32]


def step_key(parts: Mapping[str, Json]) -> str:
    """Key of a step: the sha256 of its parts (stage, version, config, input contents, file bytes)."""
    return digest_json({"format": FORMAT, **parts})


ChangeKind = Literal["setting", "file", "input", "code"]
_KINDS: tuple[ChangeKind, ...] = ("setting", "file", "input", "code")
_PARTS: dict[str, ChangeKind] = {"config": "setting", "files": "file", "inputs": "input"}


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between the parts of two keys.

    Attributes:
        kind: "setting" (a config field), "file" (its bytes), "input" (what an upstream step made), or "code".
        name: `filter.min_chars`; a file's path in the config; an upstream step; `version`.
        before, after: a setting's value as JSON text, or a digest; None where it is absent.
    """

    kind: ChangeKind
    name: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.kind in ("setting", "code"):
            before, after = (_excerpt(*pair) for pair in ((self.before, self.after), (self.after, self.before)))
            return f"{self.name}: {before} -> {after}"
        before, after = _short_digests(self.before, self.after)
        what = "file" if self.kind == "file" else "rows of"
        return f"{what} {self.name} changed: {before} -> {after}"


SHOWN = 60
"""Characters of a setting that are shown at most; of a longer one those around the first difference."""


def _excerpt(text: str | None, other: str | None) -> str:
    if text is None:
        return "absent"
    if len(text) <= SHOWN:
        return text
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other or "", strict=False)))
    start = max(0, same - SHOWN // 3)
    return f"{'…' if start else ''}{text[start : start + SHOWN]}{'…' if start + SHOWN < len(text) else ''}"


def _short_digests(before: str | None, after: str | None) -> tuple[str, str]:
    """Twelve digits of each; of `<content> <key>` those of the keys where the contents are equal."""
    old, new = (("absent", "") if each is None else each.split(" ", 1) for each in (before, after))
    at = -1 if old[0] == new[0] else 0
    return old[at][:12], new[at][:12]


def explain(old: dict[str, Json] | None, new: dict[str, Json]) -> list[str]:
    """Why a key differs from an older one: `filter.min_chars: 1 -> 5`, one line per difference."""
    if old is None:
        return ["never ran"]
    return [str(change) for change in changes(old, new)] or ["its artefact is not in the store"]


def changes(old: Mapping[str, Json], new: Mapping[str, Json]) -> list[Change]:
    """The differences between the parts of two keys (see `step_key`): settings, files, inputs, code."""
    before, after = _facts(old), _facts(new)
    places = sorted(before.keys() | after.keys(), key=lambda place: (_KINDS.index(place[0]), place[1]))
    return [
        Change(*place, before.get(place), after.get(place)) for place in places if before.get(place) != after.get(place)
    ]


def _facts(parts: Mapping[str, Json]) -> dict[tuple[ChangeKind, str], str]:
    """(kind, name) -> value of everything in the parts; parts of a damaged lock file may be anything."""
    facts: dict[tuple[ChangeKind, str], str] = {}
    for part, value in parts.items():
        kind = _PARTS.get(part, "code")
        for name, leaf in _flatten(value).items() if isinstance(value, dict) else [("", value)]:
            plain = kind in ("file", "input") and isinstance(leaf, str)
            # Sorted, since one side was read from a file whose keys are.
            facts[kind, name or part] = str(leaf) if plain else json.dumps(leaf, ensure_ascii=False, sort_keys=True)
    return facts


def _flatten(value: dict[str, Json], path: str = "") -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for name, item in value.items():
        inside = f"{path}.{name}" if path else name
        flat |= _flatten(item, inside) if isinstance(item, dict) and item else {inside: item}
    return flat


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that a loader reads, sorted. Cards, licences, logs, hidden files (git's, the hub
    client's notes about its downloads) and copies in other formats are none of them."""
    files = [path for path in folder.rglob("*") if path.is_file() and _may_be_read(path.relative_to(folder))]
    safe = any(path.suffix == ".safetensors" for path in files)
    patterns = (*MODEL_FILES, *CODE_FILES) if safe else (*MODEL_FILES, *CODE_FILES, *OTHER_WEIGHTS)
    return sorted(path for path in files if any(path.match(pattern) for pattern in patterns))


def _may_be_read(inside: Path) -> bool:
    return inside.parts[0] != OTHER_FORMATS and not any(part.startswith(".") for part in inside.parts)


def path_digest(path: Path, cache: "DigestCache") -> str:
    """sha256 of a file, or of a folder's files with their names (a model). Where the path lies does not count."""
    if path.is_file():
        return cache.sha256(path)
    return digest_json({file.relative_to(path).as_posix(): cache.sha256(file) for file in model_files(path)})


class DigestCache:
    """File digests remembered by inode, size and modification time, so that weights are hashed once.

    A file rewritten in place within one tick of the clock, with equal size, is not noticed.

    Args:
        path: JSON file of the cache; created on `save`, and a damaged one is ignored: it only costs time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        self._changed = False
        try:
            known = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(known, dict) and all(isinstance(digest, str) for digest in known.values()):
            self._known = known

    def sha256(self, path: Path) -> str:
        """sha256 of a file's bytes, from memory where inode, size and mtime (ns) are the same."""
        stat = path.stat()
        name = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        if name not in self._known:
            self._known[name] = file_sha256(path)
            self._changed = True
        return self._known[name]

    def save(self) -> None:
        """Write what was learned; by rename, so that a reader never sees half a file. A file that cannot be written
        is no error: all it costs is hashing again."""
        if not self._changed:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known), "utf-8")
            temporary.replace(self._path)
        except OSError as error:
            logger.debug("cannot keep file digests: %s", error)
            with suppress(OSError):
                temporary.unlink()
        self._changed = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a committed artefact; `manifest.json` in its folder, written last.

    Attributes:
        key: the step's key, the sha256 of `parts`.
        stage: kind of the step ("filter").
        parts: everything that made the key, so that two keys can be compared part by part.
        content: digest of what downstream stages read.
        files: relative path -> {"sha256": hex, "bytes": size} of every other file in the folder.
        rows_in, rows_out, rejected, metrics: as in `Result`.
        versions: Python, libraries, commit, host; recorded, never keyed.

    The file also holds the sha256 of itself without that line, so that a manifest that was changed is noticed.
    """

    key: str
    stage: str
    parts: dict[str, Json]
    content: str
    files: dict[str, dict[str, Json]]
    rows_in: int
    rows_out: int
    rejected: dict[str, int]
    metrics: dict[str, Json]
    versions: dict[str, str]
    format: int = FORMAT

    @classmethod
    def of(
        cls, stage: str, key: str, parts: Mapping[str, Json], result: Result, versions: Mapping[str, str]
    ) -> "Manifest":
        """The manifest of a stage's result; the store adds the files."""
        return cls(
            key=key,
            stage=stage,
            parts={**parts},
            content=result.content,
            files={},
            rows_in=result.rows_in,
            rows_out=result.rows_out,
            rejected={**result.rejected},
            metrics={**result.metrics},
            versions={**versions},
        )

    def to_json(self) -> str:
        """Indented JSON text, for people too."""
        plain = json.loads(json.dumps(asdict(self), allow_nan=False))  # what a reader will get: tuples become lists
        sealed = plain | {SEAL: digest_json(plain)}
        return json.dumps(sealed, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest file.

        Raises:
            CorruptArtefact: the file is not a manifest of this format, or it was changed after it was written.
        """
        todo = "run the pipeline again: it will be rebuilt"
        try:
            sealed = json.loads(path.read_text("utf-8"))
            seal = sealed.pop(SEAL)
            manifest = cls(**sealed)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CorruptArtefact(f"not a manifest: {error}", where=str(path), todo=todo) from error
        if seal != digest_json(sealed) or manifest.format != FORMAT:
            raise CorruptArtefact("the manifest was changed or is of another format", where=str(path), todo=todo)
        return manifest
