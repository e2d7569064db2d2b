"""Conversations to token ids, through the student's own chat template: the one place where that happens.

`encode` turns a row into what is trained; `answer.py` asks models with the same `render` and `encode_texts`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from pipeline.core.errors import UsageError, boundary

IGNORED: Final = -100
"""Label of a token that is not trained."""

Messages: TypeAlias = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as it is trained: the ids, and how many of them are the prompt's and so not trained."""

    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def labels(self) -> list[int]:
        """One label an id: `IGNORED` for the prompt, the id itself for the completion."""
        return [IGNORED] * self.prompt_tokens + list(self.ids[self.prompt_tokens :])

    @property
    def trained_tokens(self) -> int:
        """Tokens of the completion."""
        return len(self.ids) - self.prompt_tokens


def load_tokenizer(model: str, revision: str | None) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        UsageError: it cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    todo = "give a model folder (or hub id and revision) with a tokenizer that transformers loads"
    with boundary(UsageError, "the tokenizer cannot be loaded", where=model, todo=todo):
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    if tokenizer.chat_template is None:
        todo = "take an instruct model, or add a chat_template.jinja to the folder"
        raise UsageError("the tokenizer has no chat template", where=model, todo=todo)
    return tokenizer


def stop_ids(model: str, revision: str | None, tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens at which generation ends: of the generation config, else the tokenizer's EOS.

    Raises:
        UsageError: there is none.
    """
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    except OSError:  # no generation_config.json
        eos = None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        todo = "set eos_token_id in the folder's generation_config.json"
        raise UsageError("nothing says at which token the model stops", where=model, todo=todo)
    return (eos,) if isinstance(eos, int) else tuple(eos)


def most_positions(model: str, revision: str | None) -> int | None:
    """Most tokens that a model takes, as its config says (`max_position_embeddings`); None where it does not.

    Raises:
        UsageError: the config cannot be loaded.
    """
    from transformers import AutoConfig

    todo = "give a model folder (or hub id and revision) that transformers loads as a causal language model"
    with boundary(UsageError, "the model's config cannot be loaded", where=model, todo=todo):
        config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def special_texts(tokenizer: Any) -> re.Pattern[str]:
    """Finds the text of a special token: written in a message it would be encoded as the token itself."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = {text for text in (*tokenizer.all_special_tokens, *added) if text.strip()}
    return re.compile("|".join(re.escape(text) for text in sorted(texts)) or r"(?!)")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages without the fields that are None: what chat templates expect."""
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def render(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool) -> str:
    """The conversation as the text that the model reads.

    Raises:
        UsageError: the template refuses the conversation (an unknown role, say).
    """
    todo = "change the prompts (some templates know no system message), or take another student"
    with boundary(UsageError, "the chat template refuses a conversation", where=str(tokenizer.name_or_path), todo=todo):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return str(text)


def encode_texts(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    """Ids of each text. Rendered conversations hold their special tokens already; raw text may get the model's BOS."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, padding=False, truncation=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def encode(
    tokenizer: Any, prompts: Sequence[Messages], completions: Sequence[Messages], stops: Sequence[int]
) -> list[Encoded | str]:
    """Ids and mask of each row, or the reason why it has none.

    `special_token`: a message holds the text of a special token, which would end the turn or begin another.
    `reasoning_dropped`: the template leaves out the completion's reasoning.
    `prompt_not_prefix`: the prompt's ids do not begin the ids of prompt and completion.

    What the template writes behind the last stop token (a newline, say) is left out: no model ever generates it.

    Args:
        prompts, completions: conversations, and the turns that follow them.
        stops: see `stop_ids`.
    """
    special = special_texts(tokenizer)
    asked = [render(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    pairs = zip(prompts, completions, strict=True)
    told = [render(tokenizer, [*prompt, *turns], add_generation_prompt=False) for prompt, turns in pairs]
    encoded = zip(encode_texts(tokenizer, asked), encode_texts(tokenizer, told), strict=True)
    flaws = [_flaw(*row, special) for row in zip(prompts, completions, told, strict=True)]
    return [
        _masked(tokenizer, prompt, whole, stops) if flaw is None else flaw
        for flaw, (prompt, whole) in zip(flaws, encoded, strict=True)
    ]


def _flaw(prompt: Messages, completion: Messages, told: str, special: re.Pattern[str]) -> str | None:
    texts = (turn.get(name, "") for turn in (*prompt, *completion) for name in ("content", "reasoning_content"))
    if any(special.search(text) for text in texts):
        return "special_token"
    reasoning = (turn.get("reasoning_content", "").strip() for turn in completion)
    return "reasoning_dropped" if any(text not in told for text in reasoning) else None


def _masked(tokenizer: Any, prompt: list[int], whole: list[int], stops: Sequence[int]) -> Encoded | str:
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        return "prompt_not_prefix"
    end = _after_stop(tokenizer, whole, len(prompt), stops)
    return Encoded(tuple(whole[:end]), len(prompt))


def _after_stop(tokenizer: Any, ids: list[int], start: int, stops: Sequence[int]) -> int:
    """Where the row ends: behind its last stop token if only white space follows, else at its end."""
    for at in range(len(ids) - 1, start - 1, -1):
        if ids[at] in stops:
            rest = ids[at + 1 :]
            return at + 1 if not rest or not tokenizer.decode(rest).strip() else len(ids)
    return len(ids)


# ---------------------------------------------------------------------------------------------------------- checks


@dataclass(slots=True)
class Checks:
    """Numbers about the encoded rows, gathered before the first step; JSON through `facts`.

    Attributes:
        rows: rows that are trained.
        without_stop: rows whose last trained token is no stop token: their student would not learn to stop.
        double_bos: rows that begin with two BOS tokens.
        tokens, trained_tokens: ids of the rows, and those that count in the loss.
        longest: tokens of the longest row.
        length_limit: tokens of the longest row that may be trained, see `shards.length_limit`.
        prompt_not_prefix, reasoning_dropped, special_token: rows left out, see `encode`.
    """

    rows: int = 0
    without_stop: int = 0
    double_bos: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    length_limit: int = 0
    prompt_not_prefix: int = 0
    reasoning_dropped: int = 0
    special_token: int = 0

    def add(self, row: Encoded, stops: Sequence[int], bos: int | None) -> None:
        """Count a row that is trained."""
        self.rows += 1
        self.without_stop += row.ids[-1] not in stops
        self.double_bos += bos is not None and row.ids[:2] == (bos, bos)
        self.tokens += len(row.ids)
        self.trained_tokens += row.trained_tokens
        self.longest = max(self.longest, len(row.ids))

    def facts(self) -> dict[str, int | float]:
        """The numbers, with the share of the tokens that is trained."""
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        counted = {name: getattr(self, name) for name in Checks.__slots__}
        return {**counted, "trained_share": round(share, 6)}

    def require_trainable(self, tokenizer: Any, stops: Sequence[int], model: str, rejected: Mapping[str, int]) -> None:
        """Refuse rows that would teach something else than was meant.

        Raises:
            UsageError: no row is left, a row does not end with a stop token, or rows begin with two BOS tokens.
        """
        if self.rows == 0:
            todo = (
                f"over_length (above {self.length_limit} tokens): raise train.max_length, or take a student with more "
                "positions; prompt_not_prefix, reasoning_dropped: take another chat template"
            )
            raise UsageError("no row is left to train on", where=f"rejected: {dict(rejected)}", todo=todo)
        if self.without_stop > 0:
            names = json.dumps(tokenizer.convert_ids_to_tokens(list(stops)), ensure_ascii=False)
            todo = "add the token that ends a turn in its chat template to eos_token_id in generation_config.json"
            found = f"{self.without_stop} of {self.rows} rows do not end with {names}"
            raise UsageError(f"the student would never learn to stop: {found}", where=model, todo=todo)
        if self.double_bos > 0:
            todo = "take the BOS token out of the prompts, or out of the chat template"
            raise UsageError(f"{self.double_bos} of {self.rows} rows begin with two BOS tokens", where=model, todo=todo)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text("utf-8"))
