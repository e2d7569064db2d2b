"""Stage `filter`: bad completions leave, each with the first reason that applies."""

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.core.config import FilterConfig, FilterStep
from pipeline.core.record import RECORD_SCHEMA, count_rows, read_shard, shard_paths
from pipeline.core.sink import RowSink
from pipeline.core.stage import Context, Result, check_cancelled
from pipeline.text.conversation import completion_texts
from pipeline.text.rules import is_refusal, length_reason, refusal_phrases, repeats_itself
from pipeline.text.verifiers import VERIFIERS

logger = logging.getLogger(__name__)

VERSION = 1


def input_files(cfg: FilterStep) -> dict[str, Path]:
    """None: the built-in phrases are code."""
    return {}


@dataclass(frozen=True, slots=True)
class Judged:
    """A shard with its `verified` column filled in, and for each row the reason it leaves with, or None."""

    table: pa.Table
    reasons: list[str | None]


def run(cfg: FilterStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Judge every row of `generate`. Rows keep their order; `verified` is set where an answer was compared."""
    rows = inputs["generate"] / "rows"
    rows_in = count_rows(shard_paths(rows))
    ctx.progress.start(rows_in, "rows")
    verified: Counter[str] = Counter()
    with RowSink(out, RECORD_SCHEMA) as sink:
        for judged in ctx.fanout(functools.partial(judge_shard, cfg.filter), shard_paths(rows)):
            check_cancelled(ctx)
            sink.split(judged.table, judged.reasons)
            verified.update(_verdict_names(judged.table))
            leaving = sum(reason is not None for reason in judged.reasons)
            ctx.progress.advance(judged.table.num_rows, rejected=leaving)
    if cfg.filter.verifier != "none" and verified["right"] + verified["wrong"] == 0:
        logger.warning("the verifier compared nothing: no row has a reference answer (prompts.sets.*.columns.answer)")
    return sink.result(rows_in, {"verified": {name: verified[name] for name in ("right", "wrong", "not_compared")}})


def judge_shard(cfg: FilterConfig, path: Path) -> Judged:
    """Judge the rows of a file; what a worker process is given is the path, which is small."""
    return judge(cfg, read_shard(path))


def judge(cfg: FilterConfig, table: pa.Table) -> Judged:
    """Judge the rows of one shard of `RECORD_SCHEMA`."""
    phrases = refusal_phrases(cfg.refusal_phrases)
    texts = completion_texts(table["completion"])
    reasons = [
        _text_reason(cfg, phrases, text) if finish in cfg.finish_reasons else f"finish_reason:{finish}"
        for text, finish in zip(texts, table["finish_reason"].to_pylist(), strict=True)
    ]
    if cfg.verifier == "none":
        return Judged(table, reasons)
    verdicts = _verify(cfg.verifier, texts, table["answer"].to_pylist(), reasons)
    reasons = [
        "wrong_answer" if verdict is False else reason for verdict, reason in zip(verdicts, reasons, strict=True)
    ]
    at = table.schema.get_field_index("verified")
    return Judged(table.set_column(at, table.schema.field(at), pa.array(verdicts, pa.bool_())), reasons)


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


def _verdict_names(table: pa.Table) -> list[str]:
    names = {True: "right", False: "wrong", None: "not_compared"}
    return [names[verdict] for verdict in table["verified"].to_pylist()]
