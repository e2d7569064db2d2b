"""`python -m tests.peak_memory STAGE FOLDER [--small]`: runs a stage on the rows in FOLDER, prints its peak of memory.

A process of its own, because a process's peak never goes down again. With `--small` shards hold 256 rows instead of
8,192, so that a few thousand rows are many shards.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from pipeline.core import config as c
from pipeline.core import content, record
from pipeline.core.config_base import ConfigModel
from pipeline.core.record import PROMPT_SCHEMA, RECORD_SCHEMA, ShardWriter
from tests.support import a_prompt, a_record, dataset_step, make_context

SMALL_SHARD = 256


def write_rows(folder: Path, rows: int, size: int, *, shard_rows: int) -> None:
    """Rows with texts of `size` characters as the input of every stage: prompts, completions, records, a file."""
    folder.mkdir()
    (folder / "sources.json").write_text("{}", "utf-8")
    with (
        ShardWriter(folder / "prompts" / "rows", PROMPT_SCHEMA, shard_rows=shard_rows) as prompts,
        ShardWriter(folder / "records" / "rows", RECORD_SCHEMA, shard_rows=shard_rows) as records,
        (folder / "rows.jsonl").open("w", encoding="utf-8") as lines,
    ):
        for start in range(0, rows, shard_rows):
            numbers = range(start, min(rows, start + shard_rows))
            texts = [f"{number:09d} {'x' * size}" for number in numbers]
            ids = [f"p{number:09d}" for number in numbers]
            prompts.write(_prompts(ids))
            records.write(_records(ids, texts))
            for name, text in zip(ids, texts, strict=True):
                lines.write(f'{{"id": "{name}", "prompt": "{text}", "completion": "{text}"}}\n')
    (folder / "records" / "sources.json").write_text("{}", "utf-8")


def _prompts(ids: Sequence[str]) -> pa.Table:
    one = record.to_table(PROMPT_SCHEMA, [a_prompt()]).take([0] * len(ids))
    return _with(one, "prompt_id", pa.array(ids))


def _records(ids: Sequence[str], texts: Sequence[str]) -> pa.Table:
    one = record.to_table(RECORD_SCHEMA, [a_record()]).take([0] * len(ids))
    said = [[{"role": "assistant", "content": text, "reasoning_content": None}] for text in texts]
    table = _with(one, "row_id", pa.array(name.rjust(32, "0") for name in ids))
    return _with(table, "completion", pa.array(said, record.MESSAGES))


def _with(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), values)


def shrink_shards() -> None:
    """Make whatever is held in memory at once a thirty-second of what it is."""
    from pipeline.stages import dataset, prompts
    from pipeline.stages.generate import requests, rows
    from pipeline.stages.prompts import order, settlement
    from pipeline.teacher import replay

    content.BLOCK_ROWS = SMALL_SHARD
    defaults(ShardWriter.__init__)["shard_rows"] = SMALL_SHARD
    requests.SHARD_ROWS = settlement.SHARD_ROWS = SMALL_SHARD  # type: ignore[attr-defined]
    rows.READ_ROWS = 2 * SMALL_SHARD
    dataset.PARTITION_ROWS = 2 * SMALL_SHARD
    replay.ROWS_PER_COMMIT = SMALL_SHARD
    order.READ_ROWS = SMALL_SHARD // 8
    defaults(prompts.sorted_by_id)["run_rows"] = 2 * SMALL_SHARD  # type: ignore[attr-defined]


def defaults(function: Any) -> dict[str, Any]:
    return function.__kwdefaults__


def config_of(stage: str, folder: Path, shard_rows: int) -> ConfigModel:
    path = str(folder / "rows.jsonl")
    prompts = {"sets": {"set": {"source": {"kind": "jsonl", "path": path}}}, "test": 0}  # test n-grams are all held
    return {
        "prompts": lambda: c.PromptsStep.model_validate({"prompts": prompts}),
        "generate": lambda: c.GenerateStep.model_validate(
            {"generate": {"teacher": "t"}, "teachers": {"t": {"kind": "replay", "path": path, "origin": "tests"}}}
        ),
        "filter": lambda: c.FilterStep.model_validate({"filter": {}}),
        "dedup": lambda: c.DedupStep.model_validate({"dedup": {}}),
        "dataset": lambda: dataset_step(shard_rows=shard_rows),
    }[stage]()


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main(stage: str, folder: Path, *, small: bool) -> None:
    if small:
        shrink_shards()
    inputs = dict.fromkeys(("generate", "filter", "dedup"), folder / "records")
    inputs["prompts"] = folder / "prompts" if stage == "generate" else folder / "records"
    with TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        module = importlib.import_module(f"pipeline.stages.{stage}")
        module.run(
            config_of(stage, folder, SMALL_SHARD if small else record.SHARD_ROWS),
            inputs,
            out,
            make_context(Path(scratch)),
        )
    print(peak_bytes())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), small="--small" in sys.argv)
