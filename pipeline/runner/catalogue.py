"""All results of a data folder by their manifests alone: which runs hold them, and what was made of what."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CorruptArtefact, UsageError
from pipeline.core.lineage import Manifest
from pipeline.core.stage import Json
from pipeline.core.store import MANIFEST, Artefact, Store
from pipeline.runner.links import linked_artefact, run_folders
from pipeline.runner.steps import step_names

TODO = "give the folder of a run: --data DIR"
READ = "see to the disk or give read access, then run the same command again"


@dataclass(frozen=True, slots=True)
class Held:
    """A result and the runs that hold on to it.

    Attributes:
        artefact: its folder and manifest; its files are not looked at.
        runs: names of the runs whose folder links it (or holds a copy of it); none after they went on to another.
    """

    artefact: Artefact
    runs: tuple[str, ...]

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.artefact.manifest

    @property
    def place(self) -> tuple[str, str]:
        """Stage and key."""
        return self.manifest.stage, self.manifest.key

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.artefact.path


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a data folder holds.

    Attributes:
        data: the folder.
        results: all whose manifest can be read, sorted by stage and key.
        unreadable: folders whose manifest cannot be read; `verify` says more of them.
    """

    data: Path
    results: tuple[Held, ...]
    unreadable: tuple[Path, ...]

    @classmethod
    def of(cls, data: Path) -> "Catalogue":
        """Read the manifests of a data folder; an empty catalogue where there is none."""
        found, unreadable = stored(Store(data / "store"))
        held: dict[tuple[str, str], list[str]] = {}
        for folder in run_folders(data):
            for artefact in _linked(folder):
                place = (artefact.manifest.stage, artefact.manifest.key)
                held.setdefault(place, []).append(folder.name)
                found.setdefault(place, artefact)
        results = tuple(Held(found[place], tuple(held.get(place, ()))) for place in sorted(found))
        return cls(data, results, tuple(unreadable))

    def of_stage(self, stage: str) -> list[Held]:
        """The results of a stage."""
        return [held for held in self.results if held.manifest.stage == stage]

    def at(self, stage: str, key: str) -> Held:
        """The result of a key that is there."""
        return next(held for held in self.of_stage(stage) if held.manifest.key == key)

    def made_of(self, stage: str, name: str, content: str) -> list[Held]:
        """The results of a stage that were made of a content of the step `name`, those that runs hold first."""
        found = [held for held in self.of_stage(stage) if inputs_of(held.manifest).get(name) == content]
        return sorted(found, key=lambda held: not held.runs)

    def input_of(self, held: Held, name: str) -> Held | None:
        """The result of the step `name` that another was made of: of several with that content one that a run holds
        together with it; None: none is there."""
        content = inputs_of(held.manifest).get(name)
        found = [each for each in self.of_stage(kind_of(name)) if each.manifest.content == content]
        return max(found, key=lambda each: (len({*each.runs} & {*held.runs}), len(each.runs)), default=None)


def open_catalogue(data: Path) -> Catalogue:
    """The catalogue of the data folder that a person named.

    Raises:
        UsageError: there is no such folder, or nothing was ever made in it.
    """
    if not data.is_dir():
        raise UsageError("no such data folder", where=str(data), todo=TODO)
    if not any((data / name).is_dir() for name in ("store", "runs")):
        raise UsageError("no data folder: it has no store and no runs", where=str(data), todo=TODO)
    return Catalogue.of(data)


def stored(store: Store) -> tuple[dict[tuple[str, str], Artefact], list[Path]]:
    """The results of a store by stage and key; and the folders of those whose manifest cannot be read."""
    found, unreadable = {}, []
    for stage, key in store.artefacts():
        path = store.path_of(stage, key)
        try:
            found[stage, key] = Artefact(path, Manifest.read(path / MANIFEST))
        except (CorruptArtefact, OSError):
            unreadable.append(path)
    return found, unreadable


def _linked(folder: Path) -> Iterator[Artefact]:
    for step in step_names():
        artefact = linked_artefact(folder, step)
        if artefact is not None:
            yield artefact


def inputs_of(manifest: Manifest) -> Mapping[str, str]:
    """Step -> content that it was made of (a key that follows it, as in the parts of `report`, is left out)."""
    inputs = manifest.parts.get("inputs")
    if not isinstance(inputs, dict):
        return {}
    return {name: str(content).partition(" ")[0] for name, content in inputs.items()}


def kind_of(step: str) -> str:
    """The stage that a step is one of: `generate@2` is a `generate`."""
    return step.partition("@")[0]


def part(value: Json, *names: str) -> Json:
    """What lies under names inside each other; None where one of them is not there."""
    for name in names:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def text(value: object) -> str | None:
    """A value as text; None where there is none."""
    return None if value is None else str(value)


def texts(value: Json) -> Sequence[str]:
    """The texts of a list; none if it is none."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
