"""A model's whole story: its training, the data set that it saw, each step before that, and the sources of all."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pipeline.core.errors import UsageError, disk_errors
from pipeline.core.lineage import OTHER_WEIGHTS, DigestCache, file_sha256, model_files
from pipeline.core.stage import Json
from pipeline.core.store import MANIFEST
from pipeline.runner.catalogue import READ, Catalogue, Held, inputs_of, open_catalogue, part, text
from pipeline.runner.models import Model, model_of
from pipeline.runner.provenance import Judgement, Provenance, Term

WEIGHTS = ("*.safetensors", *OTHER_WEIGHTS)
SETTINGS = ("tuning", "epochs", "max_steps", "batch_size", "learning_rate", "max_length", "precision", "seed")
"""Of the config of a training, those that are told."""


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A step that the model came from.

    Attributes:
        step: its name.
        path: its artefact.
        runs: names of the runs that hold it.
        key, content: of its manifest.
        manifest_sha256: of the manifest's file.
        rows_in, rows_out, rejected: as in the manifest.
    """

    step: str
    path: Path
    runs: tuple[str, ...]
    key: str
    content: str
    manifest_sha256: str
    rows_in: int
    rows_out: int
    rejected: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Who gave something.

    Attributes:
        role: "teacher", "prompt", "student_base", ….
        name: in the config.
        what: what it is: a hub id, a model, where a file comes from.
        licenses: its own and those of what it was made from.
        revision, identity: where known; the identity of a model is the sha256 of its files.
        rows: of the data set that came from it; None: none can be told (a student's base).
        share: of all rows of the data set.
    """

    role: str
    name: str
    what: str
    licenses: tuple[str, ...]
    revision: str | None
    identity: str | None
    rows: int | None
    share: float | None


@dataclass(frozen=True, slots=True)
class Traced:
    """What `trace` tells.

    Attributes:
        folder: the folder that was asked about.
        model: the training's own copy of it, and its evaluations.
        changed: names of files of the model that the folder lacks or has otherwise; the weights are equal.
        extra: names of files in the folder that the training did not write and a loader reads.
        settings: of the training's config.
        steps: the training first, then what it was made of, nearest first.
        missing: steps whose result is not in the data folder, with the content that it had.
        licenses: that some row of the data set is under.
        judgement: how the data set was judged; None: its manifest does not say.
        sources: teachers, prompt sets, the student's base.
        terms: of all licences.
    """

    folder: Path
    model: Model
    changed: tuple[str, ...]
    extra: tuple[str, ...]
    settings: Mapping[str, Json]
    steps: tuple[Ancestor, ...]
    missing: Mapping[str, str]
    licenses: tuple[str, ...]
    judgement: Judgement | None
    sources: tuple[SourceFacts, ...]
    terms: tuple[Term, ...]


def trace(data: Path, folder: Path) -> Traced:
    """The story of a model, found by its bytes among all trainings of a data folder, wherever it was copied to.

    Args:
        data: the data folder.
        folder: the model's; its card and other files that no loader reads do not count.

    Raises:
        UsageError: there is no such folder, it holds no weights, or no training of the data folder wrote them.
        Incomplete: a file cannot be read.
    """
    with disk_errors(str(folder), READ):
        if not folder.is_dir():
            raise UsageError("no such folder", where=str(folder), todo="give the folder of a model")
        catalogue = open_catalogue(data)
        digests = _digests(folder, data)
        train = _find(catalogue, digests, folder)
        steps, missing = _ancestors(catalogue, train)
        written = _written(train)
        changed = sorted(name for name, digest in written.items() if digests.get(name) != digest)
        found = {held.manifest.stage: held for held in steps}
        provenance = Provenance.of(found["dataset"].manifest) if "dataset" in found else None
        sources = _sources(found, provenance)
        licenses = part(found["dataset"].manifest.metrics, "licenses") if "dataset" in found else []
        named = dict.fromkeys(name for source in sources for name in source.licenses)
        return Traced(
            folder=folder,
            model=model_of(catalogue, train),
            changed=tuple(changed),
            extra=tuple(sorted(digests.keys() - written.keys())),
            settings=_settings(train),
            steps=tuple(map(_ancestor, steps)),
            missing=missing,
            licenses=tuple(cast(list[str], licenses or [])),
            judgement=None if provenance is None else provenance.judgement,
            sources=sources,
            terms=tuple(Term(name) if provenance is None else provenance.term(name) for name in named),
        )


# ----------------------------------------------------------------------------------------------------- which model


def _digests(folder: Path, data: Path) -> dict[str, str]:
    """Name in the folder -> sha256 of each file that a loader reads.

    Raises:
        UsageError: it holds no weights.
    """
    is_result = (folder / MANIFEST).is_file() and (folder / "model").is_dir()
    root = folder / "model" if is_result else folder
    files = model_files(root)
    if not any(_are_weights(path.name) for path in files):
        todo = "give the folder of a model: the one with *.safetensors in it"
        raise UsageError("the folder holds no weights", where=str(folder), todo=todo)
    cache = DigestCache(data / "cache" / "digests.json")
    found = {path.relative_to(root).as_posix(): cache.sha256(path) for path in files}
    cache.save()
    return found


def _are_weights(name: str) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in WEIGHTS)


def _written(train: Held) -> dict[str, str]:
    """Name in the model's folder -> sha256 of what a training wrote there and a loader reads."""
    inside = {name.removeprefix("model/"): str(facts["sha256"]) for name, facts in train.manifest.files.items()
              if name.startswith("model/")}  # fmt: skip
    read = {path.relative_to(train.path / "model").as_posix() for path in model_files(train.path / "model")}
    return {name: digest for name, digest in inside.items() if name in read or _are_weights(name)}


def _find(catalogue: Catalogue, digests: Mapping[str, str], folder: Path) -> Held:
    """The training that wrote just these weights: of several the one most of whose other files are equal, and that a
    run holds.

    Raises:
        UsageError: none did.
    """
    weights = {(name, digest) for name, digest in digests.items() if _are_weights(name)}
    trained = catalogue.of_stage("train")
    found = [held for held in trained if weights == {each for each in _written(held).items() if _are_weights(each[0])}]
    if not found:
        what = f"none of the {len(trained):,} trainings in {catalogue.data} wrote these weights"
        todo = "give the data folder in which it was trained: --data DIR; trace knows no weights that were converted"
        raise UsageError(what, where=str(folder), todo=todo)
    return max(found, key=lambda held: (len(_written(held).items() & digests.items()), len(held.runs)))


# ------------------------------------------------------------------------------------------------- what it is made of


def _ancestors(catalogue: Catalogue, train: Held) -> tuple[list[Held], dict[str, str]]:
    """The training and all results that it was made of, nearest first; and those that are not there."""
    found, missing = {"train": train}, {}
    waiting = [train]
    while waiting:
        held = waiting.pop(0)
        for name, content in inputs_of(held.manifest).items():
            if name in found or name in missing:
                continue
            before = catalogue.input_of(held, name)
            if before is None:
                missing[name] = content
            else:
                found[name] = before
                waiting.append(before)
    order = ("train", "dataset", "dedup", "filter", "generate", "prompts")
    return sorted(found.values(), key=lambda held: order.index(held.manifest.stage)), missing


def _ancestor(held: Held) -> Ancestor:
    manifest = held.manifest
    return Ancestor(
        step=manifest.stage,
        path=held.path,
        runs=held.runs,
        key=manifest.key,
        content=manifest.content,
        manifest_sha256=file_sha256(held.path / MANIFEST),
        rows_in=manifest.rows_in,
        rows_out=manifest.rows_out,
        rejected=manifest.rejected,
    )


def _settings(train: Held) -> dict[str, Json]:
    config = part(train.manifest.parts, "config", "train")
    return {name: config[name] for name in SETTINGS if name in config} if isinstance(config, dict) else {}


# ------------------------------------------------------------------------------------------------------------ sources


def _sources(found: Mapping[str, Held], provenance: Provenance | None) -> tuple[SourceFacts, ...]:
    """By the statement of the data set's manifest; where it has none, by what the stages recorded."""
    sets, teachers = (_counts(found, name) for name in ("prompt_sets", "teachers"))
    rows = found["dataset"].manifest.rows_out if "dataset" in found else 0
    base = _base(found["train"])
    if provenance is not None:
        told = [_declared(each) for each in provenance.sources if each.get("role") != "student_base"]
    else:
        told = [*_teachers(found), *_prompt_sets(found)]
    return (*(_counted(source, sets if source.role == "prompt" else teachers, rows) for source in told), base)


def _counts(found: Mapping[str, Held], name: str) -> Mapping[str, int]:
    """Rows of the data set by teacher, or by prompt set."""
    told = part(found["dataset"].manifest.metrics, "sources", name) if "dataset" in found else None
    return {key: cast(int, part(facts, "rows") or 0) for key, facts in told.items()} if isinstance(told, dict) else {}


def _counted(source: SourceFacts, counts: Mapping[str, int], rows: int) -> SourceFacts:
    count = counts.get(source.name)
    share = None if count is None or rows == 0 else count / rows
    return replace(source, rows=count, share=share)


def _declared(source: Mapping[str, Any]) -> SourceFacts:
    facts = source.get("facts")
    return SourceFacts(
        role=str(source.get("role")),
        name=str(source.get("name")),
        what=str(source.get("what")),
        licenses=tuple(map(str, source.get("licenses", ()))),
        revision=text(part(facts, "revision")),
        identity=text(part(facts, "identity")),
        rows=None,
        share=None,
    )


def _teachers(found: Mapping[str, Held]) -> list[SourceFacts]:
    told = part(found["generate"].manifest.metrics, "teachers") if "generate" in found else None
    return [_teacher(name, facts) for name, facts in told.items()] if isinstance(told, dict) else []


def _teacher(name: str, facts: Json) -> SourceFacts:
    what = ", ".join(str(each) for each in (part(facts, "model"), part(facts, "origin")) if each is not None)
    named = part(facts, "licenses")
    licenses = named if isinstance(named, list) else [part(facts, "license")]
    identity = text(part(facts, "identity"))
    return SourceFacts("teacher", name, what, tuple(map(str, licenses)), None, identity, None, None)


def _prompt_sets(found: Mapping[str, Held]) -> list[SourceFacts]:
    told = part(found["prompts"].manifest.metrics, "sources") if "prompts" in found else None
    if not isinstance(told, dict):
        return []
    return [
        SourceFacts(
            role="prompt",
            name=name,
            what=str(part(facts, "source")),
            licenses=(str(part(facts, "license")),),
            revision=text(part(facts, "revision")),
            identity=None,
            rows=None,
            share=None,
        )
        for name, facts in told.items()
    ]


def _base(train: Held) -> SourceFacts:
    """The student before its training, as the training itself recorded it."""
    facts = part(train.manifest.metrics, "student")
    ancestors = part(train.manifest.parts, "config", "student", "base_models")
    above = [str(each) for each in ancestors.values()] if isinstance(ancestors, dict) else []
    return SourceFacts(
        role="student_base",
        name="student",
        what="a folder" if part(facts, "model") == "local" else str(part(facts, "model") or "unknown"),
        licenses=(str(part(facts, "license") or "unknown"), *above),
        revision=text(part(facts, "revision")),
        identity=text(part(train.manifest.parts, "files", "student.model")),
        rows=None,
        share=None,
    )
