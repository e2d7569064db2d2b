"""Which split a group of prompts belongs to: decided by its name alone, before anything is generated."""

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(group_id: str, *, validation: float, test: float) -> Split:
    """Assign a group to a split by the hash of its name.

    The hash is mapped to [0, 1): test takes [0, test), validation takes [test, test + validation), train takes
    the rest. So a group keeps its split when other groups come or go, and changing `validation` never moves a
    group into or out of the test split.

    Args:
        group_id: any text; prompts that share it always share a split.
        validation: share of groups, in [0, 1).
        test: share of groups, in [0, 1).
    """
    digest = hashlib.sha256(b"split\0" + group_id.encode("utf-8", "surrogatepass")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test:
        return "test"
    if position < test + validation:
        return "validation"
    return "train"
