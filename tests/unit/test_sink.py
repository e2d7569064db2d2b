"""What a stage keeps and rejects: both are written, both are counted, no row leaves unseen."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.record import RECORD_SCHEMA, Record, read_shards, records_of, to_table
from pipeline.core.sink import RowSink, counted_reason
from tests.support import a_record


def records(count: int) -> list[Record]:
    return [a_record(row_id=f"{row:032x}") for row in range(count)]


def ids(folder: Path) -> list[int]:
    return [int(row.row_id, 16) for table in read_shards(folder) for row in records_of(table)]


def reasons(folder: Path) -> list[str]:
    return [reason for table in read_shards(folder) for reason in table["reason"].to_pylist()]


def test_rows_and_tables_may_be_kept_and_rejected_in_any_order(tmp_path: Path) -> None:
    rows = records(6)
    with RowSink(tmp_path, RECORD_SCHEMA) as sink:
        sink.keep(rows[:2])
        sink.reject(rows[2:3], ["empty"])
        sink.keep(to_table(RECORD_SCHEMA, rows[3:4]))
        sink.reject(to_table(RECORD_SCHEMA, rows[4:6]), ["too_long", "empty"])
    result = sink.result(6)
    assert (ids(tmp_path / "rows"), ids(tmp_path / "rejects")) == ([0, 1, 3], [2, 4, 5])
    assert reasons(tmp_path / "rejects") == ["empty", "too_long", "empty"]
    assert (result.rows_in, result.rows_out, result.rejected) == (6, 3, {"empty": 2, "too_long": 1})


@pytest.mark.parametrize("verdicts", [[], [None], ["a"], [None, "a", None], ["a", "b"]])
def test_a_split_sends_every_row_one_way_or_the_other(tmp_path: Path, verdicts: list[str | None]) -> None:
    with RowSink(tmp_path, RECORD_SCHEMA) as sink:
        sink.split(to_table(RECORD_SCHEMA, records(len(verdicts))), verdicts)
    assert ids(tmp_path / "rows") == [at for at, verdict in enumerate(verdicts) if verdict is None]
    assert ids(tmp_path / "rejects") == [at for at, verdict in enumerate(verdicts) if verdict is not None]


@given(
    st.lists(st.none() | st.sampled_from(["empty", "too_long", "duplicate_of:x", "finish_reason:length"]), max_size=20)
)
def test_kept_and_rejected_are_all_there_were(
    tmp_path_factory: pytest.TempPathFactory, verdicts: list[str | None]
) -> None:
    with RowSink(tmp_path_factory.mktemp("sink"), RECORD_SCHEMA) as sink:
        sink.split(to_table(RECORD_SCHEMA, records(len(verdicts))), verdicts)
    result = sink.result(len(verdicts))
    assert result.rows_in == result.rows_out + sum(result.rejected.values())


def test_a_split_with_fewer_verdicts_than_rows_is_refused(tmp_path: Path) -> None:
    with RowSink(tmp_path, RECORD_SCHEMA) as sink, pytest.raises(pa.ArrowException):
        sink.split(to_table(RECORD_SCHEMA, records(2)), [None])


def test_a_stage_that_keeps_and_rejects_nothing_still_leaves_its_schemas(tmp_path: Path) -> None:
    with RowSink(tmp_path, RECORD_SCHEMA) as sink:
        pass
    assert (sink.result(0).rows_out, sink.result(0).rejected) == (0, {})
    assert [table.schema.names for table in read_shards(tmp_path / "rows")] == [RECORD_SCHEMA.names]
    assert [table.schema.names[-1] for table in read_shards(tmp_path / "rejects")] == ["reason"]


def test_content_covers_what_was_rejected_and_why(tmp_path: Path) -> None:
    contents = set()
    for at, (kept, rejected) in enumerate([(2, []), (1, ["empty"]), (1, ["too_long"])]):
        with RowSink(tmp_path / str(at), RECORD_SCHEMA) as sink:
            sink.keep(records(2)[:kept])
            sink.reject(records(2)[kept:], rejected)
        contents.add(sink.result(2).content)
    assert len(contents) == 3


def test_the_details_of_a_duplicate_are_not_counted_apart_but_kept(tmp_path: Path) -> None:
    with RowSink(tmp_path, RECORD_SCHEMA) as sink:
        sink.reject(records(3), ["duplicate_of:a", "duplicate_of:b", "finish_reason:length"])
    assert sink.result(3).rejected == {"duplicate_of": 2, "finish_reason:length": 1}
    assert reasons(tmp_path / "rejects") == ["duplicate_of:a", "duplicate_of:b", "finish_reason:length"]


@pytest.mark.parametrize(
    ("reason", "counted"),
    [("empty", "empty"), ("duplicate_of:abc", "duplicate_of"), ("finish_reason:stop:x", "finish_reason:stop:x")],
)
def test_counted_reason(reason: str, counted: str) -> None:
    assert counted_reason(reason) == counted
