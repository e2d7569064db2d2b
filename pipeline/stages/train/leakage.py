"""How much of the validation split is trained on: prompts in both splits, and rows that are near each other."""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from pipeline.core.record import read_shards
from pipeline.student.preflight.columns import check_columns
from pipeline.student.preflight.leak import Leak
from pipeline.text.near import NearIndex
from pipeline.text.normalise import normalise

NGRAM: Final = 5
THRESHOLD: Final = 0.8
"""As `prompts.near_test` has them."""
COMPARED: Final = 20_000
"""Training rows that are compared by n-grams; all are by their prompt. Their order is decided by a hash."""
VALIDATION: Final = 2_000
"""Validation rows that are."""
NAMED: Final = 3


def compare_splits(data: Path, workdir: Path) -> None:
    """Write what `find_leakage` finds to where the checks look for it; nothing of rows that cannot be read at all."""
    if check_columns(data).level != "error":
        find_leakage(data).write(workdir)


def find_leakage(data: Path) -> Leak:
    """Compare the splits of a data set.

    A prompt counts as the same if it is after normalising (case, white space). Near are rows whose prompt and
    completion share 80 % of their word 5-grams (Jaccard) with those of a training row; of a shorter row the whole is
    its only n-gram.

    Memory: 16 bytes and some for each validation prompt, and the n-grams of `COMPARED` training rows.

    Raises:
        CorruptArtefact: a shard is damaged.
    """
    validation = list(_texts(data, "validation"))
    if not validation:
        return Leak(0, 0, 0, 0, ())
    wanted = {_digest(prompt) for _, prompt, _ in validation}
    found: set[bytes] = set()
    texts: list[str] = []
    for _, prompt, whole in _texts(data, "train"):
        if (digest := _digest(prompt)) in wanted:
            found.add(digest)
        if len(texts) < COMPARED:
            texts.append(whole)
    index = NearIndex(texts, ngram=NGRAM, threshold=THRESHOLD)
    same = [row_id for row_id, prompt, _ in validation if _digest(prompt) in found]
    near = [row_id for row_id, _, whole in validation[:VALIDATION] if index.is_near(whole)]
    return Leak(len(validation), len(same), len(near), len(texts), tuple([*same, *near][:NAMED]))


def _texts(data: Path, split: str) -> Iterator[tuple[str, str, str]]:
    """(row id, prompt, prompt and completion) of a split's rows, a shard in memory at a time."""
    for table in read_shards(data, ["row_id", "prompt", "completion"], stem=f"{split}-"):
        yield from _rows(table)


def _rows(table: pa.Table) -> Iterator[tuple[str, str, str]]:
    for row in table.to_pylist():
        prompt = _said(row["prompt"])
        yield row["row_id"], prompt, f"{prompt}\n{_said(row['completion'])}"


def _said(messages: list[dict[str, Any]]) -> str:
    """What the messages say, but for system messages, which many rows share."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] not in ("system", "developer"))


def _digest(prompt: str) -> bytes:
    return blake2b(normalise(prompt).encode("utf-8", "surrogatepass"), digest_size=16).digest()
