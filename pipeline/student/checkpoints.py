"""Checkpoints of a training on disk: hashed, committed by one rename, used only if whole and of this training.

`<workdir>/checkpoints/step-<n>/` is one checkpoint. It is written as `.step-<n>`, which no reader looks at; then every
file is synced and hashed, `COMPLETE.json` is written last, and a rename makes it visible. `best-<n>/` beside them has
the same form and holds the weights of the best measurement, if they may become the student; each checkpoint holds hard
links to those that were the best when it was written. Loads nothing heavy.
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import digest_json, file_sha256
from pipeline.core.stage import Json
from pipeline.core.store import sync_folder

FOLDER: Final = "checkpoints"
"""Where a training's checkpoints lie in its work folder."""
MARKER: Final = "COMPLETE.json"
SEAL: Final = "marker_sha256"
"""The entry of the marker that covers all its other entries."""
FORMAT: Final = 2
"""Version of what a checkpoint holds: bump when an older one cannot be resumed."""

BEST: Final = "best"
"""Folder of a checkpoint with the weights of the best measurement so far."""

_NAME: Final = re.compile(r"step-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Training:
    """Which training a checkpoint is of: it goes on from no other.

    Attributes:
        key: the train step's key.
        steps: optimizer steps in all.
        rows: training rows of the data set.
        order: sha256 over the order in which they are trained and their lengths in tokens.
    """

    key: str
    steps: int
    rows: int
    order: str


@dataclass(frozen=True, slots=True)
class Setting:
    """How a part of a training was run. It may change on the way: the training stays the same up to rounding.

    Attributes:
        world_size: processes.
        micro_batch_size: rows per process and forward pass.
        sharded: whether the processes share one model (FSDP); such checkpoints have files of their own.
        torch, transformers: versions.
    """

    world_size: int
    micro_batch_size: int
    sharded: bool
    torch: str
    transformers: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is complete, undamaged and of this training."""

    path: Path
    step: int
    setting: Setting


@dataclass(frozen=True, slots=True)
class Ignored:
    """A folder that looks like a checkpoint and was moved out of the way, and what is wrong with it."""

    name: str
    reason: str


def staging(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before its commit; several processes may write into it."""
    return folder / f".step-{step}"


def commit(folder: Path, step: int, training: Training, setting: Setting) -> Checkpoint:
    """Make what was written into `staging(folder, step)` a checkpoint.

    Raises:
        OSError: the disk is full or failing; no checkpoint came into being.
    """
    staged, final = staging(folder, step), folder / f"step-{step}"
    _mark(staged, step, training, setting)
    staged.rename(final)
    sync_folder(folder)
    return Checkpoint(final, step, setting)


def _mark(staged: Path, step: int, training: Training, setting: Setting) -> None:
    """Sync and hash all files, and write down what they are."""
    files: dict[str, Json] = {}
    for path in _files(staged):
        _sync(path)
        files[path.relative_to(staged).as_posix()] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    facts: dict[str, Json] = {"format": FORMAT, "step": step, **asdict(training), **asdict(setting), "files": files}
    with (staged / MARKER).open("x", encoding="utf-8") as file:
        file.write(json.dumps(facts | {SEAL: digest_json(facts)}, indent=2, sort_keys=True) + "\n")
    _sync(staged / MARKER)
    for path in [*filter(Path.is_dir, staged.rglob("*")), staged]:
        sync_folder(path)


# -------------------------------------------------------------------------------------------------- the best weights


def best_staging(folder: Path, step: int) -> Path:
    """Where the weights of a measurement that is the best so far are written before their commit."""
    return folder / f".best-{step}"


def commit_best(folder: Path, step: int, training: Training, setting: Setting) -> None:
    """Make what was written into `best_staging(folder, step)` the best weights, and remove those before.

    Raises:
        OSError: the disk is full or failing; those before are kept.
    """
    staged = best_staging(folder, step)
    _mark(staged, step, training, setting)
    before = list(folder.glob("best-*"))
    staged.rename(folder / f"best-{step}")
    sync_folder(folder)
    for path in before:
        shutil.rmtree(path)


def link_best(folder: Path, step: int, staged: Path) -> None:
    """Put the best weights into a checkpoint that is being written, whose they are then too, without a second copy."""
    _link_tree(folder / f"best-{step}", staged / BEST)


def restore_best(folder: Path, start: Checkpoint | None, step: int | None) -> None:
    """Take the best weights back that a checkpoint holds; those of a later measurement will be made again.

    Args:
        step: of the best measurement before the checkpoint; None: there is none.

    Raises:
        OSError: the disk is full or failing.
    """
    for path in [*folder.glob(".best-*"), *folder.glob("best-*")]:
        shutil.rmtree(path)
    if start is not None and step is not None:
        _link_tree(start.path / BEST, best_staging(folder, step))
        best_staging(folder, step).rename(folder / f"best-{step}")


def check_best(folder: Path, step: int, training: Training) -> Path:
    """The folder of the best weights.

    Raises:
        CorruptArtefact: they are not what was written.
    """
    path = folder / f"best-{step}"
    found = _checked(path, step, training)
    if isinstance(found, Checkpoint):
        return path
    todo = "run the same command again: it goes on from the newest checkpoint that is whole"
    raise CorruptArtefact(f"the best weights cannot be used: {found}", where=str(path), todo=todo)


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    """A second name for a file; a copy where the file system knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ------------------------------------------------------------------------------------------------------ finding them


def find_newest(folder: Path, training: Training) -> tuple[Checkpoint | None, tuple[Ignored, ...]]:
    """The newest checkpoint to go on from, if there is one; what is newer and of no use is moved out of the way.

    Half-written ones of a killed process are removed. Call it in one process, before any of them trains.
    """
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    ignored: list[Ignored] = []
    for step, path in reversed(_listed(folder)):
        found = _checked(path, step, training)
        if isinstance(found, Checkpoint):
            return found, tuple(ignored)
        path.rename(path.with_name(f"ignored-{path.name}-{uuid.uuid4().hex[:8]}"))
        ignored.append(Ignored(path.name, found))
    return None, tuple(ignored)


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest ones."""
    for step, path in _listed(folder)[:-keep]:
        shutil.rmtree(path.rename(staging(folder, step)))  # half removed, it must not look like a damaged one


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, or None if there is none; what it holds is not looked at."""
    listed = _listed(folder)
    return listed[-1][0] if listed else None


def size_of(checkpoint: Checkpoint) -> int:
    """Bytes on the disk."""
    return sum(path.stat().st_size for path in _files(checkpoint.path))


def _checked(path: Path, step: int, training: Training) -> Checkpoint | str:
    """The checkpoint, if it may be used, or why it may not."""
    try:
        facts: dict[str, Any] = json.loads((path / MARKER).read_text("utf-8"))
        seal = facts.pop(SEAL)
        if seal != digest_json(facts) or facts["format"] != FORMAT:
            return f"{MARKER} is damaged or of another format"
        expected: dict[str, Json] = {**asdict(training), "step": step}
        for name, value in expected.items():
            if facts[name] != value:
                return f"it is of another training: {name} {facts[name]} and not {value}"
        setting = Setting(**{name: facts[name] for name in Setting.__slots__})
        return _damage(path, facts["files"]) or Checkpoint(path, step, setting)
    except FileNotFoundError:
        return f"it is incomplete: no {MARKER}"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, LookupError, AttributeError, TypeError):
        return f"{MARKER} is damaged"


def _damage(path: Path, files: dict[str, dict[str, Json]]) -> str | None:
    """What is wrong with the files, if anything is."""
    present = {file.relative_to(path).as_posix() for file in _files(path)} - {MARKER}
    if odd := sorted(present ^ files.keys()):
        return f"files are missing or were added: {', '.join(odd[:5])}"
    for name, known in files.items():
        if file_sha256(path / name) != known["sha256"]:
            return f"{name} is damaged: its sha256 is not the one in {MARKER}"
    return None


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of what looks like a checkpoint, oldest first."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in named if match is not None)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
