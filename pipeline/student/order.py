"""In which order rows are trained: decided by seed and lengths alone, whatever the number of processes."""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

WINDOW_BATCHES: Final = 50
"""Batches whose rows are sorted by length together, at most a quarter of an epoch."""

Indices = npt.NDArray[np.int64]


def count_steps(rows: int, *, epochs: float, batch_size: int, max_steps: int | None) -> int:
    """Optimizer steps for `epochs` passes over `rows` rows, the last step filled up; at most `max_steps`."""
    steps = max(1, math.ceil(rows * epochs / batch_size - 1e-9))
    return steps if max_steps is None else min(steps, max_steps)


def training_order(lengths: Indices, *, steps: int, batch_size: int, seed: int, group_by_length: bool) -> Indices:
    """Indices of the rows to train on: `steps` whole batches of `batch_size`, one after the other.

    The rows of each epoch are permuted anew and the epochs strung together, so that no batch is short. With
    `group_by_length`, windows of batches are sorted by length, cut into batches, and the batches of a window shuffled.

    Args:
        lengths: tokens of each row.
    """
    rows, total = len(lengths), steps * batch_size
    epochs = [_generator(seed, epoch).permutation(rows) for epoch in range(math.ceil(total / rows))]
    order: Indices = np.concatenate(epochs)[:total].astype(np.int64)
    if not group_by_length:
        return order
    window = batch_size * max(1, min(WINDOW_BATCHES, rows // (4 * batch_size)))
    shuffle = _generator(seed, len(epochs))
    parts = [order[start : start + window] for start in range(0, total, window)]
    return np.concatenate([_grouped(part, lengths, batch_size, shuffle) for part in parts])


def _grouped(part: Indices, lengths: Indices, batch_size: int, shuffle: np.random.Generator) -> Indices:
    by_length = part[np.argsort(lengths[part], kind="stable")]
    batches = by_length.reshape(-1, batch_size)
    grouped: Indices = batches[shuffle.permutation(len(batches))].reshape(-1)
    return grouped


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed % 2**63, epoch]))


def epoch_ends(rows: int, *, steps: int, batch_size: int) -> set[int]:
    """Steps after which another epoch is complete; the last step is always one of them."""
    ends = {math.ceil(epoch * rows / batch_size) for epoch in range(1, steps * batch_size // rows + 1)}
    return {step for step in ends if step <= steps} | {steps}


def measured_steps(rows: int, *, steps: int, batch_size: int, every: int | None) -> set[int]:
    """Steps after which the student is measured: each `every`-th, or where an epoch ends; always the last one."""
    if every is None:
        return epoch_ends(rows, steps=steps, batch_size=batch_size)
    return {*range(every, steps + 1, every), steps}
