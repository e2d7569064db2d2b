"""Rows that share a sequence are trained as if each were alone; the loss step is TRL's, to the rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.record import Message
from pipeline.student.batches import Collator, documents_apart
from tests.tiny_models import make_tiny_model
from tests.training_rows import points, sum_row, train_here, write_dataset

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def varied(number: int) -> Any:
    """A row whose answer has between one word and 25."""
    words = [WORDS[(number * 7 + at) % 10] for at in range(1 + number * number * 11 % 25)]
    return sum_row(number, completion=(Message("assistant", " ".join(words)),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [varied(number) for number in range(52)]
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", rows[:48], rows[48:])


def encoded(lengths: tuple[int, ...], vocabulary: int = 290, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random tokens; the first third of each is not trained."""
    random = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = random.integers(6, vocabulary, length)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) < length // 3, -100, ids), "row": number})
    return rows


LORA = {"kind": "lora", "r": 4, "alpha": 8, "train_tokens": ()}


@pytest.mark.parametrize("tuning", [{"kind": "full"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("grouped", [False, True], ids=["random", "grouped"])
def test_a_packed_training_is_the_unpacked_one(
    tmp_path: Path, model: Path, dataset: Path, tuning: dict[str, Any], grouped: bool
) -> None:
    common = {"max_length": 256, "tuning": tuning, "group_by_length": grouped, "epochs": 2, "learning_rate": 1e-3}
    apart, _ = train_here(tmp_path / "apart", model, dataset, **common)
    shared, _ = train_here(tmp_path / "shared", model, dataset, packing=True, **common)
    for name in ("loss", "grad_norm"):
        found = points(apart.out, name)
        assert len(found) == 12
        assert points(shared.out, name) == pytest.approx(found, rel=1e-5)
    assert points(shared.out, "eval_loss") == pytest.approx(points(apart.out, "eval_loss"), rel=1e-5)


# ----------------------------------------------------------------------------------------------------- documents apart


def loaded(folder: Path, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)


class TestDocumentsApart:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_a_llama_keeps_them_apart(self, model: Path, attention: str) -> None:
        assert documents_apart(loaded(model, attn_implementation=attention), encoded((9, 5, 17))) < 1e-5

    def test_a_sliding_window_keeps_them_apart(self) -> None:
        from transformers import MistralConfig, MistralForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        torch.manual_seed(0)
        narrow = MistralForCausalLM(MistralConfig(vocab_size=300, sliding_window=4, **sizes, **heads))
        wide = MistralForCausalLM(MistralConfig(vocab_size=300, sliding_window=None, **sizes, **heads))
        wide.load_state_dict(narrow.state_dict())
        rows = encoded((9, 5, 17))
        assert documents_apart(narrow, rows) < 1e-5
        one = {"input_ids": torch.tensor(rows[2]["input_ids"])[None], "use_cache": False}
        assert not torch.allclose(narrow.eval()(**one).logits, wide.eval()(**one).logits, atol=1e-3), "it does slide"

    def test_a_model_without_a_block_diagonal_mask_is_seen(self) -> None:
        """A convolution over the sequence looks across the boundary, whatever the mask says."""
        from transformers import Lfm2Config, Lfm2ForCausalLM

        torch.manual_seed(0)
        mixed = Lfm2ForCausalLM(
            Lfm2Config(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                layer_types=["conv", "full_attention"],
                initializer_range=0.5,
            )
        )
        assert documents_apart(mixed, encoded((9, 5, 17))) > 1e-3

    def test_the_model_stays_in_its_mode(self, model: Path) -> None:
        llama = loaded(model).train()
        documents_apart(llama, encoded((4, 3)))
        assert llama.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_flash_attention_keeps_rows_of_a_flattened_sequence_apart(model: Path) -> None:
    pytest.importorskip("flash_attn")
    llama = loaded(model, attn_implementation="flash_attention_2").to("cuda", torch.bfloat16)
    assert documents_apart(llama, encoded((9, 5, 17))) < 0.1
    rows = encoded((9, 5, 17))
    flat = Collator(0, packing=True, flat=True)(rows)
    alone = [Collator(0, packing=True, flat=True)([row]) for row in rows]
    losses = []
    for batches in ([flat], alone):
        total = 0.0
        for batch in batches:
            inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            inputs.pop("rows")
            labels = inputs.pop("labels")[:, 1:].flatten()
            logits = llama(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        losses.append(total)
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
