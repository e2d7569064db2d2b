"""Dropping what nobody refers to: results that no run links or was made of, work that no run resumes, leftovers.

Stored answers are never touched. Results that a lock file names are kept only if its config is given: the data folder
does not know where configs lie. A run lets go of its results when its folder under `runs/` is deleted.
"""

import shutil
import uuid
from collections.abc import Collection as Collection_
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.core.errors import UsageError, disk_errors
from pipeline.core.lineage import Manifest
from pipeline.core.load import load_config
from pipeline.core.runs import lock_holder, own_data, read_lock
from pipeline.core.store import QUARANTINE, Store, sync_folder
from pipeline.runner.catalogue import inputs_of, kind_of, stored
from pipeline.runner.links import held_places, result_links, run_folders, work_links

TRASH = ".trash"
"""Folder beside the results (and beside the work) into which things are renamed before they are removed, so that a
half-removed one can never be taken for a whole one."""

Kind = Literal["result", "work", "staging", "quarantine", "trash"]


@dataclass(frozen=True, slots=True)
class Unreferenced:
    """Something that can go.

    Attributes:
        kind: "result" (no run links it), "work" (no run resumes it), "staging" (of a process that is gone),
            "quarantine" (a damaged or replaced result), "trash" (half removed by an earlier `gc`).
        path: its folder or file.
        bytes: size of its files.
        modified: UTC time of its last change, ISO 8601.
    """

    kind: Kind
    path: Path
    bytes: int
    modified: str


@dataclass(frozen=True, slots=True)
class Collection:
    """What can go, or is gone.

    Attributes:
        data: the data folder.
        deleted: it is gone; False: it was only listed.
        items: sorted by kind, as in `Unreferenced`, and path.
        bytes: of all of them.
        kept: results that a run links or a given config's lock file names.
        dangling: links of runs to results that are not there.
    """

    data: Path
    deleted: bool
    items: tuple[Unreferenced, ...]
    bytes: int
    kept: int
    dangling: tuple[Path, ...]


def collect(data: Path, configs: Sequence[Path] = (), *, delete: bool = False) -> Collection:
    """List what nobody refers to, and remove it if asked.

    Args:
        configs: configs whose lock files' results are kept too.
        delete: remove it; the folder is held alone meanwhile.

    Raises:
        UsageError: there is no such folder, a config is wrong, or has no lock file.
        RunLocked: with `delete`, a run is going on in the folder.
        Incomplete: something cannot be removed; the same command goes on.
    """
    if not data.is_dir():
        raise UsageError("no such data folder", where=str(data), todo="give the folder of a run: --data DIR")
    locked = {place for config in configs for place in _locked_places(config)}
    with disk_errors(str(data), "give write access, then run the same command again"):
        if not delete:
            return _list(data, locked, deleted=False)
        with own_data(data):
            found = _list(data, locked, deleted=True)
            _remove(data, found.items)
            return found


def _locked_places(config: Path) -> set[tuple[str, str]]:
    """(stage, key) of the results that the lock file beside a config names."""
    path = load_config(config).base_lock_path
    lock = read_lock(path)
    if not lock:
        todo = "leave this config out: nothing is kept for it"
        raise UsageError("the config has no lock file", where=str(path), todo=todo)
    return {(str(entry["parts"].get("stage")), entry["key"]) for entry in lock.values()}


# ------------------------------------------------------------------------------------------------------------ list


def _list(data: Path, locked: set[tuple[str, str]], *, deleted: bool) -> Collection:
    store = Store(data / "store")
    links = [link for folder in run_folders(data) for link in result_links(folder)]
    # Work that is not finished may have its result already: a process was killed between the commit and the link.
    results = [*store.artefacts()]
    held = locked.union(*map(held_places, run_folders(data)), _unfinished(data))
    wanted = held | _made_of({place: artefact.manifest for place, artefact in stored(store)[0].items()}, held)
    items = [
        *(_item("result", store.path_of(*place)) for place in results if place not in wanted),
        *(_item("work", path) for path in _idle_work(data)),
        *(_item("staging", path) for path in store.leftovers()),
        *(_item("quarantine", path) for path in _children(store.root / QUARANTINE)),
        *(_item("trash", path) for root in (store.root, data / "work") for path in _children(root / TRASH)),
    ]
    return Collection(
        data=data,
        deleted=deleted,
        items=tuple(items),
        bytes=sum(item.bytes for item in items),
        kept=sum(place in wanted for place in results),
        dangling=tuple(link.path for link in links if link.dangles),
    )


def _made_of(manifests: Mapping[tuple[str, str], Manifest], held: Collection_[tuple[str, str]]) -> set[tuple[str, str]]:
    """The results that others are made of, back to the prompts: without them nobody could tell any more what a model
    was trained on. Of several with equal content one is enough, so none is added where one is held."""
    of_content: dict[tuple[str, str], tuple[str, str]] = {}
    for place in sorted(manifests, key=lambda place: place not in held):
        of_content.setdefault((place[0], manifests[place].content), place)
    found: set[tuple[str, str]] = set()
    left = [place for place in held if place in manifests]
    while left:
        for step, content in inputs_of(manifests[left.pop()]).items():
            source = of_content.get((kind_of(step), content))
            if source is not None and source not in found:
                found.add(source)
                left.append(source)
    return found


def _idle_work(data: Path) -> Iterator[Path]:
    """Work folders that no run's `.work` links and nobody works in, and lock files that nobody holds."""
    wanted = _unfinished(data)
    for path in sorted((data / "work").glob("*/*")):
        if path.parent.name == TRASH:
            continue
        is_lock = path.suffix == ".lock"
        kept = not is_lock and (path.parent.name, path.name) in wanted
        if not kept and lock_holder(path if is_lock else path.with_name(f"{path.name}.lock")) is None:
            yield path


def _unfinished(data: Path) -> set[tuple[str, str]]:
    """(stage, key) of the work that runs have begun and not finished."""
    return {link.place for folder in run_folders(data) for link in work_links(folder)}


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _item(kind: Kind, path: Path) -> Unreferenced:
    """An item with the size and the last change of its files; what vanishes while we look counts nothing."""
    size, latest = 0, 0.0
    for file in (path, *path.rglob("*")):
        try:
            facts = file.lstat()
        except FileNotFoundError:
            continue
        size += 0 if file.is_dir() else facts.st_size
        latest = max(latest, facts.st_mtime)
    modified = datetime.fromtimestamp(latest, UTC).isoformat(timespec="seconds")
    return Unreferenced(kind, path, size, modified)


# ---------------------------------------------------------------------------------------------------------- remove


def _remove(data: Path, items: Sequence[Unreferenced]) -> None:
    """Rename everything into the trash, make that last, then remove the trash."""
    for item in items:
        if item.kind not in ("trash", "staging"):  # what lies in staging is never taken for a result
            trash = data / ("work" if item.kind == "work" else "store") / TRASH
            trash.mkdir(exist_ok=True)
            item.path.rename(trash / f"{item.path.name[:16]}-{uuid.uuid4().hex[:8]}")
    for folder in {item.path.parent for item in items}:
        sync_folder(folder)
    for item in items:
        if item.kind == "staging":
            shutil.rmtree(item.path)
    for trash in (data / "store" / TRASH, data / "work" / TRASH):
        if trash.is_dir():
            shutil.rmtree(trash)
