"""Names of licences: SPDX expressions in their canonical form, anything else as the name it is."""

import functools
import re
from dataclasses import dataclass
from typing import Any, Final

from license_expression import ExpressionError, get_spdx_licensing

UNKNOWN: Final = "unknown"
LONGEST_NAME: Final = 200
SPDX_CHARS: Final = re.compile(r"[A-Za-z0-9.+:() -]+")
"""Characters of licence expressions (SPDX 2.3, annex D)."""
NO_EXPRESSION: Final = (ExpressionError, LookupError, AssertionError, AttributeError, RecursionError)
"""What license-expression (30.4) raises on texts that are no expressions, such as `() MIT` or `( and or-later`."""

# fmt: off
HUB_IDS: Final = frozenset(
    {
        "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0",
        "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
        "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "ecl-2.0", "epl-1.0", "epl-2.0",
        "eupl-1.1", "eupl-1.2", "isc", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "ofl-1.1", "osl-3.0",
        "postgresql", "unlicense", "wtfpl", "zlib",
    }
)
# fmt: on
"""SPDX ids, in lower case, that the Hugging Face hub knows under the same name."""
OTHER_HUB_IDS: Final = {
    "licenseref-llama-3-community": "llama3",
    "licenseref-scancode-bigscience-open-rail-m": "bigscience-openrail-m",
    "licenseref-scancode-gemma-tou-2024-04-01": "gemma",
    "licenseref-scancode-gemma-tou-2025-03-24": "gemma",
    "licenseref-scancode-llama-2-license-2023": "llama2",
    "licenseref-scancode-llama-3.1-license-2024": "llama3.1",
    "licenseref-scancode-llama-3.2-license-2024": "llama3.2",
    "licenseref-scancode-llama-3.3-license-2024": "llama3.3",
    "licenseref-scancode-llama-4-cla-2025": "llama4",
    "odc-by-1.0": "odc-by",
    "pddl-1.0": "pddl",
}
"""Ids of term records, in lower case, that the hub knows under another name."""


@dataclass(frozen=True, slots=True)
class License:
    """A licence's name; `spdx` says whether it is a valid SPDX expression."""

    name: str
    spdx: bool


@functools.cache
def _spdx() -> Any:
    return get_spdx_licensing()


@functools.lru_cache(maxsize=1024)
def parse_license(text: str) -> License:
    """A licence as written by a person. Not covered: what it permits, and whether a text really is under it.

    Raises:
        ValueError: the name is blank, longer than 200 characters or holds control characters.
    """
    name = " ".join(text.split())
    if name == "" or len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError("a licence is an SPDX expression or a short printable name")
    if SPDX_CHARS.fullmatch(name) is None:  # license-expression fails on some of these names
        return License(name, spdx=False)
    expression = _spdx_expression(name)
    if expression is None:
        return License(UNKNOWN if name.casefold() == UNKNOWN else name, spdx=False)
    return License(expression, spdx=True)


@functools.lru_cache(maxsize=1024)
def comparable(name: str) -> str:
    """What two names of a licence share; "unknown" for what can be none."""
    try:
        return parse_license(name).name.casefold()
    except ValueError:
        return UNKNOWN


def _spdx_expression(name: str) -> str | None:
    """In its canonical form; None: it is none."""
    try:
        checked = _spdx().validate(name)
    except NO_EXPRESSION:
        return None
    found: str | None = checked.normalized_expression
    return None if checked.errors else found


def hub_license(names: set[str]) -> dict[str, str]:
    """The licence fields of a Hugging Face card for rows under all of these licences together.

    One licence that the hub knows is named by its id. Anything else is `other`, with a `license_name` in the form the
    hub accepts (lower case letters, digits, `.` and `-`).
    """
    ids = {OTHER_HUB_IDS.get(name.lower(), name.lower()) for name in names}
    if len(ids) == 1 and ids <= HUB_IDS.union(OTHER_HUB_IDS.values()):
        return {"license": ids.pop()}
    joined = "-and-".join(sorted(ids)) or UNKNOWN
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", joined).strip("-") or UNKNOWN}
