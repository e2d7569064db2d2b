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
KEPT_FIRST = ("test", "validation", "train")
"""Of equal prompts the one in the earlier of these splits stays."""
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
    """Prompts of a scratch file, in canonical order.

    Attributes:
        path: the file.
        reasons: for each prompt the reason it leaves with so far, or None.
        also_in: row in the file -> the other sets that hold this prompt, sorted; for prompts that stay.
    """

    path: Path
    reasons: list[str | None]
    also_in: Mapping[int, tuple[str, ...]]


@dataclass(slots=True)
class Equals:
    """Equal prompts: the one that stays, so far, and the sets that hold them."""

    position: int
    split: str
    name: str
    sets: tuple[str, ...]


def run(cfg: PromptsStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Write the prompts sorted by (prompt_set, prompt_id), and `sources.json`.

    The sets are read and sorted through scratch files; then duplicates are found and the test prompts indexed; then
    the rest is compared with them. In memory are a digest and a name a row, and the test prompts' n-grams.

    Raises:
        UsageError: a source, card or template is missing or wrong, an id occurs twice, or a set has no rows.
    """
    config = cfg.prompts
    facts = {name: source_facts(config.sets[name]) for name in sorted(config.sets)}
    tallies = {name: Tally() for name in facts}
    with TemporaryDirectory(dir=ctx.workdir) as scratch:
        prompts = _read_sets(config, facts, Path(scratch), ctx)
        settled = _settle(prompts, Path(scratch), ctx)
        index = _index_tests(settled, config.near_test)
        ctx.progress.start(sum(len(part.reasons) for part in settled), "rows")
        with RowSink(out, PROMPT_SCHEMA) as sink:
            for part in settled:
                check_cancelled(ctx)
                _keep_distance(part, index, sink, tallies, facts)
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


def _settle(prompts: Iterable[Prompt], scratch: Path, ctx: Context) -> list[Settled]:
    """Write the prompts in shards and find the blank ones and the exact duplicates.

    Of equal prompts the first in test stays, else the first in validation, else the first: so no text is in two
    splits, and none that a test group holds is trained.
    """
    equals: dict[bytes, Equals] = {}
    written: list[tuple[Path, list[Equals | None]]] = []
    for number, chunk in enumerate(chunks(prompts, SHARD_ROWS)):
        check_cancelled(ctx)
        path = scratch / f"settled-{number:05d}.arrow"
        write_prompts(path, chunk)
        written.append((path, [_enter(prompt, at, equals) for at, prompt in enumerate(chunk, number * SHARD_ROWS)]))
    return [_settled(path, found, number * SHARD_ROWS) for number, (path, found) in enumerate(written)]


def _enter(prompt: Prompt, position: int, equals: dict[bytes, Equals]) -> Equals | None:
    """Enter a prompt among its equals and return them; None for a blank prompt."""
    if is_blank(prompt):
        return None
    same: list[Json] = [[message.role, normalise(message.content)] for message in prompt.prompt]
    digest = blake2b(canonical_json(same), digest_size=16).digest()
    name = f"{prompt.prompt_set}/{prompt.prompt_id}"
    found = equals.setdefault(digest, Equals(position, prompt.split, name, (prompt.prompt_set,)))
    if prompt.prompt_set not in found.sets:
        found.sets = (*found.sets, prompt.prompt_set)
    if KEPT_FIRST.index(prompt.split) < KEPT_FIRST.index(found.split):
        found.position, found.split, found.name = position, prompt.split, name
    return found


def _settled(path: Path, entered: Iterable[Equals | None], start: int) -> Settled:
    """The reasons `empty` and `duplicate_of:<prompt_set>/<prompt_id>` of a shard whose first row is row `start`."""
    reasons: list[str | None] = []
    also_in: dict[int, tuple[str, ...]] = {}
    for row, found in enumerate(entered):
        if found is None:
            reasons.append("empty")
        elif found.position != start + row:
            reasons.append(f"duplicate_of:{found.name}")
        else:
            reasons.append(None)
            if len(found.sets) > 1:
                own = found.name.partition("/")[0]
                also_in[row] = tuple(sorted(set(found.sets) - {own}))
    return Settled(path, reasons, also_in)


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


def _keep_distance(
    part: Settled, index: NearIndex, sink: RowSink, tallies: Mapping[str, Tally], facts: Mapping[str, SourceFacts]
) -> None:
    """Keep the shard's prompts or reject them, training and validation prompts near a test prompt too."""
    kept, rejected, reasons = [], [], []
    for row, (prompt, reason) in enumerate(zip(read_prompts(part.path), part.reasons, strict=True)):
        if row in part.also_in:
            prompt = _join(prompt, part.also_in[row], facts)
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


def _join(prompt: Prompt, also_in: tuple[str, ...], facts: Mapping[str, SourceFacts]) -> Prompt:
    """The prompt under the terms of all sets that hold it."""
    licenses = {*prompt.license_set, *(facts[name].license for name in also_in)}
    return replace(prompt, also_in=also_in, license_set=tuple(sorted(licenses)))


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
