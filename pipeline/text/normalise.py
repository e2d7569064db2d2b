"""Text in the form in which it is compared: Unicode, case, white space, words."""

import re
import unicodedata
from typing import Final

UNSPACED: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters of scripts that write no spaces between words (Thai to Khmer, kana, Han): each counts as a word."""

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_WORD: Final = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_TOKEN: Final = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")


def normalise(text: str) -> str:
    """Unicode NFC, full case folding, white space runs as one space, none at the ends.

    Case folding works on the decomposed text, as in Unicode's canonical caseless matching (D145), so that the result
    does not depend on the form of the input, and normalising twice changes nothing. Compatibility variants (full
    width, ligatures, superscripts) stay apart: 10² is not 102.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFD", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def replace_surrogates(text: str) -> str:
    """Every lone surrogate, which UTF-8 cannot hold, as U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def words(text: str) -> list[str]:
    """The words of a text: split at white space; each character of an unspaced script is a word of its own."""
    return text.split() if text.isascii() else _WORD.findall(text)


def tokens(text: str) -> list[str]:
    """Words and punctuation marks, each apart: `2+3?` is `2`, `+`, `3`, `?`. So a changed full stop changes one
    token, and `2+3` is not `2-3`."""
    return _TOKEN.findall(text)
