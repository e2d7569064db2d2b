"""The index finds exactly the texts that comparing with every indexed text finds."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.text.near import NearIndex, shingles

TEXTS = st.lists(st.sampled_from("abcde"), max_size=14).map(" ".join)


def similarity(left: str, right: str, ngram: int) -> float:
    a, b = shingles(left, ngram), shingles(right, ngram)
    return len(a & b) / len(a | b)


@given(
    st.lists(TEXTS, max_size=12), TEXTS, st.integers(1, 4), st.sampled_from([0.1, 0.25, 0.5, 0.6, 2 / 3, 0.8, 0.9, 1.0])
)
def test_agrees_with_comparing_all_pairs(indexed: list[str], text: str, ngram: int, threshold: float) -> None:
    near = any(similarity(text, other, ngram) >= threshold for other in indexed)
    assert NearIndex(indexed, ngram=ngram, threshold=threshold).is_near(text) is near


def test_form_does_not_matter() -> None:
    index = NearIndex(["How many clips did Natalia sell altogether in April and May?"], ngram=5, threshold=0.8)
    assert index.is_near("how many  clips did NATALIA sell altogether in April and May")
    assert not index.is_near("How many pages did Julie read altogether in April and May?")


def test_short_texts_are_compared_as_a_whole() -> None:
    index = NearIndex(["2 + 3", "a long text about 2 + 3 and 4"], ngram=5, threshold=0.1)
    assert index.is_near("2  +  3")
    assert not index.is_near("2 + 4")


def test_an_empty_index_is_near_nothing() -> None:
    assert not NearIndex([], ngram=5, threshold=0.5).is_near("anything at all")
