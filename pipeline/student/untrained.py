"""Tokens that a chat template writes and a base model never learned, whose frozen embeddings make adapters stall."""

from collections.abc import Sequence
from typing import Any, Final

import torch

from pipeline.core.config_train import AdapterTuning
from pipeline.core.errors import UsageError
from pipeline.student.adapters import token_layers
from pipeline.student.tokenise import encode_texts, render

NORM_SHARE: Final = 0.3
"""A row whose norm is below this share of the median norm counts as untrained."""
_PROBE: Final = 8
"""Leading numbers of a row that are compared first: rows that agree in them are rare."""


def template_tokens(tokenizer: Any, stops: Sequence[int]) -> tuple[int, ...]:
    """Special and added tokens that the chat template writes into a conversation, and the stop tokens, ascending.

    The conversation has a system message (where the template takes one), a user's and an assistant's turn, with and
    without reasoning, and ends once with the generation prompt. Tokens that only tools or images bring are not seen.
    """
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    found = {token for ids in encode_texts(tokenizer, _conversations(tokenizer)) for token in ids if token in known}
    return tuple(sorted(found | set(stops)))


def _conversations(tokenizer: Any) -> list[str]:
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
    plain = {"role": "assistant", "content": "Hi."}
    ways = [[*head, asked, told] for head in ([system], []) for told in (plain, {**plain, "reasoning_content": "Hm."})]
    rendered = []
    for way in ways:
        try:
            rendered.append(render(tokenizer, way, add_generation_prompt=False))
            rendered.append(render(tokenizer, way[:-1], add_generation_prompt=True))
        except UsageError:
            continue  # some templates take no system message; one that takes no conversation at all fails elsewhere
    return rendered


def untrained_tokens(model: Any, tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """Those of `tokens` whose input embedding, or whose row of an untied output layer, was never trained.

    Untrained is a row whose norm is below `NORM_SHARE` of the median over the tokenizer's tokens (rows beyond them are
    padding), or that equals another row exactly, as rows do that were filled with a mean or a zero when the vocabulary
    was enlarged. Rows that were drawn at random with the usual norm are not recognised.
    """
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    return [token for token in tokens if any(_is_untrained(matrix, token, len(tokenizer)) for matrix in matrices)]


@torch.no_grad()
def _is_untrained(matrix: torch.Tensor, token: int, size: int) -> bool:
    if token >= len(matrix):
        return False  # the model has no such token at all
    row = matrix[token]
    if float(row.float().norm()) < NORM_SHARE * _median_norm(matrix, size):
        return True
    alike = (matrix[:, :_PROBE] == row[:_PROBE]).all(dim=1).nonzero().flatten()
    return int((matrix[alike] == row).all(dim=1).sum()) > 1


def _median_norm(matrix: torch.Tensor, size: int) -> float:
    """Over the first `size` rows; in float32, since bfloat16 sums of squares are coarse."""
    return float(torch.linalg.vector_norm(matrix[:size], dim=1, dtype=torch.float32).median())


def tokens_to_train(model: Any, tokenizer: Any, stops: Sequence[int], tuning: AdapterTuning) -> tuple[int, ...]:
    """The tokens whose embeddings are trained beside the adapters, ascending; see `AdapterTuning.train_tokens`.

    Args:
        model: the base, before it gets adapters. Where all its embeddings are trained in full, there is nothing to do.

    Raises:
        UsageError: a text of the list is no single token of the tokenizer, or the model has no row for it.
    """
    if not token_layers(model, tuning):
        return ()
    if tuning.train_tokens == "auto":
        return tuple(untrained_tokens(model, tokenizer, template_tokens(tokenizer, stops)))
    tokens = tuple(sorted({_token_of(tokenizer, text) for text in tuning.train_tokens}))
    rows = len(model.get_input_embeddings().weight)
    for token in tokens:
        if token >= rows:
            text = tokenizer.convert_ids_to_tokens(token)
            what = f"the model has {rows} embeddings and none for {text!r}, token {token}"
            todo = "enlarge the model's embeddings first, or leave it out"
            raise UsageError(what, where="train.tuning.train_tokens", todo=todo)
    return tokens


def _token_of(tokenizer: Any, text: str) -> int:
    token = tokenizer.get_vocab().get(text)
    if isinstance(token, int):
        return token
    (ids,) = encode_texts(tokenizer, [text])
    if len(ids) != 1:
        what = f"{text!r} is {len(ids)} tokens of the student's tokenizer, not one"
        todo = "name texts of single tokens, such as those of the chat template"
        raise UsageError(what, where="train.tuning.train_tokens", todo=todo)
    return ids[0]
