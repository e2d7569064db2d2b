"""Trainings that must come to the same, and what they must learn. All in this process, on a tiny model of noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UsageError
from pipeline.core.record import Message, read_shards
from pipeline.student.order import count_steps, training_order
from pipeline.student.shards import lengths_of, train_file
from tests.tiny_models import make_tiny_model
from tests.training_rows import points, sum_row, train_here, write_dataset

ROWS = [sum_row(number) for number in range(44)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", ROWS[:40], ROWS[40:])


def answer(model: Path, prompt: str) -> str:
    """What the saved model generates with the settings it brings itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = AutoModelForCausalLM.from_pretrained(model).generate(**ids, do_sample=False, max_new_tokens=30)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :]))


@pytest.mark.parametrize("parts", [4, 1], ids=["4x2", "1x8"])
def test_accumulation_changes_nothing(tmp_path: Path, model: Path, dataset: Path, parts: int) -> None:
    course = {"epochs": 3, "max_steps": 12}
    whole, _ = train_here(tmp_path / "whole", model, dataset, micro_batch_size=8, **course)
    split, _ = train_here(tmp_path / "split", model, dataset, micro_batch_size=parts, **course)
    for name in ("loss", "grad_norm", "eval_loss"):
        found = points(whole.out, name)
        assert len(found) == (3 if name == "eval_loss" else 12)
        assert points(split.out, name) == pytest.approx(found, abs=1e-5, rel=1e-4)


def test_equal_seeds_give_equal_bytes(tmp_path: Path, model: Path, dataset: Path) -> None:
    weights = {
        name: (
            train_here(tmp_path / name, model, dataset, seed=seed)[0].out / "model" / "model.safetensors"
        ).read_bytes()
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    }
    assert weights["first"] == weights["second"] != weights["other"]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, model: Path, dataset: Path) -> None:
    plain, _ = train_here(tmp_path / "plain", model, dataset)
    saving, _ = train_here(tmp_path / "saving", model, dataset, gradient_checkpointing=True)
    for name in ("loss", "grad_norm"):
        found = points(plain.out, name)
        assert len(found) == 5
        assert points(saving.out, name) == pytest.approx(found, rel=1e-5)


class TestGroupedByLength:
    """Which rows meet in a batch changes; how often each is trained does not, nor what is learned in expectation."""

    LENGTHS = np.random.default_rng(5).integers(5, 200, 1000)

    @given(seed=st.integers(0, 2**32), epochs=st.integers(1, 3), rows=st.integers(8, 300), grouped=st.booleans())
    @settings(max_examples=50)
    def test_each_row_is_trained_once_an_epoch(self, seed: int, epochs: int, rows: int, grouped: bool) -> None:
        steps = count_steps(rows, epochs=epochs, batch_size=4, max_steps=None)
        order = training_order(self.LENGTHS[:rows], steps=steps, batch_size=4, seed=seed, group_by_length=grouped)
        times = np.bincount(order, minlength=rows)
        assert len(order) == 4 * steps
        assert int(times.min()) == epochs, "and the last batch is filled up from one more"
        assert int((times - epochs).sum()) < 4

    @pytest.mark.parametrize("seed", range(5))
    def test_batches_are_alike_within_and_in_no_order_of_length(self, seed: int) -> None:
        order = training_order(self.LENGTHS, steps=125, batch_size=8, seed=seed, group_by_length=True)
        batches = self.LENGTHS[order].reshape(-1, 8)
        assert float(np.ptp(batches, axis=1).mean()) < 0.1 * float(np.ptp(self.LENGTHS))
        along = float(np.corrcoef(np.arange(125), batches.mean(axis=1))[0, 1])
        assert abs(along) < 0.35, "125 unrelated numbers: a correlation beyond this has a chance of 1 in 10,000"

    def test_an_epoch_costs_the_same_loss_at_a_learning_rate_of_nothing(self, tmp_path: Path, model: Path) -> None:
        rows = [sum_row(number, completion=(Message("assistant", "yes " * (1 + number % 9)),)) for number in range(40)]
        dataset = write_dataset(tmp_path / "dataset", rows)
        means = []
        for grouped in (False, True):
            folder = tmp_path / str(grouped)
            job, _ = train_here(folder, model, dataset, group_by_length=grouped, learning_rate=1e-12)
            lengths, trained = lengths_of(train_file(job))
            order = training_order(lengths, steps=5, batch_size=8, seed=0, group_by_length=grouped)
            weights = trained[order].reshape(5, 8).sum(axis=1)
            losses = points(job.out, "loss")
            means.append(float(np.average(losses, weights=weights)))
            assert float(np.std(losses)) > 1e-4, "the batches differ"
        assert means[1] == pytest.approx(means[0], rel=1e-6)


def test_long_rows_are_rejected_and_never_cut(tmp_path: Path, model: Path) -> None:
    long = sum_row(99, completion=(Message("assistant", "word " * 200),))
    cut = sum_row(98, finish_reason="length")
    dataset = write_dataset(tmp_path / "dataset", [*ROWS, long, cut])
    job, found = train_here(tmp_path, model, dataset, max_steps=1)
    assert found["rows_in"] == 46
    assert found["rejected"] == {"over_length": 1, "unfinished": 1}
    rejects = [row for table in read_shards(job.out / "rejects") for row in table.to_pylist()]
    assert [(row["row_id"], row["reason"]) for row in rejects] == [
        (long.row_id, "over_length"),
        (cut.row_id, "unfinished"),
    ]
    assert found["metrics"]["checks"]["rows"] == 44
    assert found["metrics"]["checks"]["without_stop"] == 0


def test_the_prompt_is_not_trained_and_the_end_is(tmp_path: Path, model: Path) -> None:
    # One answer to every question: a model that learns it says exactly that, and then stops by itself.
    rows = [sum_row(number, completion=(Message("assistant", "Monday"),)) for number in range(40)]
    dataset = write_dataset(tmp_path / "dataset", rows)
    job, found = train_here(tmp_path, model, dataset, epochs=12, learning_rate=1e-2)
    tokens = found["metrics"]["checks"]
    assert tokens["trained_tokens"] < tokens["tokens"] / 2
    assert points(job.out, "loss")[-1] < 0.05, "the questions differ, so their tokens would keep the loss up"
    assert answer(job.out / "model", "What is 55 + 1?") == "Monday</s>"


def test_the_folder_is_the_base_with_other_weights(tmp_path: Path, model: Path, dataset: Path) -> None:
    job, _ = train_here(tmp_path, model, dataset, max_steps=1)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((job.out / "model" / name).read_text()) == json.loads((model / name).read_text())
    assert (job.out / "model" / "chat_template.jinja").read_text() == (model / "chat_template.jinja").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_saved_in_the_bases_format(tmp_path: Path, dataset: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = make_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).save_pretrained(base)
    job, _ = train_here(tmp_path, base, dataset, max_steps=1)
    weights = load_file(job.out / "model" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{dtype}"}
    assert "lm_head.weight" not in weights, "a tied embedding is stored once"


def test_a_template_that_never_ends_a_turn(tmp_path: Path, dataset: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    template = (base / "chat_template.jinja").read_text().replace("{{ eos_token }}", "")
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match="never learn to stop: 40 of 40 rows"):
        train_here(tmp_path, base, dataset)
