"""The student before its training: loaded from its folder or the hub, in the number format it is trained in."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.core.errors import UsageError, boundary
from pipeline.student.jobs import TrainJob


def load_base(job: TrainJob) -> Any:
    """The base model in float32, whatever it is stored in: small updates would be lost in bfloat16 weights."""
    todo = "give a model folder (or hub id and revision) that transformers loads as a causal language model"
    with boundary(UsageError, "the student cannot be loaded", where=job.student.model, todo=todo):
        return AutoModelForCausalLM.from_pretrained(
            job.student.model, revision=job.student.revision, dtype=torch.float32, device_map=None
        )


def load_config(job: TrainJob) -> Any:
    """The base's config as it is stored."""
    return AutoConfig.from_pretrained(job.student.model, revision=job.student.revision)


def count_parameters(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters; tied ones count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
