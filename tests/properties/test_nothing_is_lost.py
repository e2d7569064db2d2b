"""`rows_in == rows_out + rejected` for any rows: hostile texts, equal rows, missing answers, odd finish reasons."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.config import DedupStep, FilterStep, GenerateStep
from pipeline.core.config_base import ConfigModel
from pipeline.core.config_train import StudentModel, TrainConfig
from pipeline.core.errors import UsageError
from pipeline.core.record import (
    PROMPT_SCHEMA,
    RECORD_SCHEMA,
    Message,
    Prompt,
    Record,
    ShardWriter,
    read_shards,
    to_table,
)
from pipeline.core.stage import Result
from pipeline.stages import dataset, dedup, filter, generate
from pipeline.student.jobs import TrainJob
from pipeline.student.shards import encode_shards, train_file
from tests.examples import examples
from tests.support import a_prompt, a_record, dataset_step, make_context
from tests.tiny_models import make_tiny_model

HUGE = "a long answer, " * 20_000
NASTY = [
    "",
    " ",
    "\0",
    "\ufeff",
    "\r\n",
    "e\u0301",
    "\u202e",
    "\U0001f40d",
    "I cannot assist",
    "</s>",
    "5",
    "\\boxed{5}",
]
STORED = st.text(max_size=20) | st.sampled_from([*NASTY, HUGE])
"""Texts that a file of ours can hold."""
SENT = STORED | st.text(st.characters(categories=["Cs", "Lu", "Cc"]), max_size=5)
"""Texts that a teacher's file can hold: lone surrogates too."""
FINISH = st.sampled_from(["stop", "stop", "stop", "length", "", "\0", "duplicate_of:x", "tool_calls", "a:b"])


@st.composite
def records(draw: Callable[..., Any]) -> list[Record]:
    """Any rows that `generate` could write, and then some of them again."""
    turn = st.builds(Message, st.sampled_from(["assistant", "assistant", "user"]), STORED, st.none() | STORED)
    row = st.builds(
        a_record,
        row_id=st.integers(0, 30).map(lambda number: f"{number:032x}"),
        prompt_set=st.sampled_from(["one", "two"]),
        split=st.sampled_from(["train", "validation"]),
        prompt=st.lists(turn, max_size=2).map(tuple),
        completion=st.lists(turn, max_size=2).map(tuple),
        answer=st.none() | STORED,
        also_in=st.sampled_from([(), ("two",)]),
        license_set=st.sampled_from([("MIT",), ("MIT", "unknown"), ()]),
        finish_reason=FINISH,
        prompt_tokens=st.none() | st.integers(0, 99),
        completion_tokens=st.none() | st.integers(0, 99),
        verified=st.none() | st.booleans(),
        flags=st.sampled_from([(), ("nul",)]),
    )
    rows = draw(st.lists(row, max_size=12))
    return rows + (draw(st.lists(st.sampled_from(rows), max_size=4)) if rows else [])


def entered(table: pa.Table) -> list[str]:
    """What a stage never changes of a row, as text."""
    kept = ["row_id", "prompt_set", "prompt", "completion", "finish_reason", "split"]
    return [repr(row) for row in table.select(kept).to_pylist()]


def both(out: Path) -> Iterator[pa.Table]:
    """What a stage kept and what it rejected."""
    yield from read_shards(out / "rows")
    yield from read_shards(out / "rejects")


def assert_counted(result: Result, out: Path) -> None:
    """The counts are the files', reason by reason."""
    reasons = [reason for table in read_shards(out / "rejects") for reason in table["reason"].to_pylist()]
    assert result.rows_in == result.rows_out + sum(result.rejected.values())
    assert result.rows_out == sum(table.num_rows for table in read_shards(out / "rows"))
    assert sum(result.rejected.values()) == len(reasons)
    assert all(any(reason.startswith(counted) for counted in result.rejected) for reason in reasons)


FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "finish_reasons": st.lists(FINISH, max_size=3),
        "min_chars": st.integers(1, 5),
        "max_chars": st.integers(1, 100),
        "refusal_phrases": st.none() | st.lists(STORED, max_size=2),
        "repetition": st.fixed_dictionaries({"ngram": st.integers(1, 3), "max_share": st.sampled_from([0.1, 1.0])}),
        "verifier": st.sampled_from(["none", "exact", "numeric"]),
    },
).map(lambda filter: FilterStep.model_validate({"filter": filter}))
DEDUPS = st.booleans().map(lambda normalise: DedupStep.model_validate({"dedup": {"normalise": normalise}}))


@pytest.mark.parametrize(("stage", "upstream", "configs"), [(filter, "generate", FILTERS), (dedup, "filter", DEDUPS)])
@settings(examples(30), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(rows=records(), data=st.data())
def test_filter_and_dedup(
    stage: ModuleType, upstream: str, configs: st.SearchStrategy[ConfigModel], rows: list[Record], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        out.mkdir()
        with ShardWriter(source / "rows", RECORD_SCHEMA, shard_rows=3) as writer:
            writer.write(to_table(RECORD_SCHEMA, rows))
        result = stage.run(data.draw(configs), {upstream: source}, out, make_context(Path(folder)))
        assert_counted(result, out)
        assert result.rows_in == len(rows)
        left = Counter(
            row for part in ("rows", "rejects") for table in read_shards(out / part) for row in entered(table)
        )
        assert left == Counter(entered(to_table(RECORD_SCHEMA, rows)))


@settings(examples(30), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(rows=records().filter(bool), shard_rows=st.integers(1, 9))
def test_dataset(rows: list[Record], shard_rows: int) -> None:
    with TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        out.mkdir()
        with ShardWriter(source / "rows", RECORD_SCHEMA, shard_rows=3) as writer:
            writer.write(to_table(RECORD_SCHEMA, rows))
        (source / "sources.json").write_text("{}", "utf-8")
        cfg = dataset_step(shard_rows=shard_rows)
        result = dataset.run(cfg, {"dedup": source, "prompts": source}, out, make_context(Path(folder)))
        assert (result.rows_in, result.rows_out, dict(result.rejected)) == (len(rows), len(rows), {})
        shipped = Counter(row_id for table in read_shards(out / "data") for row_id in table["row_id"].to_pylist())
        assert shipped == Counter(row.row_id for row in rows)


# --------------------------------------------------------------------------------------------- generate, from a file

TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": SENT})
ANSWERS = st.fixed_dictionaries(
    {
        "id": st.integers(0, 7).map(lambda number: f"p{number}"),
        "completion": SENT
        | st.none()
        | st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": SENT}), max_size=3
        ),
        "finish": SENT | FINISH | st.none(),
    }
)
SPLITS = st.sampled_from(["train", "train", "validation", "test"])


@settings(examples(40), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(splits=st.lists(SPLITS, max_size=7), answers=st.lists(ANSWERS, max_size=12), samples=st.integers(1, 3))
def test_generate(splits: list[str], answers: list[dict[str, Any]], samples: int) -> None:
    asked = [(f"p{at}", sample) for at, split in enumerate(splits) if split != "test" for sample in range(samples)]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        write_prompts(Path(folder), [a_prompt(prompt_id=f"p{at}", split=split) for at, split in enumerate(splits)])
        (Path(folder) / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), "utf-8")
        teacher = {"kind": "replay", "path": f"{folder}/answers.jsonl", "origin": "tests", "finish_reason": "finish"}
        cfg = GenerateStep.model_validate(
            {"generate": {"teacher": "t", "samples": samples}, "teachers": {"t": teacher}}
        )
        try:
            result = generate.run(cfg, {"prompts": Path(folder) / "prompts"}, out, make_context(Path(folder)))
        except UsageError as error:  # not one answer at all
            assert f"of {len(asked)} rows {len(asked)} were rejected as no_completion" in error.what
            return
        assert_counted(result, out)
        columns = ["prompt_id", "sample"]
        found = [(row["prompt_id"], row["sample"]) for table in both(out) for row in table.select(columns).to_pylist()]
        assert sorted(found) == sorted(asked) and result.rows_in == len(asked)


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    with ShardWriter(folder / "prompts" / "rows", PROMPT_SCHEMA, shard_rows=2) as writer:
        writer.write(to_table(PROMPT_SCHEMA, prompts))


# ------------------------------------------------------------------------------------------- train, before any step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@settings(examples(15), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(rows=records().filter(bool), max_length=st.sampled_from([8, 64]))
def test_tokenising(rows: list[Record], max_length: int, model: Path) -> None:
    rows = [row for row in rows if row.prompt and row.completion] or [a_record()]
    with TemporaryDirectory() as folder:
        out, workdir, data = (Path(folder) / name for name in ("out", "work", "data"))
        out.mkdir()
        workdir.mkdir()
        with ShardWriter(data, RECORD_SCHEMA, shard_rows=3, stem="train") as writer:
            writer.write(to_table(RECORD_SCHEMA, rows))
        student = StudentModel(model=str(model))
        job = TrainJob(TrainConfig(max_length=max_length), student, data, out, workdir, 1, "launch")
        try:
            tokens = encode_shards(job)
        except UsageError as error:
            assert "no row is left" in error.what
            trained, rejected = 0, None
        else:
            with pa.OSFile(str(train_file(job))) as file:
                trained = pa.ipc.open_stream(file).read_all().num_rows
            rejected = tokens.rejected
            assert tokens.rows_in == len(rows)
        written = [reason for table in read_shards(out / "rejects") for reason in table["reason"].to_pylist()]
        assert trained + len(written) == len(rows)
        assert rejected is None or Counter(rejected) == Counter(written)
