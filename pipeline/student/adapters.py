"""Adapters on the student: LoRA and its relatives, through PEFT."""

from typing import Any

from peft import LoraConfig, get_peft_model

from pipeline.core.config_train import LoraTuning
from pipeline.core.errors import UsageError, boundary


def with_adapters(model: Any, tuning: LoraTuning) -> Any:
    """The model with LoRA adapters.

    Raises:
        UsageError: the config names modules that the model has not, or that cannot be adapted.
    """
    if isinstance(tuning.target_modules, str):
        targets: str | list[str] = tuning.target_modules
    else:
        targets = list(tuning.target_modules)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.r,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        modules_to_save=list(tuning.modules_to_save) or None,
        ensure_weight_tying=tied and bool(tuning.modules_to_save),
        bias="none",
        init_lora_weights=True,
        use_rslora=False,
        use_dora=False,
    )
    todo = 'name linear modules of the model in train.tuning.target_modules, or "all-linear"'
    with boundary(UsageError, "no adapters for these modules", where="train.tuning", todo=todo):
        adapted = get_peft_model(model, config)
    if hasattr(adapted.get_output_embeddings(), "lora_A"):
        raise lm_head_error()
    return adapted


def lm_head_error() -> UsageError:
    """The error for adapters on the output layer."""
    what = "lm_head cannot have an adapter: the loss reads its weight directly, so the adapter would never be trained"
    return UsageError(what, where="train.tuning.target_modules", todo="leave it out, or name it in modules_to_save")
