"""Models of random weights of several architectures, with the tokenizer of `tiny_models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_models import make_tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
KINDS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}


def make_tiny_like(folder: Path, kind: str, *, tied: bool = True, dtype: str = "float32") -> Path:
    """Write a model folder of one of `KINDS`: 300 tokens, 2 layers of width 64, grouped attention.

    The initial spread is that of a trained model rather than of a fresh one, so that errors show in the logits.
    """
    import torch
    import transformers

    make_tiny_model(folder)
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    ids = {name: stored[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = getattr(transformers, f"{KINDS[kind]}Config")(
        **SIZES, **ids, tie_word_embeddings=tied, initializer_range=0.1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{KINDS[kind]}ForCausalLM")(config)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    model.generation_config = generation
    (folder / "model.safetensors").unlink()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def change_rows(folder: Path, rows: dict[int, int | None]) -> Path:
    """Make rows of the embeddings (and of an untied output layer) untrained: zeros, or the copy of another row."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        for row, source in rows.items():
            tensors[name][row] = torch.zeros(64) if source is None else tensors[name][source]
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
