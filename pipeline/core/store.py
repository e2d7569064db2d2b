"""Artefacts on disk: written aside, synced, verified, and made visible by one rename; never changed afterwards."""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import CorruptArtefact, Incomplete
from pipeline.core.lineage import Manifest, file_sha256
from pipeline.core.stage import Json

MANIFEST = "manifest.json"
STAGING = ".staging"
QUARANTINE = ".quarantine"
REBUILD = "run the pipeline again: it will be rebuilt"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Artefact:
    """A committed result: its folder and its manifest."""

    path: Path
    manifest: Manifest


class Store:
    """`<root>/<stage>/<key>/`: one folder per artefact.

    Args:
        root: folder of the store; staging and quarantine lie inside it, so that every move is a rename.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, stage: str, key: str) -> Path:
        """Where the artefact of a key lies or would lie."""
        return self.root / stage / key

    def find(self, stage: str, key: str) -> Artefact | None:
        """The artefact of a key with every file's sha256 verified, or None if there is none.

        Raises:
            CorruptArtefact: a file is missing, extra or different. The artefact is left for `quarantine`.
        """
        artefact = self.glance(stage, key)
        if artefact is not None:
            verify(artefact)
        return artefact

    def glance(self, stage: str, key: str) -> Artefact | None:
        """The artefact of a key with its files' names and sizes compared, their contents not; None if there is none.

        Raises:
            CorruptArtefact: a file is missing, extra or of another size.
        """
        folder = self.path_of(stage, key)
        if not folder.exists():
            return None
        artefact = Artefact(folder, Manifest.read(self._manifest(folder)))
        if (artefact.manifest.stage, artefact.manifest.key) != (stage, key):
            what = f"the manifest is of {artefact.manifest.stage} {artefact.manifest.key[:12]}"
            raise CorruptArtefact(what, where=str(folder), todo=REBUILD)
        _check_names(artefact)
        return artefact

    def find_sound(self, stage: str, key: str) -> Artefact | None:
        """Like `find`, but a corrupt artefact is quarantined, loudly, and counts as missing."""
        try:
            return self.find(stage, key)
        except CorruptArtefact as error:
            logger.error("%s: %s (%s); it will be rebuilt", stage, error.what, error.where)
            self.quarantine(stage, key, "corrupt")
            return None

    def _manifest(self, folder: Path) -> Path:
        path = folder / MANIFEST
        if not path.is_file():
            raise CorruptArtefact("the manifest is missing", where=str(folder), todo=REBUILD)
        return path

    @contextmanager
    def staging(self, stage: str) -> Iterator[Path]:
        """An empty folder to write into, locked while the block lasts; what is still there at its end is removed."""
        root = self.root / STAGING
        folder = root / f"{stage}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        make_folder(self.root)
        root.mkdir(exist_ok=True)
        with ExitStack() as stack:
            with _locked_folder(root, fcntl.LOCK_SH):  # or `leftovers` could see it before it is locked
                folder.mkdir()
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                stack.enter_context(_locked_folder(folder, fcntl.LOCK_SH))
            yield folder

    def leftovers(self) -> list[Path]:
        """Staging folders whose process is gone, sorted."""
        root = self.root / STAGING
        if not root.is_dir():
            return []
        with _locked_folder(root, fcntl.LOCK_EX):
            return sorted(path for path in root.iterdir() if _is_abandoned(path))

    def sweep(self) -> None:
        """Remove the staging folders of processes that were killed."""
        for folder in self.leftovers():
            logger.info("removing what a killed process left: %s", folder.name)
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, staged: Path, manifest: Manifest, *, replace_other_content: bool = False) -> Artefact:
        """Sync what was staged, write its manifest last, verify it, and make it visible by one rename.

        If the key has an artefact already (another process was faster), that one is returned and ours is dropped; with
        `replace_other_content` an artefact of other content is quarantined and ours takes its place.

        Raises:
            Incomplete: the disk is full or the folder cannot be written.
        """
        final = self.path_of(manifest.stage, manifest.key)
        try:
            _sync_tree(staged)
            complete = replace(manifest, files=_describe_files(staged))
            _write_synced(staged / MANIFEST, complete.to_json())
            sync_folder(staged)
            verify(Artefact(staged, complete))
            final.parent.mkdir(parents=True, exist_ok=True)
            return self._publish(staged, final, complete, replace_other_content)
        except OSError as error:
            todo = "make room or give write access, then run the same command again"
            raise Incomplete(
                f"cannot commit: {error.strerror}", where=str(error.filename or final), todo=todo
            ) from error

    def _publish(self, staged: Path, final: Path, manifest: Manifest, replace_other_content: bool) -> Artefact:
        old = self.find_sound(manifest.stage, manifest.key)
        if old is not None and replace_other_content and old.manifest.content != manifest.content:
            self.quarantine(manifest.stage, manifest.key, "replaced")
            old = None
        if old is not None:
            return old
        try:
            staged.rename(final)
        except OSError:
            adopted = self.find_sound(manifest.stage, manifest.key)
            if adopted is None:
                raise
            logger.info("%s %s was committed by another process first", manifest.stage, manifest.key[:12])
            return adopted
        sync_folder(final.parent)
        sync_folder(self.root)  # the stage's own folder may be new
        return Artefact(final, manifest)

    def quarantine(self, stage: str, key: str, why: str) -> Path:
        """Move an artefact out of the way, so that it is never used again but can be looked at."""
        target = self.root / QUARANTINE / f"{stage}-{key[:16]}-{why}-{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process was faster
            self.path_of(stage, key).rename(target)
            logger.warning("moved the %s artefact %s/%s to %s", why, stage, key[:12], target)
        return target

    def artefacts(self) -> Iterator[tuple[str, str]]:
        """(stage, key) of every committed artefact, sorted."""
        for folder in sorted(self.root.glob("*/*")):
            if not folder.parent.name.startswith("."):
                yield folder.parent.name, folder.name


def verify(artefact: Artefact) -> None:
    """Compare every file of an artefact with its manifest.

    Raises:
        CorruptArtefact: a file is missing, extra or different.
    """
    _check_names(artefact)
    for name, facts in artefact.manifest.files.items():
        path = artefact.path / name
        if file_sha256(path) != facts["sha256"]:
            raise CorruptArtefact("the file's sha256 differs from the manifest", where=str(path), todo=REBUILD)


def _check_names(artefact: Artefact) -> None:
    """Compare the files' names and sizes with the manifest.

    Raises:
        CorruptArtefact: a file is missing, extra or of another size.
    """
    known = artefact.manifest.files
    sizes = {path.relative_to(artefact.path).as_posix(): path.stat().st_size for path in _files(artefact.path)}
    sizes.pop(MANIFEST, None)
    if sizes.keys() != known.keys():
        odd = ", ".join(sorted(sizes.keys() ^ known.keys())[:5])
        raise CorruptArtefact(f"files differ from the manifest: {odd}", where=str(artefact.path), todo=REBUILD)
    for name, facts in known.items():
        if sizes[name] != facts["bytes"]:
            what = f"the file has {sizes[name]:,} bytes, not the {facts['bytes']:,} of the manifest"
            raise CorruptArtefact(what, where=str(artefact.path / name), todo=REBUILD)


@contextmanager
def _locked_folder(folder: Path, kind: int) -> Iterator[None]:
    """Hold a lock on a folder for the block.

    Raises:
        OSError: the file system knows no locks, or (`LOCK_NB`) another process holds one.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)


def _is_abandoned(staging: Path) -> bool:
    try:
        with _locked_folder(staging, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return True
    except OSError:  # held by a living process, or gone
        return False


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _describe_files(folder: Path) -> dict[str, dict[str, Json]]:
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in _files(folder)
    }


def _write_synced(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_tree(folder: Path) -> None:
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries (a rename, a new file) survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and the missing ones above it, so that they survive a power loss; it may be there already."""
    if folder.is_dir():
        return
    make_folder(folder.parent, mode)
    folder.mkdir(mode, exist_ok=True)
    sync_folder(folder.parent)


def write_by_rename(path: Path, text: str) -> None:
    """Replace a small text file so that readers see the old or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        _write_synced(temporary, text)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
