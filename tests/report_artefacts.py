"""Artefacts of a made-up run in the layouts of the real stages, for the tests of stage `report`."""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.config import ReportConfig, ReportStep
from pipeline.core.lineage import Manifest, digest_json
from pipeline.core.record import (
    PROMPT_SCHEMA,
    RECORD_SCHEMA,
    Message,
    Prompt,
    Record,
    ShardWriter,
    rejects_schema,
    to_table,
    write_parquet,
)
from pipeline.core.sink import RowSink, counted_reason
from pipeline.core.stage import Json, Result
from pipeline.stages import report
from tests.support import a_prompt, a_record, make_context

MODEL: dict[str, Any] = {
    "accuracy": 0.953,
    "ci95": [0.944, 0.962],
    "parameters": 1_862_400,
    "bytes": 7_449_600,
    "answers_per_second": 412.3,
    "answers_per_second_passes": [409.9, 412.3, 415.0],
    "cut": 0,
    "prompt_too_long": 0,
    "by_task": {"capital": {"n": 1201, "accuracy": 0.961}, "currency": {"n": 903, "accuracy": 0.942}},
}

EVALUATION: dict[str, Any] = {
    "n": 2104,
    "metric": "exact",
    "engine": "transformers",
    "precision": "float32",
    "max_tokens": 256,
    "bootstrap": 2000,
    "speed": {"prompts": 512, "batch_size": 64, "threads": None},
    "teacher": MODEL,
    "base": {
        **MODEL,
        "accuracy": 0.121,
        "ci95": [0.108, 0.135],
        "parameters": 246_912,
        "bytes": 987_648,
        "answers_per_second": 771.0,
        "method": "three_shot",
        "methods": {"strict": 0.002, "first_line": 0.034, "three_shot": 0.118},
        "methods_n": 500,
        "strict_accuracy": 0.003,
        "by_task": {"capital": {"n": 1201, "accuracy": 0.148}, "currency": {"n": 903, "accuracy": 0.085}},
    },
    "student": {
        **MODEL,
        "accuracy": 0.935,
        "ci95": [0.924, 0.945],
        "parameters": 246_912,
        "bytes": 987_648,
        "answers_per_second": 783.4,
        "by_task": {"capital": {"n": 1201, "accuracy": 0.944}, "currency": {"n": 903, "accuracy": 0.923}},
    },
    "retained": 0.981,
    "retained_ci95": [0.970, 0.992],
    "gap_closed": 0.978,
    "gap_closed_ci95": [0.966, 0.990],
}

SOURCES: dict[str, dict[str, Json]] = {
    "geography": {
        "source": "made for this test",
        "revision": "3f2a9c1",
        "license": "CC0-1.0",
        "description": "",
        "rows": 60,
    },
    "found": {"source": "a web page", "revision": "unknown", "license": "unknown", "description": "", "rows": 12},
}

TEACHER: dict[str, Json] = {
    "name": "tiny",
    "kind": "vllm",
    "license": "Apache-2.0",
    "identity": digest_json("weights"),
    "model": "teacher",
    "origin": "local weights",
}


@dataclass
class Run:
    """What the made-up run consists of; tests change the parts they are about."""

    kept: list[Record] = field(default_factory=list)
    rejected: dict[str, list[tuple[Record, str]]] = field(default_factory=dict)
    prompts: list[Prompt] = field(default_factory=lambda: [a_prompt()])
    evaluation: dict[str, Any] = field(default_factory=lambda: EVALUATION)
    loss: list[dict[str, Any]] = field(default_factory=list)
    sources: Mapping[str, Mapping[str, Json]] = field(default_factory=lambda: SOURCES)
    metrics: dict[str, dict[str, Json]] = field(default_factory=lambda: {"generate": {"teachers": {"tiny": TEACHER}}})

    def rejects(self, stage: str) -> list[tuple[Record, str]]:
        return self.rejected.get(stage, [])

    def entering(self, stage: str) -> list[Record]:
        """Rows that enter a stage: the kept ones and those that leave at it or later."""
        order = ("generate", "filter", "dedup", "dataset", "train")
        later = order[order.index(stage) :]
        return [*self.kept, *(row for name in later for row, _ in self.rejects(name))]


def a_row(number: int, text: str, **changes: Any) -> Record:
    """A record with its own id and this text as its completion."""
    values: dict[str, Any] = {
        "row_id": digest_json(number)[:32],
        "prompt_set": "geography",
        "prompt_id": f"p{number}",
        "prompt": (Message("user", f"What is the capital of land number {number}?"),),
        "completion": (Message("assistant", text),),
        "answer": "Ulm",
        "completion_tokens": len(text.split()),
    }
    return a_record(**{**values, **changes})


def ordinary_run() -> Run:
    """A run with rows that left at every stage, two prompt sets and a falling loss."""
    draw = random.Random(0)
    words = [
        "Ulm",
        "lies",
        "on",
        "the",
        "Danube",
        "and",
        "has",
        "a",
        "tall",
        "church",
        "tower",
        "that",
        "one",
        "may",
        "climb",
    ]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    rows = [a_row(number, text(4, 60), verified=True) for number in range(140)]
    rejected = {
        "generate": [(a_row(200 + n, "", completion=(), completion_tokens=None), "content_filter") for n in range(2)],
        "filter": [(a_row(300 + n, text(50, 90), verified=False), "wrong_answer") for n in range(11)]
        + [(a_row(400 + n, text(80, 120), finish_reason="length"), "finish_reason:length") for n in range(6)]
        + [(a_row(500 + n, "I cannot help with that."), "refusal") for n in range(3)],
        "dedup": [(a_row(600 + n, rows[n].completion[0].content), f"duplicate_of:{rows[n].row_id}") for n in range(4)],
        "train": [(a_row(700, text(300, 301)), "too_long")],
    }
    splits = ["train"] * 150 + ["validation"] * 18 + ["test"] * 40
    prompts = [a_prompt(prompt_id=f"p{number}", split=split) for number, split in enumerate(splits)]
    loss: list[dict[str, Any]] = [
        {"step": step, "epoch": step / 100, "loss": 3 * 0.97**step + 0.2 + draw.random() / 20, "grad_norm": 1.0}
        for step in range(1, 201)
    ]
    loss += [{"step": step, "epoch": step / 100, "eval_loss": 3 * 0.97**step + 0.24} for step in (100, 200)]
    return Run(kept=rows, rejected=rejected, prompts=prompts, loss=loss)


def write_run(run: Run, folder: Path) -> dict[str, Path]:
    """Write the artefacts of a run; returns the stage's `inputs`."""
    inputs = {
        kind: folder / kind for kind in ("prompts", "generate", "filter", "dedup", "dataset", "train", "evaluate")
    }
    _commit(inputs["prompts"], _sink(inputs["prompts"], PROMPT_SCHEMA, run.prompts, []), run)
    (inputs["prompts"] / "sources.json").write_text(json.dumps(run.sources), "utf-8")
    for stage in ("generate", "filter", "dedup"):
        left = run.rejects(stage)
        gone = {row.row_id for row, _ in left}
        rows = [row for row in run.entering(stage) if row.row_id not in gone]
        _commit(inputs[stage], _sink(inputs[stage], RECORD_SCHEMA, rows, left), run)
    _write_dataset(inputs["dataset"], run)
    _write_train(inputs["train"], run)
    inputs["evaluate"].mkdir()
    (inputs["evaluate"] / "evaluation.json").write_text(json.dumps(run.evaluation), "utf-8")
    n = run.evaluation["n"]
    not_scored = {"no_reference": 12}
    _commit(inputs["evaluate"], Result(n + 12, n, not_scored, digest_json("evaluate")), run)
    return inputs


def change_manifest(folder: Path, **changes: Any) -> None:
    """Write the manifest of an artefact anew with some fields changed."""
    path = folder / "manifest.json"
    path.write_text(replace(Manifest.read(path), **changes).to_json(), "utf-8")


def write_report(run: Run, folder: Path, *, sample_rows: int = 40, name: str = "made-up") -> tuple[Result, str]:
    """Write the artefacts and the report about them; returns the stage's result and the HTML text."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "report"
    out.mkdir()
    inputs = write_run(run, folder)
    config = ReportStep(report=ReportConfig(sample_rows=sample_rows), name=name)
    result = report.run(config, inputs, out, make_context(folder, "report"))
    return result, (out / "report.html").read_text("utf-8")


def _sink(folder: Path, schema: pa.Schema, rows: Sequence[Any], left: Sequence[tuple[Any, str]]) -> Result:
    with RowSink(folder, schema) as sink:
        sink.keep(rows)
        sink.reject([row for row, _ in left], [reason for _, reason in left])
    return sink.result(len(rows) + len(left))


def _write_dataset(folder: Path, run: Run) -> None:
    rows = run.entering("train")
    (folder / "data").mkdir(parents=True)
    write_parquet(to_table(RECORD_SCHEMA, rows), folder / "data" / "train-00000-of-00001.parquet")
    left = run.rejects("dataset")
    counted = Counter(counted_reason(reason) for _, reason in left)
    with ShardWriter(folder / "rejects", rejects_schema(RECORD_SCHEMA)) as writer:
        writer.write(to_table(rejects_schema(RECORD_SCHEMA), [row for row, _ in left], [reason for _, reason in left]))
    shipped: dict[str, Json] = {
        "prompt_sets": {
            name: {**facts, "rows": sum(row.prompt_set == name for row in rows)} for name, facts in run.sources.items()
        },
        "teachers": {"tiny": {"licenses": ["Apache-2.0"], "rows": len(rows)}},
    }
    result = Result(len(rows) + len(left), len(rows), counted, digest_json("dataset"), {"sources": shipped})
    _commit(folder, result, run)


def _write_train(folder: Path, run: Run) -> None:
    left = run.rejects("train")
    folder.mkdir()
    (folder / "loss.json").write_text(json.dumps(run.loss), "utf-8")
    (folder / "rejects").mkdir()
    ids = {"row_id": [row.row_id for row, _ in left], "reason": [reason for _, reason in left]}
    schema = pa.schema({"row_id": pa.string(), "reason": pa.string()})
    write_parquet(pa.table(ids, schema=schema), folder / "rejects" / "part-00000.parquet")
    rows_in = len(run.entering("train"))
    counted = Counter(counted_reason(reason) for _, reason in left)
    _commit(folder, Result(rows_in, rows_in - len(left), counted, digest_json("train")), run)


def _commit(folder: Path, result: Result, run: Run) -> None:
    stage = folder.name
    manifest = Manifest(
        key=digest_json([stage, "key"]),
        stage=stage,
        parts={"stage": stage, "version": 1, "config": {}},
        content=result.content,
        files={},
        rows_in=result.rows_in,
        rows_out=result.rows_out,
        rejected=dict(result.rejected),
        metrics={**result.metrics, **run.metrics.get(stage, {})},
        versions={"python": "3.11"},
    )
    (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")
