"""Which of equal rows stays: classes of equal digests, 50 bytes a row at the most while they are found."""

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.core.lineage import canonical_json
from pipeline.core.stage import Json

DIGEST_BYTES: Final = 16

Digests = npt.NDArray[np.uint64]
"""Shape (rows, 2): `DIGEST_BYTES` a row."""
Positions = npt.NDArray[np.int64]
"""Shape (rows,): numbers of rows."""


def digest_of(value: Json) -> bytes:
    """`DIGEST_BYTES` that stand for a value: blake2b over its canonical JSON."""
    return hashlib.blake2b(canonical_json(value), digest_size=DIGEST_BYTES).digest()


def digests_of(joined: bytes) -> Digests:
    """Digests from the bytes of all of them, one after the other."""
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)


def first_of_equals(digests: Digests, ranks: npt.NDArray[np.uint8]) -> Positions:
    """For each row the row that stays for it (itself, if it stays): of equals the first of the lowest rank.

    Args:
        digests: rows with equal digests are equals.
        ranks: shape (rows,).
    """
    order = np.lexsort((ranks, digests[:, 1], digests[:, 0]))  # stable: rows of one rank stay in their order
    ordered = digests[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    del ordered
    kept = np.empty(len(order), dtype=np.int64)
    kept[order] = order[begins][np.cumsum(begins) - 1]
    return kept


def have_equals(kept: Positions) -> npt.NDArray[np.bool_]:
    """For each row whether another one equals it, from `first_of_equals`."""
    several = np.zeros(len(kept), dtype=bool)
    several[kept[kept != np.arange(len(kept))]] = True
    found: npt.NDArray[np.bool_] = several[kept]
    return found
