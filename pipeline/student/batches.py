"""Rows as the tensors of a forward pass: padded, or packed into shared sequences in which each sees only itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.student.order import Indices

UNTRAINED: Final = -100
"""The label of tokens that are not trained, as PyTorch's cross-entropy ignores it."""
ROWS: Final = "rows"
"""Entry of a batch that says which rows it holds; no input of the model."""
WIDER: Final = 0.9
"""Sequences twice as long as the longest row are taken where they need at most this share of the tokens: attention
costs more in longer sequences."""

Ids: TypeAlias = npt.NDArray[np.int32]
Row: TypeAlias = Mapping[str, Any]
"""`input_ids` and `labels` of one row, lists or arrays of equal length, and maybe `row`, its number."""
Batch: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded rows in the order in which they are trained, read from a memory-mapped shard without a copy.

    A map-style data set for PyTorch: the item at a place is a `Row`, whose `row` is its number in the shard.

    Attributes:
        input_ids, labels: per chunk of the shard its values, end to end, and where each row begins.
        first: number of the first row of each chunk.
        order: number of the row at each place.
    """

    input_ids: tuple[Ids, ...]
    labels: tuple[Ids, ...]
    offsets: tuple[Indices, ...]
    first: Indices
    order: Indices

    @classmethod
    def open(cls, path: Path, order: Indices) -> "Rows":
        """The rows of a token shard (an Arrow stream with the columns `input_ids` and `labels`)."""
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        chunks = [chunk for chunk in table.select(["input_ids", "labels"]).to_batches() if chunk.num_rows > 0]
        first = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])[:-1].astype(np.int64)
        return cls(
            tuple(chunk["input_ids"].values.to_numpy() for chunk in chunks),
            tuple(chunk["labels"].values.to_numpy() for chunk in chunks),
            tuple(chunk["labels"].offsets.to_numpy().astype(np.int64) for chunk in chunks),
            first,
            order,
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Row:
        return self.row(int(self.order[place]))

    def row(self, number: int) -> Row:
        """The row with this number in the shard."""
        chunk = int(np.searchsorted(self.first, number, side="right")) - 1
        begin, end = self.offsets[chunk][number - self.first[chunk] :][:2]
        return {"input_ids": self.input_ids[chunk][begin:end], "labels": self.labels[chunk][begin:end], "row": number}


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes the tensors of one forward pass of its rows: right-padded, packed, or one flattened sequence.

    The model's loss compares the output at a position with the label at the next one. Hence the first label of each
    row is -100: in a shared sequence it would be the target of another row's last token; alone it has no context and
    is not trained either.

    Attributes:
        pad_id: fills up; never trained nor seen by a row.
        packing: rows share sequences. There is no attention mask then: transformers makes a block-diagonal one where
            `position_ids` start anew (masking_utils.find_packed_sequence_indices), but only without one and with
            `use_cache=False`. What fills a sequence up counts its own positions, as a row would.
        flat: all rows in one sequence, and its boundaries for FlashAttention's kernel of variable lengths, which
            neither pads nor looks across them. For other kernels attention would be quadratic in the whole.
    """

    pad_id: int
    packing: bool = False
    flat: bool = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """`input_ids` and `labels`, int64 (sequences, tokens); `attention_mask` or `position_ids` of that shape.

        Where the rows say their numbers, also `rows`: int64 (rows,), in the order of the argument.
        """
        lengths = [len(row["input_ids"]) for row in rows]
        if self.flat:
            bins, width = [list(range(len(rows)))], sum(lengths)
        elif self.packing:
            bins, width = pack(lengths)
        else:
            bins, width = [[at] for at in range(len(rows))], max(lengths)
        batch = lay_out(rows, bins, width, self.pad_id)
        if self.flat:
            batch |= _boundaries(batch["position_ids"][0])
        elif not self.packing:
            positions = batch.pop("position_ids")
            batch["attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()
        if "row" in rows[0]:
            batch[ROWS] = torch.tensor([row["row"] for row in rows])
        return batch


def lay_out(rows: Sequence[Row], bins: Sequence[Sequence[int]], width: int, pad_id: int) -> Batch:
    """The rows of each bin end to end in a sequence of `width` tokens, with positions that start anew at each row.

    In a bin of one row the positions run on through its padding; in a bin of several they start anew there as well.
    """
    ids = np.full((len(bins), width), pad_id, np.int64)
    labels = np.full((len(bins), width), UNTRAINED, np.int64)
    positions = np.tile(np.arange(width, dtype=np.int64), (len(bins), 1))
    for sequence, members in enumerate(bins):
        at = 0
        for member in members:
            length = len(rows[member]["input_ids"])
            ids[sequence, at : at + length] = rows[member]["input_ids"]
            labels[sequence, at : at + length] = rows[member]["labels"]
            labels[sequence, at] = UNTRAINED
            positions[sequence, at:] -= positions[sequence, at]
            at += length
        if len(members) > 1 and at < width:
            positions[sequence, at:] -= positions[sequence, at]
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }


def pack(lengths: Sequence[int]) -> tuple[list[list[int]], int]:
    """Rows of these lengths in few sequences of one width: (members of each sequence, width).

    First-fit decreasing (Johnson 1973; at most 11/9 of the fewest sequences possible, and one), into sequences as long
    as the longest row, or twice as long where that saves a tenth of the tokens.
    """
    narrow, wide = (_first_fit(lengths, times * max(lengths)) for times in (1, 2))
    return wide if _tokens(wide) <= WIDER * _tokens(narrow) else narrow


def _tokens(packed: tuple[list[list[int]], int]) -> int:
    bins, width = packed
    return len(bins) * width


def _first_fit(lengths: Sequence[int], capacity: int) -> tuple[list[list[int]], int]:
    bins: list[list[int]] = []
    filled: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        fitting = (index for index, used in enumerate(filled) if used + lengths[at] <= capacity)
        index = next(fitting, len(bins))
        if index == len(bins):
            bins.append([])
            filled.append(0)
        bins[index].append(at)
        filled[index] += lengths[at]
    return bins, max(filled)


def _boundaries(positions: torch.Tensor) -> Batch:
    """Where rows begin in a flattened sequence, as FlashAttention's and linear attention's kernels take it.

    The model would find it out from the positions, with a wait for the device in each layer.
    """
    starts = (positions == 0).nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([len(positions)])]).to(torch.int32)
    longest, lengths = int(ends.diff().max()), ends.diff()
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)[None],
    }


def documents_apart(model: Any, rows: Sequence[Row]) -> float:
    """How far rows that share a sequence see each other: 0, up to rounding, if they do not.

    The rows are laid out in two sequences, forwards and backwards, so that each stands before and after others, with
    padding at the end; this very model computes them, and each row alone.

    Returns:
        The largest difference between a logit of a row in a shared sequence and the same logit of the row alone; inf
        where one of them is no number.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    orders = [list(range(len(rows))), list(range(len(rows)))[::-1]]
    training, largest = model.training, 0.0
    model.eval()
    with torch.no_grad():
        shared = _shared_logits(model, rows, orders, sum(lengths))
        for number, row in enumerate(rows):
            (alone,) = _logits(model, lay_out([row], [[0]], lengths[number], pad_id=0))
            for sequence, order in zip(shared, orders, strict=True):
                at = sum(lengths[member] for member in order[: order.index(number)])
                apart = (sequence[at : at + lengths[number]] - alone).abs()
                largest = max(largest, float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
    model.train(training)
    return largest


def _shared_logits(model: Any, rows: Sequence[Row], orders: Sequence[Sequence[int]], tokens: int) -> list[torch.Tensor]:
    """Logits of sequences that hold all rows, laid out as the collator would for the model's kind of attention."""
    if not flattens(model.config._attn_implementation):
        return list(_logits(model, lay_out(rows, orders, tokens + 2, pad_id=0)))
    flat = [lay_out(rows, [order], tokens, pad_id=0) for order in orders]
    return [_logits(model, batch | _boundaries(batch["position_ids"][0]))[0] for batch in flat]


def flattens(attention: str) -> bool:
    """Whether this kind of attention packs all rows of a forward pass into one sequence."""
    return attention.startswith("flash_attention")


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Float32 logits (sequences, tokens, vocabulary)."""
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    return logits
