"""Soft targets of rows: their Arrow schema, one row's dataclass, and their writer and reader.

They lie in `targets/` beside the `rows/` of `generate`, a row for each kept row, in the same order. Values are float32:
exactly what vLLM computed; of numbers that an API writes with more digits the stored answer keeps all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.lineage import canonical_json, digest_json, file_sha256
from pipeline.core.record import SHARD_ROWS, ShardWriter, Written, read_shards
from pipeline.core.stage import Json

FOLDER: Final = "targets"
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt")
"""What says which text a token id stands for, in the formats that models come in."""


def _list(kind: pa.DataType, *, nullable: bool = False) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=nullable))


TARGET_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("token_ids", _list(pa.int32())),
        pa.field("token_bytes", _list(pa.binary(), nullable=True)),
        pa.field("token_logprobs", _list(pa.float32(), nullable=True), nullable=False),
        pa.field("token_ranks", _list(pa.int32(), nullable=True), nullable=False),
        pa.field("top_ids", _list(_list(pa.int32()))),
        pa.field("top_bytes", _list(_list(pa.binary(), nullable=True))),
        pa.field("top_logprobs", _list(_list(pa.float32())), nullable=False),
    ]
)
"""Lists over the tokens of a completion, the end-of-turn token among them where the server gives it. `token_…` is the
sampled token: its logprob is null where the server gives no value, its rank (from 1) where it is beyond the list.
`top_…` are the best tokens, sorted by logprob, then by id: at most `top_k`, never one that may not be among the best.
Ids are null where a server gives texts only, bytes where it gives ids only."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogprobs:
    """What a teacher says of the n tokens of one answer, and of the m best tokens of all positions together.

    Attributes:
        ids: of the sampled tokens, int32[n]; None: the server gives texts only.
        texts: their bytes, n of them; None: it gives ids only; a single None: not of this token.
        logprobs: theirs, float32[n]; NaN where the server gives no value.
        ranks: theirs among all tokens, from 1, int32[n]; 0: unknown, beyond the list.
        sizes: number of best tokens at each position, int32[n].
        top_ids: int32[m], positions behind each other, the best first; None as for `ids`.
        top_texts: m of them; None as for `texts`.
        top_logprobs: float32[m].
    """

    ids: npt.NDArray[np.int32] | None
    texts: tuple[bytes | None, ...] | None
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32] | None
    top_texts: tuple[bytes | None, ...] | None
    top_logprobs: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.logprobs)


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What holds for all rows of a file, written into its schema's metadata.

    Attributes:
        top_k: tokens per position at most.
        tokenizers: teacher -> sha256 (64 hex digits) of the files that say what its ids mean; None: unknown.
        scales: teacher -> what the temperature does to its logprobs (teacher/temperature.py); None: never tried.
    """

    top_k: int
    tokenizers: Mapping[str, str | None]
    scales: Mapping[str, str | None]

    def json(self) -> dict[str, Json]:
        """The facts, for the manifest too."""
        return {"top_k": self.top_k, "tokenizers": {**self.tokenizers}, "scales": {**self.scales}}

    def metadata(self) -> dict[str, bytes]:
        """The facts as JSON texts."""
        return {name: canonical_json(value) for name, value in self.json().items()}


class TargetWriter:
    """Writes `out/targets/part-*.parquet`. A context manager; `written()` after the block, then see `count_in`."""

    def __init__(self, out: Path, facts: TargetFacts, *, shard_rows: int = SHARD_ROWS) -> None:
        schema = TARGET_SCHEMA.with_metadata(facts.metadata())
        self._schema = schema
        self._writer = ShardWriter(out / FOLDER, schema, shard_rows=shard_rows)

    def __enter__(self) -> "TargetWriter":
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.__exit__(kind, error, at)

    def write(self, row_ids: Sequence[str], answers: Sequence[TokenLogprobs]) -> None:
        """Add rows, in the order of the kept rows."""
        if len(row_ids) > 0:
            self._writer.write(target_table(row_ids, answers).replace_schema_metadata(self._schema.metadata))

    def written(self) -> Written:
        """What was written; valid after the `with` block."""
        return self._writer.written()


def count_in(rows: str, targets: str) -> str:
    """Content digest of an artefact with soft targets, from that of its rows and that of the targets."""
    return digest_json({"rows": rows, "targets": targets})


def target_table(row_ids: Sequence[str], answers: Sequence[TokenLogprobs]) -> pa.Table:
    """A table of `TARGET_SCHEMA`.

    Raises:
        ValueError: there are more rows than answers, or the other way round.
    """
    if len(row_ids) != len(answers):
        raise ValueError(f"{len(row_ids)} rows, but targets of {len(answers)}")
    tokens = _offsets([len(each) for each in answers])
    sizes = np.concatenate([each.sizes for each in answers]) if answers else np.empty(0, np.int32)
    tops = pa.array(_offsets(sizes), pa.int32())
    logprobs = np.concatenate([each.logprobs for each in answers])
    ranks = np.concatenate([each.ranks for each in answers])
    columns = {
        "row_id": pa.array(row_ids, pa.string()),
        "token_ids": _lists([each.ids for each in answers], pa.int32()),
        "token_bytes": _lists([each.texts for each in answers], pa.binary()),
        "token_logprobs": _list_of(tokens, pa.array(logprobs, pa.float32(), mask=np.isnan(logprobs))),
        "token_ranks": _list_of(tokens, pa.array(ranks, pa.int32(), mask=ranks == 0)),
        "top_ids": _nested([each.top_ids for each in answers], answers, pa.int32()),
        "top_bytes": _nested([each.top_texts for each in answers], answers, pa.binary()),
        "top_logprobs": _list_of(
            tokens, pa.ListArray.from_arrays(tops, np.concatenate([each.top_logprobs for each in answers]))
        ),
    }
    return pa.table({name: column.cast(TARGET_SCHEMA.field(name).type) for name, column in columns.items()}).cast(
        TARGET_SCHEMA
    )


def _offsets(lengths: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _list_of(offsets: npt.NDArray[np.int32], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


Values = npt.NDArray[np.int32] | tuple[bytes | None, ...] | None


def _lists(values: Sequence[Values], kind: pa.DataType) -> pa.ListArray:
    """A list for each answer; null where it has None."""
    flat = [pa.array(each, kind) for each in values if each is not None]
    ends = _offsets([0 if each is None else len(each) for each in values])
    offsets = pa.array(ends, pa.int32(), mask=np.array([*(each is None for each in values), False]))
    return pa.ListArray.from_arrays(offsets, pa.concat_arrays(flat) if flat else pa.array([], kind))


def _nested(values: Sequence[Values], answers: Sequence[TokenLogprobs], kind: pa.DataType) -> pa.ListArray:
    """A list of lists for each answer; null where it has None."""
    known = [(each, answer.sizes) for each, answer in zip(values, answers, strict=True) if each is not None]
    flat = [pa.array(each, kind) for each, _ in known]
    sizes = np.concatenate([size for _, size in known]) if known else np.empty(0, np.int32)
    inner = _list_of(_offsets(sizes), pa.concat_arrays(flat) if flat else pa.array([], kind))
    counts = [0 if each is None else len(answer) for each, answer in zip(values, answers, strict=True)]
    offsets = pa.array(_offsets(counts), pa.int32(), mask=np.array([*(each is None for each in values), False]))
    return pa.ListArray.from_arrays(offsets, inner)


def read_targets(folder: Path) -> Iterator[tuple[str, TokenLogprobs]]:
    """Each row's id and soft targets, from a folder `targets`; one shard in memory.

    Raises:
        CorruptArtefact: a file is damaged.
    """
    for table in read_shards(folder):
        yield from targets_of(table)


def targets_of(table: pa.Table) -> Iterator[tuple[str, TokenLogprobs]]:
    """The rows of a table of `TARGET_SCHEMA`."""
    for row in table.to_pylist():
        tops: list[list[float]] = row["top_logprobs"]
        ids, texts = row["top_ids"], row["top_bytes"]
        yield (
            row["row_id"],
            TokenLogprobs(
                ids=_int32(row["token_ids"]),
                texts=None if row["token_bytes"] is None else tuple(row["token_bytes"]),
                logprobs=np.array([np.nan if value is None else value for value in row["token_logprobs"]], np.float32),
                ranks=np.array([value or 0 for value in row["token_ranks"]], np.int32),
                sizes=np.array([len(each) for each in tops], np.int32),
                top_ids=None if ids is None else _int32([id_ for each in ids for id_ in each]),
                top_texts=None if texts is None else tuple(text for each in texts for text in each),
                top_logprobs=np.array([value for each in tops for value in each], np.float32),
            ),
        )


def _int32(values: list[int] | None) -> npt.NDArray[np.int32] | None:
    return None if values is None else np.array(values, np.int32)


def tokenizer_digest(folder: Path) -> str | None:
    """sha256 (64 hex digits) of a model's tokenizer files, which decide what its ids mean; None: there are none."""
    paths = [path for path in (folder / name for name in TOKENIZER_FILES) if path.is_file()]
    if paths and paths[0].name == TOKENIZER_FILES[0]:
        paths = paths[:1]  # it holds everything; beside it others are copies for older loaders
    return digest_json({path.name: file_sha256(path) for path in paths}) if paths else None
