"""Whether adapters can learn what the rows teach: each block has some, and no token that they need is frozen."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from pipeline.core.config_train import AdapterTuning, FullTuning
from pipeline.student.preflight.findings import Finding, fine, flawed, skipped
from pipeline.student.untrained import template_tokens, untrained_tokens

_BLOCK: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
"""A decoder layer's number in the name of a parameter."""
_ADAPTER: Final = "lora_"
"""In the name of every parameter that PEFT's LoRA adds."""


def check_adapters(model: Any, tokenizer: Any, stops: Sequence[int], tuning: FullTuning | AdapterTuning) -> Finding:
    """PF16: the base learnt the template's tokens, or they are trained; tied embeddings stay tied; and each block that
    has adapters trains some of them.

    Args:
        model: with its adapters.
    """
    if not isinstance(tuning, AdapterTuning):
        return skipped("PF16", "all weights are trained")
    trained, idle = adapter_blocks(model)
    blocks = f"{len(trained)} blocks of {len(trained) + len(idle)} train adapters"
    frozen = frozen_tokens(model, tokenizer, stops)
    figure = f"{blocks}, {len(frozen)} untrained frozen tokens"
    if idle or not trained:
        message = f"no adapter is trained in the blocks {', '.join(map(str, idle)) or 'of this model'}"
        return flawed("PF16", "error", figure, message, fix="see train.tuning.target_modules")
    if is_untied(model):
        message = "the model ties its embeddings to its output layer, and only one of them would be trained"
        fix = "leave lm_head out of train.tuning.modules_to_save, or name embed_tokens instead"
        return flawed("PF16", "error", figure, message, fix=fix)
    if frozen:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(frozen)))
        message = f"the chat template writes {names}, which the base never learnt, and whose embeddings are frozen"
        fix = 'set train.tuning.train_tokens: auto, or modules_to_save: ["embed_tokens"]'
        return flawed("PF16", "error", figure, message, fix=fix)
    return fine("PF16", figure)


def adapter_blocks(model: Any) -> tuple[list[int], list[int]]:
    """Numbers of the decoder layers with adapters that are trained, and of those with adapters that are all frozen."""
    trained: Counter[int] = Counter()
    for name, parameter in model.named_parameters():
        block = _BLOCK.search(name)
        if block is not None and _ADAPTER in name:
            trained[int(block[1])] += parameter.numel() if parameter.requires_grad else 0
    numbers = sorted(trained)
    return [each for each in numbers if trained[each] > 0], [each for each in numbers if trained[each] == 0]


def frozen_tokens(model: Any, tokenizer: Any, stops: Sequence[int]) -> list[int]:
    """Tokens that the template writes, that the base never learnt, and that are not trained."""
    with model.disable_adapter():
        untrained = untrained_tokens(model.get_base_model(), tokenizer, template_tokens(tokenizer, stops))
    end = model.get_input_embeddings()
    if any(parameter.requires_grad and parameter.shape == end.weight.shape for parameter in end.parameters()):
        return []
    rows = trained_rows(end)
    return [token for token in untrained if token not in rows]


def trained_rows(end: Any) -> set[int]:
    """Rows of an embedding that PEFT trains one by one (`trainable_token_indices`)."""
    indices = getattr(getattr(end, "token_adapter", None), "token_indices", {})
    return {int(row) for rows in indices.values() for row in rows}


def is_untied(model: Any) -> bool:
    """Whether the config ties embeddings and output layer, and what is trained of them is not the same."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return False
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    trained = [{id(each) for each in end.parameters() if each.requires_grad} for end in ends if end is not None]
    return len(trained) == 2 and trained[0] != trained[1]
