"""Where published files go: a local folder, an fsspec address, or (hub.py) a repository of the Hugging Face Hub."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from pipeline.core.errors import CorruptArtefact, Incomplete, UsageError, boundary, disk_errors
from pipeline.core.lineage import Manifest, file_sha256
from pipeline.core.store import MANIFEST
from pipeline.runner.publish.files import PRIVATE_VERSIONS, Item, What, is_allowed
from pipeline.runner.publish.folder import files_in, folder_of, refuse_changed, replaced_folder

HUB: Final = "hf://"
REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
AGAIN: Final = "run the same command again; what is there is replaced as a whole"
PUSHED: Final = ".pushed.json"
"""Says what a push wrote into a folder. A data set has none: its manifest says it, and knows no other file."""
LOCAL: Final = re.compile(r"(?:file|local)://", re.IGNORECASE)
CHAINED: Final = re.compile(r"(?:file|local|hf)(?:$|:)", re.IGNORECASE)
"""Parts of a chained address that lead to a place with rules of its own."""
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
            UsageError: it cannot be written, or holds something that no push wrote; all of it would be replaced.
        """
        names = files_in(self.path, self.where)
        if names:
            refuse_changed(self.path, pushed_before(self.path, what), self.where)
        return frozenset(names) - {PUSHED}

    def put(self, what: What, items: Sequence[Item], stale: Sequence[str], message: str, public: bool) -> str:
        """Write all of it aside and rename it into place.

        Raises:
            UsageError: as `look`: somebody may have worked in the folder since.
        """
        self.look(what, public)
        with (
            disk_errors(self.where, f"make room or give write access, then {AGAIN}"),
            replaced_folder(self.path, self.where) as partial,
        ):
            for item in items:
                file = partial / item.name
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as out:
                    for piece in item.chunks():
                        out.write(piece)
            if what == "model":
                made = {"format": 1, "files": {item.name: item.sha256 for item in items}}
                (partial / PUSHED).write_text(json.dumps(made, indent=2) + "\n", "utf-8")
        return self.where


def pushed_before(path: Path, what: What) -> Mapping[str, str]:
    """Name -> sha256 of what an earlier push wrote into a folder; empty: none did."""
    mark = path / (PUSHED if what == "model" else MANIFEST)
    try:
        made = _files_of_data_set(mark) if what == "dataset" else json.loads(mark.read_text("utf-8"))["files"]
        made = {str(name): str(sha256) for name, sha256 in made.items() if is_allowed(name, what)}
        return {**made, mark.name: file_sha256(mark)} if made else {}
    except (CorruptArtefact, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _files_of_data_set(path: Path) -> Mapping[str, Any]:
    """Of a published manifest. One that names a machine is of a store, which no push made."""
    manifest = Manifest.read(path)
    is_published = manifest.stage == "dataset" and not any(name in manifest.versions for name in PRIVATE_VERSIONS)
    return {name: facts["sha256"] for name, facts in manifest.files.items()} if is_published else {}


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
    _refuse_credentials(text)
    if text.startswith(HUB):
        return _repository(text, branch)
    if branch is not None:
        raise UsageError("only the Hub has branches", where="--branch", todo="leave it out")
    if "://" in text and LOCAL.match(text) is None:
        return _remote(text)
    path = LOCAL.sub("", text, count=1)
    if path.strip() == "":
        raise UsageError("the target is empty or the root", where=f"--to {text}", todo=f"give {TARGETS}")
    return Folder(folder_of(Path(path), f"--to {text}"))


def _refuse_credentials(text: str) -> None:
    """Refuse a name and key in any part of an address, which may chain several."""
    hosts = [after.partition("/")[0] for after in text.split("://")[1:]]
    if any("@" in host for host in hosts) or (hosts and "?" in text):
        todo = "let the environment say them, as fsspec's file system for it documents"
        raise UsageError("the address holds credentials", where="--to", todo=todo)


def _remote(text: str) -> Remote:
    where, parts = f"--to {text}", text.split("::")
    if len(parts) > 1 and any(CHAINED.match(part) for part in parts):
        todo = "give the last part of it alone"
        raise UsageError("a chained address leads to a local folder or the Hub", where=where, todo=todo)
    if not text.rstrip("/").partition("://")[2]:
        raise UsageError("the address names no place", where=where, todo=f"give {TARGETS}")
    return Remote(text.rstrip("/"))


def is_repository(name: str) -> bool:
    """Whether the Hub takes it for `owner/name`."""
    parts = name.split("/")
    is_fit = all(REPOSITORY.fullmatch(part) and ".." not in part and "--" not in part for part in parts)
    return len(parts) == 2 and is_fit and not parts[1].endswith((".", "-", ".git"))


def _repository(text: str, branch: str | None) -> Target:
    from pipeline.runner.publish.hub import Hub

    name = text.removeprefix(HUB)
    if not is_repository(name):
        todo = "give hf://OWNER/NAME: letters, digits, `-`, `_` and `.`; --what says whether it is a data set"
        raise UsageError("no repository of the Hub has that name", where=f"--to {text}", todo=todo)
    return Hub(name, branch)
