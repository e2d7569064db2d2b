"""Canonical JSON is one form per value, and its digest tells values apart."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.lineage import canonical_json, digest_json, explain, row_id, step_key

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
# Dots separate the parts of a name in a reason, so that keys with dots could hide behind each other.
mappings = st.dictionaries(st.text("abc", min_size=1, max_size=3), scalars | st.lists(scalars), max_size=4)


def reordered(value: Any, random: Any) -> Any:
    if isinstance(value, dict):
        items = [(key, reordered(item, random)) for key, item in value.items()]
        random.shuffle(items)
        return dict(items)
    return [reordered(item, random) for item in value] if isinstance(value, list) else value


@given(values, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_count(value: Any, random: Any) -> None:
    assert canonical_json(reordered(value, random)) == canonical_json(value)


@given(values)
def test_it_is_json_and_says_the_same(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(values)
def test_reading_and_writing_it_again_changes_nothing(value: Any) -> None:
    form = canonical_json(value)
    assert canonical_json(json.loads(form)) == form


@given(values, values)
def test_digests_are_equal_exactly_when_forms_are(one: Any, other: Any) -> None:
    assert (digest_json(one) == digest_json(other)) == (canonical_json(one) == canonical_json(other))


@given(values, st.sampled_from([object(), {1}, b"x", float("nan"), float("inf")]))
def test_what_json_does_not_know_is_refused_however_deep(value: Any, foreign: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical_json({"a": [value, {"b": foreign}]})


@given(mappings, mappings)
def test_a_moved_key_always_has_a_reason(old: dict[str, Any], new: dict[str, Any]) -> None:
    before: dict[str, Any] = {"config": {"filter": old}}
    after: dict[str, Any] = {"config": {"filter": new}}
    reasons = explain(before, after)
    if step_key(before) == step_key(after):
        assert reasons == ["its artefact is not in the store"]
    else:
        assert reasons != ["its artefact is not in the store"]


@given(st.tuples(st.text(), st.text(), st.text()), st.tuples(st.text(), st.text(), st.text()))
def test_row_ids_are_equal_exactly_when_their_parts_are(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    assert (row_id(*one) == row_id(*other)) == (one == other)
