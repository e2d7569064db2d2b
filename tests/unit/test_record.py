"""Rows: the dataclasses mirror the schemas, nasty text survives, and a damaged shard is noticed."""

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.content import table_digest
from pipeline.core.errors import CorruptArtefact
from pipeline.core.record import (
    MESSAGE,
    PROMPT_SCHEMA,
    RECORD_SCHEMA,
    SHARD_ROWS,
    Message,
    Prompt,
    Record,
    ShardWriter,
    count_rows,
    iter_records,
    message_dict,
    prompts_of,
    read_shards,
    records_of,
    rejects_schema,
    to_table,
    write_parquet,
)
from tests.support import a_prompt, a_record

NASTY = ["", "\x00", "a\x00b", "🧪👩‍🔬", "שלום", "\u202egnirts", "e\u0301 é", "\ufeffx", "a\r\nb\u2028c", "x" * 100_000]


def records(count: int, *, start: int = 0) -> list[Record]:
    return [a_record(row_id=f"{row:032x}", prompt_id=f"p{row}") for row in range(start, start + count)]


def write(folder: Path, count: int, shard_rows: int = 4, piece: int = 3) -> list[Record]:
    rows = records(count)
    with ShardWriter(folder, RECORD_SCHEMA, shard_rows=shard_rows) as writer:
        for start in range(0, count, piece):
            writer.write(to_table(RECORD_SCHEMA, rows[start : start + piece]))
    return rows


class TestSchema:
    @pytest.mark.parametrize(
        ("row", "schema"), [(Prompt, PROMPT_SCHEMA), (Record, RECORD_SCHEMA)], ids=["prompts", "records"]
    )
    def test_a_dataclass_has_the_columns_of_its_schema_in_order(self, row: type[Any], schema: pa.Schema) -> None:
        assert [field.name for field in fields(row)] == schema.names

    @pytest.mark.parametrize(
        ("row", "schema"), [(Prompt, PROMPT_SCHEMA), (Record, RECORD_SCHEMA)], ids=["prompts", "records"]
    )
    def test_a_field_may_be_none_exactly_where_its_column_may_be_null(self, row: type[Any], schema: pa.Schema) -> None:
        optional = {field.name for field in fields(row) if "None" in str(field.type)}
        assert optional == {field.name for field in schema if field.nullable}

    def test_a_message_has_the_fields_of_its_struct(self) -> None:
        assert [field.name for field in fields(Message)] == [field.name for field in MESSAGE]

    def test_rejects_have_a_reason_more(self) -> None:
        assert rejects_schema(RECORD_SCHEMA).names == [*RECORD_SCHEMA.names, "reason"]


class TestTables:
    @pytest.mark.parametrize("text", NASTY)
    def test_text_survives_the_way_to_disk_and_back(self, tmp_path: Path, text: str) -> None:
        row = a_record(
            prompt=(Message("user", text),),
            completion=(Message("assistant", text, text),),
            answer=text,
            also_in=(text,),
            flags=(),
        )
        write_parquet(to_table(RECORD_SCHEMA, [row]), tmp_path / "part-00000.parquet")
        assert [*iter_records(tmp_path)] == [row]

    @given(st.text(), st.none() | st.text(), st.lists(st.text(), max_size=3))
    def test_so_does_any_other(self, text: str, maybe: str | None, several: list[str]) -> None:
        row = a_record(
            prompt=(Message("system", text), Message("user", text, maybe)), answer=maybe, license_set=tuple(several)
        )
        assert records_of(to_table(RECORD_SCHEMA, [row])) == [row]

    def test_prompts_come_back_too(self) -> None:
        rows = [a_prompt(), a_prompt(prompt_id="p1", answer="2", task="sums", prompt=())]
        assert prompts_of(to_table(PROMPT_SCHEMA, rows)) == rows

    def test_no_rows_are_a_table_too(self) -> None:
        table = to_table(RECORD_SCHEMA, [])
        assert table.num_rows == 0
        assert table.schema == RECORD_SCHEMA

    @pytest.mark.parametrize("name", [field.name for field in RECORD_SCHEMA if not field.nullable])
    def test_none_in_a_required_column_is_refused(self, name: str) -> None:
        with pytest.raises((ValueError, pa.ArrowException)):
            to_table(RECORD_SCHEMA, [a_record(**{name: None})])

    def test_none_inside_a_message_never_reaches_the_disk(self, tmp_path: Path) -> None:
        table = to_table(RECORD_SCHEMA, [a_record(prompt=(Message("user", None),))])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="non-nullable"):
            write_parquet(table, tmp_path / "x.parquet")

    def test_a_lone_surrogate_is_refused_since_parquet_has_no_form_for_it(self) -> None:
        with pytest.raises(ValueError, match="surrogates"):
            to_table(RECORD_SCHEMA, [a_record(answer="\ud800")])

    def test_a_reason_stands_beside_each_reject(self) -> None:
        schema = rejects_schema(RECORD_SCHEMA)
        table = to_table(schema, records(2), ["empty", "too_long"])
        assert table["reason"].to_pylist() == ["empty", "too_long"]
        assert records_of(table) == records(2)

    def test_a_reject_without_a_reason_is_refused(self) -> None:
        with pytest.raises((ValueError, pa.ArrowException)):
            to_table(rejects_schema(RECORD_SCHEMA), records(2), ["empty"])

    def test_an_absent_field_of_a_message_is_absent_in_json(self) -> None:
        assert message_dict(Message("user", "hi")) == {"role": "user", "content": "hi"}
        assert message_dict(Message("assistant", "", "hm")) == {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
        }


class TestShardWriter:
    @pytest.mark.parametrize(
        ("count", "sizes"), [(0, [0]), (3, [3]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4]), (14, [4, 4, 4, 2])]
    )
    @pytest.mark.parametrize("piece", [1, 3, 14])
    def test_shards_are_full_but_the_last(self, tmp_path: Path, count: int, sizes: list[int], piece: int) -> None:
        rows = write(tmp_path, count, shard_rows=4, piece=piece)
        assert [table.num_rows for table in read_shards(tmp_path)] == sizes
        assert [*iter_records(tmp_path)] == rows
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            f"part-{shard:05d}.parquet" for shard in range(len(sizes))
        ]

    def test_it_says_what_it_wrote(self, tmp_path: Path) -> None:
        rows = records(5)
        with ShardWriter(tmp_path, RECORD_SCHEMA, shard_rows=2) as writer:
            writer.write(to_table(RECORD_SCHEMA, rows))
        written = writer.written()
        assert written.rows == 5 == count_rows(written.files)
        assert written.content == table_digest(RECORD_SCHEMA, [to_table(RECORD_SCHEMA, rows)])
        assert [path.name for path in written.files] == [f"part-0000{shard}.parquet" for shard in range(3)]

    def test_its_content_digest_is_free_of_the_shard_size(self, tmp_path: Path) -> None:
        digests = set()
        for size in (1, 3, 100):
            with ShardWriter(tmp_path / str(size), RECORD_SCHEMA, shard_rows=size) as writer:
                writer.write(to_table(RECORD_SCHEMA, records(7)))
            digests.add(writer.written().content)
        assert len(digests) == 1

    def test_equal_rows_are_equal_bytes_however_they_came(self, tmp_path: Path) -> None:
        for piece in (1, 5):
            write(tmp_path / str(piece), 11, shard_rows=4, piece=piece)
        one, other = (sorted((tmp_path / piece).iterdir()) for piece in ("1", "5"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]

    def test_other_columns_are_refused(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path, RECORD_SCHEMA) as writer:
            writer.write(to_table(RECORD_SCHEMA, records(1)))
            with pytest.raises(ValueError, match="schema"):
                writer.write(pa.table({"x": [1]}))
        assert writer.written().rows == 1

    def test_after_an_exception_no_last_shard_is_written(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, RECORD_SCHEMA) as writer:
            writer.write(to_table(RECORD_SCHEMA, records(3)))
            raise ZeroDivisionError
        assert [*tmp_path.iterdir()] == []

    def test_files_are_zstd_with_page_checksums_and_bounded_row_groups(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path, RECORD_SCHEMA, shard_rows=3 * SHARD_ROWS) as writer:
            writer.write(to_table(RECORD_SCHEMA, records(SHARD_ROWS + 1)))
        metadata = pq.read_metadata(tmp_path / "part-00000.parquet")
        assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [SHARD_ROWS, 1]
        assert {metadata.row_group(0).column(column).compression for column in range(metadata.num_columns)} == {"ZSTD"}


class TestReading:
    def test_a_flipped_byte_in_a_page_is_noticed(self, tmp_path: Path) -> None:
        """A quarter into the column lies the page; the second half is statistics, which nothing reads."""
        dice = random.Random(1)
        text = "".join(chr(dice.randrange(33, 127)) for _ in range(4000))
        path = tmp_path / "part-00000.parquet"
        write_parquet(to_table(RECORD_SCHEMA, [a_record(answer=text)]), path)
        group = pq.read_metadata(path).row_group(0)
        columns = [group.column(at) for at in range(group.num_columns)]
        column = next(each for each in columns if each.path_in_schema == "answer")
        whole = path.read_bytes()
        middle = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 4
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(CorruptArtefact, match="unreadable parquet") as caught:
            next(read_shards(tmp_path))
        assert caught.value.where == str(path)

    def test_any_damage_is_either_ours_to_report_or_harmless(self, tmp_path: Path) -> None:
        """Page checksums do not cover the footer (the manifest's sha256 does), but nothing may end in a traceback."""
        path, dice = tmp_path / "part-00000.parquet", random.Random(7)
        write_parquet(to_table(RECORD_SCHEMA, records(50)), path)
        whole, noticed = path.read_bytes(), 0
        for _ in range(200):
            at = dice.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :])
            try:
                [*read_shards(tmp_path)]
            except CorruptArtefact:
                noticed += 1
        assert noticed >= 80

    @pytest.mark.parametrize("keep", [0, 3, 100, -1])
    def test_a_truncated_file_is_noticed(self, tmp_path: Path, keep: int) -> None:
        write(tmp_path, 3)
        path = tmp_path / "part-00000.parquet"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CorruptArtefact):
            [*read_shards(tmp_path)]

    def test_shards_come_in_the_order_of_their_names_and_only_when_asked_for(self, tmp_path: Path) -> None:
        rows = write(tmp_path, 12)
        (tmp_path / "part-00002.parquet").write_bytes(b"damaged")
        shards = read_shards(tmp_path)
        assert [row for _ in range(2) for row in records_of(next(shards))] == rows[:8]
        with pytest.raises(CorruptArtefact):
            next(shards)

    def test_some_columns_can_be_read_alone(self, tmp_path: Path) -> None:
        write(tmp_path, 3)
        assert [table.column_names for table in read_shards(tmp_path, ["row_id", "split"])] == [["row_id", "split"]]

    def test_a_folder_whose_name_looks_like_a_partition_adds_no_column(self, tmp_path: Path) -> None:
        write(tmp_path / "user=me", 3)
        assert next(read_shards(tmp_path / "user=me")).column_names == RECORD_SCHEMA.names
