"""The trained student as a plain model folder: adapters merged, in the base's number format, with its tokenizer."""

from pathlib import Path
from typing import Any, Final

import torch
from transformers.utils import cached_file

from pipeline.core.config_train import AdapterTuning, QloraTuning
from pipeline.student.adapters import merged, with_adapters, write_adapter
from pipeline.student.initial import Student, load_base, stored_dtype
from pipeline.student.jobs import TrainJob
from pipeline.student.saver import trained_tensors, writing
from pipeline.student.sft import CheckpointedTrainer
from pipeline.student.shards import Tokens
from pipeline.student.tokenise import load_tokenizer
from pipeline.student.weights import number_formats

FORMATS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names."""


def save(
    trainer: CheckpointedTrainer, job: TrainJob, tokens: Tokens, student: Student, stored: tuple[Any, Any]
) -> None:
    """Write `out/model`: adapters merged, in the number format the base is stored in, with tokenizer and template.

    What the base stores otherwise (the router's bias of some mixtures of experts, in float32) is stored so again.

    Adapters are written beside it as they are, to `out/adapter` in PEFT's form. Called in all processes, since a
    sharded model is gathered by all; the first one writes.

    Args:
        stored: config and generation config of the base.

    Raises:
        Incomplete: it cannot be written.
    """
    model = _whole(trainer, job, student)
    if not trainer.accelerator.is_main_process:
        return
    config, generation = stored
    dtype = stored_dtype(config)
    apart = {name: each for name, each in _stored_formats(job).items() if each != dtype}
    tuning = job.train.tuning
    if isinstance(tuning, AdapterTuning):
        with writing("the adapter", job.out / "adapter"):
            write_adapter(model, job.student, job.out / "adapter")
        is_rounded = student.dtype not in (torch.float32, dtype) or (student.dtype != torch.float32 and bool(apart))
        if isinstance(tuning, QloraTuning) or is_rounded:
            model = _on_stored_weights(model, with_adapters(load_base(job), tuning, student.tokens))
        model = merged(model)
    folder = job.out / "model"
    model = _in_formats(model, dtype, apart)
    model.tie_weights()
    generation.eos_token_id = list(tokens.stops) if len(tokens.stops) > 1 else tokens.stops[0]
    if generation.pad_token_id is None:
        generation.pad_token_id = trainer.processing_class.pad_token_id
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    model.config, model.generation_config = config, generation
    tokenizer = load_tokenizer(job.student.model, job.student.revision)
    with writing("the model", folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _stored_formats(job: TrainJob) -> dict[str, torch.dtype]:
    """Name of each tensor of floating numbers in the base's files -> its number format."""
    config = cached_file(job.student.model, "config.json", revision=job.student.revision)
    found = {} if config is None else number_formats(Path(config).parent)
    return {name: FORMATS[each] for name, each in found.items() if each in FORMATS}


def _in_formats(model: Any, dtype: torch.dtype, apart: dict[str, torch.dtype]) -> Any:
    """The model in one number format but for the tensors that are `apart`, as transformers names them in both."""
    kept = {name: tensor.data for name, tensor in _tensors(model) if name in apart}
    model = model.to(dtype)
    for name, tensor in _tensors(model):
        if name in kept:
            tensor.data = kept[name].to(apart[name])
    return model


def _tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _whole(trainer: CheckpointedTrainer, job: TrainJob, student: Student) -> Any:
    """The trained model with all its weights; under FSDP gathered into a model of its own, in the first process."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model_wrapped)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return None
    model = load_base(job)
    if isinstance(job.train.tuning, AdapterTuning):
        model = with_adapters(model, job.train.tuning, student.tokens)
    model.load_state_dict(state)
    return model


def _on_stored_weights(model: Any, fresh: Any) -> Any:
    """`fresh`, the base's own weights, with what was trained over the same weights in fewer bits."""
    places = trained_tensors(fresh)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            places[name].copy_(tensor)
    return fresh
