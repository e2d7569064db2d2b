"""How untrusted text and numbers are shown: hidden characters made visible, long text cut, numbers set alike."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

TEXT_CHARS = 2000
"""Most characters of one message that the report shows."""

NAME_CHARS = 120
"""Most characters of an id, a reason or another name that the report shows."""

NO_VALUE = "–"
"""Shown where a number does not exist."""

_THIN = "\u202f"
"""Narrow no-break space: between a number and its unit."""

_JOINERS = "\u200c\u200d"
"""Zero-width joiners: scripts and emoji need them, so they are left alone beside letters that are not ASCII."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text to show as it is, or (`hint` given) the stand-in of one character that cannot be seen.

    Attributes:
        text: what is shown.
        hint: code point and Unicode name of the hidden character; "" for ordinary text.
    """

    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """Text made safe to look at: its pieces in order, and how many characters were cut off behind them."""

    pieces: tuple[Piece, ...]
    cut: int


def show(text: str, limit: int = TEXT_CHARS) -> Shown:
    """Cut `text` to `limit` characters and replace every character that has no visible form by a stand-in.

    Replaced are control characters but newline and tab, format characters (bidirectional overrides, zero-width
    space, tags, byte order mark), line and paragraph separators, lone surrogates, private and unassigned code points
    and the supplementary variation selectors. Not covered: look-alike letters of other scripts.
    """
    return Shown(tuple(_pieces(text[:limit])), max(0, len(text) - limit))


def show_name(text: str) -> Shown:
    """`show` for ids, reasons and other short names: line breaks and tabs are stand-ins too."""
    return Shown(tuple(_pieces(text[:NAME_CHARS], kept="")), max(0, len(text) - NAME_CHARS))


def plain(text: str) -> str:
    """A name as plain text, for places that hold no markup (an attribute, an SVG label): stand-ins without hints."""
    shown = show_name(text)
    return "".join(piece.text for piece in shown.pieces) + ("…" if shown.cut else "")


def _pieces(text: str, kept: str = "\n\t") -> Iterator[Piece]:
    start = 0
    for position, character in enumerate(text):
        if character in kept or not _is_hidden(text, position):
            continue
        if start < position:
            yield Piece(text[start:position])
        yield Piece(_stand_in(character), _hint(character))
        start = position + 1
    if start < len(text):
        yield Piece(text[start:])


def _is_hidden(text: str, position: int) -> bool:
    character = text[position]
    if character in _JOINERS:
        around = text[max(0, position - 1) : position + 2].replace(character, "")
        return around.isascii()
    supplementary_selector = 0xE0100 <= ord(character) <= 0xE01EF
    return supplementary_selector or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _stand_in(character: str) -> str:
    """A control picture for the ASCII controls, `U+XXXX` for the rest."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"U+{code:04X}"


def _hint(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, 'control character')}"


# ---------------------------------------------------------------------------------------------------- numbers


def count(value: int | None) -> str:
    """12345 as `12,345`; None as a dash."""
    return NO_VALUE if value is None else f"{value:,}"


def plural(number: int, noun: str, many: str | None = None) -> str:
    """`1 row`, `2 rows`; `many` is the plural where an s does not make it."""
    return f"{count(number)} {noun if number == 1 else many or noun + 's'}"


def percent(share: float | None) -> str:
    """0.9812 as `98.1 %`. Shares that would round to 0 or 100 without being it are shown as `< 0.1 %`, `> 99.9 %`."""
    if share is None:
        return NO_VALUE
    value = 100 * share
    if 0 < value < 0.05:
        return f"<{_THIN}0.1{_THIN}%"
    if 99.95 <= value < 100:
        return f">{_THIN}99.9{_THIN}%"
    return f"{value:.1f}{_THIN}%".replace("-", "−")


def bounds(low: float | None, high: float | None) -> str:
    """The ends of an interval of shares, in percent: `97.0–99.2`."""
    if low is None or high is None:
        return NO_VALUE
    ends = [f"{100 * end:.1f}".replace("-", "−") for end in (low, high)]
    return ("–" if low >= 0 else " to ").join(ends)


def rate(value: float | None) -> str:
    """A speed with three significant digits: `1,240`, `38.2`, `0.51`."""
    if value is None:
        return NO_VALUE
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(value: int | None) -> str:
    """Bytes in decimal units: `7.9 MB`."""
    if value is None:
        return NO_VALUE
    scaled = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if scaled < 999.5:
            return f"{scaled:.0f}{_THIN}{unit}" if unit == "B" or scaled >= 99.95 else f"{scaled:.1f}{_THIN}{unit}"
        scaled /= 1000
    return f"{scaled:,.1f}{_THIN}TB"


def times(factor: float | None) -> str:
    """A factor: `1.9 ×`; two decimals below 1, where one would hide too much."""
    if factor is None:
        return NO_VALUE
    return f"{factor:,.1f}{_THIN}×" if factor >= 0.995 else f"{factor:.2f}{_THIN}×"


def fraction(share: float | None) -> str:
    """A ratio below 1 as `1/7.5`, others as `times` does."""
    if share is None or share <= 0:
        return NO_VALUE
    if share > 0.98:
        return times(share)
    inverse = f"{1 / share:,.1f}".removesuffix(".0")
    return f"1/{inverse}"


def short(digest: str) -> str:
    """The first twelve hex digits of a digest."""
    return digest[:12]
