"""Running the student for the checks' sake: with no more memory than its training takes, and without a trace."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch

from pipeline.student.metrics import forget_peak_memory
from pipeline.student.tokenise import IGNORED

Row = Mapping[str, Any]
"""As the trainer's data set gives it; see `batch.Row`."""

FEW: Final = 4
"""Rows that the loss is tried on, at most; the shortest ones."""
WIDEST: Final = 256
"""Tokens of a row that the loss is tried on."""
NARROW: Final = 64
"""Tokens of a row whose logits are held for the whole vocabulary."""


def few(rows: Sequence[Row], *, micro_batch_size: int, longest: int) -> list[Row]:
    """Copies of some rows that together are no larger than a micro-batch of the training, nor equally long.

    At least two where there are two, whatever the micro-batch: then their parts are as much shorter.

    Args:
        longest: tokens of the longest row that is trained.
    """
    chosen = rows[: max(2, min(FEW, micro_batch_size))]
    width = max(4, min(WIDEST, micro_batch_size * longest // max(1, len(chosen))))
    return [cut(row, width - at * width // (2 * len(chosen))) for at, row in enumerate(chosen)]


def cut(row: Row, width: int) -> Row:
    """A copy of at most so many tokens, around the first one that is trained.

    Args:
        width: at least 2.
    """
    labels = np.asarray(row["labels"])
    if len(labels) <= width:
        return row
    first = 1 + int(np.argmax(labels[1:] != IGNORED))
    begin = max(0, min(first - width // 2, len(labels) - width))
    window = {name: np.asarray(row[name])[begin : begin + width] for name in ("input_ids", "labels")}
    return {**row, **window}


@contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """Within the block the model may be run, without dropout, and as the training runs it: layers are computed again
    for the backward pass where it says so.

    Random states, modes, gradients, the trainer's notes and the GPU's peak are restored.
    """
    model = trainer.model
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.callback(forget_peak_memory)
        stack.callback(model.zero_grad, set_to_none=True)
        for each in (_modes(model), _notes(trainer), _recomputed(trainer)):
            stack.enter_context(each)
        stack.enter_context(torch.random.fork_rng(devices=devices))
        yield


@contextmanager
def _modes(model: Any) -> Iterator[None]:
    """Evaluation mode within the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _notes(trainer: Any) -> Iterator[None]:
    """What the trainer noted of the batches is forgotten."""
    kept = {name: getattr(trainer, name) for name in ("_metrics", "_total_train_tokens") if hasattr(trainer, name)}
    metrics = {mode: {**values} for mode, values in kept.get("_metrics", {}).items()}
    try:
        yield
    finally:
        for name in ("step_rows", "step_losses"):
            getattr(trainer, name, []).clear()
        for mode, values in metrics.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(values)
        if "_total_train_tokens" in kept:
            trainer._total_train_tokens = kept["_total_train_tokens"]


@contextmanager
def _recomputed(trainer: Any) -> Iterator[None]:
    """Gradient checkpointing within the block, where the training has it: the trainer switches it on only when it
    begins, and layers obey only in training mode. They alone are in it, not what they hold, so that nothing drops."""
    model = trainer.model
    if not trainer.args.gradient_checkpointing:
        yield
        return
    is_on = model.is_gradient_checkpointing
    if not is_on:
        told = dict(trainer.args.gradient_checkpointing_kwargs or {})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=told or None)
    layers = [each for each in model.modules() if each is not model and getattr(each, "gradient_checkpointing", False)]
    rates = [
        (layer, name, value)
        for layer in layers
        for name, value in vars(layer).items()
        if "drop" in name and isinstance(value, float)
    ]
    for layer in layers:
        layer.training = True
    for layer, name, _ in rates:
        setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for layer, name, value in rates:
            setattr(layer, name, value)
        if not is_on:
            model.gradient_checkpointing_disable()
