"""Stage `filter`: bad completions leave, each with the first reason that applies."""

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from pipeline.core.config import FilterConfig, FilterStep
from pipeline.core.record import RECORD_SCHEMA, count_rows, read_shard, shard_paths
from pipeline.core.sink import RowSink
from pipeline.core.stage import Context, Result, check_cancelled
from pipeline.text.judge import Judged, judge

logger = logging.getLogger(__name__)

VERSION = 2


def input_files(cfg: FilterStep) -> dict[str, Path]:
    """None: the built-in phrases are code."""
    return {}


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


def _verdict_names(table: pa.Table) -> list[str]:
    names = {True: "right", False: "wrong", None: "not_compared"}
    return [names[verdict] for verdict in table["verified"].to_pylist()]
