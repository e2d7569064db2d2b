"""What only a GPU can run: bfloat16, QLoRA, Liger, FlashAttention, FSDP2. Not run on a GPU yet."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.core.config import TrainStep
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_train import StudentModel
from pipeline.core.record import Message
from pipeline.stages import train
from tests.support import POLICY, make_context
from tests.tiny_models import make_tiny_model
from tests.training_rows import ROOT, small_config, sum_row, write_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
STEPS = 24
ACCELERATE = ROOT / "configs" / "accelerate"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [sum_row(number, completion=(Message("assistant", "Monday"),)) for number in range(48)]
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", rows)


def trained(folder: Path, base: Path, dataset: Path, **changes: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of the steps, and metrics, of a training as the stage runs it."""
    settings = {"epochs": 4, "learning_rate": 5e-3, "accelerate": ACCELERATE / "single.yaml", **changes}
    cfg = TrainStep(
        train=small_config(**settings),
        student=StudentModel(model=str(base)),
        policy=PolicyConfig.model_validate(POLICY),
    )
    (folder / "out").mkdir(parents=True)
    result = train.run(cfg, {"dataset": dataset}, folder / "out", make_context(folder))
    points = json.loads((folder / "out" / "loss.json").read_text())
    return [point["loss"] for point in points if "loss" in point], {**result.metrics}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Path, dataset: Path) -> list[float]:
    """In float32 on one GPU."""
    losses, metrics = trained(tmp_path_factory.mktemp("plain"), base, dataset)
    assert len(losses) == STEPS and metrics["memory"]["device"] == "cuda"
    return losses


def test_a_gpu_trains_like_a_cpu(tmp_path: Path, base: Path, dataset: Path, plain: list[float]) -> None:
    on_cpu, _ = trained(tmp_path, base, dataset, accelerate=ACCELERATE / "cpu.yaml")
    assert plain[:4] == pytest.approx(on_cpu[:4], rel=1e-3)


def test_bfloat16_stays_near_float32(tmp_path: Path, base: Path, dataset: Path, plain: list[float]) -> None:
    losses, _ = trained(tmp_path, base, dataset, precision="bfloat16")
    assert losses[:4] == pytest.approx(plain[:4], rel=2e-2)
    assert losses[-1] < plain[0] / 4


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs the extra liger")
def test_ligers_kernels_compute_the_same(tmp_path: Path, base: Path, dataset: Path, plain: list[float]) -> None:
    losses, _ = trained(tmp_path, base, dataset, liger=True)
    assert losses[:4] == pytest.approx(plain[:4], rel=1e-3)


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs the package flash-attn")
@pytest.mark.parametrize("packing", [False, True])
def test_flash_attention_computes_the_same(tmp_path: Path, base: Path, dataset: Path, packing: bool) -> None:
    settings = {"precision": "bfloat16", "packing": packing}
    fused, _ = trained(tmp_path / "flash", base, dataset, attention="flash_attention_2", **settings)
    plain, _ = trained(tmp_path / "sdpa", base, dataset, attention="sdpa", **settings)
    assert fused[:4] == pytest.approx(plain[:4], rel=2e-2)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
def test_qlora_learns(tmp_path: Path, base: Path, dataset: Path) -> None:
    tuning = {"kind": "qlora", "r": 8, "modules_to_save": ["embed_tokens"]}
    losses, metrics = trained(tmp_path, base, dataset, tuning=tuning, precision="bfloat16", learning_rate=1e-2)
    assert losses[-1] < losses[0] / 2
    assert metrics["trainable_parameters"] < metrics["parameters"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_gpus_train_like_one(tmp_path: Path, base: Path, dataset: Path, plain: list[float], kind: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    losses, metrics = trained(tmp_path, base, dataset, accelerate=ACCELERATE / f"{kind}.yaml", processes=2)
    assert metrics["world_size"] == 2
    assert losses[:4] == pytest.approx(plain[:4], rel=1e-3)


def test_one_gpu_is_fsdp_too(tmp_path: Path, base: Path, dataset: Path, plain: list[float]) -> None:
    config = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump({**config, "num_processes": 1}))
    losses, _ = trained(tmp_path, base, dataset, accelerate=tmp_path / "fsdp2.yaml")
    assert losses[:4] == pytest.approx(plain[:4], rel=1e-3)


@pytest.mark.parametrize("words", [4, 40])
def test_the_highest_memory_is_near_the_estimate(tmp_path: Path, words: int) -> None:
    """A model of 100 million parameters, so that the libraries' own part does not decide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.student.jobs import TrainJob
    from pipeline.student.memory import estimate
    from tests.training_rows import train_here

    folder = make_tiny_model(tmp_path / "model")
    config = LlamaConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 2816, 8
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 16, 16, 64
    LlamaForCausalLM(config).save_pretrained(folder)
    rows = [sum_row(number, completion=(Message("assistant", "word " * words),)) for number in range(24)]
    torch.cuda.reset_peak_memory_stats()
    job, found = train_here(tmp_path, folder, write_dataset(tmp_path / "dataset", rows), max_steps=2, max_length=512)
    assert isinstance(job, TrainJob)
    needed = estimate(job, longest=found["metrics"]["checks"]["longest"], device=torch.device("cuda"))
    assert 1 / 1.5 < needed.model / torch.cuda.max_memory_allocated() < 1.5
