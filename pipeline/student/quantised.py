"""A base whose frozen linear layers are held in 4 bits, through bitsandbytes (QLoRA: Dettmers et al. 2023)."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from pipeline.core.config_train import QloraTuning
from pipeline.core.errors import UsageError
from pipeline.student.needed import BITSANDBYTES


def require_quantisable(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse 4-bit weights where they cannot be had.

    Raises:
        UsageError: bitsandbytes is not installed, or Accelerate shares the model among processes (FSDP): a checkpoint
            and the merged model are then gathered from shards, which nobody has tried with packed 4-bit weights.
    """
    BITSANDBYTES.require()
    if environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes"):
        todo = "launch it without FSDP (every process holds the 4-bit model), or set train.tuning.kind: lora"
        raise UsageError("QLoRA is not supported under FSDP", where="train.accelerate", todo=todo)


def four_bits(tuning: QloraTuning, compute: torch.dtype) -> BitsAndBytesConfig:
    """How the linear layers are held; embeddings, norms and the output layer stay as they are.

    Args:
        compute: number format in which they are multiplied, once unpacked.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=tuning.quant_type,
        bnb_4bit_use_double_quant=tuning.double_quant,
        bnb_4bit_compute_dtype=compute,
    )


def keep_unpacked(model: Any) -> None:
    """Hinder bitsandbytes from packing the weights for inference when the model is measured on a CPU with AVX512-BF16.

    It never unpacks them for the training that follows, which then runs in bfloat16 through a kernel that has no
    gradient, with a warning at most (bitsandbytes 0.50, nn/modules.py, `Linear4bit.forward`).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def kept_as_they_are(model: Any) -> Iterator[None]:
    """Restore the values of what is trained at the end: TRL's trainer rounds them to bfloat16 if the base is quantised
    (trl/trainer/sft_trainer.py), where small updates would be lost."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in kept:
        parameter.data = data.to(parameter.device)
