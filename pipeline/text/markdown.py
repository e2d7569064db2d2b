"""Text that others wrote, as inert text inside our Markdown."""

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$-])")
# Control and format characters (bidirectional overrides among them) can hide or reorder what stands beside them.
_UNSEEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")


def escape_markdown(text: str) -> str:
    """One line of text that renders as itself in a paragraph, heading or table cell: no links, HTML or new rows."""
    return _SPECIAL.sub(r"\\\1", _UNSEEN.sub(" ", text))


def with_front_matter(meta: Mapping[str, Any], body: str) -> str:
    """A card: its metadata as YAML between two lines `---`, then its text.

    Raises:
        ValueError: read back, it does not say what was meant: a bug in the escaping.
    """
    # No folding (a folded value could hold a line `---`), and ASCII, so that control characters are written as escapes.
    text = f"---\n{yaml.safe_dump({**meta}, sort_keys=False, allow_unicode=False, width=10_000)}---\n{body}"
    if split_front_matter(text) != (meta, body):
        raise ValueError("the front matter of the card does not say what was meant")
    return text


def split_front_matter(card: str) -> tuple[Any, str]:
    """The metadata between the first two lines `---` of a card that we wrote, and its text."""
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head), body
