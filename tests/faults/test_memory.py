"""Four times the rows take hardly more memory: stages of rows hold shards, never the whole set."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.peak_memory import SMALL_SHARD, write_rows
from tests.support import cli_env

STAGES = ["prompts", "generate", "filter", "dedup", "dataset"]
ROWS, TEXT = 2_000, 12_000
"""Of the smaller set: eight small shards; the larger one has four times as many."""


TIDY = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}
"""Freed memory goes back at once: the peak is then what was held, and not what an allocator keeps for later."""


def peak(stage: str, folder: Path, *options: str, env: Mapping[str, str] | None = None) -> int:
    """Most memory, in bytes, that a process ever holds which does nothing but run the stage."""
    command = [sys.executable, "-m", "tests.peak_memory", stage, str(folder), *options]
    root = Path(__file__).resolve().parents[2]
    return int(subprocess.check_output(command, env=cli_env(env), cwd=root, text=True))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The same rows, and four times as many."""
    folder = tmp_path_factory.mktemp("rows")
    few, many = folder / "few", folder / "many"
    write_rows(few, ROWS, TEXT, shard_rows=SMALL_SHARD)
    write_rows(many, 4 * ROWS, TEXT, shard_rows=SMALL_SHARD)
    yield few, many


@pytest.mark.parametrize("stage", STAGES)
def test_the_texts_are_never_all_in_memory(stage: str, sets: tuple[Path, Path]) -> None:
    few, many = (peak(stage, folder, "--small", env=TIDY) for folder in sets)
    more_text = 3 * ROWS * TEXT
    assert many - few < more_text / 3, f"{few:,} bytes, then {many:,}, for {more_text:,} bytes more text"


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("stage", "per_row"), [("prompts", 100), ("generate", 200), ("filter", 30), ("dedup", 80), ("dataset", 100)]
)
def test_a_million_rows_cost_few_bytes_each(stage: str, per_row: int, tmp_path: Path) -> None:
    """With shards as they are. What grows with the rows: digests and positions in `prompts` and `dedup`, the count of
    each prompt's samples while completions are imported in `generate`, up to a full partition in `dataset`."""
    write_rows(tmp_path / "few", 131_072, 40, shard_rows=8192)
    write_rows(tmp_path / "many", 1_000_000, 40, shard_rows=8192)
    few, many = peak(stage, tmp_path / "few"), peak(stage, tmp_path / "many")
    assert many - few < per_row * (1_000_000 - 131_072), f"{few:,} bytes, then {many:,}"
