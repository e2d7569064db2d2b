"""Where published files go: a local folder, an fsspec address, or (hub.py) a repository of the Hugging Face Hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from pipeline.core.errors import Incomplete, UsageError, boundary, disk_errors
from pipeline.core.store import MANIFEST
from pipeline.runner.publish.files import Item, What, is_allowed
from pipeline.runner.publish.folder import replaced_folder

HUB: Final = "hf://"
REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
AGAIN: Final = "run the same command again; what is there is replaced as a whole"
TARGETS: Final = "hf://OWNER/NAME, a folder, or an address that fsspec knows (s3://…, gs://…, memory://…)"


class Target(Protocol):
    """A place to publish at."""

    @property
    def name(self) -> str:
        """What a model that lies there is called."""

    @property
    def where(self) -> str:
        """The address, for people; it holds no key."""

    def look(self, what: What, public: bool) -> frozenset[str]:
        """Names of the files that are there; changes nothing.

        Raises:
            UsageError: it cannot be published there.
            PolicyRefused: everybody could read what is not public.
            Incomplete: it cannot be asked at this moment.
        """

    def put(self, what: What, items: Sequence[Item], stale: Sequence[str], message: str, public: bool) -> str:
        """Send the files, remove the stale ones, and compare what is there then; returns its address.

        Raises:
            Incomplete: the same command completes it.
        """


@dataclass(frozen=True, slots=True)
class Folder:
    """A local folder, which appears as a whole or not at all."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.path)

    def look(self, what: What, public: bool) -> frozenset[str]:
        """Names of the files in it.

        Raises:
            UsageError: it holds something that no push wrote; all of it would be replaced.
        """
        todo = "name a new folder, or one that an earlier push made"
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise UsageError("the target is no folder", where=self.where, todo=todo)
        if not self.path.is_dir():
            return frozenset()
        names = [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if not path.is_dir()]
        others = sorted(name for name in names if not is_allowed(name, what))
        if others:
            raise UsageError(f"the folder holds other files, such as {others[0]}", where=self.where, todo=todo)
        return frozenset(names)

    def put(self, what: What, items: Sequence[Item], stale: Sequence[str], message: str, public: bool) -> str:
        """Write all of it aside and rename it into place."""
        with (
            disk_errors(self.where, f"make room or give write access, then {AGAIN}"),
            replaced_folder(self.path) as partial,
        ):
            for item in items:
                file = partial / item.name
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as out:
                    for piece in item.chunks():
                        out.write(piece)
        return self.where


@dataclass(frozen=True, slots=True)
class Remote:
    """An address that fsspec knows. It has no rename of its own: the manifest, or else the card, is written last."""

    url: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def where(self) -> str:
        """The address."""
        return self.url

    def look(self, what: What, public: bool) -> frozenset[str]:
        """Names of the files under it."""
        system, root = self._open()
        with boundary(Incomplete, "the target cannot be listed", where=self.url, todo=f"see to it, then {AGAIN}"):
            system.invalidate_cache()
            found: list[str] = system.find(root) if system.exists(root) else []
        return frozenset(path.removeprefix(root).lstrip("/") for path in found)

    def put(self, what: What, items: Sequence[Item], stale: Sequence[str], message: str, public: bool) -> str:
        """Write all files, the one that completes it last, then remove the stale ones and compare sizes."""
        system, root = self._open()
        todo = f"see to it, then {AGAIN}"
        with boundary(Incomplete, "the upload failed", where=self.url, todo=todo):
            for item in sorted(items, key=_completes):
                system.makedirs(f"{root}/{item.name}".rpartition("/")[0], exist_ok=True)
                with system.open(f"{root}/{item.name}", "wb") as out:
                    for piece in item.chunks():
                        out.write(piece)
            for name in stale:
                system.rm_file(f"{root}/{name}")
            system.invalidate_cache()
            sizes = {item.name: system.size(f"{root}/{item.name}") for item in items}
        wrong = [item.name for item in items if sizes[item.name] != item.size]
        if wrong:
            raise Incomplete(f"{wrong[0]} did not arrive whole", where=self.url, todo=AGAIN)
        return self.url

    def _open(self) -> tuple[Any, str]:
        """The file system, and the root in its own form."""
        todo = f"give {TARGETS}; some need a package of their own"
        with boundary(UsageError, "no such target", where=f"--to {self.url}", todo=todo):
            from fsspec.core import url_to_fs

            system, root = url_to_fs(self.url)
        return system, str(root).rstrip("/")


def _completes(item: Item) -> tuple[bool, bool, str]:
    return item.name == MANIFEST, item.name == "README.md", item.name


def target_of(text: str, branch: str | None) -> Target:
    """The target that an address names.

    Raises:
        UsageError: it is none, or holds credentials, which would be printed and stored in a shell's history.
    """
    where = f"--to {text.partition('://')[0]}://…" if "://" in text else f"--to {text}"
    if text.startswith(HUB):
        return _repository(text, branch)
    if branch is not None:
        raise UsageError("only the Hub has branches", where="--branch", todo="leave it out")
    scheme, separator, _ = text.partition("://")
    if separator and scheme != "file":
        parts = urlsplit(text)
        if parts.password is not None or parts.query:
            todo = "let the environment say them, as fsspec's file system for it documents"
            raise UsageError("the address holds credentials", where=where, todo=todo)
        if not text.rstrip("/").partition("://")[2]:
            raise UsageError("the address names no place", where=where, todo=f"give {TARGETS}")
        return Remote(text.rstrip("/"))
    path = text.removeprefix("file://")
    if path.strip() == "" or Path(path).resolve().name == "":
        raise UsageError("the target is empty or the root", where=where, todo=f"give {TARGETS}")
    return Folder(Path(path) if Path(path).name not in ("", "..") else Path(path).resolve())


def _repository(text: str, branch: str | None) -> Target:
    from pipeline.runner.publish.hub import Hub

    parts = text.removeprefix(HUB).split("/")
    is_fit = all(REPOSITORY.fullmatch(part) and ".." not in part and "--" not in part for part in parts)
    if len(parts) != 2 or not is_fit or parts[1].endswith((".", "-", ".git")):
        todo = "give hf://OWNER/NAME: letters, digits, `-`, `_` and `.`; --what says whether it is a data set"
        raise UsageError("no repository of the Hub has that name", where=f"--to {text}", todo=todo)
    return Hub("/".join(parts), branch)
