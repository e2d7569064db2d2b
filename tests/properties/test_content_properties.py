"""Equal rows have equal digests, whatever the pieces and encodings; other rows have other digests."""

from itertools import pairwise
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.content import table_digest

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string()),
        pa.field("number", pa.int32()),
        pa.field("share", pa.float64()),
        pa.field("flag", pa.bool_()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)

texts = st.none() | st.text(max_size=6)
turn = st.none() | st.fixed_dictionaries({"role": texts, "content": texts})
row = st.fixed_dictionaries(
    {
        "text": texts,
        "number": st.none() | st.integers(-(2**31), 2**31 - 1),
        "share": st.none() | st.floats(allow_nan=False),
        "flag": st.none() | st.booleans(),
        "tags": st.none() | st.lists(texts, max_size=3),
        "turns": st.none() | st.lists(turn, max_size=2),
    }
)
rows = st.lists(row, max_size=8)


def table(values: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(values, schema=SCHEMA)


def digest(values: list[dict[str, Any]]) -> str:
    return table_digest(SCHEMA, [table(values)])


def in_pieces(whole: pa.Table, cuts: list[int]) -> list[pa.Table]:
    bounds = [0, *sorted(cut % (whole.num_rows + 1) for cut in cuts), whole.num_rows]
    return [whole.slice(start, stop - start) for start, stop in pairwise(bounds)]


@given(rows, rows)
def test_digests_are_equal_exactly_when_rows_are(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert (digest(one) == digest(other)) == (repr(one) == repr(other))


@given(rows, st.lists(st.integers(0, 100), max_size=4))
def test_pieces_do_not_count(values: list[dict[str, Any]], cuts: list[int]) -> None:
    assert table_digest(SCHEMA, in_pieces(table(values), cuts)) == digest(values)


@given(rows)
def test_encodings_do_not_count(values: list[dict[str, Any]]) -> None:
    plain = table(values)
    text, tags = plain.schema.get_field_index("text"), plain.schema.get_field_index("tags")
    encoded = plain.set_column(text, "text", plain["text"].dictionary_encode())
    encoded = encoded.set_column(tags, "tags", plain["tags"].cast(pa.large_list(pa.large_string())))
    assert table_digest(encoded.schema, [encoded]) == digest(values)


@given(st.lists(row, min_size=1, max_size=6), st.data())
def test_one_changed_value_moves_the_digest(values: list[dict[str, Any]], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(values) - 1))
    name = data.draw(st.sampled_from(SCHEMA.names))
    changed = [dict(each) for each in values]
    changed[at][name] = data.draw(row)[name]
    assert (digest(changed) == digest(values)) == (repr(changed) == repr(values))


@given(st.lists(row, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_rows_counts(values: list[dict[str, Any]], random: Any) -> None:
    shuffled = [*values]
    random.shuffle(shuffled)
    assert (digest(shuffled) == digest(values)) == (repr(shuffled) == repr(values))
