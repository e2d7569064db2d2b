"""Stage `dataset` in tests: upstream artefacts made by hand, a step that declares its sources, the facts of a card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.config import DatasetStep
from pipeline.core.lineage import Manifest
from pipeline.core.record import RECORD_SCHEMA, Record, ShardWriter, read_shards, to_table
from pipeline.core.stage import Result
from pipeline.stages import dataset as stage
from tests.support import POLICY, make_context

SOURCES: dict[str, dict[str, Any]] = {
    "set": {"source": "here", "revision": "1", "license": "MIT", "description": "d"},
    "other": {"source": "unknown", "revision": "unknown", "license": "unknown", "description": "unknown"},
}


def a_model(name: str, *licenses: str, **facts: Any) -> dict[str, Any]:
    """A declared teacher that is a model."""
    told = {"model": f"org/{name}", "revision": "r", **facts}
    return {"role": "teacher", "name": name, "what": f"org/{name}", "licenses": licenses, "facts": told}


def people(name: str, license_name: str, origin: str = "people who wrote these tests") -> dict[str, Any]:
    """A declared teacher whose completions existed before."""
    return {"role": "teacher", "name": name, "what": origin, "licenses": [license_name], "facts": {"origin": origin}}


def a_student(license_name: str = "Apache-2.0", family: str | None = None) -> dict[str, Any]:
    """A declared base of the student."""
    what = "org/student"
    return {"role": "student_base", "name": "student", "what": what, "licenses": [license_name], "family": family}


def a_step(
    *declared: Mapping[str, Any], policy: Mapping[str, Any] | None = None, title: str = "Title", **config: Any
) -> DatasetStep:
    """The config of the stage."""
    return DatasetStep.model_validate(
        {"dataset": {"title": title, **config}, "policy": policy or POLICY, "declared": declared}
    )


def write_inputs(
    folder: Path,
    rows: Sequence[Record],
    *,
    sources: Mapping[str, Mapping[str, Any]] = SOURCES,
    upstream_rows: int = 8192,
    manifests: Mapping[str, Manifest] | None = None,
) -> dict[str, Path]:
    """The input folders of the stage, each with its manifest where one is given."""
    inputs = {name: folder / name for name in ("prompts", "generate", "filter", "dedup")}
    for path in inputs.values():
        path.mkdir(parents=True, exist_ok=True)
    with ShardWriter(inputs["dedup"] / "rows", RECORD_SCHEMA, shard_rows=upstream_rows) as writer:
        writer.write(to_table(RECORD_SCHEMA, rows))
    (inputs["prompts"] / "sources.json").write_text(json.dumps(sources), "utf-8")
    for name, manifest in (manifests or {}).items():
        (inputs[name] / "manifest.json").write_text(manifest.to_json(), "utf-8")
    return inputs


def a_manifest(stage_name: str, rows_in: int, rows_out: int, rejected: Mapping[str, int], **metrics: Any) -> Manifest:
    """The manifest of a stage before."""
    result = Result(rows_in, rows_out, rejected, "c" * 64, metrics)
    parts: dict[str, Any] = {"version": 1, "config": {"prompts": {"near_test": {"ngram": 8, "threshold": 0.5}}}}
    return Manifest.of(stage_name, "k" * 64, parts, result, {"python": "3.11.0", "host": "somebodys-laptop"})


def run_stage(
    folder: Path, rows: Sequence[Record], cfg: DatasetStep | None = None, **inputs: Any
) -> tuple[Path, Result]:
    """Run the stage on rows; its output folder and its result."""
    return _run(folder, a_step() if cfg is None else cfg, write_inputs(folder, rows, **inputs))


def run_on(folder: Path, cfg: DatasetStep, sources: Mapping[str, Mapping[str, Any]]) -> tuple[Path, Result]:
    """Run the stage on the rows in `folder/dedup`; its shards' folder and its result."""
    (folder / "prompts").mkdir()
    (folder / "prompts" / "sources.json").write_text(json.dumps(sources), "utf-8")
    out, result = _run(folder, cfg, {name: folder / name for name in ("prompts", "dedup")})
    return out / "data", result


def _run(folder: Path, cfg: DatasetStep, inputs: Mapping[str, Path]) -> tuple[Path, Result]:
    out = folder / "out"
    out.mkdir(parents=True)
    return out, stage.run(cfg, inputs, out, make_context(folder))


def read_rows(folder: Path, stem: str = "") -> list[dict[str, Any]]:
    """All rows of a folder of shards, or of those whose names begin so."""
    return [row for table in read_shards(folder, stem=stem) for row in table.to_pylist()]
