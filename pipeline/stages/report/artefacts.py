"""The committed artefacts that the report reads: their manifests, their shards one at a time, their JSON files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import Manifest
from pipeline.core.record import read_shards
from pipeline.core.stage import Context, check_cancelled

KINDS = ("prompts", "generate", "filter", "dedup", "dataset", "train", "evaluate")
"""The steps a report is about, in the order in which rows pass them."""


@dataclass(frozen=True, slots=True)
class Artefacts:
    """The upstream artefacts of one run.

    Attributes:
        folders: kind of the step -> its committed folder.
        manifests: kind of the step -> its manifest.
        ctx: the stage's context; reading stops between shards when it is cancelled.
    """

    folders: Mapping[str, Path]
    manifests: Mapping[str, Manifest]
    ctx: Context

    @classmethod
    def read(cls, folders: Mapping[str, Path], ctx: Context) -> "Artefacts":
        """Read the manifests of all steps in `KINDS`.

        Raises:
            CorruptArtefact: a manifest cannot be read.
        """
        return cls(folders, {kind: Manifest.read(folders[kind] / "manifest.json") for kind in KINDS}, ctx)

    def shards(self, kind: str, folder: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The shards under `folder` of a step, one in memory at a time; none where the step has no such folder."""
        for table in read_shards(self.folders[kind] / folder, columns):
            check_cancelled(self.ctx)
            yield table

    def json(self, kind: str, name: str) -> Any:
        """The content of a JSON file of a step.

        Raises:
            CorruptArtefact: the file is missing or not JSON.
        """
        path = self.folders[kind] / name
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            todo = "run the pipeline again: it will be rebuilt"
            raise CorruptArtefact(f"unreadable {name}: {error}", where=str(path), todo=todo) from error
