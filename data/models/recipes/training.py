"""What the two recipes share: the model, its optimizers, its schedule and how it is saved."""

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100


def new_model(
    tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, inner: int, heads: int
) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings, for the tokenizer's vocabulary and length."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms, on one schedule.

    The learning rates warm up, stay level, and fall linearly to zero over the last `decay` of the steps.
    """

    def __init__(
        self, model: LlamaForCausalLM, *, steps: int, muon_lr: float, adam_lr: float, decay: float, warmup: int = 30
    ) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self._parts = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

        def share(step: int) -> float:
            return min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps))

        self._schedules = [torch.optim.lr_scheduler.LambdaLR(part, share) for part in self._parts]

    def step(self) -> None:
        """Take one step and forget the gradients."""
        for part in self._parts:
            part.step()
            part.zero_grad(set_to_none=True)
        for schedule in self._schedules:
            schedule.step()


def pad_batch(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of rows (tokens, length of the unlabelled start), filled up on the right.

    No attention mask is needed: with causal attention nothing looks at the filling, and it carries no label.
    """
    width = max(len(tokens) for tokens, _ in rows)
    inputs = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    for index, (tokens, start) in enumerate(rows):
        inputs[index, : len(tokens)] = torch.tensor(tokens)
        labels[index, start : len(tokens)] = inputs[index, start : len(tokens)]
    return inputs, labels


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, *, max_new_tokens: int) -> None:
    """Write weights in bfloat16, tokenizer and generation settings; the model in memory stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
