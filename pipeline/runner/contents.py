"""The content digest of a committed result, computed anew from its files as its stage computed it."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline.core.lineage import Manifest, digest_json, model_files
from pipeline.core.store import Artefact


def recompute(artefact: Artefact) -> str | None:
    """The content digest of an artefact whose files were verified; None for a kind whose digest covers more than its
    files hold (`evaluate`: its file also tells timings).

    Reads all rows, one shard in memory at a time.

    Raises:
        CorruptArtefact: a shard is not readable.
    """
    compute = CONTENTS.get(artefact.manifest.stage)
    return None if compute is None else compute(artefact)


def _rows(folder: Path, stem: str = "") -> str:
    """Content digest of a folder of shards, as their writer computed it."""
    from pipeline.core.content import ContentDigest  # Arrow, which most commands do without
    from pipeline.core.record import read_shards

    digest: ContentDigest | None = None
    for table in read_shards(folder, stem=stem):
        digest = ContentDigest(table.schema) if digest is None else digest
        digest.update(table)
    return "" if digest is None else digest.hexdigest()


def _kept_and_rejected(artefact: Artefact) -> str:
    return digest_json({"rows": _rows(artefact.path / "rows"), "rejects": _rows(artefact.path / "rejects")})


def _generate(artefact: Artefact) -> str:
    from pipeline.core.targets import FOLDER, count_in

    rows, targets = _kept_and_rejected(artefact), artefact.path / FOLDER
    return count_in(rows, _rows(targets)) if targets.is_dir() else rows


def _prompts(artefact: Artefact) -> str:
    sources = json.loads((artefact.path / "sources.json").read_text("utf-8"))
    return digest_json({"rows": _kept_and_rejected(artefact), "sources": sources})


def _dataset(artefact: Artefact) -> str:
    folder = artefact.path / "data"
    splits = sorted({path.name.partition("-")[0] for path in folder.glob("*.parquet")})
    return digest_json({split: _rows(folder, f"{split}-") for split in splits})


def _train(artefact: Artefact) -> str:
    """From the digests of the files, which hold weights: no need to read them twice."""
    folder = artefact.path / "model"
    return digest_json(dict(_digests(artefact.manifest, folder, artefact.path)))


def _digests(manifest: Manifest, folder: Path, root: Path) -> Iterator[tuple[str, str]]:
    for file in model_files(folder):
        yield file.relative_to(folder).as_posix(), str(manifest.files[file.relative_to(root).as_posix()]["sha256"])


def _report(artefact: Artefact) -> str:
    return str(artefact.manifest.files["report.html"]["sha256"])


CONTENTS: Mapping[str, Callable[[Artefact], str]] = {
    "prompts": _prompts,
    "generate": _generate,
    "filter": _kept_and_rejected,
    "dedup": _kept_and_rejected,
    "dataset": _dataset,
    "train": _train,
    "report": _report,
}
