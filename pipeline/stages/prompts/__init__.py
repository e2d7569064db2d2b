"""Stage `prompts`: read the prompt sets, render them, take duplicates out, split, keep a distance to the test split."""

import functools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.core.config import PromptsStep
from pipeline.core.config_prompts import FileSource, PromptsConfig, PromptSet
from pipeline.core.errors import UsageError
from pipeline.core.lineage import digest_json
from pipeline.core.record import PROMPT_SCHEMA, Prompt
from pipeline.core.sink import RowSink
from pipeline.core.stage import Context, Json, Result, check_cancelled
from pipeline.stages.prompts.card import SourceFacts, source_facts
from pipeline.stages.prompts.distance import Judged, index_tests, keep_distance
from pipeline.stages.prompts.order import sorted_by_id
from pipeline.stages.prompts.render import Renderer, load_template
from pipeline.stages.prompts.settlement import settle
from pipeline.stages.prompts.sources import read_source

VERSION = 2

MANY_NEAR_TEST = 0.2
LISTED_IDS = 10

log = logging.getLogger(__name__)


def input_files(cfg: PromptsStep) -> dict[str, Path]:
    """The local sources, cards and templates."""
    files: dict[str, Path] = {}
    for name, prompt_set in cfg.prompts.sets.items():
        if isinstance(prompt_set.source, FileSource):
            files[f"prompts.sets.{name}.source.path"] = prompt_set.source.path
        for part, path in (("card", prompt_set.card), ("template", prompt_set.template)):
            if path is not None:
                files[f"prompts.sets.{name}.{part}"] = path
    return files


@dataclass(slots=True)
class Tally:
    """What became of the rows of one prompt set."""

    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


def run(cfg: PromptsStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Write the prompts sorted by (prompt_set, prompt_id), and `sources.json`.

    The sets are read and sorted through scratch files; then duplicates are found and the test prompts indexed; then
    the rest is compared with them. In memory are 50 bytes a row, the names of prompts that have equals, and the test
    prompts' n-grams; these once more in each worker process.

    Raises:
        UsageError: a source, card or template is missing or wrong, an id occurs twice, or a set has no rows.
    """
    config = cfg.prompts
    facts = {name: source_facts(config.sets[name]) for name in sorted(config.sets)}
    tallies = {name: Tally() for name in facts}
    with TemporaryDirectory(dir=ctx.workdir) as scratch:
        settled = settle(_read_sets(config, facts, Path(scratch), ctx), list(facts), Path(scratch), ctx)
        index = index_tests(settled, config.near_test)
        licenses = {name: facts[name].license for name in facts}
        ctx.progress.start(len(settled.kept), "rows")
        with RowSink(out, PROMPT_SCHEMA) as sink:
            for judged in ctx.fanout(functools.partial(keep_distance, index, licenses), settled):
                check_cancelled(ctx)
                sink.keep(judged.kept)
                sink.reject(judged.rejected, judged.reasons)
                _count(judged, tallies)
                ctx.progress.advance(judged.rows, rejected=len(judged.reasons))
    sources = {name: _source_json(config.sets[name], facts[name], tallies[name]) for name in facts}
    (out / "sources.json").write_text(json.dumps(sources, indent=2, ensure_ascii=False) + "\n", "utf-8")
    splits = sum((tally.kept for tally in tallies.values()), Counter[str]())
    _warn(config, splits, tallies)
    result = sink.result(sum(tally.rows for tally in tallies.values()), {"sources": sources, "splits": dict(splits)})
    # The facts about the sources are read downstream too, so a corrected card must count.
    return replace(result, content=digest_json({"rows": result.content, "sources": sources}))


def _read_sets(
    config: PromptsConfig, facts: Mapping[str, SourceFacts], scratch: Path, ctx: Context
) -> Iterator[Prompt]:
    """All prompts, by (prompt_set, prompt_id)."""
    ctx.progress.start(len(facts), "prompt sets")
    for name in facts:
        check_cancelled(ctx)
        with TemporaryDirectory(dir=scratch) as runs:
            prompts = sorted_by_id(_render_set(name, config, facts[name].license), Path(runs))
            yield from _refuse_equal_ids(prompts, name, config.sets[name])
        ctx.progress.advance()


def _render_set(name: str, config: PromptsConfig, license_name: str) -> Iterator[Prompt]:
    prompt_set = config.sets[name]
    columns = prompt_set.columns
    needed = [columns.id, columns.prompt, columns.answer, columns.group_id, columns.task, columns.tools]
    template = None if prompt_set.template is None else load_template(prompt_set.template)
    renderer = Renderer(name, prompt_set, config, template, license_name)
    empty = True
    # A template may use any column.
    for row in read_source(prompt_set.source, [c for c in needed if c is not None] if template is None else None):
        empty = False
        yield renderer.render(row)
    if empty:
        todo = "give it rows, or take the set out of the config"
        raise UsageError("the prompt set has no rows", where=f"prompts.sets.{name}: {_place(prompt_set)}", todo=todo)


def _place(prompt_set: PromptSet) -> str:
    source = prompt_set.source
    return str(source.path) if isinstance(source, FileSource) else source.dataset


def _refuse_equal_ids(prompts: Iterable[Prompt], name: str, prompt_set: PromptSet) -> Iterator[Prompt]:
    """Pass prompts sorted by id through. Ids made from the text may be equal: these are duplicates, not mistakes."""
    twice: dict[str, None] = {}
    last = None
    for prompt in prompts:
        if prompt.prompt_id == last and prompt_set.columns.id is not None and len(twice) <= LISTED_IDS:
            twice[prompt.prompt_id] = None
        last = prompt.prompt_id
        yield prompt
    if twice:
        listed = ", ".join(map(repr, list(twice)[:LISTED_IDS])) + (", …" if len(twice) > LISTED_IDS else "")
        todo = "make the ids unique, or set `columns.id: null` to make them from the text"
        raise UsageError(
            f"ids that occur twice: {listed}", where=f"prompts.sets.{name}: {_place(prompt_set)}", todo=todo
        )


def _count(judged: Judged, tallies: Mapping[str, Tally]) -> None:
    for (name, split), rows in judged.kept_in.items():
        tallies[name].rows += rows
        tallies[name].kept[split] += rows
    for (name, reason), rows in judged.rejected_for.items():
        tallies[name].rows += rows
        tallies[name].rejected[reason] += rows


def _source_json(prompt_set: PromptSet, facts: SourceFacts, tally: Tally) -> Json:
    """What `sources.json` says about a set. Local paths are left out: the same bytes elsewhere are the same data."""
    source = prompt_set.source
    if isinstance(source, FileSource):
        read: dict[str, Json] = {"kind": source.kind}
    else:
        read = {"kind": "hub", "dataset": source.dataset, "config": source.config, "split": source.split}
    counts: dict[str, Json] = {
        "rows": tally.rows,
        "kept": dict(sorted(tally.kept.items())),
        "rejected": dict(sorted(tally.rejected.items())),
    }
    return {**asdict(facts), **read, **counts}


def _warn(config: PromptsConfig, splits: Counter[str], tallies: Mapping[str, Tally]) -> None:
    """Say what is allowed but hardly ever meant."""
    if config.test > 0 and splits["test"] == 0:
        log.warning(
            "no prompt is in the test split: the student cannot be measured; give more prompts or raise prompts.test"
        )
    for name, tally in tallies.items():
        if tally.rejected["near_test"] > MANY_NEAR_TEST * tally.rows:
            share = tally.rejected["near_test"] / tally.rows
            hint = "long shared phrases make prompts near: raise prompts.near_test.threshold, or use group_id"
            log.warning("prompt set %s: %.0f %% of the prompts are near a test prompt; %s", name, 100 * share, hint)
