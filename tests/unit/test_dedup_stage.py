"""Stage `dedup`: one of equal rows stays, the others name it, and it remembers where they came from."""

from pathlib import Path
from typing import Any

from pipeline.core.config import DedupConfig, DedupStep
from pipeline.core.record import RECORD_SCHEMA, Message, Record, ShardWriter, iter_records, read_shards, to_table
from pipeline.core.stage import Result
from pipeline.stages import dedup as stage
from tests.support import a_record, make_context


def run(tmp_path: Path, rows: list[Record], **config: Any) -> tuple[Result, list[Record], dict[str, str]]:
    """Result, kept rows, reason by id of the rejected rows."""
    with ShardWriter(tmp_path / "filter" / "rows", RECORD_SCHEMA, shard_rows=2) as writer:
        writer.write(to_table(RECORD_SCHEMA, rows))
    out = tmp_path / "out"
    out.mkdir()
    cfg = DedupStep(dedup=DedupConfig(**config))
    result = stage.run(cfg, {"filter": tmp_path / "filter"}, out, make_context(tmp_path))
    reasons: dict[str, str] = {}
    for table in read_shards(out / "rejects"):
        reasons.update(zip(table["row_id"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return result, list(iter_records(out / "rows")), reasons


def row(row_id: str, text: str, **changes: Any) -> Record:
    return a_record(row_id=row_id, completion=(Message("assistant", text),), **changes)


def test_the_first_stays_and_the_others_name_it(tmp_path: Path) -> None:
    result, kept, reasons = run(tmp_path, [row("a", "x"), row("b", "y"), row("c", "X "), row("d", "x"), row("e", "y")])
    assert [record.row_id for record in kept] == ["a", "b"]
    assert reasons == {"c": "duplicate_of:a", "d": "duplicate_of:a", "e": "duplicate_of:b"}
    assert (result.rows_in, result.rows_out, dict(result.rejected)) == (5, 2, {"duplicate_of": 3})


def test_exact_text_where_nothing_is_normalised(tmp_path: Path) -> None:
    _, kept, reasons = run(tmp_path, [row("a", "x"), row("b", "X"), row("c", "x")], normalise=False)
    assert [record.row_id for record in kept] == ["a", "b"]
    assert reasons == {"c": "duplicate_of:a"}


def test_the_kept_row_joins_sets_and_licences(tmp_path: Path) -> None:
    rows = [
        row("a", "x", prompt_set="one", license_set=("MIT", "unknown")),
        row("b", "x", prompt_set="two", license_set=("CC-BY-4.0",), also_in=("zero",)),
        row("c", "x", prompt_set="one", license_set=("MIT",)),
        row("d", "alone", prompt_set="one", also_in=("seen",)),
    ]
    _, kept, _ = run(tmp_path, rows)
    assert [(record.also_in, record.license_set) for record in kept] == [
        (("two", "zero"), ("CC-BY-4.0", "MIT", "unknown")),
        (("seen",), ("MIT",)),
    ]


def test_of_a_training_and_a_validation_row_the_training_row_leaves(tmp_path: Path) -> None:
    rows = [row("a", "x", prompt_set="one"), row("b", "x", prompt_set="two", split="validation"), row("c", "x")]
    _, kept, reasons = run(tmp_path, rows)
    assert [(record.row_id, record.split, record.also_in) for record in kept] == [("b", "validation", ("one", "set"))]
    assert reasons == {"a": "duplicate_of:b", "c": "duplicate_of:b"}


def test_prompt_role_and_reasoning_tell_rows_apart(tmp_path: Path) -> None:
    rows = [
        row("a", "x"),
        row("b", "x", prompt=(Message("user", "another question"),)),
        row("c", "x", prompt=(Message("system", "What is 1 + 1?"),)),
        a_record(row_id="d", completion=(Message("assistant", "x", reasoning_content="so"),)),
        a_record(row_id="e", completion=(Message("assistant", "x", reasoning_content=""),)),
        row("f", "", prompt=(Message("user", "What is 1 + 1?"), Message("user", "x"))),
    ]
    _, kept, _ = run(tmp_path, rows)
    assert len(kept) == len(rows)


def test_no_rows_are_no_error(tmp_path: Path) -> None:
    result, kept, _ = run(tmp_path, [])
    assert (result.rows_in, result.rows_out, kept) == (0, 0, [])
