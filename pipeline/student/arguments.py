"""Every argument of TRL's `SFTConfig` that can shape a result, with an explicit value: no library default decides.

A test compares the names with those of the installed TRL, so that a new one cannot slip in unseen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.config_train import TrainConfig
from pipeline.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the steps are laid out.

    Attributes:
        steps: optimizer steps.
        warmup_steps: of these, with a rising learning rate.
        micro_batch_size: rows per process and forward pass.
        accumulation: forward passes per optimizer step and process.
    """

    steps: int
    warmup_steps: int
    micro_batch_size: int
    accumulation: int


def schedule(cfg: TrainConfig, *, steps: int, world_size: int) -> Schedule:
    """Divide a batch among processes and forward passes.

    Raises:
        UsageError: `batch_size` is not a multiple of the number of processes.
    """
    if cfg.batch_size % world_size != 0:
        what = f"batch_size {cfg.batch_size} cannot be shared by {world_size} processes"
        todo = "choose a multiple of their number, or another number of them"
        raise UsageError(what, where="train.batch_size", todo=todo)
    share = cfg.batch_size // world_size
    rows = max(part for part in range(1, min(share, cfg.micro_batch_size) + 1) if share % part == 0)
    return Schedule(steps, round(cfg.warmup_share * steps), rows, share // rows)


def sft_arguments(cfg: TrainConfig, plan: Schedule, *, scratch: Path, use_cpu: bool) -> dict[str, Any]:
    """Arguments for `SFTConfig`.

    The rows come encoded, ordered and cut to whole batches (tokenise.py, order.py): hence one epoch, a sequential
    sampler, and none of TRL's own preparation. FSDP comes from Accelerate's environment.

    Args:
        scratch: the trainer's output folder; nothing is kept there.
    """
    return {
        "output_dir": str(scratch),
        **_optimisation(cfg, plan),
        **_numerics(cfg, use_cpu=use_cpu),
        **_rows(cfg),
        **_TRL,
        **_SURROUNDINGS,
    }


def _optimisation(cfg: TrainConfig, plan: Schedule) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "average_tokens_across_devices": True,
        "num_train_epochs": 1.0,
        "max_steps": plan.steps,
        "learning_rate": cfg.learning_rate,
        "lr_scheduler_type": cfg.schedule,
        "lr_scheduler_kwargs": None,
        "warmup_steps": plan.warmup_steps,
        "optim": "adamw_torch",
        "optim_args": None,
        "optim_target_modules": None,
        "weight_decay": cfg.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": cfg.adam_beta2,
        "adam_epsilon": 1e-8,
        "max_grad_norm": cfg.max_grad_norm,
        "label_smoothing_factor": 0.0,
        "neftune_noise_alpha": None,
        "auto_find_batch_size": False,
    }


def _numerics(cfg: TrainConfig, *, use_cpu: bool) -> dict[str, Any]:
    checkpointing = {"use_reentrant": False} if cfg.gradient_checkpointing else None
    return {
        "use_cpu": use_cpu,
        "bf16": cfg.precision == "bfloat16",
        "fp16": False,
        "bf16_full_eval": False,
        "fp16_full_eval": False,
        "tf32": None if use_cpu else False,
        "gradient_checkpointing": cfg.gradient_checkpointing,
        "gradient_checkpointing_kwargs": checkpointing,
        "activation_offloading": False,
        "torch_compile": False,
        "torch_compile_backend": None,
        "torch_compile_mode": None,
        "use_liger_kernel": False,
        "liger_kernel_config": None,
        "use_cache": False,
        "full_determinism": False,
    }


def _rows(cfg: TrainConfig) -> dict[str, Any]:
    accelerator = {
        "split_batches": False,
        "dispatch_batches": False,
        "even_batches": True,
        "use_seedable_sampler": False,
        "non_blocking": False,
        "gradient_accumulation_kwargs": None,
        "use_configured_state": False,
    }
    return {
        "seed": cfg.seed,
        "data_seed": cfg.seed,
        "train_sampling_strategy": "sequential",
        "length_column_name": "length",
        "accelerator_config": accelerator,
        "parallelism_config": None,
        "dataloader_drop_last": False,
        "dataloader_num_workers": 0,
        "dataloader_in_order": True,
        "remove_unused_columns": True,
        "label_names": ["labels"],
        "per_device_eval_batch_size": cfg.micro_batch_size,
        "prediction_loss_only": True,
    }


_TRL: dict[str, Any] = {
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": 0.0,  # no sum over tokens: micro-batches and processes would shape the result
    "chat_template_path": None,
    "dataset_text_field": "text",
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "eos_token": None,
    "max_length": None,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
    "packing": False,
    "packing_strategy": "bfd",
    "padding_free": False,
    "pad_to_multiple_of": None,
    "eval_packing": False,
    "completion_only_loss": True,
    "assistant_only_loss": False,
    "loss_type": "nll",
}

_SURROUNDINGS: dict[str, Any] = {
    "eval_strategy": "no",  # trainer.measure_loss does it
    "save_strategy": "no",  # saver.Saver asks for it
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "ignore_data_skip": False,
    "logging_strategy": "steps",
    "logging_steps": 1,  # curve.Curve averages over `log_steps`
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,
}
