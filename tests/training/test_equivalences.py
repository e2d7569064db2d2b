"""Trainings that must come to the same, and what they must learn. All in this process, on a tiny model of noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UsageError
from pipeline.core.record import Message, read_shards
from tests.tiny_models import make_tiny_model
from tests.training_rows import sum_row, train_here, write_dataset

ROWS = [sum_row(number) for number in range(44)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", ROWS[:40], ROWS[40:])


def points(out: Path, name: str) -> list[float]:
    return [point[name] for point in json.loads((out / "loss.json").read_text()) if name in point]


def answer(model: Path, prompt: str) -> str:
    """What the saved model generates with the settings it brings itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = AutoModelForCausalLM.from_pretrained(model).generate(**ids, do_sample=False, max_new_tokens=30)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :]))


def test_accumulation_changes_nothing(tmp_path: Path, model: Path, dataset: Path) -> None:
    whole, _ = train_here(tmp_path / "8x1", model, dataset, micro_batch_size=8)
    parts, _ = train_here(tmp_path / "4x2", model, dataset, micro_batch_size=4)
    for name in ("loss", "grad_norm", "eval_loss"):
        found = points(whole.out, name)
        assert len(found) == (1 if name == "eval_loss" else 5)
        assert points(parts.out, name) == pytest.approx(found, abs=1e-5, rel=1e-4)


def test_equal_seeds_give_equal_bytes(tmp_path: Path, model: Path, dataset: Path) -> None:
    weights = {
        name: (
            train_here(tmp_path / name, model, dataset, seed=seed)[0].out / "model" / "model.safetensors"
        ).read_bytes()
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    }
    assert weights["first"] == weights["second"] != weights["other"]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, model: Path, dataset: Path) -> None:
    plain, _ = train_here(tmp_path / "plain", model, dataset, max_steps=2)
    saving, _ = train_here(tmp_path / "saving", model, dataset, max_steps=2, gradient_checkpointing=True)
    assert points(saving.out, "loss") == pytest.approx(points(plain.out, "loss"), abs=1e-5)


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


@pytest.mark.parametrize("modules", [(), ("embed_tokens",)])
def test_lora_trains_and_is_merged(tmp_path: Path, model: Path, dataset: Path, modules: tuple[str, ...]) -> None:
    from safetensors.torch import load_file

    tuning: dict[str, Any] = {"kind": "lora", "r": 8, "alpha": 16, "modules_to_save": modules}
    job, found = train_here(tmp_path, model, dataset, tuning=tuning, epochs=6, learning_rate=1e-2)
    metrics = found["metrics"]
    assert 0 < metrics["trainable_parameters"] < metrics["parameters"]
    losses = points(job.out, "loss")
    assert losses[-1] < losses[0] - 0.5
    before, after = load_file(model / "model.safetensors"), load_file(job.out / "model" / "model.safetensors")
    assert set(after) == set(before), "a plain model: no adapter's tensors, no untied output layer"
    changed = {name for name in before if not before[name].equal(after[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert ("model.embed_tokens.weight" in changed) is bool(modules)


def test_an_adapter_on_modules_that_do_not_exist(tmp_path: Path, model: Path, dataset: Path) -> None:
    with pytest.raises(UsageError, match="no adapters for these modules"):
        train_here(tmp_path, model, dataset, tuning={"kind": "lora", "target_modules": ["no_such_module"]})


def test_a_pattern_that_hits_the_output_layer(tmp_path: Path, model: Path, dataset: Path) -> None:
    with pytest.raises(UsageError, match="lm_head cannot have an adapter"):
        train_here(tmp_path, model, dataset, tuning={"kind": "lora", "target_modules": ".*(q_proj|lm_head)"})


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path, dataset: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = make_tiny_model(tmp_path / "base")
    broken = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    broken.save_pretrained(base)
    with pytest.raises(UsageError, match="training diverged at step 1"):
        train_here(tmp_path, base, dataset)
    assert not (tmp_path / "out" / "model").exists()


def test_a_template_that_never_ends_a_turn(tmp_path: Path, dataset: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    template = (base / "chat_template.jinja").read_text().replace("{{ eos_token }}", "")
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match="never learn to stop: 40 of 40 rows"):
        train_here(tmp_path, base, dataset)
