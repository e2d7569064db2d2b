"""Byte-level BPE tokenizers with a chat template, made from a sample of text."""

import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def without_capitals(text: str) -> str:
    """The text without its words of capitals, whose letters should stay apart."""
    return re.sub(r"\b[A-Z]+\b", "", text)


def train_tokenizer(
    texts: Iterable[str], *, size: int, eos: str, pad: str, roles: Sequence[str], chat_template: str, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer that reads numbers digit by digit and adds no token of its own to a text.

    Args:
        texts: what the merges are learned from.
        size: tokens in the vocabulary, the special ones included.
        eos: ends an assistant's turn (and a document).
        pad: fills up a batch; never the same as `eos`, which must be learned.
        roles: marks of the chat template, one token each.
        chat_template: Jinja text.
        max_length: longest input of the model, in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[pad, eos, *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=list(roles),
        chat_template=chat_template,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
