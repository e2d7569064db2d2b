"""Sorting more prompts than fit into memory: sorted runs on disk, merged."""

import heapq
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from pipeline.core.record import PROMPT_SCHEMA, Prompt, prompts_of, to_table

RUN_ROWS = 65_536
READ_ROWS = 1024
"""Rows of each run in memory while merging."""

T = TypeVar("T")


def chunks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` rows, in order."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


def sorted_by_id(prompts: Iterable[Prompt], scratch: Path, *, run_rows: int = RUN_ROWS) -> Iterator[Prompt]:
    """The prompts by `prompt_id` (code point order); equal ids in the order they came.

    Args:
        prompts: read once, to the end, before the first prompt is yielded.
        scratch: an empty folder for the runs; the caller removes it.
        run_rows: prompts that are sorted in memory at once.
    """
    runs = []
    for number, chunk in enumerate(chunks(prompts, run_rows)):
        path = scratch / f"run-{number:05d}.arrow"
        write_prompts(path, sorted(chunk, key=_prompt_id))
        runs.append(path)
    yield from heapq.merge(*map(read_prompts, runs), key=_prompt_id)


def _prompt_id(prompt: Prompt) -> str:
    return prompt.prompt_id


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    """Write prompts to a scratch file, in their order."""
    with pa.ipc.new_file(str(path), PROMPT_SCHEMA) as writer:
        writer.write_table(to_table(PROMPT_SCHEMA, prompts), max_chunksize=READ_ROWS)


def read_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a scratch file, `READ_ROWS` in memory at a time."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        for number in range(reader.num_record_batches):
            yield from prompts_of(pa.Table.from_batches([reader.get_batch(number)]))
