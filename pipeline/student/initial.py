"""The student before its training: loaded from its folder or the hub, in the number format it is trained in."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from pipeline.core.config_train import AdapterTuning, FullTuning, QloraTuning, TrainConfig
from pipeline.core.errors import UsageError, boundary
from pipeline.student.adapters import with_adapters
from pipeline.student.jobs import TrainJob
from pipeline.student.loading import loading, require_safetensors
from pipeline.student.needed import FLASH_ATTENTION
from pipeline.student.quantised import four_bits, keep_unpacked, require_quantisable
from pipeline.student.tokenise import load_tokenizer
from pipeline.student.untrained import tokens_to_train

logger = logging.getLogger(__name__)

TODO = "give a model folder (or hub id and revision) that transformers loads as a causal language model"


@dataclass(frozen=True, slots=True)
class Student:
    """The model as it enters the training.

    Attributes:
        model: with adapters, where those are trained.
        tokens: ids whose embeddings are trained beside the adapters, ascending.
        token_texts: their texts.
        parameters: of the base; tied ones count once.
        trainable: parameters that are trained.
        dtype: number format of the weights that are not in 4 bits.
    """

    model: Any
    tokens: tuple[int, ...]
    token_texts: tuple[str, ...]
    parameters: int
    trainable: int
    dtype: torch.dtype


def load_student(job: TrainJob, stops: tuple[int, ...], device: torch.device) -> Student:
    """The model that is trained. The adapters' initial values come from torch's random state.

    Args:
        stops: see `tokenise.stop_ids`.
        device: of this process.

    Raises:
        UsageError: the model cannot be loaded or trained as configured.
    """
    train, config = job.train, load_config(job)
    dtype = held_dtype(train, config)
    _require_loadable(job, config)
    require_attention(train, config, device)
    model = _load(job, dtype, device)
    repair_generation(model.generation_config, job.student.model)
    parameters, _ = count_parameters(model)
    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    if isinstance(train.tuning, AdapterTuning):
        tokenizer = load_tokenizer(job.student.model, job.student.revision)
        tokens = _of_first_process(partial(tokens_to_train, model, tokenizer, stops, train.tuning))
        texts = tuple(map(str, tokenizer.convert_ids_to_tokens(list(tokens))))
        model = with_adapters(model, train.tuning, tokens)
    elif dtype != torch.float32:
        logger.warning("the weights are trained in %s: updates below a 256th of a weight are lost", dtype)
    _, trainable = count_parameters(model)
    return Student(model, tokens, texts, parameters, trainable, dtype)


def _load(job: TrainJob, dtype: torch.dtype, device: torch.device) -> Any:
    placed: dict[str, Any] = {"device_map": None}
    if isinstance(job.train.tuning, QloraTuning):
        require_quantisable()
        quantisation = four_bits(job.train.tuning, getattr(torch, job.train.precision))
        placed = {"device_map": {"": device}, "quantization_config": quantisation}
    with loading("the student cannot be loaded", model=job.student.model, todo=TODO):
        model = AutoModelForCausalLM.from_pretrained(
            job.student.model,
            revision=job.student.revision,
            dtype=dtype,
            attn_implementation=job.train.attention,
            trust_remote_code=False,
            use_safetensors=True,
            **placed,
        )
    keep_unpacked(model)
    return model


def _of_first_process(decide: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """What the first process decides, in all of them: under FSDP the others may hold empty weights in place of the
    model's until they get their shards (`fsdp_cpu_ram_efficient_loading`)."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return decide()
    said = [decide() if torch.distributed.get_rank() == 0 else ()]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


def repair_generation(generation: Any, model: str) -> None:
    """Make a generation config one that can be saved: some publishers set temperature or top_p and leave `do_sample`
    out, which transformers loads and refuses to save. What they meant is sampling, so that is switched on.

    Raises:
        UsageError: it cannot be saved for another reason.
    """
    todo = "correct the base's generation_config.json"
    with boundary(UsageError, "the student's generation config is not valid", where=model, todo=todo):
        try:
            generation.validate(strict=True)
        except ValueError:
            if generation.do_sample:
                raise
            generation.do_sample = True
            generation.validate(strict=True)
            logger.info("do_sample is set in the generation config: the base's sets values for sampling alone")


def load_base(job: TrainJob) -> Any:
    """The base model in float32 on the CPU, whatever it is stored in: adapters are merged into it, and rounded once.

    Raises:
        UsageError: it cannot be loaded.
    """
    _require_loadable(job, load_config(job))
    with loading("the student cannot be loaded", model=job.student.model, todo=TODO):
        return AutoModelForCausalLM.from_pretrained(
            job.student.model,
            revision=job.student.revision,
            dtype=torch.float32,
            device_map=None,
            trust_remote_code=False,
            use_safetensors=True,
        )


def load_config(job: TrainJob) -> Any:
    """The base's config as it is stored.

    Raises:
        UsageError: it cannot be loaded.
    """
    with loading("the student's config cannot be loaded", model=job.student.model, todo=TODO):
        return AutoConfig.from_pretrained(job.student.model, revision=job.student.revision, trust_remote_code=False)


def _require_loadable(job: TrainJob, config: Any) -> None:
    require_safetensors(job.student.model)
    if getattr(config, "quantization_config", None) is not None:
        what = "the student's weights are stored quantised, so no trained weights can be merged into them"
        todo = "take the model they were made from; tuning.kind: qlora holds it in 4 bits while it is trained"
        raise UsageError(what, where=job.student.model, todo=todo)


# ---------------------------------------------------------------------------------------------------- number formats


def stored_dtype(config: Any) -> torch.dtype:
    """The number format of a checkpoint; float32 where its config says nothing."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def held_dtype(train: TrainConfig, config: Any) -> torch.dtype:
    """The number format in which the base's weights are held while it is trained, see `TrainConfig.weights`.

    Adapters, and whatever else is trained beside them, are always float32. Frozen weights that are stored in float16
    are held in float32: under bfloat16 autocast, sums of float16 embeddings and activations may overflow.

    Raises:
        UsageError: float32 arithmetic was asked for over bfloat16 weights.
    """
    if train.weights == "bfloat16" and train.precision == "float32":
        todo = "set train.precision: bfloat16, or train.weights: float32"
        raise UsageError("bfloat16 weights cannot be trained in float32", where="train.weights", todo=todo)
    if train.weights != "auto":
        dtype: torch.dtype = getattr(torch, train.weights)
        return dtype
    frozen = not isinstance(train.tuning, FullTuning) and train.precision == "bfloat16"
    return torch.bfloat16 if frozen and stored_dtype(config) == torch.bfloat16 else torch.float32


def require_attention(train: TrainConfig, config: Any, device: torch.device) -> None:
    """Refuse an attention that cannot run here, or that computes something else than the model.

    Raises:
        UsageError: FlashAttention without its package, without a GPU or in float32; or `sdpa` for a model that caps
            its attention's logits, which PyTorch's `scaled_dot_product_attention` leaves out without a word.
    """
    where = f"train.attention: {train.attention}"
    if train.attention == "flash_attention_2":
        if device.type != "cuda":
            raise UsageError("flash_attention_2 needs a GPU", where=where, todo="set train.attention: sdpa")
        if not is_flash_attn_2_available():
            raise FLASH_ATTENTION.error()
        if train.precision == "float32":
            todo = "set train.precision: bfloat16, or train.attention: sdpa"
            raise UsageError("flash_attention_2 does not compute in float32", where=where, todo=todo)
    if train.attention == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        what = "this model caps its attention's logits (attn_logit_softcapping), which sdpa leaves out"
        raise UsageError(what, where=where, todo="set train.attention: eager, or flash_attention_2 on a GPU")


# --------------------------------------------------------------------------------------------------------- parameters


def count_parameters(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters; tied ones count once, and 4-bit ones as the numbers that they stand for."""
    sizes = [(_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def _numel(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())
