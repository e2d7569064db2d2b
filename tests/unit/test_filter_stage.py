"""Stage `filter`: the first reason in the order of the config's fields, and the verdict of the verifier."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import FilterConfig, FilterStep
from pipeline.core.record import RECORD_SCHEMA, Message, Record, ShardWriter, iter_records, read_shards, to_table
from pipeline.core.stage import Result
from pipeline.stages import filter as stage
from tests.support import a_record, make_context


def run(tmp_path: Path, rows: list[Record], **config: Any) -> tuple[Result, list[Record], list[str]]:
    """Result, kept rows, reasons of the rejected ones."""
    with ShardWriter(tmp_path / "generate" / "rows", RECORD_SCHEMA, shard_rows=3) as writer:
        writer.write(to_table(RECORD_SCHEMA, rows))
    out = tmp_path / "out"
    out.mkdir()
    cfg = FilterStep(filter=FilterConfig(**config))
    result = stage.run(cfg, {"generate": tmp_path / "generate"}, out, make_context(tmp_path))
    reasons = [reason for table in read_shards(out / "rejects") for reason in table["reason"].to_pylist()]
    return result, list(iter_records(out / "rows")), reasons


def said(text: str, **changes: Any) -> Record:
    return a_record(completion=(Message("assistant", text),), **changes)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said("I cannot assist with that.", finish_reason="length"), "finish_reason:length"),
        (said(" \n"), "empty"),
        (a_record(completion=(Message("assistant", "", reasoning_content="hm"),)), "empty"),
        (said("x"), "too_short"),
        (said("x " * 60), "too_long"),
        (said("I cannot assist with that. " * 3), "refusal"),
        (said("the end " * 12), "repetition"),
        (said("it is 5", answer="6"), "wrong_answer"),
    ],
)
def test_each_reason(tmp_path: Path, row: Record, reason: str) -> None:
    result, kept, reasons = run(tmp_path, [row], min_chars=2, max_chars=100, verifier="numeric")
    assert (reasons, kept) == ([reason], [])
    assert result.rejected == {reason: 1}


def test_a_verifier_that_compares_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "without").mkdir()
    run(tmp_path / "without", [said("it is 5", answer=None)], verifier="numeric")
    assert "compared nothing" in caplog.text
    caplog.clear()
    (tmp_path / "with").mkdir()
    run(tmp_path / "with", [said("it is 5", answer="5")], verifier="numeric")
    assert "compared nothing" not in caplog.text


def test_kept_rows_keep_their_order_and_are_counted(tmp_path: Path) -> None:
    rows = [said(text, row_id=f"{number:032x}") for number, text in enumerate(["a", "", "b", "c", "", "d", "e"])]
    result, kept, _ = run(tmp_path, rows)
    assert [row.completion[0].content for row in kept] == ["a", "b", "c", "d", "e"]
    assert (result.rows_in, result.rows_out, dict(result.rejected)) == (7, 5, {"empty": 2})


def test_verdicts(tmp_path: Path) -> None:
    rows = [
        said("it is 5", answer="5"),
        said("it is 5", answer=None),
        said("it is 5", answer="6"),
        said("", answer="5"),
    ]
    result, kept, _ = run(tmp_path, rows, verifier="numeric")
    assert [row.verified for row in kept] == [True, None]
    assert [row.verified for row in iter_records(tmp_path / "out" / "rejects")] == [False, None]
    assert result.metrics["verified"] == {"right": 1, "wrong": 1, "not_compared": 2}


def test_without_a_verifier_nothing_is_compared(tmp_path: Path) -> None:
    _, kept, _ = run(tmp_path, [said("it is 5", answer="6")])
    assert [row.verified for row in kept] == [None]


def test_no_rows_are_no_error(tmp_path: Path) -> None:
    result, kept, _ = run(tmp_path, [])
    assert (result.rows_in, result.rows_out, kept) == (0, 0, [])
