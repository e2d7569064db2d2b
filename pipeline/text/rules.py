"""Pure rules on the text of a completion. Each takes time linear in the text."""

from collections.abc import Sequence
from typing import Final

from pipeline.text.normalise import normalise, words

REFUSAL_CHARS: Final = 200
"""How far into a completion a refusal is looked for: later, it is a quotation more often than a refusal."""

_APOSTROPHES: Final = str.maketrans("\u2018\u2019\u02bc\uff07`\u00b4", "''''''")
_LONG_FORMS: Final = (
    ("cannot", "can't"),
    ("can not", "can't"),
    ("will not", "won't"),
    ("do not", "don't"),
    ("i am ", "i'm "),
    ("not able to", "unable to"),
)

REFUSAL_PHRASES: Final = (
    "sorry, but i can't",
    "sorry but i can't",
    "sorry, i can't",
    "sorry, but i'm unable to",
    "sorry, but i won't",
    "sorry, but as an ai",
    "i apologize, but i can't",
    "i apologize, but i'm unable to",
    "i can't assist",
    "i can't help with",
    "i can't help you",
    "i can't provide",
    "i can't fulfill",
    "i can't fulfil",
    "i can't comply",
    "i can't answer",
    "i can't generate",
    "i can't create content",
    "i can't engage in",
    "i can't discuss",
    "i can't support",
    "i can't participate",
    "i'm unable to assist",
    "i'm unable to help",
    "i'm unable to provide",
    "i'm unable to fulfill",
    "i'm unable to fulfil",
    "i'm unable to comply",
    "i'm unable to answer",
    "i'm unable to generate",
    "i'm unable to create",
    "i'm unable to engage",
    "i'm unable to discuss",
    "i won't be able to",
    "i won't provide",
    "i won't help with",
    "i won't assist",
    "i don't feel comfortable",
    "i'm not comfortable",
    "i must decline",
    "i have to decline",
    "i respectfully decline",
    "i must refuse",
    "as an ai language model",
    "as an ai model",
    "as an ai assistant, i",
    "as an ai, i",
    "as a language model",
    "as a large language model",
    "i'm just an ai",
    "i'm only an ai",
    "it would be inappropriate for me",
    "it is not appropriate for me",
    "it's not appropriate for me",
    "against my guidelines",
    "against my programming",
    "goes against my",
    "violates my guidelines",
)
"""English phrases, in the form of `refusal_form`. They name what is refused ("can't provide"), because a bare
"I'm unable to" also begins many an innocent letter. Other languages need their own list in the config."""


def length_reason(text: str, *, min_chars: int, max_chars: int) -> str | None:
    """`empty`, `too_short`, `too_long` or None, by the code points between leading and trailing white space."""
    length = len(text.strip())
    if length == 0:
        return "empty"
    if length < min_chars:
        return "too_short"
    return "too_long" if length > max_chars else None


def refusal_form(text: str) -> str:
    """The form in which refusals are compared: normalised, straight apostrophes, short forms (can't, I'm, unable)."""
    folded = normalise(text).translate(_APOSTROPHES)
    for long, short in _LONG_FORMS:
        folded = folded.replace(long, short)
    return folded


def refusal_phrases(phrases: Sequence[str] | None) -> tuple[str, ...]:
    """A config's phrases ready for `is_refusal`; None means the built-in list. Blank phrases match nothing."""
    chosen = REFUSAL_PHRASES if phrases is None else phrases
    return tuple(form for form in map(refusal_form, chosen) if form != "")


def is_refusal(text: str, phrases: Sequence[str]) -> bool:
    """Whether the first `REFUSAL_CHARS` characters hold one of the phrases, beginning at the start of a word.

    Args:
        text: the completion.
        phrases: from `refusal_phrases`.
    """
    head = refusal_form(text.lstrip()[:REFUSAL_CHARS])
    return any(_holds(head, phrase) for phrase in phrases)


def _holds(head: str, phrase: str) -> bool:
    at = head.find(phrase)
    while at > 0 and head[at - 1].isalnum():
        at = head.find(phrase, at + 1)
    return at >= 0


def repeated_share(text: str, ngram: int) -> float:
    """Share of the word n-grams that occurred before in the text, in [0, 1); 0 for texts under 4 × ngram words."""
    found = words(text)
    total = len(found) - ngram + 1
    if len(found) < 4 * ngram:
        return 0.0
    distinct = len(set(zip(*(found[start:] for start in range(ngram)), strict=False)))
    return (total - distinct) / total


def repeats_itself(text: str, *, ngram: int, max_share: float) -> bool:
    """Whether more than `max_share` of the word n-grams are repeats; see `repeated_share`."""
    found = words(text)
    total = len(found) - ngram + 1
    # n-grams that begin with different words differ: where enough words differ, there is no need to build n-grams.
    if len(found) < 4 * ngram or total - len(set(found[:total])) <= max_share * total:
        return False
    return repeated_share(text, ngram) > max_share
