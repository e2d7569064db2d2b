"""The checks that run the student take no more memory than its training, and say so where there is not enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import UsageError
from pipeline.runner.preflight import one_device, sharding
from pipeline.student.losses import distillation_loss
from pipeline.student.memory import MemoryEstimate, device_memory, estimate
from pipeline.student.preflight.findings import NAMES, fine
from pipeline.student.preflight.model import (
    Loaded,
    check_model,
    check_scaling,
    knows_itself,
    loaded_of,
    loss_and_norm,
    run_checks,
)
from pipeline.student.preflight.trial import cut, few, undisturbed
from pipeline.student.preflight.worker import PreflightJob, look
from pipeline.student.shards import encode_shards
from pipeline.student.worker import run_job
from tests.tiny_models import make_tiny_model
from tests.training import broken_trainers as broken
from tests.training.preflight_cases import ROWS, UNSEEN, a_job, a_model, by_id, set_json

CPU = torch.device("cpu")


def a_mixture(folder: Path) -> Path:
    """A tiny Mixtral, whose training balances its experts."""
    from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

    make_tiny_model(folder)
    stored = json.loads((folder / "config.json").read_text())
    ids = {name: stored[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(
        **ids, **sizes, num_key_value_heads=1, num_local_experts=4, initializer_range=0.1, router_aux_loss_coef=0.02
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def a_vast_model(folder: Path) -> Path:
    """A folder without weights, of a model that needs three times this machine's memory."""
    available = device_memory(CPU)
    if available is None:
        pytest.skip("nobody says how much memory this machine has")
    a_model(folder)
    (folder / "model.safetensors").unlink()
    layers = 1 + 3 * available // (16 * 200 * 10**6)
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    set_json(folder / "config.json", **sizes, head_dim=128, num_hidden_layers=layers)
    return folder


def loaded(folder: Path, **train: Any) -> Loaded:
    job = a_job(folder, a_model(folder / "model"), ROWS, **train)
    return loaded_of(broken.a_trainer(job), job, encode_shards(job), estimate(job, longest=64, device=CPU))


class TestAMixtureOfExperts:
    def test_is_checked_and_trained(self, tmp_path: Path) -> None:
        job = a_job(tmp_path, a_mixture(tmp_path / "model"), ROWS, reasoning="inline", max_steps=1)
        run_job(job, lambda report: None)
        levels = {each["id"]: each["level"] for each in json.loads((job.out / "preflight.json").read_text())}
        assert [levels[id_] for id_ in ("PF13", "PF14", "PF15")] == ["ok"] * 3
        assert (job.out / "model" / "model.safetensors").is_file()

    def test_the_balance_of_its_experts_is_no_part_of_the_loss(self, tmp_path: Path) -> None:
        trainer = broken.a_trainer(a_job(tmp_path, a_mixture(tmp_path / "model"), ROWS, reasoning="inline"))
        with undisturbed(trainer):
            assert check_scaling(trainer, broken.some_rows(trainer)).level == "ok"


class TestTheForwardPasses:
    def test_none_is_larger_than_one_of_the_training(self, tmp_path: Path) -> None:
        it = loaded(tmp_path, micro_batch_size=1)
        tokens: list[int] = []
        it.trainer.model.register_forward_pre_hook(
            lambda model, args, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        found = by_id(check_model(it))
        assert [found[id_].level for id_ in ("PF13", "PF14", "PF15")] == ["ok"] * 3
        assert max(tokens) <= it.tokens.checks["longest"]

    def test_rows_are_tried_in_parts_of_different_lengths_that_are_trained(self) -> None:
        labels = [-100] * 700 + list(range(300))
        rows = [{"input_ids": list(range(1000)), "labels": labels, "row": at} for at in range(9)]
        parts = few(rows, micro_batch_size=1, longest=100)
        assert [len(part["input_ids"]) for part in parts] == [50, 38]
        assert all(part["labels"][1:].max() >= 0 and part["labels"][1:].min() < 0 for part in parts)
        assert [len(part["labels"]) for part in few(rows, micro_batch_size=64, longest=1000)] == [256, 224, 192, 160]

    @pytest.mark.parametrize("first", [1, 5, 98, 99])
    def test_a_cut_row_keeps_its_first_trained_token(self, first: int) -> None:
        row = {"input_ids": list(range(100)), "labels": [-100] * first + list(range(first, 100))}
        part = cut(row, 8)
        assert first in part["labels"][1:]
        assert all(label in (-100, id_) for id_, label in zip(part["input_ids"], part["labels"], strict=True))

    def test_layers_are_computed_again_where_the_training_does_and_nothing_drops(self, tmp_path: Path) -> None:
        model = a_model(tmp_path / "model")
        set_json(model / "config.json", attention_dropout=0.5)
        trainer = broken.a_trainer(a_job(tmp_path, model, ROWS, gradient_checkpointing=True))
        modes = [each.training for each in trainer.model.modules()]
        runs: list[int] = []
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *told: runs.append(1))
        rows = broken.some_rows(trainer)
        with undisturbed(trainer):
            first = loss_and_norm(trainer, [rows])
            assert len(runs) == 2, "once forwards, and once more for the backward pass"
            assert first == loss_and_norm(trainer, [rows])
            assert check_scaling(trainer, rows).level == "ok"
        assert not trainer.model.is_gradient_checkpointing
        assert modes == [each.training for each in trainer.model.modules()]


class TestMemory:
    def test_too_little_is_told_before_any_weight_is_loaded(self, tmp_path: Path) -> None:
        job = a_job(tmp_path, a_vast_model(tmp_path / "model"), ROWS)
        with pytest.raises(UsageError, match="of what the device has") as refused:
            run_job(job, lambda report: None)
        assert "PF22" in refused.value.where
        levels = {each["id"]: each["level"] for each in json.loads((job.workdir / "preflight.json").read_text())}
        assert (levels["PF22"], levels["PF13"], levels["PF01"]) == ("error", "not_applicable", "ok")

    def test_the_command_tells_it_without_loading_either(self, tmp_path: Path) -> None:
        found = by_id(look(PreflightJob(a_job(tmp_path, a_vast_model(tmp_path / "model"), ROWS), None, 0)).findings)
        assert found["PF22"].level == "error" and "PF22" in found["PF17"].message

    def test_where_too_little_was_accepted_the_student_is_not_run(self, tmp_path: Path) -> None:
        it = loaded(tmp_path)
        found = by_id(check_model(replace(it, memory=replace(it.memory, available=1))))
        assert all("PF22" in found[id_].message for id_ in ("PF13", "PF14", "PF15", "PF18"))
        assert found["PF12"].level == "ok"

    def test_running_out_of_it_in_a_check_is_a_finding(self) -> None:
        def runs_out() -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of this.")

        memory = MemoryEstimate("float32", *[1] * 8, "cuda", 1, 100)
        checks = [("PF13", lambda: fine("PF13", "1")), ("PF14", runs_out), ("PF15", lambda: fine("PF15", "1"))]
        found = by_id(run_checks(checks, memory))
        assert {id_: each.level for id_, each in found.items()} == {
            "PF13": "ok",
            "PF14": "not_applicable",
            "PF15": "not_applicable",
            "PF22": "error",
        }
        assert "ran out of memory in PF14: CUDA out of memory. Tried to allocate 2.00 GiB." in found["PF22"].message


class TestAModelThatProcessesShare:
    def test_one_that_is_too_large_for_one_device_is_estimated_and_not_loaded(self, tmp_path: Path) -> None:
        job = replace(a_job(tmp_path, a_vast_model(tmp_path / "model"), ROWS, batch_size=64), world_size=64)
        shared = {"ACCELERATE_USE_FSDP": "true", "LOCAL_WORLD_SIZE": "1"}
        found = by_id(look(PreflightJob(job, None, 0, shared)).findings)
        assert found["PF22"].level == "ok"
        assert all("too large for one device" in found[id_].message for id_ in ("PF05", "PF13", "PF17"))

    def test_one_that_fits_is_checked_whole(self, tmp_path: Path) -> None:
        job = replace(a_job(tmp_path, a_model(tmp_path / "model"), ROWS), world_size=2)
        found = by_id(look(PreflightJob(job, None, 0, {"ACCELERATE_USE_FSDP": "true"})).findings)
        assert [found[id_].level for id_ in ("PF13", "PF14", "PF22")] == ["ok"] * 3

    def test_accelerates_config_says_so(self) -> None:
        assert sharding({"distributed_type": "MULTI_GPU"}, 8) == {}
        told = sharding({"distributed_type": "FSDP", "num_machines": 2}, 8)
        assert told == {"ACCELERATE_USE_FSDP": "true", "LOCAL_WORLD_SIZE": "4"}

    def test_a_job_keeps_what_accelerate_would_set(self, tmp_path: Path) -> None:
        asked = PreflightJob(a_job(tmp_path, a_model(tmp_path / "model"), ROWS), None, 3, {"LOCAL_WORLD_SIZE": "4"})
        asked.write(tmp_path / "asked.json")
        assert PreflightJob.read(tmp_path / "asked.json").environ == {"LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("gpu_ids", "visible", "device"),
    [("all", None, "0"), (None, "2,3", "2"), ("all", "", ""), ("1, 2", "5,6,7", "1"), (3, None, "3")],
)
def test_the_process_of_the_checks_sees_one_gpu(gpu_ids: Any, visible: str | None, device: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert one_device({"gpu_ids": gpu_ids}, environ) == {"CUDA_VISIBLE_DEVICES": device}


def _nothing(student: torch.Tensor, *told: Any, **more: Any) -> torch.Tensor:
    return student.sum() * 0


def _hard(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, **more: Any) -> torch.Tensor:
    return distillation_loss(student, teacher, labels, temperature=1.0, alpha=0.0)


@pytest.mark.parametrize(("loss", "knows"), [(distillation_loss, True), (_nothing, False), (_hard, False)])
def test_a_distillation_loss_must_tell_neighbouring_distributions_apart(
    loss: Callable[..., torch.Tensor], knows: bool
) -> None:
    logits = torch.randn(1, 12, 50, generator=torch.Generator().manual_seed(0))
    counted = torch.arange(12)[None] > 3
    assert knows_itself(logits, counted, loss) is knows
    assert knows_itself(torch.ones_like(logits), counted, distillation_loss), "alike everywhere: nothing to tell apart"


def test_all_checks_are_still_told(tmp_path: Path) -> None:
    job = a_job(tmp_path, a_model(tmp_path / "model"), ROWS, UNSEEN)
    assert [each.id for each in look(PreflightJob(job, None, 0)).findings] == [*NAMES]
