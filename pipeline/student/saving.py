"""The trained student as a plain model folder: adapters merged, in the base's number format, with its tokenizer."""

from typing import Any

import torch

from pipeline.core.config_train import LoraTuning
from pipeline.student.adapters import with_adapters
from pipeline.student.initial import load_base
from pipeline.student.jobs import TrainJob
from pipeline.student.saver import writing
from pipeline.student.sft import CheckpointedTrainer
from pipeline.student.shards import Tokens
from pipeline.student.tokenise import load_tokenizer


def save(trainer: CheckpointedTrainer, job: TrainJob, tokens: Tokens, stored: tuple[Any, Any]) -> None:
    """Write `out/model`: adapters merged, in the number format the base is stored in, with tokenizer and template.

    Called in all processes, since a sharded model is gathered by all; the first one writes.

    Args:
        stored: config and generation config of the base.

    Raises:
        Incomplete: it cannot be written.
    """
    model = _whole(trainer, job)
    if not trainer.accelerator.is_main_process:
        return
    if isinstance(job.train.tuning, LoraTuning):
        model = model.merge_and_unload()
    config, generation = stored
    folder = job.out / "model"
    dtype = stored_dtype(config)
    model = model.to(dtype)
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


def stored_dtype(config: Any) -> torch.dtype:
    """The number format of a checkpoint; float32 where its config says nothing."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _whole(trainer: CheckpointedTrainer, job: TrainJob) -> Any:
    """The trained model with all its weights; under FSDP gathered into a model of its own, in the first process."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model_wrapped)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return None
    model = load_base(job)
    if isinstance(job.train.tuning, LoraTuning):
        model = with_adapters(model, job.train.tuning)
    model.load_state_dict(state)
    return model
