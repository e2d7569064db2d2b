"""Pinned content digests: rows that come out differently are a new version of their stage."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.core.config import DedupStep, FilterStep, PromptsStep
from pipeline.core.config_base import ConfigModel
from pipeline.core.record import RECORD_SCHEMA, Message, ShardWriter, to_table
from pipeline.stages import dataset, dedup, filter, prompts
from tests.support import a_record, dataset_step, make_context

# stage -> (VERSION, content digest of the fixture below)
PINNED = {
    "prompts": (2, "eb3d5ac1fdab0e3bbe04e079ae3b70a9d8a890d5b5ad77bb579516d019b4af77"),
    "filter": (2, "47cc1948854b480ab0854a0257da3388470b2e333b97c9d4e05dc73e2b3fa0f8"),
    "dedup": (2, "dccf2389ee99535291be5cde396b9a11ab1d0560c8517f873755958f625c86f5"),
    "dataset": (1, "f7bcdcc91a2aa47e1441a9e38f69e5706a3dcd63c9aafdb14755e387bc51e8b6"),
}
TEXTS = [
    "2",
    " 2",
    "It is 1,002.",
    "I\u2019m sorry, but I can\u2019t help with that.",
    "",
    "so " * 40,
    "caf\u00e9",
    "CAFE\u0301",
]
ROWS = [
    a_record(
        row_id=f"{number:032x}",
        prompt_id=f"p{number}",
        prompt_set="ab"[number % 2],
        split="validation" if number == 7 else "train",
        completion=(Message("assistant", text, "hm" if number == 2 else None),),
        answer=[None, "2", "1002"][number % 3],
        finish_reason="length" if number == 4 else "stop",
    )
    for number, text in enumerate(TEXTS * 2)
]
QUESTIONS = [
    {"id": number, "q": f"In a sentence that is long enough to be near another one: what is {number % 25} + 3?", "a": 7}
    for number in range(60)
]
SOURCES = {"a": {"source": "s", "revision": "1", "license": "MIT", "description": "d"}}


def prompts_cfg(folder: Path) -> PromptsStep:
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), "utf-8")
    (folder / "t.jinja").write_text("{{ q }} {{ '!' * (id % 2) }}", "utf-8")
    one = {
        "source": {"kind": "jsonl", "path": folder / "q.jsonl"},
        "columns": {"answer": "a"},
        "template": folder / "t.jinja",
        "system": "Be brief.",
    }
    near = {"ngram": 3, "threshold": 0.9}
    return PromptsStep.model_validate(
        {"prompts": {"sets": {"one": one}, "test": 0.1, "validation": 0.1, "near_test": near}}
    )


def upstream_of(folder: Path) -> Mapping[str, Path]:
    """The same rows as every upstream artefact."""
    with ShardWriter(folder / "up" / "rows", RECORD_SCHEMA) as writer:
        writer.write(to_table(RECORD_SCHEMA, ROWS))
    (folder / "up" / "sources.json").write_text(json.dumps(SOURCES), "utf-8")
    return dict.fromkeys(("generate", "filter", "dedup", "prompts"), folder / "up")


@pytest.mark.parametrize(
    ("name", "stage", "cfg"),
    [
        ("prompts", prompts, None),
        ("filter", filter, FilterStep.model_validate({"filter": {"verifier": "numeric"}})),
        ("dedup", dedup, DedupStep.model_validate({"dedup": {}})),
        ("dataset", dataset, dataset_step(seed=3)),
    ],
)
def test_content_is_pinned(tmp_path: Path, name: str, stage: ModuleType, cfg: ConfigModel | None) -> None:
    (tmp_path / "out").mkdir()
    used = prompts_cfg(tmp_path) if cfg is None else cfg
    result = stage.run(used, upstream_of(tmp_path), tmp_path / "out", make_context(tmp_path))
    found = (stage.VERSION, result.content)
    assert found == PINNED[name], (
        f"{name}: output changed: bump VERSION and pin {found} (rejected: {dict(result.rejected)})"
    )
