"""The links in the folders of runs: which results and which unfinished work each run holds on to."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import Manifest
from pipeline.core.runs import WORK
from pipeline.core.store import MANIFEST, Artefact
from pipeline.runner.steps import step_names


@dataclass(frozen=True, slots=True)
class Link:
    """A link in a run's folder.

    Attributes:
        path: the link; its name is the step.
        target: the absolute path that it points to: `…/<stage>/<key>`; nothing need be there.
    """

    path: Path
    target: Path

    @property
    def place(self) -> tuple[str, str]:
        """Stage and key of what it points to."""
        return self.target.parent.name, self.target.name

    @property
    def dangles(self) -> bool:
        """Whether nothing is where it points."""
        return not self.target.is_dir()


def run_folders(data: Path) -> list[Path]:
    """The folders of all runs, sorted."""
    root = data / "runs"
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def result_links(folder: Path) -> list[Link]:
    """The links of a run's folder to results, sorted by step."""
    return [*_links(folder)]


def work_links(folder: Path) -> list[Link]:
    """The links of a run's folder to unfinished work, sorted by step."""
    return [*_links(folder / WORK)]


def copied_results(folder: Path) -> list[Path]:
    """The results that lie in a run's folder themselves, as after a copy that followed the links; sorted by step."""
    if not folder.is_dir():
        return []
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
    return [path for path in folders if path.name in step_names() or (path / MANIFEST).is_file()]


def held_places(folder: Path) -> set[tuple[str, str]]:
    """(stage, key) of the results that a run holds on to: what it links, and what lies in its folder itself, as after a
    copy that followed the links."""
    copies = (linked_artefact(folder, path.name) for path in folder.iterdir() if not path.is_symlink())
    found = {(copy.manifest.stage, copy.manifest.key) for copy in copies if copy is not None}
    return found | {link.place for link in result_links(folder)}


def _links(folder: Path) -> Iterator[Link]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.name.startswith("."):  # a dot: left by a process that died while linking
            yield Link(path, Path(os.path.normpath(folder.resolve() / path.readlink())))


def linked_artefact(folder: Path, step: str) -> Artefact | None:
    """The result of a step that a run's folder links, if its manifest can be read; its files are not looked at."""
    path = folder / step
    try:
        return Artefact(path, Manifest.read(path / MANIFEST)) if (path / MANIFEST).is_file() else None
    except CorruptArtefact:
        return None
