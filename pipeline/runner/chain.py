"""Whether results fit together: each made of results that are there, its statement of sources as it was hashed."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import digest_json
from pipeline.core.stage import Json
from pipeline.core.store import MANIFEST, REBUILD
from pipeline.runner.catalogue import Catalogue, Held, inputs_of, kind_of, part
from pipeline.terms.statement import PROVENANCE, Statement

REMADE = "run the run again: what is not up to date is made anew; a run that is not needed any more: delete its folder"


@dataclass(frozen=True, slots=True)
class Break:
    """A place where the chain from a model back to its sources breaks.

    Attributes:
        where: the manifest, or the file of overrides.
        what: what does not fit.
        todo: what to do about it.
    """

    where: Path
    what: str
    todo: str


def breaks_of(catalogue: Catalogue, runs: Collection[str] | None = None) -> Iterator[Break]:
    """The breaks in what runs hold on to. Results that no run holds are not looked at: `gc` may have taken theirs.

    Args:
        runs: names of runs; None: all.
    """
    contents = {(held.manifest.stage, held.manifest.content) for held in catalogue.results}
    untold = {path.parent.name for path in catalogue.unreadable}  # its damage is told, so not what follows of it
    for held in catalogue.results:
        if held.runs if runs is None else {*held.runs} & {*runs}:
            yield from _missing_inputs(held, contents, untold)
            yield from _false_statement(held)


def _missing_inputs(held: Held, contents: Collection[tuple[str, str]], untold: Collection[str]) -> Iterator[Break]:
    for name, content in inputs_of(held.manifest).items():
        if (kind_of(name), content) not in contents and kind_of(name) not in untold:
            what = f"it was made of rows of {name} (content {content[:12]}) that are not in the store"
            yield Break(held.path / MANIFEST, what, REMADE)


def _false_statement(held: Held) -> Iterator[Break]:
    """What a manifest says of sources and term records, against the hashes beside it."""
    told = held.manifest.metrics.get(PROVENANCE)
    if not isinstance(told, dict) or "statement_sha256" not in told:
        return
    if _statement_sha256(told) != told["statement_sha256"]:
        yield Break(held.path / MANIFEST, "the statement of its sources is not the one that was hashed", REBUILD)
    records, hashes = told.get("records"), part(told, "record_sha256")
    if not isinstance(records, dict) or not isinstance(hashes, dict):
        return
    for name in sorted(records.keys() | hashes.keys()):
        if name not in records or digest_json(records[name]) != hashes.get(name):
            yield Break(held.path / MANIFEST, f"the term record {name} is not the one that was hashed", REBUILD)


def _statement_sha256(told: Mapping[str, Json]) -> str | None:
    try:
        return Statement.from_json(cast(Mapping[str, Any], told["statement"])).sha256
    except (TypeError, LookupError, AttributeError):
        return None


def override_breaks(path: Path | None) -> Iterator[Break]:
    """The breaks in a file of overrides, each line of which holds the hash of the one before."""
    from pipeline.terms.overrides import read_overrides

    try:
        read_overrides(path)
    except CorruptArtefact as error:
        yield Break(Path(error.where), error.what, error.todo)
