"""What holds for every stage of rows, on any rows: none is lost, twice is once, files do not matter."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import DedupStep, FilterStep, PromptsStep
from pipeline.core.config_base import ConfigModel
from pipeline.core.config_prompts import PromptsConfig
from pipeline.core.record import (
    RECORD_SCHEMA,
    Message,
    Record,
    ShardWriter,
    count_rows,
    iter_records,
    read_shards,
    to_table,
)
from pipeline.core.stage import Result
from pipeline.stages import dataset, dedup, filter, prompts
from pipeline.text.normalise import normalise
from tests.examples import examples
from tests.support import a_record, dataset_step, make_context

EXAMPLES = examples(40)

NASTY = st.sampled_from(
    ["", " ", "\0", "\ufeff", "\r\n", "e\u0301", "\u00e9", "\u202e", "\U0001f40d", "I cannot assist"]
)
TEXT = st.text(max_size=30) | NASTY | st.sampled_from(["it is 5", "IT IS  5", "the end " * 20])
SETS = st.sampled_from(["one", "two", "three"])


@st.composite
def records(draw: Callable[..., Any]) -> list[Record]:
    """Rows with unique ids, a few equal texts among them."""
    count = draw(st.integers(0, 12))
    return [
        a_record(
            row_id=f"{number:032x}",
            prompt_set=draw(SETS),
            prompt_id=f"p{number}",
            split=draw(st.sampled_from(["train", "train", "validation"])),
            prompt=(Message("user", draw(st.sampled_from(["q", "Q ", "r"]))),),
            completion=(Message("assistant", draw(TEXT), draw(st.sampled_from([None, None, "so"]))),),
            answer=draw(st.sampled_from([None, "5", "x"])),
            finish_reason=draw(st.sampled_from(["stop", "stop", "length"])),
            license_set=tuple(sorted(draw(st.sets(st.sampled_from(["MIT", "unknown"]), min_size=1)))),
        )
        for number in range(count)
    ]


def run(
    stage: ModuleType, cfg: ConfigModel, upstream: str, rows: Sequence[Record], folder: Path, size: int = 5
) -> Result:
    """Run a stage on rows, into `folder/out`."""
    with ShardWriter(folder / upstream / "rows", RECORD_SCHEMA, shard_rows=size) as writer:
        writer.write(to_table(RECORD_SCHEMA, rows))
    (folder / "prompts").mkdir()
    (folder / "prompts" / "sources.json").write_text("{}", "utf-8")
    (folder / "out").mkdir()
    inputs = {upstream: folder / upstream, "prompts": folder / "prompts"}
    return stage.run(cfg, inputs, folder / "out", make_context(folder))


def assert_nothing_lost(result: Result, folder: Path) -> None:
    out = folder / "out"
    assert result.rows_in == result.rows_out + sum(result.rejected.values())
    assert result.rows_out == count_rows((out / "rows").glob("*.parquet"))
    assert sum(result.rejected.values()) == count_rows((out / "rejects").glob("*.parquet"))


def ids(rows: Sequence[Record]) -> list[str]:
    return [row.row_id for row in rows]


FILTER = FilterStep.model_validate({"filter": {"verifier": "numeric", "min_chars": 2}})


@EXAMPLES
@given(records())
def test_filter(rows: list[Record]) -> None:
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        result = run(filter, FILTER, "generate", rows, Path(one))
        assert_nothing_lost(result, Path(one))
        kept = list(iter_records(Path(one) / "out" / "rows"))
        rejected = list(iter_records(Path(one) / "out" / "rejects"))
        assert sorted(ids(kept) + ids(rejected)) == ids(rows)
        again = run(filter, FILTER, "generate", kept, Path(two))
        assert (again.rejected, list(iter_records(Path(two) / "out" / "rows"))) == ({}, kept)


@EXAMPLES
@given(records(), st.booleans())
def test_dedup(rows: list[Record], normalised: bool) -> None:
    def text(row: Record) -> tuple[str | None, ...]:
        parts = (row.prompt[0].content, row.completion[0].content, row.completion[0].reasoning_content)
        return tuple(normalise(part) if normalised and part is not None else part for part in parts)

    cfg = DedupStep.model_validate({"dedup": {"normalise": normalised}})
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        result = run(dedup, cfg, "filter", rows, Path(one))
        assert_nothing_lost(result, Path(one))
        kept = list(iter_records(Path(one) / "out" / "rows"))
        assert len({text(row) for row in kept}) == len(kept) == len({text(row) for row in rows})
        kept_text = {row.row_id: text(row) for row in kept}
        by_id = {row.row_id: row for row in rows}
        for table in read_shards(Path(one) / "out" / "rejects"):
            for row_id, reason in zip(table["row_id"].to_pylist(), table["reason"].to_pylist(), strict=True):
                assert kept_text[reason.removeprefix("duplicate_of:")] == text(by_id[row_id])
        assert all(row.prompt_set not in row.also_in for row in kept)
        again = run(dedup, cfg, "filter", kept, Path(two))
        assert (again.rejected, list(iter_records(Path(two) / "out" / "rows"))) == ({}, kept)


def shipped(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "out" / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


@EXAMPLES
@given(records().filter(bool), st.integers(1, 15), st.integers(1, 15), st.randoms(use_true_random=False))
def test_dataset(rows: list[Record], upstream_rows: int, shard_rows: int, shuffled: Any) -> None:
    other = list(rows)
    shuffled.shuffle(other)
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        plain = dataset_step()
        result = run(dataset, plain, "dedup", rows, Path(one))
        cfg = dataset_step(shard_rows=shard_rows)
        again = run(dataset, cfg, "dedup", other, Path(two), upstream_rows)
        assert (result.rows_in, result.rows_out, dict(result.rejected)) == (len(rows), len(rows), {})
        assert result.content == again.content
        assert shipped(Path(one)) == shipped(Path(two))
        assert sorted(row["row_id"] for row in shipped(Path(one))) == ids(rows)


SURROGATES = st.text(st.characters(), max_size=12) | NASTY
SOURCE_ROW = st.fixed_dictionaries(
    {
        "prompt": SURROGATES
        | st.none()
        | st.sampled_from(["one two three four five six", "One two three four five SIX"])
    },
    optional={
        "answer": SURROGATES | st.integers() | st.floats(allow_nan=False) | st.none(),
        "group": st.integers(0, 3),
    },
)


@EXAMPLES
@given(st.lists(SOURCE_ROW, min_size=1, max_size=20), st.booleans())
def test_prompts(rows: list[dict[str, Any]], own_ids: bool) -> None:
    lines = [json.dumps({"answer": None, "group": None, **row, "id": f"{at}"}) for at, row in enumerate(rows)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        path.write_text("\n".join(lines), "utf-8")
        columns = {"id": "id" if own_ids else None, "answer": "answer", "group_id": "group"}
        sets = {name: {"source": {"kind": "jsonl", "path": path}, "columns": columns} for name in ("one", "two")}
        config = PromptsConfig.model_validate({"sets": sets, "test": 0.3, "validation": 0.3, "near_test": {"ngram": 2}})
        (Path(folder) / "out").mkdir()
        result = prompts.run(PromptsStep(prompts=config), {}, Path(folder) / "out", make_context(Path(folder)))
        assert_nothing_lost(result, Path(folder))
        assert result.rows_in == 2 * len(rows)
        kept = [row for table in read_shards(Path(folder) / "out" / "rows") for row in table.to_pylist()]
        keys = [(row["prompt_set"], row["prompt_id"]) for row in kept]
        assert keys == sorted(set(keys))
        texts = [normalise(row["prompt"][0]["content"]) for row in kept]
        assert len(set(texts)) == len(texts) and "" not in texts
        rejected = [row for table in read_shards(Path(folder) / "out" / "rejects") for row in table.to_pylist()]
        tested = {normalise(row["prompt"][0]["content"]) for row in [*kept, *rejected] if row["split"] == "test"} - {""}
        assert not tested & {normalise(row["prompt"][0]["content"]) for row in kept if row["split"] != "test"}
        assert all(row["also_in"] == [{"one": "two", "two": "one"}[row["prompt_set"]]] for row in kept)
        assert {row["split"] for row in kept} <= {"train", "validation", "test"}
