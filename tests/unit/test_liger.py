"""Liger's kernels are refused, before the model is loaded, where they cannot be had."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from pipeline.core.errors import UsageError
from pipeline.student.liger import require_liger
from tests.tiny_models import make_tiny_model
from tests.training_rows import sum_row, train_here, write_dataset


def test_without_a_gpu_they_are_refused_and_nothing_is_trained(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without a GPU")
    model = make_tiny_model(tmp_path / "model")
    dataset = write_dataset(tmp_path / "dataset", [sum_row(number) for number in range(8)])
    with pytest.raises(UsageError, match="Liger's kernels need a GPU") as refused:
        train_here(tmp_path, model, dataset, liger=True)
    assert refused.value.where == "train.liger"


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="needs an environment without liger-kernel")
def test_without_the_package_the_error_says_how_to_install_it() -> None:
    with pytest.raises(UsageError, match="the package liger-kernel") as refused:
        require_liger(LlamaConfig(), torch.device("cuda"))
    assert "pip install liger-kernel" in refused.value.todo
