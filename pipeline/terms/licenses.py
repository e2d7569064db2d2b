"""Names of licences: SPDX expressions in their canonical form, anything else as the name it is."""

import functools
import re
from dataclasses import dataclass
from typing import Any, Final

from license_expression import get_spdx_licensing

UNKNOWN: Final = "unknown"
LONGEST_NAME: Final = 200

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
    checked = _spdx().validate(name)
    if checked.errors or checked.normalized_expression is None:
        return License(UNKNOWN if name.casefold() == UNKNOWN else name, spdx=False)
    return License(checked.normalized_expression, spdx=True)


def hub_license(names: set[str]) -> dict[str, str]:
    """The licence fields of a Hugging Face card for rows under all of these licences together.

    One licence that the hub knows is named by its id. Anything else is `other`, with a `license_name` in the form the
    hub accepts (lower case letters, digits, `.` and `-`).
    """
    ids = {name.lower() for name in names}
    if len(ids) == 1 and ids <= HUB_IDS:
        return {"license": ids.pop()}
    joined = "-and-".join(sorted(ids)) or UNKNOWN
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", joined).strip("-") or UNKNOWN}
