"""Text that others wrote, as inert text inside our Markdown."""

import re
from typing import Final

_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$-])")
# Control and format characters (bidirectional overrides among them) can hide or reorder what stands beside them.
_UNSEEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")


def escape_markdown(text: str) -> str:
    """One line of text that renders as itself in a paragraph, heading or table cell: no links, HTML or new rows."""
    return _SPECIAL.sub(r"\\\1", _UNSEEN.sub(" ", text))
