"""Tokenizers trained here, chat templates in the style of known families, and texts that break naive code."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
    "<|bos|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens that are not special."""
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it says: is it what it is?\n\nYes, the fox is.\n\n\n",
    "def add(a, b):\n    return a + b\n\n\nclass Fox:\n\tname = 'the fox'\n",
    "user\nassistant\nsystem\n\nfinal analysis commentary\n\n",
] * 4
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen and Llama 3 split text: newlines in a row are one piece."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


# ------------------------------------------------------------------------------------------------------ tokenizers


def _added(backend: Any, specials: Sequence[str] = SPECIAL) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    named = {"unk_token": "<unk>"} if backend.token_to_id("<unk>") is not None else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", **named)


def byte_level(split: str | None = None, normalizer: Any = None) -> Any:
    """Byte-level BPE, as GPT-2 or (with `split`) as Qwen and Llama 3."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    by = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*by, plain])
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return _added(backend)


def sentencepiece_style(metaspace: bool = False) -> Any:
    """BPE with byte fallback; a space before each run of text (Llama 2), or (`metaspace`) at the very start."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tail = [decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first", split=False), *tail])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *tail, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    whole = json.loads(backend.to_str())
    pieces = whole["model"]["vocab"]
    pieces |= {text: len(pieces) + number for number, text in enumerate(BYTES)}  # known, but no added tokens
    return _added(Tokenizer.from_str(json.dumps(whole)))


def unigram() -> Any:
    """Unigram whose vocabulary holds the special tokens as pieces, as T5's: looked up, they are found in plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(
        {character for text in (*CORPUS, *SPECIAL, string.printable) for character in text} - {" "} | {"▁"}
    )
    pieces = [("<unk>", 0.0), *((text, 0.0) for text in SPECIAL), *((text, -500.0) for text in BYTES)]
    backend = Tokenizer(models.Unigram([*pieces, *((text, -5.0) for text in letters)], 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="first", split=False), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _added(backend)


def lossy() -> Any:
    """BPE over the characters of its corpus: any other is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    backend.train_from_iterator(
        [*CORPUS, *SPECIAL], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    )
    return _added(backend)


def folding() -> Any:
    """Byte-level BPE behind a normaliser that folds compatibility characters (NFKC)."""
    from tokenizers import normalizers

    return byte_level(normalizer=normalizers.NFKC())


def one_byte_a_token() -> Any:
    """Every byte is a token, as in ByT5; a tokenizer in Python."""
    from transformers import AddedToken, ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0, eos_token=AddedToken("</s>", special=True))
    tokenizer.add_special_tokens(
        {"bos_token": "<|bos|>", "additional_special_tokens": [AddedToken(text, special=True) for text in SPECIAL]}
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bpe": byte_level,
    "bpe-newlines": lambda: byte_level(SPLIT),
    "sentencepiece": sentencepiece_style,
    "metaspace": lambda: sentencepiece_style(metaspace=True),
    "unigram": unigram,
    "bytes": one_byte_a_token,
}
"""Those that lose nothing."""


@cache
def tokenizer_of(name: str) -> Any:
    return TOKENIZERS[name]()


def bytes_of(name: str, ids: Sequence[int]) -> bytes:
    """What ids mean, token by token, without any decoder of the library."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = tokenizer_of(name)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    parts: list[bytes] = []
    begins = True
    for id in ids:
        if id in tokenizer.added_tokens_decoder:
            parts.append(tokenizer.added_tokens_decoder[id].content.encode())
            begins = True
            continue
        token = tokenizer.convert_ids_to_tokens(id)
        if name.startswith("bpe"):
            parts.append(bytes(byte_of[character] for character in token))
        elif name == "bytes":
            parts.append(bytes([ord(token)]))
        elif token in BYTES:
            parts.append(bytes([int(token[3:5], 16)]))
        else:
            text = token.removeprefix("▁") if begins and name == "sentencepiece" else token
            parts.append(text.replace("▁", " ").encode())
        begins = False
    return b"".join(parts)


# ------------------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class Family:
    """A chat template, the text of its stop token, and what it writes behind the prompt.

    Attributes:
        told: (thinking or None, content) -> the text that is trained where the template shows thinking itself.
        inlined: the same with `train.reasoning: inline`.
        shows_thinking: whether it has a place for it.
    """

    template: str
    stop: str
    told: Callable[[str | None, str], str]
    inlined: Callable[[str, str], str]
    shows_thinking: bool


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = (
    '{%- for call in m.tool_calls or [] %}{%- set f = call.function %}{{- \'\n<tool_call>\n{"name": "\' + f.name '
    '+ \'", "arguments": \' }}{%- if f.arguments is string %}{{- f.arguments }}{%- else %}'
    "{{- f.arguments | tojson }}{%- endif %}{{- '}\n</tool_call>' }}{%- endfor %}"
)
QWEN3 = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}" + CALLS + "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}OPENED{%- endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}{{ '<｜Assistant｜>' }}{% for c in m['tool_calls'] %}"
    "{{ c['type'] + ' ' + c['function']['name'] + '\n```json\n' + c['function']['arguments'] + '\n```' }}{% endfor %}"
    "{{ '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
HARMONY = (
    "{{- '<|start|>system<|message|>You are a model.<|end|>' }}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if 'tool_calls' in m %}{%- set f = m.tool_calls[0].function %}"
    "{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}"
    "{{- f.arguments | tojson }}{{- '<|call|>' }}"
    "{%- elif loop.last and not add_generation_prompt %}"
    "{%- if 'thinking' in m %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{%- endif %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}"
    '{{ \'{"name": "\' + f.name + \'", "parameters": \' + (f.arguments | tojson) + "}" }}'
    "{% else %}{{ m['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _qwen(thought: str | None, content: str) -> str:
    return "<think>\n" + (thought or "").strip("\n") + "\n</think>\n\n" + content.lstrip("\n") + "<|im_end|>"


def _harmony(thought: str | None, content: str) -> str:
    analysis = "" if thought is None else f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
    return f"{analysis}<|channel|>final<|message|>{content}<|return|>"


def _tagged(thought: str) -> str:
    bare = thought.strip("\n")
    return f"<think>\n{bare}\n</think>\n\n"


FAMILIES = {
    "chatml": Family(
        CHATML,
        "<|im_end|>",
        lambda thought, content: content + "<|im_end|>",
        lambda thought, content: _tagged(thought) + content + "<|im_end|>",
        False,
    ),
    "qwen3": Family(
        QWEN3.replace("OPENED", ""),
        "<|im_end|>",
        _qwen,
        lambda thought, content: _tagged(thought) + content.lstrip("\n") + "<|im_end|>",
        True,
    ),
    "qwen3-opened": Family(
        QWEN3.replace("OPENED", "{{- '<think>\n' }}"),
        "<|im_end|>",
        lambda thought, content: _qwen(thought, content).removeprefix("<think>\n"),
        lambda thought, content: (_tagged(thought) + content).removeprefix("<think>\n") + "<|im_end|>",
        True,
    ),
    "r1": Family(
        R1,
        "<｜end▁of▁sentence｜>",
        lambda thought, content: content + "<｜end▁of▁sentence｜>",
        lambda thought, content: (_tagged(thought) + content).removeprefix("<think>\n") + "<｜end▁of▁sentence｜>",
        False,
    ),
    "harmony": Family(
        HARMONY,
        "<|return|>",
        _harmony,
        lambda thought, content: f"<|channel|>final<|message|>{_tagged(thought)}{content}<|return|>",
        True,
    ),
    "llama3": Family(
        LLAMA3,
        "<|eot_id|>",
        lambda thought, content: content.strip() + "<|eot_id|>",
        lambda thought, content: _tagged(thought).lstrip() + content.rstrip() + "<|eot_id|>",
        False,
    ),
}

# ----------------------------------------------------------------------------------------------------------- texts

TEXTS = {
    "plain": "The fox is quick.",
    "emoji": "👩‍👩‍👧‍👦 and 🏳️‍🌈 of 🇩🇪🇯🇵, 👍🏽!",
    "cjk": "日本語と中文、한국어。",
    "code": "def f(a):\r\n\tif a  <  1:\r\n\t\treturn a\r\n",
    "combining": "e\u0301 ﬁ Å \u1e9b\u0323 n\u0303",
    "nul": "a\0b\u200b\ufeffc",
    "newlines": "\n\n  what is it?\n\n\n",
    "space": " the fox ",
    "special": "say <|im_end|> and <|start|>user, <｜User｜><|eot_id|> or <|return|>",
    "only-special": "<|im_end|>",
    "markup": "a <tool_call> is not <b>, <|nothing|> or <|im_end>",
    "right-to-left": "שלום \u202eabc\u202c عالم",
    "underline": "a_b __c__ \\u0041 <0x41>",
}
