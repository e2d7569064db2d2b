"""Two texts that a person would call the same compare as the same; others do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text.normalise import normalise, replace_surrogates, tokens, words


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Hello  World\n", "hello world"),
        ("caf\u00e9", "cafe\u0301"),
        ("Stra\u00dfe", "STRASSE"),
        ("\u1fb3", "\u03b1\u0345"),
        ("\u03b1\u0345\u0301", "\u03b1\u0301\u0345"),
        ("a\u00a0b\u3000c", "a b c"),
        ("\u01c4", "\u01c6"),
    ],
)
def test_equal_texts(left: str, right: str) -> None:
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(("left", "right"), [("10\u00b2", "102"), ("2+3", "2-3"), ("ab", "a b"), ("a", "\u0430")])
def test_different_texts(left: str, right: str) -> None:
    assert normalise(left) != normalise(right)


@given(st.text(st.characters()))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == once.strip() and "  " not in once and "\n" not in once


@given(st.text(st.characters()))
def test_a_text_without_surrogates_can_be_written(text: str) -> None:
    clean = replace_surrogates(text)
    clean.encode("utf-8")
    assert len(clean) == len(text)
    assert all(new == old or new == "\ufffd" for new, old in zip(clean, text, strict=True))


def test_words_of_unspaced_scripts_are_their_characters() -> None:
    assert words("a b-c") == ["a", "b-c"]
    assert words("h\u00e9 \u6771\u4eac2020") == ["h\u00e9", "\u6771", "\u4eac", "2020"]


def test_punctuation_is_a_token_of_its_own() -> None:
    assert tokens("is 2+3?") == ["is", "2", "+", "3", "?"]
    assert tokens("\u6771\u4eac") == ["\u6771", "\u4eac"]
