"""How much of the validation split is trained on: prompts in both splits, and rows that are near each other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.core.lineage import digest_json
from pipeline.core.record import read_shards, shard_paths
from pipeline.student.preflight.columns import check_columns
from pipeline.student.preflight.leak import Leak, read_leak
from pipeline.text.normalise import normalise, tokens

NGRAM: Final = 5
THRESHOLD: Final = 0.8
"""As `prompts.near_test` has them."""
COMPARED: Final = 20_000
"""Training rows that are compared by n-grams; all are by their prompt. Their order is decided by a hash."""
VALIDATION: Final = 2_000
"""Validation rows that are."""
WORDS: Final = 256
"""Words of a row that are: the last of the prompt, since what many prompts share comes first, and the first of the
completion."""
CHARACTERS: Final = 16 * WORDS
"""Of either text, among which these words are looked for."""
BATCH_ROWS: Final = 1024
NAMED: Final = 3
SLACK: Final = 1e-9
"""Keeps rounding from missing a similarity of just `THRESHOLD`."""
MULTIPLIER: Final = 0x9E3779B97F4A7C15

Hashes: TypeAlias = npt.NDArray[np.uint64]
Turns: TypeAlias = Sequence[dict[str, Any]]


def go_on() -> None:
    """For `compare_splits`: nobody asks us to stop."""


def compare_splits(data: Path, workdir: Path, check: Callable[[], None] = go_on) -> None:
    """Write what `find_leakage` finds to where the checks look for it; nothing of rows that cannot be read at all.

    What an earlier attempt found of the same files stays.

    Args:
        check: see `find_leakage`.
    """
    if check_columns(data).level == "error":
        return
    files = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in shard_paths(data)]
    of = digest_json([[name, size, time] for name, size, time in files])
    known = read_leak(workdir)
    if known is None or known.of != of:
        replace(find_leakage(data, check), of=of).write(workdir)


def find_leakage(data: Path, check: Callable[[], None] = go_on) -> Leak:
    """Compare the splits of a data set.

    A prompt counts as the same if all its messages are after normalising (case, white space). Near are rows whose
    prompt and completion, without system messages, share 80 % of their word 5-grams (Jaccard) with those of a
    training row; of a shorter row the whole is its only n-gram. See `WORDS`, `VALIDATION` and `COMPARED` for what is
    looked at.

    Memory: some 100 bytes for each validation row, 8 bytes for each n-gram of `VALIDATION` of them, and a shard.

    Args:
        check: called every `BATCH_ROWS` rows; it may raise.

    Raises:
        CorruptArtefact: a shard is damaged.
    """
    ids: list[str] = []
    digests: list[bytes] = []
    open_rows: dict[int, Hashes] = {}
    for batch in _batches(data, "validation"):
        check()
        for row in batch:
            if len(ids) < VALIDATION:
                open_rows[len(ids)] = hashes_of(row)
            ids.append(row["row_id"])
            digests.append(_digest(row["prompt"]))
    if not ids:
        return Leak(0, 0, 0, 0, ())
    wanted, found, near, compared = set(digests), set[bytes](), set[int](), 0
    for batch in _batches(data, "train"):
        check()
        found.update(wanted.intersection(_digest(row["prompt"]) for row in batch))
        part = batch[: COMPARED - compared]
        compared += len(part)
        if part and open_rows:
            hits = _near(part, open_rows)
            near |= hits
            open_rows = {at: hashes for at, hashes in open_rows.items() if at not in hits}
    same = [row_id for row_id, digest in zip(ids, digests, strict=True) if digest in found]
    rows = [*same, *(ids[at] for at in sorted(near))]
    return Leak(len(ids), len(same), len(near), compared, tuple(dict.fromkeys(rows))[:NAMED])


def _batches(data: Path, split: str) -> Iterator[list[dict[str, Any]]]:
    for table in read_shards(data, ["row_id", "prompt", "completion"], stem=f"{split}-"):
        for start in range(0, table.num_rows, BATCH_ROWS):
            yield table.slice(start, BATCH_ROWS).to_pylist()


def _digest(prompt: Turns) -> bytes:
    """Of roles and texts of all messages, the system's too: it may hold the document that is asked about."""
    text = "\0".join(f"{turn['role']}\n{normalise(turn['content'])}" for turn in prompt)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# ----------------------------------------------------------------------------------------------------------- n-grams


def hashes_of(row: dict[str, Any]) -> Hashes:
    """The distinct n-grams of a row, sorted, as 64-bit hashes: two that differ are taken for one once in 2^64."""
    asked = tokens(normalise(_said(row["prompt"])[-CHARACTERS:]))[-WORDS:]
    told = tokens(normalise(_said(row["completion"])[:CHARACTERS]))[:WORDS]
    words = np.fromiter(map(hash, (*asked, *told)), np.int64).view(np.uint64)
    size = min(NGRAM, len(words))
    count = max(1, len(words) - size + 1)
    grams = np.full(count if size else 1, size, np.uint64)
    for start in range(size):
        grams = (grams ^ (grams >> np.uint64(29))) * np.uint64(MULTIPLIER) + words[start : start + count]
    return np.unique(grams)


def _said(turns: Turns) -> str:
    """What the messages say, but for system messages, which many rows share."""
    return "\n".join(turn["content"] for turn in turns if turn["role"] not in ("system", "developer"))


def _near(rows: Sequence[dict[str, Any]], open_rows: dict[int, Hashes]) -> set[int]:
    index = Index.of(open_rows)
    return {at for row in rows for at in index.near(hashes_of(row))}


@dataclass(frozen=True, slots=True)
class Index:
    """The n-grams of some rows, and which rows hold each.

    Attributes:
        numbers, sizes: of the rows, and how many n-grams each has.
        known: (n-grams,) sorted and distinct.
        starts: (n-grams + 1,) where the holders of each n-gram begin in `holders`.
        holders: places in `numbers`.
    """

    numbers: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    known: Hashes
    starts: npt.NDArray[np.int64]
    holders: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: dict[int, Hashes]) -> "Index":
        """The index of rows by their numbers."""
        sizes = np.array([len(hashes) for hashes in rows.values()], np.int64)
        grams = np.concatenate([*rows.values()])
        order = np.argsort(grams, kind="stable")
        known, starts = np.unique(grams[order], return_index=True)
        holders = np.repeat(np.arange(len(sizes)), sizes)[order]
        return cls(np.array([*rows], np.int64), sizes, known, np.append(starts, len(grams)), holders)

    def near(self, hashes: Hashes) -> list[int]:
        """Numbers of the rows whose Jaccard similarity reaches the threshold."""
        at = np.searchsorted(self.known, hashes)
        at = at[self.known[np.minimum(at, len(self.known) - 1)] == hashes]
        if len(at) < THRESHOLD * len(hashes) - SLACK:  # no row can hold as many as it takes
            return []
        lengths = self.starts[at + 1] - self.starts[at]
        begins = np.repeat(self.starts[at] - np.cumsum(lengths) + lengths, lengths)
        shared = np.bincount(self.holders[begins + np.arange(lengths.sum())], minlength=len(self.sizes))
        reached = shared >= THRESHOLD * (len(hashes) + self.sizes - shared) - SLACK
        found: list[int] = self.numbers[reached].tolist()
        return found
