"""Checks of what the collator makes of rows: what is trained survives it, and rows do not see each other."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from pipeline.student.batches import documents_apart
from pipeline.student.preflight.findings import Finding, fine, flawed, skipped
from pipeline.student.tokenise import IGNORED

Row = Mapping[str, Any]
"""As the trainer's data set gives it: `input_ids` and `labels`, lists or arrays, and whatever else a batch needs."""

ROUNDING: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Share of the largest logit by which orders of summation may differ. Rows that see each other differ by far more."""
FIX: Final = "take the pipeline's own collator (pipeline.student.batches); nothing in a config changes it"


def collate(trainer: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """A batch as the trainer's data loader makes it: columns that it does not know are gone before the collator."""
    batch: dict[str, Any] = trainer._get_collator_with_removed_columns(trainer.data_collator, "training")([*rows])
    return batch


def find_row(batch: Mapping[str, Any], row: Row) -> tuple[int, int] | None:
    """Where a row's tokens stand in a batch: (sequence, place); None: nowhere."""
    ids = np.asarray(row["input_ids"])
    for number, sequence in enumerate(batch["input_ids"].cpu().numpy()):
        if len(sequence) >= len(ids):
            windows = np.lib.stride_tricks.sliding_window_view(sequence, len(ids))
            hits = np.flatnonzero((windows == ids).all(axis=1))
            if len(hits) > 0:
                return number, int(hits[0])
    return None


def labels_of(batch: Mapping[str, Any], row: Row) -> list[int] | None:
    """The labels that a batch holds for a row; None: the row is not in it."""
    place = find_row(batch, row)
    if place is None:
        return None
    sequence, at = place
    labels: list[int] = batch["labels"][sequence, at : at + len(row["input_ids"])].tolist()
    return labels


def check_padding(trainer: Any, rows: Sequence[Row], pad: int | None, stops: Sequence[int]) -> Finding:
    """PF05: in a batch of rows of different lengths the last label of each is still there, whatever pads it.

    Args:
        rows: some, of different lengths.
        pad: the padding token's id.
    """
    batch = collate(trainer, rows)
    is_end = pad in stops
    figure = f"{len(rows)} rows, the padding token {'is' if is_end else 'is not'} a stop token"
    lost = 0
    for row in rows:
        labels = labels_of(batch, row)
        lost += labels is None or labels[-1] != int(row["labels"][-1])
    if lost == 0:
        return fine("PF05", figure)
    why = ", which is the padding token" if is_end else ""
    return flawed("PF05", "error", figure, f"{lost} of {len(rows)} rows lose the label of their end{why}", fix=FIX)


def sentinels(rows: Sequence[Row], ids: Sequence[int]) -> list[dict[str, Any]]:
    """Rows that are recognised in a batch: every column of a real row, and ids that rise from one to the next.

    Args:
        rows: two real rows, for the columns that the batch needs beside ids and labels.
        ids: at least 11 plain ids.
    """
    made = []
    for row, own in zip(rows, (ids[:4], ids[4:11]), strict=True):
        labels = [IGNORED, IGNORED, *own[2:]]
        made.append({**row, "input_ids": np.array(own, np.int32), "labels": np.array(labels, np.int32)})
    return made


def check_columns_reach(trainer: Any, rows: Sequence[Row], ids: Sequence[int]) -> Finding:
    """PF12: what the token shards hold reaches the model: ids and labels, and a mask or positions that fit them."""
    made = sentinels(rows, ids)
    batch = collate(trainer, made)
    figure = f"{len(made)} marked rows: {', '.join(sorted(batch))}"
    message = _lost(batch, made)
    if message is None:
        return fine("PF12", figure)
    return flawed("PF12", "error", figure, message, fix=FIX)


def _lost(batch: Mapping[str, Any], rows: Sequence[Row]) -> str | None:
    """What of the rows is not in the batch."""
    for name in ("input_ids", "labels"):
        if name not in batch:
            return f"the batch has no {name}"
    for row in rows:
        place, length = find_row(batch, row), len(row["input_ids"])
        if place is None:
            return "the tokens of a row are not in the batch as they are in the shard"
        sequence, at = place
        if labels_of(batch, row) != [int(label) for label in row["labels"]]:
            return "the labels of a row are not in the batch as they are in the shard"
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        if mask is not None and not bool((mask[sequence, at : at + length] == 1).all()):
            return "tokens of a row are masked from attention"
        if positions is not None and positions[sequence, at : at + length].tolist() != list(range(length)):
            return "the positions of a row do not begin at 0"
    if "row" in rows[0] and not any(name in batch for name in ("row", "rows")):
        return "the rows' numbers are lost, without which a row that spoils the loss cannot be named"
    return None


def check_apart(trainer: Any, rows: Sequence[Row], *, packing: bool) -> Finding:
    """PF18: the logits of rows that share sequences are those of each row alone.

    The model is tried with all rows in one sequence, whoever lays them out, and then with what its collator makes of
    two of them and a third one that is as long as both, so that the two share a sequence.
    """
    if not packing:
        return skipped("PF18", "train.packing is false: no sequence holds two rows")
    rows = _sharing(rows)
    with torch.no_grad(), trainer.accelerator.autocast():
        batch = collate(trainer, rows)
        together = forward(trainer, batch)
        alone = [forward(trainer, collate(trainer, [row])) for row in rows]
        apart = documents_apart(trainer.model, rows)
    largest = max(float(each.abs().max()) for each in alone)
    if not np.isfinite(largest):
        return skipped("PF18", "the model's outputs are not finite: see PF15")
    for row, logits in zip(rows, alone, strict=True):
        place, length = find_row(batch, row), len(row["input_ids"])
        if place is None:
            return flawed("PF18", "error", "-", "a packed row is not in its batch", fix=FIX)
        sequence, at = place
        difference = (together[sequence, at : at + length] - logits[0, :length]).abs()
        apart = max(apart, float(difference.nan_to_num(nan=torch.inf).max()))
    figure = f"largest difference {apart:.2g} of logits up to {largest:.2g}"
    if apart <= tolerance(trainer) * largest:
        return fine("PF18", figure)
    fix = "set train.packing: false; this model or its attention does not keep rows of one sequence apart"
    return flawed("PF18", "error", figure, "rows that share a sequence see each other", fix=fix)


def _sharing(rows: Sequence[Row]) -> list[Row]:
    """Two rows, and one of both their tokens backwards."""
    first, second = (*rows, *rows)[:2]
    both = {
        name: np.concatenate([np.asarray(first[name]), np.asarray(second[name])])[::-1].copy()
        for name in ("input_ids", "labels")
    }
    return [first, second, {**first, **both}]


def forward(trainer: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Float32 logits (sequences, tokens, vocabulary) of a batch."""
    inputs = {
        name: value for name, value in trainer._prepare_inputs({**batch}).items() if name not in ("labels", "rows")
    }
    logits: torch.Tensor = trainer.model(**inputs, use_cache=False).logits.float()
    return logits


def tolerance(trainer: Any) -> float:
    """What rounding may do to a figure, as a share of it."""
    held = {parameter.dtype for parameter in trainer.model.parameters() if parameter.is_floating_point()}
    held |= {torch.bfloat16} if trainer.args.bf16 else set()
    return max(ROUNDING.get(dtype, 0.0) for dtype in held)
