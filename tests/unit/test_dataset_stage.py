"""Stage `dataset`: what the shards hold, in which order, and that nothing else can change their bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import CorruptArtefact, UsageError
from pipeline.core.record import Message, Record
from pipeline.core.stage import Result
from pipeline.stages import dataset as stage
from pipeline.stages.dataset.upstream import read_sources
from tests.dataset_stage import SOURCES, a_step, run_stage
from tests.support import a_record


def run(tmp_path: Path, rows: Sequence[Record], *, upstream_rows: int = 8192, **config: Any) -> Result:
    """Run the stage into `tmp_path/out`."""
    return run_stage(tmp_path, rows, a_step(**config), upstream_rows=upstream_rows)[1]


def records(count: int) -> list[Record]:
    return [
        a_record(
            row_id=f"{number:032x}",
            prompt_id=f"p{number}",
            split="validation" if number % 10 == 3 else "train",
            completion=(Message("assistant", f"answer {number} " * (number % 7)),),
        )
        for number in range(count)
    ]


def shards(tmp_path: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "out" / "data").glob(pattern))}


def test_shards_are_named_after_their_number_and_hold_every_row_once(tmp_path: Path) -> None:
    result = run(tmp_path, records(100), shard_rows=40)
    assert list(shards(tmp_path)) == [
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "validation-00000-of-00001.parquet",
    ]
    train = pq.read_table(sorted((tmp_path / "out" / "data").glob("train-*")))
    assert train.num_rows == 90 and len(set(train["row_id"].to_pylist())) == 90
    unused = {"tools", "returned_model", "fingerprint"}  # by no row
    assert train.column_names == [name for name in stage.COLUMNS if name not in unused]
    assert (result.rows_in, result.rows_out, dict(result.rejected)) == (100, 100, {})
    assert result.metrics["splits"] == {"train": 90, "validation": 10}


def test_rows_are_in_the_order_of_their_hash(tmp_path: Path) -> None:
    run(tmp_path, records(50), seed=7)
    table = pq.read_table(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    ids = table["row_id"].to_pylist()
    assert ids == sorted(ids, key=lambda row_id: stage.order_key(7, row_id))
    assert ids != sorted(ids, key=lambda row_id: stage.order_key(8, row_id))


def test_only_splits_with_rows_are_written(tmp_path: Path) -> None:
    run(tmp_path, [a_record(split="validation")])
    assert list(shards(tmp_path)) == ["validation-00000-of-00001.parquet"]


def test_reasoning_is_a_field_only_where_a_row_uses_it(tmp_path: Path) -> None:
    thinking = a_record(row_id="1" * 32, completion=(Message("assistant", "2", reasoning_content="1 + 1"),))
    for name, rows in (("without", [a_record()]), ("with", [a_record(), thinking])):
        (tmp_path / name).mkdir()
        run(tmp_path / name, rows)
    plain = pq.read_table(tmp_path / "without" / "out" / "data" / "train-00000-of-00001.parquet")
    assert plain["completion"].to_pylist() == [[{"role": "assistant", "content": "2"}]]
    mixed = pq.read_table(tmp_path / "with" / "out" / "data" / "train-00000-of-00001.parquet")
    assert {turns[0].get("reasoning_content") for turns in mixed["completion"].to_pylist()} == {None, "1 + 1"}
    assert mixed["prompt"].to_pylist()[0] == [{"role": "user", "content": "What is 1 + 1?"}]


@pytest.mark.parametrize("upstream_rows", [8192, 7, 100])
def test_equal_rows_give_equal_bytes(tmp_path: Path, upstream_rows: int) -> None:
    for name, size in (("one", 8192), ("two", upstream_rows)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, records(300), upstream_rows=size, shard_rows=64)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_large_pages_do_not_depend_on_how_rows_arrived(tmp_path: Path) -> None:
    rows = [a_record(row_id=f"{n:032x}", completion=(Message("assistant", f"{n} " * 4000),)) for n in range(300)]
    for name, size in (("one", 8192), ("two", 17)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, rows, upstream_rows=size, shard_rows=200)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_shard_size_changes_files_but_not_content(tmp_path: Path) -> None:
    results = []
    for size in (10, 1000):
        (tmp_path / str(size)).mkdir()
        results.append(run(tmp_path / str(size), records(100), shard_rows=size))
    assert results[0].content == results[1].content


def test_many_partitions_give_the_order_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for size in (65_536, 16):
        (tmp_path / str(size)).mkdir()
        monkeypatch.setattr(stage, "PARTITION_ROWS", size)
        contents.append(run(tmp_path / str(size), records(300)).content)
    assert contents[0] == contents[1]


def test_sources_say_who_is_under_which_licence(tmp_path: Path) -> None:
    rows = [
        a_record(row_id="1" * 32, teacher="big", license_set=("Apache-2.0", "MIT")),
        a_record(row_id="2" * 32, teacher="big", prompt_set="other", license_set=("Apache-2.0", "unknown")),
        a_record(row_id="3" * 32, teacher="small", license_set=("MIT",)),
        a_record(row_id="4" * 32, teacher="solo", license_set=("Apache-2.0", "MIT")),
    ]
    result = run(tmp_path, rows)
    sources: Any = result.metrics["sources"]
    assert sources["teachers"] == {
        "big": {"licenses": ["Apache-2.0"], "rows": 2},
        "small": {"licenses": ["MIT"], "rows": 1},
        "solo": {"licenses": ["Apache-2.0"], "rows": 1},
    }
    assert sources["prompt_sets"]["set"] == {**SOURCES["set"], "rows": 3}
    assert sources["prompt_sets"]["other"] == {**SOURCES["other"], "rows": 1}
    assert result.metrics["licenses"] == ["Apache-2.0", "MIT", "unknown"]


def test_no_row_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)no row is left.*manifests of generate, filter and dedup"):
        run(tmp_path, [])


def test_a_test_row_never_ships(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtefact, match="split 'test'"):
        run(tmp_path, [a_record(), a_record(row_id="1" * 32, split="test")])


def test_unreadable_sources_are_corruption(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtefact):
        read_sources(tmp_path)


def test_page_checksums_are_written(tmp_path: Path) -> None:
    run(tmp_path, records(100))
    path = tmp_path / "out" / "data" / "train-00000-of-00001.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(0)
    damaged = bytearray(path.read_bytes())
    damaged[chunk.dictionary_page_offset + chunk.total_compressed_size - 1] ^= 0xFF  # end of the last page's body
    path.write_bytes(damaged)
    with pytest.raises((OSError, pa.ArrowInvalid)):
        pq.read_table(path, page_checksum_verification=True)
