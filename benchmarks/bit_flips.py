"""One flipped bit in a shard of a data set: what `datasets.load_dataset` makes of it, and what the pipeline does.

`python -m benchmarks.bit_flips DATASET [--flips 300] [--seed 20260]` takes an artefact of the stage `dataset`, flips
one random bit of its shards at a time, in a copy, and counts how each of three readers takes it: `load_dataset` on that
shard, pyarrow with checksums of pages verified, and the check of the manifest's hashes that comes before training.
"""

import argparse
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import Manifest
from pipeline.core.store import MANIFEST, Artefact, verify

OUTCOMES = ("an error", "wrong rows, silently", "right rows")


def count(dataset: Path, flips: int, seed: int, work: Path) -> dict[str, Counter[str]]:
    """Reader -> outcome -> flips."""
    chance = random.Random(seed)
    folder = work / "dataset"
    shutil.copytree(dataset.resolve(), folder)
    shards = sorted((folder / "data").glob("*.parquet"))
    whole = {path: path.read_bytes() for path in shards}
    rows = {path: pq.read_table(path).to_pylist() for path in shards}
    found: dict[str, Counter[str]] = {"load_dataset": Counter(), "page checksums": Counter(), "manifest": Counter()}
    for number in range(flips):
        path = chance.choices(shards, weights=[len(whole[each]) for each in shards])[0]
        content = bytearray(whole[path])
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        found["load_dataset"][outcome(partial(load, path, work / f"cache-{number}"), rows[path])] += 1
        found["page checksums"][outcome(partial(checked, path), rows[path])] += 1
        found["manifest"][outcome(partial(verified, folder, path), rows[path])] += 1
        path.write_bytes(whole[path])
        shutil.rmtree(work / f"cache-{number}", ignore_errors=True)
    return found


def outcome(read: Callable[[], list[dict[str, Any]]], right: list[dict[str, Any]]) -> str:
    """What a reader makes of a shard."""
    try:
        rows = read()
    except Exception:  # noqa: BLE001 (whatever a reader raises, it noticed)
        return OUTCOMES[0]
    return OUTCOMES[2] if rows == right else OUTCOMES[1]


def load(path: Path, cache: Path) -> list[dict[str, Any]]:
    """The rows as `datasets` gives them."""
    import datasets

    loaded = datasets.load_dataset("parquet", data_files=[str(path)], split="train", cache_dir=str(cache))
    table: pa.Table = loaded.data.table
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def checked(path: Path) -> list[dict[str, Any]]:
    """The rows as pyarrow gives them when it verifies the checksums of pages."""
    rows: list[dict[str, Any]] = pq.read_table(path, page_checksum_verification=True).to_pylist()
    return rows


def verified(folder: Path, path: Path) -> list[dict[str, Any]]:
    """The rows after the check that comes before training.

    Raises:
        CorruptArtefact: the shard is not what was committed.
    """
    try:
        verify(Artefact(folder, Manifest.read(folder / MANIFEST)))
    except CorruptArtefact as error:
        assert error.where == str(path)
        raise
    return checked(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=20260)
    given = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    with tempfile.TemporaryDirectory() as work:
        found = count(given.dataset, given.flips, given.seed, Path(work))
    print(f"{'reader':16}" + "".join(f"{name:>22}" for name in OUTCOMES))
    for reader, counted in found.items():
        print(f"{reader:16}" + "".join(f"{counted[name]:>22}" for name in OUTCOMES))


if __name__ == "__main__":
    main()
