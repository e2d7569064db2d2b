"""Places in a text that a detector found: merged where they overlap, replaced by a mark that says their kind."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

MARK: Final = "[REDACTED:{kind}]"
MOST_ROUNDS: Final = 8
WHOLE_TEXT: Final = "text"


@dataclass(frozen=True, slots=True)
class Found:
    """One match: `text[start:end]` is a `kind`."""

    kind: str
    start: int
    end: int


Detector: TypeAlias = Callable[[str], list[Found]]


def merge(found: Iterable[Found], kinds: Sequence[str]) -> list[Found]:
    """Matches in the order of the text; those that overlap as one, named by the first of their kinds in `kinds`."""
    merged: list[Found] = []
    for one in sorted(found, key=lambda one: (one.start, one.end, kinds.index(one.kind))):
        if merged and one.start < merged[-1].end:
            last = merged[-1]
            kind = min(last.kind, one.kind, key=kinds.index)
            merged[-1] = Found(kind, last.start, max(last.end, one.end))
        else:
            merged.append(one)
    return merged


def replace(text: str, found: Iterable[Found]) -> str:
    """The text with a mark in place of each match; the matches are in order and do not overlap."""
    pieces, at = [], 0
    for one in found:
        pieces += [text[at : one.start], MARK.format(kind=one.kind)]
        at = one.end
    return "".join([*pieces, text[at:]])


def redact(text: str, detect: Detector) -> tuple[str, list[str]]:
    """The text without what the detector finds, also in what is left then, and the kinds of all matches.

    A mark can part what hid a match from what stood beside it, so the result is scanned again. A text in which the
    last of `MOST_ROUNDS` scans still finds something was made for that; it is replaced as a whole.
    """
    kinds: list[str] = []
    for _ in range(MOST_ROUNDS):
        found = detect(text)
        if not found:
            return text, kinds
        kinds += [one.kind for one in found]
        text = replace(text, found)
    return (MARK.format(kind=WHOLE_TEXT) if detect(text) else text), kinds
