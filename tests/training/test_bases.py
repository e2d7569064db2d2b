"""Bases as they are published: what their folders say apart from the weights' usual form survives a training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.config_train import StudentModel
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.record import Message
from pipeline.student.initial import load_student
from pipeline.student.jobs import TrainJob
from pipeline.student.saver import writing
from pipeline.student.worker import JOB, main
from tests.tiny_models import make_tiny_model
from tests.training_rows import small_config, sum_row, train_here, write_dataset

LORA: dict[str, Any] = {"kind": "lora", "r": 4, "alpha": 8}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of many lengths."""
    rows = [sum_row(n, completion=(Message("assistant", str(n + 1) * (1 + n % 9)),)) for n in range(40)]
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", rows)


def with_generation(folder: Path, **settings: Any) -> Path:
    path = make_tiny_model(folder) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


class TestAGenerationConfig:
    def test_that_means_sampling_and_does_not_say_so_is_completed(self, tmp_path: Path, dataset: Path) -> None:
        """Published so: transformers loads it and saves no such config."""
        base = with_generation(tmp_path / "base", temperature=0.6, top_p=0.9)
        job, _ = train_here(tmp_path, base, dataset, max_steps=1)
        saved = json.loads((job.out / "model" / "generation_config.json").read_text())
        assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)

    def test_that_cannot_be_saved_is_refused_before_the_first_step(self, tmp_path: Path, dataset: Path) -> None:
        base = with_generation(tmp_path / "base", length_penalty=0.5)
        with pytest.raises(UsageError, match=r"(?s)generation config is not valid.*length_penalty"):
            train_here(tmp_path, base, dataset, max_steps=1)

    def test_that_cannot_be_saved_is_not_called_a_full_disk(self, tmp_path: Path) -> None:
        with pytest.raises(Incomplete, match="flag is wrong") as failed, writing("the model", tmp_path / "model"):
            raise ValueError("flag is wrong")
        assert "room" not in failed.value.todo


def router_biases(folder: Path) -> dict[str, Any]:
    return {name: each for name, each in load_file(folder / "model.safetensors").items() if "e_score" in name}


@pytest.mark.parametrize("tuning", [{"kind": "full"}, LORA], ids=lambda tuning: tuning["kind"])
def test_tensors_that_the_base_stores_in_float32_are_not_rounded(
    tmp_path: Path, dataset: Path, tuning: dict[str, Any]
) -> None:
    """The router's bias of GLM-4-MoE differs between experts by less than a step of bfloat16."""
    from transformers import AutoConfig, Glm4MoeConfig, Glm4MoeForCausalLM

    base = make_tiny_model(tmp_path / "base")
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16}
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    model = Glm4MoeForCausalLM(
        Glm4MoeConfig(vocab_size=vocabulary, tie_word_embeddings=False, **SIZES, **experts, **groups)
    ).to(torch.bfloat16)
    (gate,) = (module for module in model.modules() if hasattr(module, "e_score_correction_bias"))
    gate.e_score_correction_bias = torch.tensor([7.0001, 7.0002, 7.0003, 7.0004])
    model.save_pretrained(base)
    changes = {"precision": "bfloat16"} if tuning == LORA else {}
    job, _ = train_here(tmp_path, base, dataset, max_steps=1, tuning=tuning, **changes)
    before, after = router_biases(base), router_biases(job.out / "model")
    assert len(before) == 1 and before.keys() == after.keys()
    for name, bias in before.items():
        assert bias.dtype == after[name].dtype == torch.float32
        assert bias.equal(after[name])
    formats = {each.dtype for name, each in load_file(job.out / "model" / "model.safetensors").items()}
    assert formats == {torch.float32, torch.bfloat16}


def test_a_mixture_of_experts_is_the_same_training_however_its_batches_are_computed(
    tmp_path: Path, dataset: Path
) -> None:
    """Its base asks for load balancing, whose loss is no sum over tokens."""
    from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

    base = make_tiny_model(tmp_path / "base")
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    config = MixtralConfig(vocab_size=vocabulary, router_aux_loss_coef=0.5, **SIZES, **experts)
    MixtralForCausalLM(config).save_pretrained(base)
    found = []
    ways: dict[str, dict[str, Any]] = {
        "8x1": {"micro_batch_size": 8},
        "1x8": {"micro_batch_size": 1},
        "packed": {"packing": True},
    }
    for name, way in ways.items():
        job, _ = train_here(tmp_path / name, base, dataset, max_steps=3, group_by_length=False, **way)
        points = [one for one in json.loads((job.out / "loss.json").read_text()) if "loss" in one]
        found.append([value for point in points for value in (point["loss"], point["grad_norm"])])
        saved = json.loads((job.out / "model" / "config.json").read_text())
        assert (saved["output_router_logits"], saved["router_aux_loss_coef"]) == (True, 0.5)
    assert len(found[0]) == 6
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


# ------------------------------------------------------------------------------------------------- several processes


def load_as(rank: int, base: str, store: str) -> None:
    """One of two processes of one machine that share a model (FSDP): the second one loads empty weights."""
    import os

    sharing = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **sharing})
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    folder = Path(base)
    job = TrainJob(small_config(tuning=LORA), StudentModel(model=base), folder, folder, folder, 2, "x")
    student = load_student(job, (2,), torch.device("cpu"))
    weights = student.model.get_input_embeddings().state_dict().values()
    told = {"tokens": list(student.tokens), "empty": all(not each.any() for each in weights if each.dim() == 2)}
    (folder / f"found-{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def test_processes_that_hold_empty_weights_train_the_tokens_that_the_first_one_chose(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[4] = 0.0
    model.save_pretrained(base)
    torch.multiprocessing.spawn(load_as, (str(base), str(tmp_path / "store")), nprocs=2)
    first, second = (json.loads((base / f"found-{rank}.json").read_text()) for rank in range(2))
    assert (first["empty"], second["empty"]) == (False, True), "else this test says nothing"
    assert first["tokens"] == second["tokens"] == [4]


def test_a_launched_worker_does_not_take_what_an_earlier_start_left(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start of the stage gives its processes a name of its own; the launcher's may come again."""
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    model = make_tiny_model(tmp_path / "base")
    job = TrainJob(
        small_config(max_steps=1),
        StudentModel(model=str(model)),
        dataset / "data",
        tmp_path / "out",
        tmp_path / "work",
        1,
        "first",
    )
    names = []
    for start in ("first", "second"):
        replace(job, launch=start).write(tmp_path / "work" / JOB)
        main(tmp_path / "work" / JOB)
        names.append(json.loads((tmp_path / "work" / "tokens.json").read_text())["launch"])
    assert names[0].startswith("first:") and names[1].startswith("second:")
