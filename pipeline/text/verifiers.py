r"""Does a completion give the reference answer? True, False, or None where there is nothing to compare.

`exact`: both texts are equal after `normalise` (Unicode, case, white space); punctuation counts.

`numeric`: both texts give the same number, compared exactly as a fraction. The number of a text is
  1. the number that follows its last `####` (with no letter between them: headings are no answers), else
  2. the first number inside its last `\boxed{…}`, after the last `=` in there, else
  3. the first number within 40 characters after its last "answer is", "answer:" or "answer =", else
  4. its last number.
A reference without a number gives None, a completion without one False. Understood: thousands separators (comma,
thin or no-break space), decimal points, fractions (`3/4`, `1 1/2`, `\frac{3}{4}`), exponents (`1.5e-3`), a minus sign
(`-`, `−`) directly in front that is not a subtraction, signs of currency. A unit or `%` after the number is ignored:
50% is 50. Not covered: decimal commas (1.234,50), numbers in words, expressions (`2^10`, `sqrt(2)`), several answers.
A number of more than 400 characters is not read.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Final, TypeAlias

from pipeline.text.normalise import normalise

Verifier: TypeAlias = Callable[[str, str | None], bool | None]

MARKER_CHARS: Final = 40
LONGEST_NUMBER: Final = 400

# Quantifiers are possessive or bounded, and every digit starts a match that succeeds: linear time on any text.
_INTEGER: Final = r"(?:\d{1,3}(?:[,\u202f\u00a0\u2009]\d{3})++(?!\d)|\d++)"
_NUMBER: Final = re.compile(
    r"(?=[-\u2212$€£¥.\d])"  # only for speed: most places hold none of these
    r"(?P<sign>(?<![\w)\]}.])[-\u2212])?[$€£¥]?"
    r"(?:(?P<whole>\d{1,9}) (?P<mixed_over>\d{1,9})/(?P<mixed_under>\d{1,9})(?!\d|/|\.\d)"
    rf"|(?<!\d/)(?P<over>{_INTEGER}) ?[/\u2044] ?(?P<under>\d++)(?!/|\.\d)"
    rf"|(?P<plain>{_INTEGER}(?:\.\d++)?|(?<![\d.])\.\d++)(?P<exponent>[eE][-+]?\d{{1,3}}(?!\d))?)"
)
_FRAC: Final = re.compile(r"\\[dt]?frac\{(-?\d{1,100})\}\{(\d{1,100})\}")
_GROUPING: Final = re.compile(r"[,\u202f\u00a0\u2009]")
_HASHES: Final = re.compile(r"####(?=[^\w\n]{0,10}\d)")
_ANSWER: Final = re.compile(r"\banswer(?: is|\s?[:=])", re.IGNORECASE)


def exact(completion: str, reference: str | None) -> bool | None:
    """Whether the completion is the reference, up to Unicode form, case and white space."""
    if reference is None:
        return None
    return normalise(completion) == normalise(reference)


def numeric(completion: str, reference: str | None) -> bool | None:
    """Whether the completion's number equals the reference's; the rule is in the module's docstring."""
    expected = None if reference is None else final_number(reference)
    if expected is None:
        return None
    return final_number(completion) == expected


VERIFIERS: Final[dict[str, Verifier]] = {"exact": exact, "numeric": numeric}
"""The comparisons by their name in the config."""


def final_number(text: str) -> Fraction | None:
    """The number a text gives as its answer, or None; the rule is in the module's docstring."""
    plain = _plain(text)
    for segment in (_after(_HASHES, plain), _boxed(plain), _after(_ANSWER, plain)):
        marked = None if segment is None else _first_number(segment)
        if marked is not None:
            return marked
    # The values are worked out from the end: making a fraction costs more than finding it.
    return next(
        (value for match in reversed(list(_NUMBER.finditer(plain))) if (value := _value(match)) is not None), None
    )


def _plain(text: str) -> str:
    r"""LaTeX's ways to write numbers as plain text: `1{,}234`, `\$5`, `\frac{3}{4}`."""
    if "\\" not in text and "{" not in text:
        return text
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("\\,", "").replace("\\!", "")
    return _FRAC.sub(r"\1/\2", text)


def _after(marker: re.Pattern[str], text: str) -> str | None:
    """The characters after the last marker. Bold marks and colons between marker and number do no harm."""
    end = None
    for match in marker.finditer(text):
        end = match.end()
    return None if end is None else _cut(text, end)


def _cut(text: str, start: int) -> str:
    """`MARKER_CHARS` characters from `start`, and the rest of a number that begins in them."""
    end = start + MARKER_CHARS
    limit = min(len(text), end + LONGEST_NUMBER)
    while end < limit and not text[end].isspace():
        end += 1
    return text[start:end]


def _boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds, after its last `=`; None if there is none or it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].rpartition("=")[2]
    return None


def _first_number(text: str) -> Fraction | None:
    return next((value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None), None)


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that was matched; None for one that is too long or divides by zero."""
    size = _size(match)
    return size if size is None or not match["sign"] else -size


def _size(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > LONGEST_NUMBER:
        return None
    if match["whole"] is not None:
        under = int(match["mixed_under"])
        return None if under == 0 else int(match["whole"]) + Fraction(int(match["mixed_over"]), under)
    if match["over"] is not None:
        under = int(match["under"])
        return None if under == 0 else Fraction(int(_GROUPING.sub("", match["over"])), under)
    return Fraction(_GROUPING.sub("", match["plain"]) + (match["exponent"] or ""))
