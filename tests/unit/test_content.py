"""Content digests: what moves them, what does not, and what they refuse."""

import pyarrow as pa
import pytest

from pipeline.core.content import BLOCK_ROWS, ContentDigest, table_digest
from pipeline.core.record import RECORD_SCHEMA, to_table
from tests.support import a_record


def digest(**columns: pa.Array) -> str:
    table = pa.table(columns)
    return table_digest(table.schema, [table])


def strings(*values: str | None) -> pa.Array:
    return pa.array(values, pa.string())


def lists(*values: list[str | None] | None) -> pa.Array:
    return pa.array(values, pa.list_(pa.string()))


class TestMoves:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (strings("a", "b"), strings("a", "c")),
            (strings("a", "b"), strings("b", "a")),
            (strings("ab", "c"), strings("a", "bc")),
            (strings("a", None), strings("a", "")),
            (strings("a"), strings("a", None)),
            (lists(["a", "b"], []), lists(["a"], ["b"])),
            (lists([]), lists(None)),
            (lists([None]), lists([""])),
            (lists([], ["a"]), lists(["a"], [])),
            (pa.array([1, 2]), pa.array([1, 3])),
            (pa.array([0]), pa.array([None], pa.int64())),
            (pa.array([1], pa.int32()), pa.array([1], pa.int64())),
            (pa.array([0.0]), pa.array([-0.0])),
            (pa.array([True]), pa.array([False])),
            (pa.array([False]), pa.array([None], pa.bool_())),
            (pa.array([b"a"]), strings("a")),
            (pa.array([{"x": "a", "y": None}]), pa.array([{"x": None, "y": "a"}])),
            (
                pa.array([None], pa.struct([("x", pa.string())])),
                pa.array([{"x": None}], pa.struct([("x", pa.string())])),
            ),
        ],
    )
    def test_with_any_value(self, one: pa.Array, other: pa.Array) -> None:
        assert digest(x=one) != digest(x=other)

    def test_with_a_columns_name(self) -> None:
        assert digest(x=strings("a")) != digest(y=strings("a"))

    def test_with_the_order_of_columns(self) -> None:
        table = pa.table({"x": [1], "y": [2]})
        turned = table.select(["y", "x"])
        assert table_digest(table.schema, [table]) != table_digest(turned.schema, [turned])

    def test_with_a_fields_name_inside_a_struct(self) -> None:
        assert digest(x=pa.array([{"a": 1}])) != digest(x=pa.array([{"b": 1}]))

    def test_with_a_column_that_moves_into_the_struct_before_it(self) -> None:
        inside = digest(x=pa.array([{"a": 1, "b": 2}]))
        beside = digest(x=pa.array([{"a": 1}]), b=pa.array([2]))
        assert inside != beside


class TestStays:
    def test_when_rows_come_in_other_pieces(self) -> None:
        table = pa.table({"x": [str(row) for row in range(3 * BLOCK_ROWS + 5)]})
        expected = table_digest(table.schema, [table])
        for size in (1000, BLOCK_ROWS, BLOCK_ROWS + 1):
            pieces = [table.slice(start, size) for start in range(0, table.num_rows, size)]
            assert table_digest(table.schema, pieces) == expected

    def test_when_strings_are_dictionary_encoded(self) -> None:
        plain = strings("a", "b", None, "a")
        assert digest(x=plain.dictionary_encode()) == digest(x=plain)

    def test_when_a_dictionary_holds_more_than_is_used(self) -> None:
        encoded = pa.DictionaryArray.from_arrays(pa.array([2, 0]), strings("a", "unused", "c"))
        assert digest(x=encoded) == digest(x=strings("c", "a"))

    def test_when_offsets_are_wider(self) -> None:
        assert digest(x=pa.array(["a", None], pa.large_string())) == digest(x=strings("a", None))
        wide = pa.array([["a"], []], pa.large_list(pa.large_string()))
        assert digest(x=wide) == digest(x=lists(["a"], []))

    def test_when_an_array_is_a_slice_of_a_longer_one(self) -> None:
        assert digest(x=lists(["z"], ["a", "b"], [], ["y"]).slice(1, 2)) == digest(x=lists(["a", "b"], []))
        assert digest(x=strings("z", "a", "y").slice(1, 1)) == digest(x=strings("a"))

    def test_when_bytes_lie_under_a_null(self) -> None:
        data = pa.array(["a", "hidden"])
        masked = pa.Array.from_buffers(pa.string(), 2, [pa.py_buffer(b"\x01"), *data.buffers()[1:]])
        assert masked.to_pylist() == ["a", None]
        assert digest(x=masked) == digest(x=strings("a", None))

    def test_when_the_empty_table_comes_in_between(self) -> None:
        table = pa.table({"x": ["a", "b"]})
        pieces = [table.slice(0, 0), table.slice(0, 1), table.slice(0, 0), table.slice(1), table.slice(0, 0)]
        assert table_digest(table.schema, pieces) == table_digest(table.schema, [table])


def test_the_digest_can_be_read_in_between_without_changing_it() -> None:
    table = pa.table({"x": ["a", "b"]})
    digest = ContentDigest(table.schema)
    digest.update(table.slice(0, 1))
    assert digest.hexdigest() == table_digest(table.schema, [table.slice(0, 1)])
    digest.update(table.slice(1))
    assert digest.hexdigest() == table_digest(table.schema, [table])


def test_columns_are_taken_by_name_in_the_order_of_the_schema() -> None:
    table = to_table(RECORD_SCHEMA, [a_record()])
    assert table_digest(RECORD_SCHEMA, [table.select(table.column_names[::-1])]) == table_digest(RECORD_SCHEMA, [table])


def test_a_type_without_a_digest_is_refused_rather_than_left_out() -> None:
    with pytest.raises(TypeError, match="no content digest"):
        digest(x=pa.array([1], pa.timestamp("s")))
