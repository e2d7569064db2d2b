"""Stage `prompts`: read the prompt sets, render them, take duplicates out, split, keep a distance to the test split."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.core.config import FileSource, NearTest, PromptsConfig, PromptSet, PromptsStep
from pipeline.core.errors import UsageError
from pipeline.core.lineage import canonical_json, digest_json
from pipeline.core.record import PROMPT_SCHEMA, SHARD_ROWS, Prompt
from pipeline.core.sink import RowSink, counted_reason
from pipeline.core.stage import Context, Json, Result, check_cancelled
from pipeline.stages.prompts.card import SourceFacts, source_facts
from pipeline.stages.prompts.order import chunks, read_prompts, sorted_by_id, write_prompts
from pipeline.stages.prompts.render import Renderer, is_blank, load_template
from pipeline.stages.prompts.sources import read_source
from pipeline.text.near import NearIndex
from pipeline.text.normalise import normalise

VERSION = 1

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


@dataclass(frozen=True, slots=True)
class Settled:
    """Prompts of a scratch file, in canonical order, with the reason each leaves with so far, or None."""

    path: Path
    reasons: list[str | None]


def run(cfg: PromptsStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Write the prompts sorted by (prompt_set, prompt_id), and `sources.json`.

    The sets are read and sorted through scratch files; then duplicates are found and the test prompts indexed; then
    the rest is compared with them. In memory are 16 bytes and an id a row, and the test prompts' n-grams.

    Raises:
        UsageError: a source, card or template is missing or wrong, an id occurs twice, or a set has no rows.
    """
    config = cfg.prompts
    facts = {name: source_facts(config.sets[name]) for name in sorted(config.sets)}
    tallies = {name: Tally() for name in facts}
    with TemporaryDirectory(dir=ctx.workdir) as scratch:
        prompts = _read_sets(config, facts, Path(scratch), ctx)
        settled = list(_settle(prompts, Path(scratch), ctx))
        index = _index_tests(settled, config.near_test)
        ctx.progress.start(sum(len(part.reasons) for part in settled), "rows")
        with RowSink(out, PROMPT_SCHEMA) as sink:
            for part in settled:
                check_cancelled(ctx)
                _keep_distance(part, index, sink, tallies)
                ctx.progress.advance(len(part.reasons), rejected=sum(reason is not None for reason in part.reasons))
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
    needed = [columns.id, columns.prompt, columns.answer, columns.group_id, columns.task]
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


def _settle(prompts: Iterable[Prompt], scratch: Path, ctx: Context) -> Iterator[Settled]:
    """Write the prompts in shards and find the blank ones and the exact duplicates.

    The first of equal prompts stays, wherever the others would have been: so no text is in two splits.
    """
    first: dict[bytes, str] = {}
    for number, chunk in enumerate(chunks(prompts, SHARD_ROWS)):
        check_cancelled(ctx)
        path = scratch / f"settled-{number:05d}.arrow"
        write_prompts(path, chunk)
        yield Settled(path, [_own_reason(prompt, first) for prompt in chunk])


def _own_reason(prompt: Prompt, first: dict[bytes, str]) -> str | None:
    """`empty`, `duplicate_of:<prompt_set>/<prompt_id>` or None; remembers the prompt in `first`."""
    if is_blank(prompt):
        return "empty"
    name = f"{prompt.prompt_set}/{prompt.prompt_id}"
    same: list[Json] = [[message.role, normalise(message.content)] for message in prompt.prompt]
    kept = first.setdefault(blake2b(canonical_json(same), digest_size=16).digest(), name)
    # Identity, because prompts whose ids are made from their text have equal names when they are duplicates.
    return None if kept is name else f"duplicate_of:{kept}"


def _near_text(prompt: Prompt) -> str:
    """What is compared with the test split: the messages without the system's, which all prompts of a set share."""
    return "\n".join(message.content for message in prompt.prompt if message.role != "system")


def _index_tests(settled: Iterable[Settled], near: NearTest) -> NearIndex:
    tests = (
        _near_text(prompt)
        for part in settled
        for prompt, reason in zip(read_prompts(part.path), part.reasons, strict=True)
        if reason is None and prompt.split == "test"
    )
    return NearIndex(tests, ngram=near.ngram, threshold=near.threshold)


def _keep_distance(part: Settled, index: NearIndex, sink: RowSink, tallies: Mapping[str, Tally]) -> None:
    """Keep the shard's prompts or reject them, training and validation prompts near a test prompt too."""
    kept, rejected, reasons = [], [], []
    for prompt, reason in zip(read_prompts(part.path), part.reasons, strict=True):
        if reason is None and prompt.split != "test" and index.is_near(_near_text(prompt)):
            reason = "near_test"
        tally = tallies[prompt.prompt_set]
        tally.rows += 1
        if reason is None:
            tally.kept[prompt.split] += 1
            kept.append(prompt)
        else:
            tally.rejected[counted_reason(reason)] += 1
            rejected.append(prompt)
            reasons.append(reason)
    sink.keep(kept)
    sink.reject(rejected, reasons)


def _source_json(prompt_set: PromptSet, facts: SourceFacts, tally: Tally) -> Json:
    """What `sources.json` says about a set. Local folders are left out: they tell of the machine, not of the data."""
    source = prompt_set.source
    if isinstance(source, FileSource):
        read: dict[str, Json] = {"kind": source.kind, "file": source.path.name}
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
