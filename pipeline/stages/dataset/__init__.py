"""Stage `dataset`: what ships. Shards in an order that only seed and row ids decide, their terms, and their card."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from pipeline.core.config import DatasetConfig, DatasetStep
from pipeline.core.config_policy import files_of_policy
from pipeline.core.errors import CorruptArtefact, UsageError
from pipeline.core.lineage import digest_json
from pipeline.core.record import (
    MESSAGES,
    OPTIONAL_OF_MESSAGE,
    RECORD_SCHEMA,
    ShardWriter,
    Written,
    count_rows,
    read_shards,
    shard_paths,
    uncompressed_bytes,
)
from pipeline.core.stage import Context, Result, check_cancelled
from pipeline.stages.dataset.card import write_card
from pipeline.stages.dataset.census import OPTIONAL_COLUMNS, Census
from pipeline.stages.dataset.croissant import Split, write_croissant
from pipeline.stages.dataset.excluded import Excluder
from pipeline.stages.dataset.facts import Facts
from pipeline.stages.dataset.provenance import Judged, hub_ids, judge_rows, provenance_json, replayed
from pipeline.stages.dataset.upstream import Passed, Upstream
from pipeline.terms.licenses import UNKNOWN
from pipeline.terms.statement import PROVENANCE

VERSION = 1

COLUMNS = (
    "prompt",
    "completion",
    "tools",
    "row_id",
    "prompt_set",
    "prompt_id",
    "also_in",
    "teacher",
    "returned_model",
    "fingerprint",
    "license_set",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "task",
    "answer",
    "verified",
)
"""Columns of the shards, in this order. No clock, host or request id is among them: equal rows give equal bytes."""

SPLITS = ("train", "validation")
PARTITION_ROWS = 65_536
"""Rows, about, that are sorted in memory at once."""
PARTITION_BYTES = 128 * 2**20
"""Their size, about, as Arrow holds it; rows of more than 2 KB make the partitions smaller."""
MAX_PARTITIONS = 256
"""Files open at once, per split; beyond 16 million rows or 32 GB the partitions grow instead."""

_ORDER = pa.field("order", pa.binary(32), nullable=False)


def input_files(cfg: DatasetStep) -> dict[str, Path]:
    """What the policy names: term records, texts, overrides."""
    return files_of_policy(cfg.policy)


def run(cfg: DatasetStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Write `data/<split>-*.parquet` for the splits that have rows, their card, their description for machines
    (`croissant.json`), and the terms that they are under (`LICENSES/`, `LICENSES.md`, `NOTICE`).

    Rows of excluded sources leave first (see excluded.py); the gate judges those that stay, before a shard is written.

    Raises:
        UsageError: no row is left, or the policy's records, texts or choices cannot be used.
        PolicyRefused: the rows' terms forbid what the policy means to do, or nobody knows them.
        CorruptArtefact: a row of the test split arrived, which `prompts` keeps from every teacher, or the file of
            overrides was changed.
    """
    rows = inputs["dedup"] / "rows"
    rows_in = count_rows(shard_paths(rows))
    upstream = Upstream.read(inputs)
    ctx.progress.start(2 * rows_in, "rows")
    census = Census()
    with TemporaryDirectory(dir=ctx.workdir) as scratch:
        with Excluder(cfg, upstream.prompt_sources, out) as excluder:
            partitions = _partition(rows, rows_in, cfg.dataset.seed, Path(scratch), census, excluder, ctx)
        _check_some_left(census, rows)
        judged = judge_rows(cfg, census, upstream, str(rows), ctx.resume_command)
        schema = schema_of(census)
        written = {
            split: _write_split(split, partitions[split], cfg.dataset, schema, out / "data", ctx)
            for split in SPLITS
            if census.splits[split] > 0
        }
    content = digest_json({split: facts.content for split, facts in written.items()})
    passed = (*upstream.passed, Passed("dataset", rows_in, census.rows, excluder.rejected))
    facts = _facts(cfg, content, census, upstream, judged, passed)
    judged.notices.write(out)
    write_croissant(out, facts, [Split(split, each.files, each.rows) for split, each in written.items()], schema)
    write_card(out / "README.md", facts)
    provenance = provenance_json(judged, cfg.policy, upstream, passed, census)
    metrics = {**census.metrics(census.sources(upstream.prompt_sources)), PROVENANCE: provenance}
    return Result(rows_in, census.rows, dict(sorted(excluder.rejected.items())), content, metrics)


def _check_some_left(census: Census, rows: Path) -> None:
    """Raises: UsageError: there is not one row."""
    if census.rows == 0:
        todo = (
            "see why they left: `rejected` in the manifests of generate, filter and dedup, rejects/ beside them, and "
            "dataset.exclude_teachers, dataset.exclude_prompt_sets"
        )
        raise UsageError("no row is left for the data set", where=str(rows), todo=todo)


def _facts(
    cfg: DatasetStep, content: str, census: Census, upstream: Upstream, judged: Judged, passed: Sequence[Passed]
) -> Facts:
    """What the card and `croissant.json` tell."""
    sets = upstream.prompt_sources
    return Facts(
        title=cfg.dataset.title,
        content=content,
        census=census,
        statement=judged.statement,
        there=judged.there,
        descriptions=tuple(
            (name, text)
            for name in sorted(census.prompt_sets & sets.keys())
            if (text := str(sets[name].get("description", UNKNOWN))) != UNKNOWN
        ),
        hub_ids=hub_ids(upstream),
        replayed=replayed(cfg.declared),
        policy=cfg.policy,
        verdict=judged.verdict,
        notices=judged.notices,
        passed=tuple(passed),
        near_test=upstream.near_test,
    )


def schema_of(census: Census) -> pa.Schema:
    """The shards' schema: without the columns and the fields of messages that no row uses."""
    unused = {name for name in OPTIONAL_COLUMNS if (name, "") not in census.used}
    schema = pa.schema([RECORD_SCHEMA.field(name) for name in COLUMNS if name not in unused])
    for name in ("prompt", "completion"):
        used = {field for column, field in census.used if column == name}
        at = schema.get_field_index(name)
        schema = schema.set(at, pa.field(name, _messages_with(used), nullable=False))
    return schema


def _messages_with(used: set[str]) -> pa.DataType:
    """The type of a list of messages without those optional fields that are not used."""
    message = MESSAGES.value_type
    fields = [message.field(index) for index in range(message.num_fields)]
    kept = pa.struct([field for field in fields if field.name not in OPTIONAL_OF_MESSAGE or field.name in used])
    return pa.list_(pa.field("item", kept, nullable=False))


def order_key(seed: int, row_id: str) -> bytes:
    """What the rows are sorted by: 32 bytes that depend on nothing but the seed and the row's id."""
    return hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()


def _partition(
    rows: Path, rows_in: int, seed: int, scratch: Path, census: Census, excluder: Excluder, ctx: Context
) -> dict[str, list[Path]]:
    """Spread the rows over files by ranges of their order key; files of a split, in the order of their ranges.

    Sorting each file then sorts everything, with one file in memory at a time.
    """
    size = sum(uncompressed_bytes(path) for path in shard_paths(rows))
    count = min(MAX_PARTITIONS, max(-(-rows_in // PARTITION_ROWS), -(-size // PARTITION_BYTES)))
    files = {split: [scratch / f"{split}-{number:05d}.arrow" for number in range(count)] for split in SPLITS}
    schema = pa.schema([_ORDER, *(RECORD_SCHEMA.field(name) for name in COLUMNS)])
    with ExitStack() as stack:
        writers = {
            (split, number): stack.enter_context(pa.ipc.new_file(str(path), schema))
            for split, paths in files.items()
            for number, path in enumerate(paths)
        }
        for read in read_shards(rows):
            check_cancelled(ctx)
            table = excluder.stay(read)
            census.add(table)
            for place, part in _parts(table, seed, count):
                if place[0] not in SPLITS:
                    todo = "run `python -m pipeline prompts CONFIG --force` and the stages after it"
                    raise CorruptArtefact(f"a row of the split {place[0]!r} got here", where=str(rows), todo=todo)
                writers[place].write_table(part.select(schema.names).cast(schema))
            left = read.num_rows - table.num_rows
            ctx.progress.advance(read.num_rows + left, rejected=left)  # those that left are not written
    return files


def _parts(table: pa.Table, seed: int, count: int) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    """The rows of a table by split and partition, with their order key."""
    keys = [order_key(seed, row_id) for row_id in table["row_id"].to_pylist()]
    places: dict[tuple[str, int], list[int]] = {}
    for row, (split, key) in enumerate(zip(table["split"].to_pylist(), keys, strict=True)):
        number = int.from_bytes(key[:8], "big") * count >> 64
        places.setdefault((split, number), []).append(row)
    keyed = table.append_column(_ORDER, pa.array(keys, _ORDER.type))
    for place, at in places.items():
        yield place, keyed.take(at)


def _write_split(
    split: str, partitions: list[Path], cfg: DatasetConfig, schema: pa.Schema, folder: Path, ctx: Context
) -> Written:
    """Sort the partitions of one split into its shards, and name the shards after their number."""
    with ShardWriter(folder, schema, shard_rows=cfg.shard_rows, stem=split) as writer:
        for path in partitions:
            check_cancelled(ctx)
            with pa.ipc.open_file(str(path)) as reader:
                table = reader.read_all()
            # Rows with equal ids (an artefact made by hand could hold some) stay in the order they came in.
            table = table.sort_by("order").select(schema.names).cast(schema)
            writer.write(table)
            ctx.progress.advance(table.num_rows)
    written = writer.written()
    named = [folder / f"{split}-{at:05d}-of-{len(written.files):05d}.parquet" for at in range(len(written.files))]
    for path, name in zip(written.files, named, strict=True):
        path.rename(name)
    return replace(written, files=tuple(named))
