"""Rows out of a token shard, and as the tensors of a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.student.batches import ROWS, UNTRAINED, Collator, Rows, pack

PAD = 99
COLUMNS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


def row(length: int, *, first: int = 0, prompt: int = 1, number: int | None = None) -> dict[str, Any]:
    """Tokens `first`, `first` + 1, …; the first `prompt` of them are not trained."""
    ids = np.arange(first, first + length, dtype=np.int32)
    labels = np.where(np.arange(length) < prompt, UNTRAINED, ids)
    return {"input_ids": ids, "labels": labels} | ({} if number is None else {"row": number})


class TestRows:
    """A shard of several chunks, an empty one among them."""

    ROWS = tuple(row(length, first=10 * length) for length in (3, 1, 4, 2, 5))

    @pytest.fixture
    def shard(self, tmp_path: Path) -> Path:
        path = tmp_path / "train.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, COLUMNS) as writer:
            for part in (self.ROWS[:2], (), self.ROWS[2:]):
                columns = {name: [list(one[name]) for one in part] for name in COLUMNS.names}
                writer.write_table(pa.table(columns, schema=COLUMNS))
        return path

    def test_each_place_holds_the_row_that_the_order_says(self, shard: Path) -> None:
        order = np.array([4, 0, 2, 2, 1, 3])
        rows = Rows.open(shard, order)
        assert len(rows) == 6
        for place, number in enumerate(order):
            found = rows[place]
            assert found["row"] == number
            for name in ("input_ids", "labels"):
                np.testing.assert_array_equal(found[name], self.ROWS[number][name])

    def test_a_row_is_a_view_of_the_mapped_file(self, shard: Path) -> None:
        found = Rows.open(shard, np.arange(5))[3]["input_ids"]
        assert not found.flags.owndata
        assert not found.flags.writeable


class TestPadded:
    def test_rows_are_filled_up_on_the_right(self) -> None:
        batch = Collator(PAD)([row(3, number=7), row(2, first=5, number=4)])
        assert batch["input_ids"].tolist() == [[0, 1, 2], [5, 6, PAD]]
        assert batch["labels"].tolist() == [[-100, 1, 2], [-100, 6, -100]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert batch[ROWS].tolist() == [7, 4]
        assert sorted(batch) == ["attention_mask", "input_ids", "labels", ROWS]

    def test_the_end_token_is_trained_where_it_is_the_pad_token_too(self) -> None:
        ended = {"input_ids": [1, 2, PAD], "labels": [-100, 2, PAD]}
        batch = Collator(PAD)([ended, row(5)])
        assert batch["labels"][0].tolist() == [-100, 2, PAD, -100, -100]


class TestPacked:
    def test_positions_start_anew_at_each_row_and_at_the_padding(self) -> None:
        batch = Collator(PAD, packing=True)([row(2), row(6, first=10), row(3, first=20)])
        assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14, 15], [20, 21, 22, 0, 1, PAD]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
        assert batch["labels"].tolist() == [[-100, 11, 12, 13, 14, 15], [-100, 21, 22, -100, 1, -100]]
        assert "attention_mask" not in batch, "with one, transformers takes no notice of the positions"

    def test_no_row_is_the_target_of_another(self) -> None:
        whole = [row(3, prompt=0), row(3, first=10, prompt=0), row(6, first=20, prompt=0)]
        batch = Collator(PAD, packing=True)(whole)
        first = batch["position_ids"] == 0
        assert int(first.sum()) == 3
        assert set(batch["labels"][first].tolist()) == {UNTRAINED}

    def test_flattened_rows_say_where_they_begin(self) -> None:
        batch = Collator(PAD, packing=True, flat=True)([row(2), row(3, first=10)])
        assert batch["input_ids"].tolist() == [[0, 1, 10, 11, 12]]
        assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 2, 5]
        assert batch["cu_seq_lens_q"].dtype == torch.int32
        assert batch["max_length_q"] == batch["max_length_k"] == 3
        assert batch["seq_idx"].tolist() == [[0, 0, 1, 1, 1]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_packing_loses_no_row_and_needs_no_more_tokens_than_padding(lengths: list[int]) -> None:
    bins, width = pack(lengths)
    assert sorted(member for members in bins for member in members) == list(range(len(lengths)))
    assert all(sum(lengths[member] for member in members) <= width for members in bins)
    assert max(lengths) <= width <= 2 * max(lengths)
    assert len(bins) * width <= len(lengths) * max(lengths)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_packed_and_padded_batches_train_the_same_targets(lengths: list[int]) -> None:
    rows = [row(length, first=100 * at, number=at) for at, length in enumerate(lengths)]
    targets = []
    for packing in (False, True):
        batch = Collator(PAD, packing)(rows)
        labels, before = batch["labels"][:, 1:], batch["input_ids"][:, :-1]
        trained = labels != UNTRAINED
        targets.append(sorted(zip(before[trained].tolist(), labels[trained].tolist(), strict=True)))
    assert (
        targets[0]
        == targets[1]
        == [(a, a + 1) for at, n in enumerate(lengths) for a in range(100 * at, 100 * at + n - 1)]
    )
