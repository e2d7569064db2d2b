"""Which files of an artefact are published: those on an allow-list, checked against its manifest, and no others."""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Literal

from pipeline.core.errors import CorruptArtefact, UsageError
from pipeline.core.lineage import CODE_FILES, MODEL_FILES, OTHER_WEIGHTS, Manifest, model_files
from pipeline.core.store import MANIFEST, REBUILD, Artefact

What = Literal["dataset", "model"]

README: Final = "README.md"
NOTICES: Final = ("LICENSES/*", "LICENSES.md", "NOTICE")
DATASET: Final = ("data/*.parquet", README, "croissant.json", *NOTICES, MANIFEST)
MODEL: Final = (*MODEL_FILES, *CODE_FILES, *OTHER_WEIGHTS, README, *NOTICES)
ALLOWED: Final[dict[What, tuple[str, ...]]] = {"dataset": DATASET, "model": MODEL}
"""What a target gets, and all that a push ever removes there; part by part, so that `*` stays within a folder."""
PRIVATE_VERSIONS: Final = ("host",)
"""Facts of the manifest that name a machine."""
MODEL_FOLDER: Final = "model"
CHUNK: Final = 1 << 20

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")


@dataclass(frozen=True, slots=True)
class Item:
    """A file to publish.

    Attributes:
        name: relative path at the target, with `/`.
        source: the file, or the bytes themselves of one that is made for the occasion.
        size: in bytes.
        sha256: 64 hex digits of what it must hold.
    """

    name: str
    source: Path | bytes
    size: int
    sha256: str

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes. A symbolic link is refused.

        Raises:
            CorruptArtefact: it became a link.
        """
        assert isinstance(self.source, Path)
        try:
            handle = os.open(self.source, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            if self.source.is_symlink():
                raise _corrupt("a symbolic link", self.source) from error
            raise
        with os.fdopen(handle, "rb") as file:
            yield file

    def chunks(self) -> Iterator[bytes]:
        """Its bytes in pieces, compared with its sha256 at the end.

        Raises:
            CorruptArtefact: they are others than when the list was made.
        """
        if isinstance(self.source, bytes):
            yield self.source
            return
        digest = hashlib.sha256()
        with self.open() as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                yield piece
        if digest.hexdigest() != self.sha256:
            raise _corrupt("the file changed while it was published", self.source)

    def text(self) -> str:
        """Its bytes as text, for the scan."""
        return b"".join(self.chunks()).decode("utf-8", "replace")


def item_of(name: str, text: str) -> Item:
    """A file that is made for the occasion."""
    content = text.encode("utf-8")
    return Item(_checked(name), content, len(content), hashlib.sha256(content).hexdigest())


def dataset_items(artefact: Artefact) -> list[Item]:
    """The files of a data set that are published, sorted by name; its manifest without what names this machine.

    Raises:
        CorruptArtefact: one is a link, lies elsewhere, or has a name that no target should see.
        UsageError: one that a data set needs is missing.
    """
    names = [name for name in artefact.manifest.files if is_allowed(name, "dataset")]
    items = [_of_artefact(artefact, name, name) for name in names]
    for needed in (README, "LICENSES.md", "NOTICE"):
        if needed not in names:
            todo = "make the data set again: `python -m pipeline dataset CONFIG --force`"
            raise UsageError(f"the data set has no {needed}", where=str(artefact.path), todo=todo)
    if not any(name.startswith("data/") for name in names):
        raise _corrupt("the data set has no shard", artefact.path)
    manifest = published_manifest(artefact.manifest, names)
    return sorted([*items, item_of(MANIFEST, manifest.to_json())], key=lambda item: item.name)


def published_manifest(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """A manifest as others see it: of these files alone, and without what names a machine. It is sealed anew, so that
    who has the files can check them."""
    versions = {name: value for name, value in manifest.versions.items() if name not in PRIVATE_VERSIONS}
    return replace(manifest, versions=versions, files={name: manifest.files[name] for name in sorted(names)})


def model_items(artefact: Artefact) -> list[Item]:
    """The files of a trained student that a loader reads, sorted by name, without card and notices.

    Raises:
        CorruptArtefact: as `dataset_items`.
    """
    folder = artefact.path / MODEL_FOLDER
    names = [path.relative_to(folder).as_posix() for path in model_files(folder)]
    names = [name for name in names if f"{MODEL_FOLDER}/{name}" in artefact.manifest.files]
    if not any(PurePosixPath(name).suffix == ".safetensors" for name in names):
        raise _corrupt("the student has no weights", folder)
    return [_of_artefact(artefact, f"{MODEL_FOLDER}/{name}", name) for name in names]


def is_allowed(name: str, what: What) -> bool:
    """Whether a file of this relative name belongs to what is published."""
    parts = PurePosixPath(name).parts
    return any(_matches(parts, PurePosixPath(pattern).parts) for pattern in ALLOWED[what])


def is_notice(name: str) -> bool:
    """Whether it is a licence or a notice."""
    return any(_matches(PurePosixPath(name).parts, PurePosixPath(pattern).parts) for pattern in NOTICES)


def _matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    pairs = zip(parts, patterns, strict=False)
    return len(parts) == len(patterns) and all(fnmatchcase(part, pattern) for part, pattern in pairs)


def _of_artefact(artefact: Artefact, inside: str, name: str) -> Item:
    path = artefact.path / _checked(inside)
    facts = artefact.manifest.files[inside]
    _refuse_links(artefact.path, path)
    return Item(_checked(name), path, int(str(facts["bytes"])), str(facts["sha256"]))


def _refuse_links(root: Path, path: Path) -> None:
    """No part of the way from the artefact to the file may lead elsewhere."""
    for part in (path, *path.parents):
        if part == root:
            break
        if stat.S_ISLNK(part.lstat().st_mode):
            raise _corrupt("a symbolic link", part)
    if not path.resolve().is_relative_to(root.resolve()):
        raise _corrupt("the file lies outside of its artefact", path)


def _checked(name: str) -> str:
    """The name, if it is a plain relative path that no target can take for another."""
    if len(name) > 400 or not all(_NAME.fullmatch(part) for part in name.split("/")):
        raise _corrupt(f"a file's name is not fit to be published: {name!r}", name)
    return name


def _corrupt(what: str, where: Path | str) -> CorruptArtefact:
    return CorruptArtefact(what, where=str(where), todo=REBUILD)
