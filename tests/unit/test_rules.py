"""Which completions the rules on text take out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text.rules import (
    REFUSAL_CHARS,
    REFUSAL_PHRASES,
    is_refusal,
    length_reason,
    refusal_form,
    refusal_phrases,
    repeated_share,
    repeats_itself,
)

BUILT_IN = refusal_phrases(None)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t assist with that request.",
        "I am sorry, but I cannot provide this information.",
        "  **Sorry**, I won't be able to do so; I can not help you here.",
        "As an AI language model, I have no opinions.",
        "I am not able to fulfill this request.",
        "I\nCANNOT\ncomply with this.",
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text, BUILT_IN)


@pytest.mark.parametrize(
    "text",
    [
        "Dear Ms Lee, I am unable to attend the meeting on Friday.",
        "I can't help but notice that the sum is 12.",
        "I'm sorry to hear about your dog. Here is a list of vets.",
        "The answer is 42.",
        "Alibi can't provide",  # "i can't provide" inside a word
        "",
    ],
)
def test_innocent_answers(text: str) -> None:
    assert not is_refusal(text, BUILT_IN)


def test_a_refusal_is_looked_for_at_the_beginning_only() -> None:
    phrase = "I cannot assist with that"
    assert is_refusal("a " * (REFUSAL_CHARS // 2 - len(phrase)) + phrase, BUILT_IN)
    assert not is_refusal("a " * REFUSAL_CHARS + phrase, BUILT_IN)


def test_own_phrases_replace_the_built_in_ones() -> None:
    own = refusal_phrases(("Je ne peux pas", " "))
    assert is_refusal("je ne PEUX pas r\u00e9pondre", own)
    assert not is_refusal("I cannot assist with that.", own)
    assert not is_refusal("I cannot assist with that.", refusal_phrases(()))


def test_the_built_in_phrases_are_in_the_form_they_are_compared_in() -> None:
    assert [refusal_form(phrase) for phrase in REFUSAL_PHRASES] == list(REFUSAL_PHRASES)
    assert len(set(REFUSAL_PHRASES)) == len(REFUSAL_PHRASES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\u3000", "empty"),
        ("ab", "too_short"),
        (" ab ", "too_short"),
        ("abc", None),
        ("abcde", None),
        ("abcdef", "too_long"),
    ],
)
def test_lengths(text: str, reason: str | None) -> None:
    assert length_reason(text, min_chars=3, max_chars=5) == reason


def test_share_of_repeated_ngrams() -> None:
    assert repeated_share("a b c d e f g h", 2) == 0
    assert repeated_share("a b a b a b a b", 2) == pytest.approx(5 / 7)
    assert repeated_share("a b a b a b a", 2) == 0  # under 4 x ngram words
    assert repeats_itself("the end " * 50, ngram=4, max_share=0.5)
    assert repeats_itself("\u6771\u4eac" * 50, ngram=4, max_share=0.5)


@given(st.lists(st.sampled_from("abcdef"), max_size=60), st.integers(1, 5), st.floats(0.05, 1))
def test_the_short_cut_changes_no_verdict(letters: list[str], ngram: int, max_share: float) -> None:
    text = " ".join(letters)
    assert repeats_itself(text, ngram=ngram, max_share=max_share) == (repeated_share(text, ngram) > max_share)
