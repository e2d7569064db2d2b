"""Blank and equal prompts: which stay, which leave and why, and which sets hold those that stay."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.record import SHARD_ROWS, Prompt
from pipeline.core.stage import Context, Json, check_cancelled
from pipeline.stages.prompts.order import chunks, write_prompts
from pipeline.stages.prompts.render import is_blank, tool_parts
from pipeline.text.equals import Digests, Positions, digest_of, digests_of, first_of_equals, have_equals
from pipeline.text.normalise import normalise

KEPT_FIRST: Final = ("test", "validation", "train")
"""Of equal prompts the one in the earlier of these splits stays."""


@dataclass(frozen=True, slots=True)
class Settled:
    """Prompts of a scratch file, in canonical order.

    Attributes:
        path: the file.
        reasons: for each prompt the reason it leaves with so far, or None.
        also_in: row in the file -> the other sets that hold this prompt, sorted; for prompts that stay.
    """

    path: Path
    reasons: list[str | None]
    also_in: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Settlement:
    """What is known of all prompts: some 50 bytes each while it is found out, and the names of those that have equals.
    Iterates over its files, as often as wanted.

    Attributes:
        paths: scratch files of `SHARD_ROWS` prompts each; the last may hold fewer.
        kept: for each prompt the position of the one that stays for it.
        blank: for each prompt whether it says nothing.
        names: position of a prompt that stays for others -> `<prompt_set>/<prompt_id>`.
        also_in: position of a prompt that stays -> the other sets that hold it, if any, sorted.
    """

    paths: list[Path]
    kept: Positions
    blank: npt.NDArray[np.bool_]
    names: Mapping[int, str]
    also_in: Mapping[int, tuple[str, ...]]

    def __iter__(self) -> Iterator[Settled]:
        for number, path in enumerate(self.paths):
            start = number * SHARD_ROWS
            kept = self.kept[start : start + SHARD_ROWS].tolist()
            yield Settled(
                path,
                [self._reason(position, at) for position, at in enumerate(kept, start)],
                {row: self.also_in[start + row] for row in range(len(kept)) if start + row in self.also_in},
            )

    def _reason(self, position: int, kept: int) -> str | None:
        if self.blank[position]:
            return "empty"
        return None if kept == position else f"duplicate_of:{self.names[kept]}"


@dataclass(frozen=True, slots=True)
class Compared:
    """What is compared of the prompts of a file: a row each, blank ones too."""

    digests: Digests
    ranks: npt.NDArray[np.uint8]
    sets: npt.NDArray[np.uint32]
    blank: npt.NDArray[np.bool_]


def settle(prompts: Iterable[Prompt], sets: Sequence[str], scratch: Path, ctx: Context) -> Settlement:
    """Write the prompts in shards and find the blank ones and the exact duplicates.

    Of equal prompts the first in test stays, else the first in validation, else the first: so no text is in two
    splits, and none that a test group holds is trained.

    Args:
        prompts: by (prompt_set, prompt_id); read once.
        sets: names of all prompt sets.
        scratch: a folder for the files; the caller removes it.
    """
    number_of = {name: number for number, name in enumerate(sets)}
    paths: list[Path] = []
    compared = []
    for chunk in chunks(prompts, SHARD_ROWS):
        check_cancelled(ctx)
        paths.append(scratch / f"settled-{len(paths):05d}.arrow")
        write_prompts(paths[-1], chunk)
        compared.append(_compared(chunk, number_of))
    if not compared:
        return Settlement([], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool), {}, {})
    blank = np.concatenate([part.blank for part in compared])
    kept = first_of_equals(
        np.concatenate([part.digests for part in compared]), np.concatenate([part.ranks for part in compared])
    )
    several = have_equals(kept) & ~blank
    in_sets = np.concatenate([part.sets for part in compared])
    names = dict(_names(paths, np.unique(kept[several])))
    return Settlement(paths, kept, blank, names, _also_in(kept, several, in_sets, sets))


def _compared(prompts: Sequence[Prompt], number_of: Mapping[str, int]) -> Compared:
    digests = (digest_of(_said(prompt)) for prompt in prompts)
    return Compared(
        digests=digests_of(b"".join(digests)),
        ranks=np.array([KEPT_FIRST.index(prompt.split) for prompt in prompts], dtype=np.uint8),
        sets=np.array([number_of[prompt.prompt_set] for prompt in prompts], dtype=np.uint32),
        blank=np.array([is_blank(prompt) for prompt in prompts], dtype=bool),
    )


def _said(prompt: Prompt) -> list[Json]:
    """What makes two prompts equal: their turns, and the functions that they offer."""
    turns: list[Json] = [[turn.role, normalise(turn.content), *tool_parts(turn)] for turn in prompt.prompt]
    return turns if prompt.tools is None else [*turns, prompt.tools]


def _names(paths: Sequence[Path], positions: Positions) -> Iterator[tuple[int, str]]:
    """(position, `<prompt_set>/<prompt_id>`) of the prompts at some positions, ascending."""
    for number, path in enumerate(paths):
        start = number * SHARD_ROWS
        here = positions[(positions >= start) & (positions < start + SHARD_ROWS)]
        if len(here) == 0:
            continue
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            rows = reader.read_all().select(["prompt_set", "prompt_id"]).take(pa.array(here - start))
        columns = (rows[name].to_pylist() for name in rows.column_names)
        for position, prompt_set, prompt_id in zip(here.tolist(), *columns, strict=True):
            yield position, f"{prompt_set}/{prompt_id}"


def _also_in(
    kept: Positions, several: npt.NDArray[np.bool_], in_sets: npt.NDArray[np.uint32], names: Sequence[str]
) -> dict[int, tuple[str, ...]]:
    """For prompts that stay and have equals in other sets: the names of these sets, sorted."""
    pairs = np.unique(np.stack([kept[several], in_sets[several].astype(np.int64)], axis=1), axis=0)
    others = pairs[pairs[:, 1] != in_sets[pairs[:, 0]]]
    found: dict[int, list[str]] = {}
    for position, number in others.tolist():
        found.setdefault(position, []).append(names[number])
    return {position: tuple(sorted(sets)) for position, sets in found.items()}
