"""Tokenizers: how they are loaded, what conversations look like through their chat templates, and ids of texts.

text_path.py makes rows of these; `answer.py` asks models with the same `render` and `encode_texts`.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from pipeline.core.errors import UsageError, boundary
from pipeline.student.loading import loading

IGNORED: Final = -100
"""Label of a token that is not trained."""

Messages: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What was done to a row on its way to ids.

    Attributes:
        neutralised: texts of special tokens in it that were encoded as ordinary text.
        end_tokens_cut: the teacher's end tokens that were cut off.
        end_token_left: the completion still ends with what is an end token in some chat format.
        reasoning_inlined, reasoning_left_out: as `train.reasoning` says.
        trimmed: the template took white space off the ends of what the teacher wrote.
        with_system: the conversation has a system message.
        received_bytes: UTF-8 bytes of all that the teacher wrote.
        completion_bytes: those of what is trained.
    """

    neutralised: int = 0
    end_tokens_cut: tuple[str, ...] = ()
    end_token_left: bool = False
    reasoning_inlined: bool = False
    reasoning_left_out: bool = False
    trimmed: bool = False
    with_system: bool = False
    received_bytes: int = 0
    completion_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as it is trained: the ids, how many of them are the prompt's and so not trained, and what was done."""

    ids: tuple[int, ...]
    prompt_tokens: int
    facts: RowFacts = RowFacts()

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
    with loading("the tokenizer cannot be loaded", model=model, todo=todo):
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
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
    with loading("the model's config cannot be loaded", model=model, todo=todo):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def special_texts(tokenizer: Any, without: Collection[str] = ()) -> re.Pattern[str]:
    """Finds the text of a special token, the longest one first: encoded as it is, it becomes the token itself."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = {text for text in (*tokenizer.all_special_tokens, *added) if text.strip() and text not in without}
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def template_source(tokenizer: Any) -> str:
    """The source of the chat template; of all of them where there are several."""
    source = tokenizer.chat_template
    return "\n".join(source.values()) if isinstance(source, dict) else str(source)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: without the fields that are null, empty thinking and empty calls."""
    return [
        {name: _without_null(value) for name, value in message.items() if not _is_absent(name, value)}
        for message in messages
    ]


def _is_absent(name: str, value: Any) -> bool:
    return value is None or value == [] or (name == "reasoning_content" and not value.strip())


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_null(each) for name, each in value.items() if each is not None}
    return [_without_null(each) for each in value] if isinstance(value, list) else value


def render(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool, tools: Sequence[Any] = ()) -> str:
    """The conversation as the text that the model reads.

    Args:
        tools: function definitions in OpenAI's form; none are offered where it is empty.

    Raises:
        UsageError: the template refuses the conversation (an unknown role, say).
    """
    return render_all(tokenizer, [messages], add_generation_prompt=add_generation_prompt, tools=tools)[0]


def render_all(
    tokenizer: Any, conversations: Sequence[Messages], *, add_generation_prompt: bool, tools: Sequence[Any] = ()
) -> list[str]:
    """`render` of many conversations that offer the same tools."""
    if not conversations:
        return []
    todo = "change the prompts (some templates know no system message), or take another student"
    with boundary(UsageError, "the chat template refuses a conversation", where=str(tokenizer.name_or_path), todo=todo):
        texts: list[str] = tokenizer.apply_chat_template(
            [[dict(message) for message in messages] for messages in conversations],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    return texts


def encode_texts(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    """Ids of each text. Rendered conversations hold their special tokens already; raw text may get the model's BOS."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text("utf-8"))
