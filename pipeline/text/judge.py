"""Which completions are good enough, by rules and verifiers that ask nobody."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.core.config import FilterConfig
from pipeline.text.conversation import calls_of, completion_texts
from pipeline.text.rules import is_refusal, length_reason, refusal_phrases, repeats_itself
from pipeline.text.verifiers import VERIFIERS


@dataclass(frozen=True, slots=True)
class Judged:
    """A shard with its `verified` column filled in, and for each row the reason it leaves with, or None."""

    table: pa.Table
    reasons: list[str | None]


def judge(cfg: FilterConfig, table: pa.Table) -> Judged:
    """Judge the rows of one shard of `RECORD_SCHEMA`."""
    phrases = refusal_phrases(cfg.refusal_phrases)
    texts, called = completion_texts(table["completion"]), calls_of(table["completion"])
    reasons = [
        _reason(cfg, phrases, text, bool(calls)) if finish in cfg.finish_reasons else f"finish_reason:{finish}"
        for text, calls, finish in zip(texts, called, table["finish_reason"].to_pylist(), strict=True)
    ]
    if cfg.verifier == "none":
        return Judged(table, reasons)
    verdicts = _verify(cfg.verifier, texts, table["answer"].to_pylist(), reasons)
    reasons = [
        "wrong_answer" if verdict is False else reason for verdict, reason in zip(verdicts, reasons, strict=True)
    ]
    at = table.schema.get_field_index("verified")
    return Judged(table.set_column(at, table.schema.field(at), pa.array(verdicts, pa.bool_())), reasons)


def _reason(cfg: FilterConfig, phrases: Sequence[str], text: str, calls_tools: bool) -> str | None:
    """A completion that calls functions and says nothing beside is not empty; no rule on texts concerns it."""
    return None if calls_tools and not text.strip() else _text_reason(cfg, phrases, text)


def _text_reason(cfg: FilterConfig, phrases: Sequence[str], text: str) -> str | None:
    """The first rule on the text alone that it breaks, in the order of the config's fields."""
    length = length_reason(text, min_chars=cfg.min_chars, max_chars=cfg.max_chars)
    if length is not None:
        return length
    if is_refusal(text, phrases):
        return "refusal"
    if repeats_itself(text, ngram=cfg.repetition.ngram, max_share=cfg.repetition.max_share):
        return "repetition"
    return None


def _verify(
    name: str, texts: Sequence[str], answers: Sequence[str | None], reasons: Sequence[str | None]
) -> list[bool | None]:
    """Compare the rows that no earlier rule took; the others are not compared (None)."""
    verifier = VERIFIERS[name]
    return [
        verifier(text, answer) if reason is None else None
        for text, answer, reason in zip(texts, answers, reasons, strict=True)
    ]
