"""The loss step is TRL's, to the rounding; a loss or a gradient that is no number ends the training and names rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.config import TrainStep
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_train import StudentModel
from pipeline.core.errors import UsageError
from pipeline.stages import train
from pipeline.student.arguments import Schedule, sft_arguments
from pipeline.student.batches import Collator
from tests.support import POLICY, make_context
from tests.tiny_models import make_tiny_model
from tests.training_rows import small_config, sum_row, train_here, write_dataset

ROWS = [sum_row(number) for number in range(40)]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", ROWS)


# ------------------------------------------------------------------------------------------------------ TRL's own loss


def encoded(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    rows = []
    for number, length in enumerate(lengths):
        ids = random.integers(6, 290, length)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) < length // 3, -100, ids), "row": number})
    return rows


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tied_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def soft_capped() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0))


def scaled_down() -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0))


def scaled() -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3))


def mixture_of_experts() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **experts))


def adapted() -> Any:
    return with_lora(llama())


def adapted_head() -> Any:
    """The output layer is trained in full, through a wrapper of PEFT's."""
    return with_lora(llama(), modules_to_save=("lm_head",))


def with_lora(model: Any, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": "all-linear", "modules_to_save": None, "init_lora_weights": False, **changes}
    lora = LoraConfig(task_type="CAUSAL_LM", **settings)
    return get_peft_model(model, lora)


MODELS = [llama, tied_llama, soft_capped, scaled_down, scaled, mixture_of_experts, adapted, adapted_head]


def loss_and_gradients(
    kind: type[Any], model: Any, folder: Path, batch: dict[str, Any]
) -> tuple[float, dict[str, Any]]:
    """Of one micro-batch of a step with twice as many trained tokens."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig

    trainer = kind(
        model=model,
        args=SFTConfig(**sft_arguments(small_config(), Schedule(1, 0, 8, 1), scratch=folder / "x", use_cpu=True)),
        train_dataset=Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.current_gradient_accumulation_steps = 2
    items = 2 * (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=items)
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_loss_and_gradient_are_those_of_trl(model: Path, make: Callable[[], Any], packing: bool) -> None:
    from trl import SFTTrainer

    from pipeline.student.sft import CheckpointedTrainer

    rows = encoded((23, 9, 14, 5))
    padded = Collator(0)(rows)
    padded.pop("rows")
    found = []
    for kind, batch in ((SFTTrainer, padded), (CheckpointedTrainer, Collator(0, packing)(rows))):
        torch.manual_seed(0)
        found.append(loss_and_gradients(kind, make(), model, batch))
    (theirs, their_gradients), (ours, our_gradients) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert our_gradients.keys() == their_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=2e-6 * largest)


# --------------------------------------------------------------------------------------------------------- not finite


def untied(folder: Path, change: Callable[[Any], None]) -> Path:
    """The tiny model with an output layer of its own, changed."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    base = AutoModelForCausalLM.from_pretrained(make_tiny_model(folder))
    base.config.tie_word_embeddings = False
    apart = LlamaForCausalLM(base.config)
    apart.load_state_dict({**base.state_dict(), "lm_head.weight": base.model.embed_tokens.weight.detach().clone()})
    with torch.no_grad():
        change(apart)
    apart.save_pretrained(folder)
    return folder


class TestARowWithoutAFiniteLoss:
    ODD = ROWS[17]

    @classmethod
    def prepare(cls, folder: Path) -> tuple[Path, Path]:
        """A model and a data set: one row alone uses a token whose embedding is infinite."""
        from transformers import AutoTokenizer

        make_tiny_model(folder / "base")
        (token,) = AutoTokenizer.from_pretrained(folder / "base")("~", add_special_tokens=False)["input_ids"]

        def spoil(model: Any) -> None:
            model.model.embed_tokens.weight[token] = torch.inf

        base = untied(folder / "base", spoil)
        odd = sum_row(17, prompt=(type(cls.ODD.prompt[0])("user", "What is 17 ~ 1?"),))
        rows = [odd if row.row_id == odd.row_id else row for row in ROWS]
        return base, write_dataset(folder / "dataset", rows)

    @pytest.fixture(scope="class")
    def failed(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UsageError]:
        folder = tmp_path_factory.mktemp("odd")
        base, dataset = self.prepare(folder)
        with pytest.raises(UsageError) as error:
            train_here(folder, base, dataset, epochs=3, micro_batch_size=2, checkpoint={"steps": 1})
        return folder, error.value

    def test_it_is_named(self, failed: tuple[Path, UsageError]) -> None:
        _, error = failed
        assert error.what == "the loss is not finite for 1 of the 8 rows of step 3"
        assert error.where == f"row_id {self.ODD.row_id}"

    def test_the_weights_before_that_step_are_kept_and_named(self, failed: tuple[Path, UsageError]) -> None:
        folder, error = failed
        kept = folder / "work" / "checkpoints" / "step-2"
        assert error.todo.endswith(f"{kept} is kept")
        for name, tensor in load_file(kept / "trained.safetensors").items():
            expected = name != "model.embed_tokens.weight"
            assert bool(tensor.isfinite().all()) is expected, "only the token that was infinite from the beginning"

    def test_two_processes_end_with_the_same_words(self, tmp_path: Path, failed: tuple[Path, UsageError]) -> None:
        """One has the row and the other has not: neither waits for the other."""
        base, dataset = self.prepare(tmp_path)
        student, policy = StudentModel(model=str(base)), PolicyConfig.model_validate(POLICY)
        config = small_config(processes=2, epochs=3, micro_batch_size=2, checkpoint={"steps": 1})
        ctx = make_context(tmp_path)
        (tmp_path / "out").mkdir()
        cfg = TrainStep(train=config, student=student, policy=policy)
        with pytest.raises(UsageError) as error:
            train.run(cfg, {"dataset": dataset}, tmp_path / "out", ctx)
        _, alone = failed
        assert (error.value.what, error.value.where) == (alone.what, alone.where)
        assert error.value.todo.endswith("step-2 is kept")

    def test_there_is_no_model(self, failed: tuple[Path, UsageError]) -> None:
        folder, _ = failed
        assert not (folder / "out" / "model").exists()


CHECKED = ("PF13", "PF15", "PF18")
"""Checks before the first step that would refuse these models."""


def test_a_broken_model_fails_for_all_rows_and_names_five(tmp_path: Path, dataset: Path) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf

    with pytest.raises(UsageError, match="not finite for 8 of the 8 rows of step 1") as error:
        train_here(tmp_path, untied(tmp_path / "base", spoil), dataset, packing=True, accept_findings=CHECKED)
    assert error.value.where.count(",") == 4
    assert error.value.where.endswith(" and 3 more")
    assert error.value.todo.endswith("no checkpoint was written yet")


def test_a_gradient_that_is_not_finite_names_the_rows_of_its_step(tmp_path: Path, dataset: Path) -> None:
    def spoil(model: Any) -> None:
        model.model.norm.weight *= 1e-30
        model.lm_head.weight *= 1e30

    with pytest.raises(UsageError, match=r"gradient of step 1 is not finite \(norm inf\), though each row's") as error:
        train_here(tmp_path, untied(tmp_path / "base", spoil), dataset, micro_batch_size=4, accept_findings=CHECKED)
    assert error.value.where.endswith(" and 3 more")
