"""Liger's kernels in the layers of the student: norms, rotary embeddings and MLPs (Hsu et al. 2024, arXiv:2410.10989).

Not its fused cross entropy: it replaces the model's forward pass, which TRL's trainer patches with a fused output layer
of its own and therefore refuses the other (trl/trainer/sft_trainer.py). TRL's own switch for the kernels is deprecated,
so they are put into the loaded model here, as transformers would at the start of the training.
"""

from typing import Any, Final

import torch

from pipeline.core.errors import UsageError
from pipeline.student.needed import LIGER

WHERE: Final = "train.liger"
LAYERS_ONLY: Final = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def require_liger(config: Any, device: torch.device) -> None:
    """Refuse Liger's kernels where they cannot be had, before the model is loaded.

    Raises:
        UsageError: there is no GPU, the package is missing, or it has no kernels for this architecture.
    """
    if device.type == "cpu":
        raise UsageError("Liger's kernels need a GPU", where=WHERE, todo="set train.liger: false")
    LIGER.require()
    from liger_kernel.transformers.monkey_patch import (  # type: ignore[import-not-found, unused-ignore]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        what = f"Liger has no kernels for models of the type {config.model_type}"
        raise UsageError(what, where=WHERE, todo="set train.liger: false")


def use_liger(model: Any) -> None:
    """Put the kernels into a loaded model, with adapters or without."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {**LAYERS_ONLY})
