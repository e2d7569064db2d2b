"""Hashing everything again: results, the links to them, a lock file, the stored answers. Finds all damage, mends none.

Nothing is written and no lock is taken, so that a folder that may not be written can be verified, and one in which a
run is going on: what is moved away meanwhile was whole, or is somebody else's to report.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.errors import CorruptArtefact, UsageError, boundary, disk_errors
from pipeline.core.lineage import Manifest, file_sha256, step_key
from pipeline.core.log import show_progress
from pipeline.core.runs import read_lock
from pipeline.core.stage import Progress
from pipeline.core.store import MANIFEST, REBUILD, Artefact, Store
from pipeline.runner.catalogue import READ, Catalogue
from pipeline.runner.chain import Break, breaks_of, override_breaks
from pipeline.runner.contents import recompute
from pipeline.runner.links import Link, copied_results, result_links, run_folders
from pipeline.runner.locked import RELOCK
from pipeline.runner.session import Session
from pipeline.runner.steps import STAGES, stage_module

RELINK = "run it again: the result is made anew or linked; a run that is not needed any more: delete its folder"
RECOPY = "move this copy away and run again: the result is linked instead, or made anew"
STRAY = "remove it, or move it out of the store: no run made it and none needs it"
EXTRA = "remove this file: for its sake the next run would take the whole result for damaged and make it anew"
KEY = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not what it was when it was committed.

    Attributes:
        kind: what it was found in; "stray": something in the store that is no part of it; "chain": what it was made of
            is not there, or what it says of its sources, or the file of overrides, is not what was hashed.
        where: the file, folder or link.
        what: what is wrong.
        todo: what to do about it.
    """

    kind: Literal["artefact", "stray", "link", "lock", "answers", "chain"]
    where: Path
    what: str
    todo: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at and what was found.

    Attributes:
        data: the data folder.
        run: the run that was verified; None: everything in the folder.
        artefacts: results whose files were all hashed; copies of them in the folders of runs count too.
        files, bytes: of these.
        contents: of these results those whose content digest was computed anew from their rows.
        links: links of runs to results.
        locked: entries of the lock file; of those whose result is in the store the content was compared.
        answer_files: files of stored answers; 0 for one run, since all runs share them.
        damage: everything that is wrong.
    """

    data: Path
    run: str | None
    artefacts: int
    files: int
    bytes: int
    contents: int
    links: int
    locked: int
    answer_files: int
    damage: tuple[Damage, ...]


def verify_data(data: Path) -> Verification:
    """Verify all results, links and stored answers of a data folder.

    Raises:
        UsageError: there is no such folder, or no run ever worked in it.
        Incomplete: the disk fails, or something may not be read.
    """
    todo = "give the folder of a run: --data DIR"
    with disk_errors(str(data), READ):
        if not data.is_dir():
            raise UsageError("no such data folder", where=str(data), todo=todo)
        if not any((data / name).exists() for name in ("store", "runs", "responses")):
            what = "no data folder: it has no store, no runs and no stored answers"
            raise UsageError(what, where=str(data), todo=todo)
        return _verify_data(data)


def _verify_data(data: Path) -> Verification:
    from pipeline.teacher import audit  # SQLite, which `verify CONFIG` does without

    store = Store(data / "store")
    strays = _strays(store.root)
    places = [store.path_of(*place) for place in store.artefacts()]
    places = [path for path in places if path not in strays]
    copies = [path for folder in run_folders(data) for path in copied_results(folder)]
    links = [link for folder in run_folders(data) for link in result_links(folder)]
    answers = audit.response_files(data / "responses")
    with show_progress("verify") as progress:
        progress.start(_count_files([*places, *copies]) + len(answers), "files")
        checks = [_Check(path, progress, is_copy=path in copies) for path in (*places, *copies)]
        damage = [found for check in checks for found in check.run()]
        damage += [Damage("stray", path, what, STRAY) for path, what in strays.items()]
        damage += [found for link in links for found in _link_damage(link)]
        damage += _chain_damage(breaks_of(Catalogue.of(data)))
        for path in answers:
            checked = audit.check(path)
            damage += [] if checked.damage is None else [Damage("answers", path, checked.damage, checked.todo)]
            progress.advance()
    return _verification(data, None, checks, links, 0, len(answers), damage)


def verify_run(session: Session) -> Verification:
    """Verify what a run links and what its config's lock file names.

    Raises:
        UsageError: neither a run's folder nor a lock file is there, or the lock file is damaged.
        Incomplete: the disk fails, or something may not be read.
    """
    with disk_errors(str(session.data), READ):
        return _verify_run(session)


def _verify_run(session: Session) -> Verification:
    store = session.store
    links, copies = result_links(session.folder), copied_results(session.folder)
    lock = read_lock(session.loaded.base_lock_path)
    if not links and not copies and not lock:
        todo = f"run it first: {session.command('run')}"
        raise UsageError("nothing was run yet", where=str(session.folder), todo=todo)
    locked = [(str(entry["parts"].get("stage")), entry["key"]) for entry in lock.values()]
    found = [place for place in locked if store.path_of(*place).is_dir()]
    linked = {*found, *(link.place for link in links if not link.dangles)}
    places = [store.path_of(*place) for place in sorted(linked)]
    with show_progress("verify") as progress:
        progress.start(_count_files([*places, *copies]), "files")
        checks = [_Check(path, progress, is_copy=path in copies) for path in (*places, *copies)]
        damage = [found for check in checks for found in check.run()]
    damage += [found for link in links for found in _link_damage(link)]
    damage += _lock_damage(session)
    damage += _chain_damage(breaks_of(Catalogue.of(session.data), [session.loaded.run_name]))
    damage += _chain_damage(override_breaks(session.loaded.config.policy.overrides))
    return _verification(session.data, session.loaded.run_name, checks, links, len(lock), 0, damage)


def _verification(
    data: Path,
    run: str | None,
    checks: "Sequence[_Check]",
    links: Sequence[Link],
    locked: int,
    answer_files: int,
    damage: Sequence[Damage],
) -> Verification:
    return Verification(
        data=data,
        run=run,
        artefacts=len(checks),
        files=sum(check.files for check in checks),
        bytes=sum(check.bytes for check in checks),
        contents=sum(check.recomputed for check in checks),
        links=len(links),
        locked=locked,
        answer_files=answer_files,
        damage=tuple(damage),
    )


def _strays(root: Path) -> dict[Path, str]:
    """What lies where stages or results belong and is neither, and what it is."""
    visible = [path for path in sorted(root.glob("*")) if not (path.is_dir() and path.name.startswith("."))]
    found = {path: "a file where the folders of stages belong" for path in visible if not path.is_dir()}
    for stage, key in Store(root).artefacts():
        path = root / stage / key
        if not path.is_dir():
            found[path] = "a file where results belong"
        elif KEY.fullmatch(key) is None:
            found[path] = "a folder that is no result: its name is no key"
    return found


def _count_files(places: Sequence[Path]) -> int:
    return sum(1 for place in places for path in place.rglob("*") if path.is_file())


class _Check:
    """The verification of one artefact, with what it counted.

    Args:
        folder: where it lies: `…/<stage>/<key>`.
        progress: told of every file.
        is_copy: it lies in a run's folder, under the name of its step.
    """

    def __init__(self, folder: Path, progress: Progress, *, is_copy: bool) -> None:
        self._folder, self._progress, self._is_copy = folder, progress, is_copy
        self._todo = RECOPY if is_copy else REBUILD
        self.files = self.bytes = self.recomputed = 0

    def run(self) -> list[Damage]:
        """All damage of the artefact; none if it was moved away while we looked."""
        try:
            found = [*self._all()]
        except FileNotFoundError:
            if self._folder.exists():
                raise
            return []
        return found if self._folder.exists() else []

    def _all(self) -> Iterator[Damage]:
        try:
            manifest = self._manifest()
        except CorruptArtefact as error:
            yield Damage("artefact", Path(error.where), error.what, self._todo)
            return
        said = [*self._contradictions(manifest), *self._file_damage(manifest)]
        yield from said
        if not said:
            yield from self._content_damage(Artefact(self._folder, manifest))

    def _manifest(self) -> Manifest:
        path = self._folder / MANIFEST
        if not path.is_file():
            raise CorruptArtefact("the manifest is missing", where=str(self._folder), todo=REBUILD)
        return Manifest.read(path)

    def _contradictions(self, manifest: Manifest) -> Iterator[Damage]:
        """What a sealed manifest can only say if it was made or moved by hand."""
        place = (self._folder.name,) if self._is_copy else (self._folder.parent.name, self._folder.name)
        if (manifest.stage, manifest.key)[: len(place)] != place:
            yield self._damage(f"the manifest is of {manifest.stage} {manifest.key[:12]}")
        if step_key(manifest.parts) != manifest.key:
            yield self._damage("the key is not the sha256 of its parts")
        if manifest.rows_in != manifest.rows_out + sum(manifest.rejected.values()):
            yield self._damage("rows_in is not rows_out and the rejected rows together")

    def _file_damage(self, manifest: Manifest) -> Iterator[Damage]:
        there = {path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()}
        for name in sorted(manifest.files.keys() - there):
            yield self._damage("the file is missing", name)
        for name in sorted(there - manifest.files.keys() - {MANIFEST}):
            todo = RECOPY if self._is_copy else EXTRA
            yield Damage("artefact", self._folder / name, "the manifest does not know this file", todo)
        self._progress.advance()
        for name in sorted(there & manifest.files.keys()):
            yield from self._bytes_damage(name, manifest)

    def _bytes_damage(self, name: str, manifest: Manifest) -> Iterator[Damage]:
        facts = manifest.files[name]
        try:
            size, digest = (self._folder / name).stat().st_size, file_sha256(self._folder / name)
        except OSError as error:
            yield self._damage(f"the file cannot be read: {error.strerror}", name)
            return
        self.files, self.bytes = self.files + 1, self.bytes + size
        self._progress.advance()
        if size != facts["bytes"]:
            yield self._damage(f"the file has {size:,} bytes, not the {facts['bytes']:,} of the manifest", name)
        elif digest != facts["sha256"]:
            yield self._damage("the file's sha256 differs from the manifest", name)

    def _content_damage(self, artefact: Artefact) -> Iterator[Damage]:
        if not _is_of_this_version(artefact.manifest):
            return
        where = str(artefact.path)
        try:
            with boundary(CorruptArtefact, "its rows cannot be read", where=where, todo=REBUILD):
                content = recompute(artefact)
        except CorruptArtefact as error:
            yield Damage("artefact", Path(error.where), error.what, self._todo)
            return
        self.recomputed += content is not None
        if content is not None and content != artefact.manifest.content:
            yield self._damage("the content digest is not that of its rows")

    def _damage(self, what: str, name: str = "") -> Damage:
        return Damage("artefact", self._folder / name, what, self._todo)


def _is_of_this_version(manifest: Manifest) -> bool:
    """Whether today's code made it: another version of a stage may digest its rows in another way."""
    if manifest.stage not in {spec.kind for spec in STAGES}:
        return False
    return manifest.parts.get("version") == stage_module(manifest.stage).VERSION


def _link_damage(link: Link) -> Iterator[Damage]:
    if link.dangles:
        yield Damage("link", link.path, f"links a result that is not there: {'/'.join(link.place)}", RELINK)


def _chain_damage(breaks: Iterable[Break]) -> list[Damage]:
    return [Damage("chain", each.where, each.what, each.todo) for each in breaks]


def _lock_damage(session: Session) -> Iterator[Damage]:
    path = session.loaded.base_lock_path
    entries = read_lock(path)
    for step, entry in entries.items():
        if step_key(entry["parts"]) != entry["key"]:
            yield Damage("lock", path, f"{step}: the key is not the sha256 of its parts", RELOCK)
            continue
        manifest = session.store.path_of(str(entry["parts"].get("stage")), entry["key"]) / MANIFEST
        try:
            content = Manifest.read(manifest).content if manifest.is_file() else entry["content"]
        except CorruptArtefact:  # said of the artefact already
            continue
        if content != entry["content"]:
            what = f"{step}: the content is {entry['content'][:12]}, in the store {content[:12]}"
            yield Damage("lock", path, what, RELOCK)
