"""The data set's shards as token shards: encoded once, by one process, and memory-mapped by all of them."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.core.errors import UsageError
from pipeline.core.record import ShardWriter, count_rows, read_shards
from pipeline.student.jobs import TrainJob
from pipeline.student.order import Indices
from pipeline.student.process import write_json
from pipeline.student.tokenise import (
    Checks,
    Encoded,
    encode,
    load_tokenizer,
    most_positions,
    plain_messages,
    read_json,
    stop_ids,
)

TOKENS: Final = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
REJECTS: Final = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("row_id", "prompt_set", "prompt_id", "reason")]
)
COLUMNS: Final = ("row_id", "prompt_set", "prompt_id", "prompt", "completion", "finish_reason")
BATCH_ROWS: Final = 1024
WAIT_S: Final = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What was encoded; `tokens.json` beside the shards, written last.

    Attributes:
        launch: see `TrainJob`.
        rows_in: training rows of the data set.
        rejected: reason -> training rows that are not trained.
        validation_rows: encoded validation rows.
        checks: see `Checks.facts`.
        stops: ids of the tokens that end a generation.
    """

    launch: str
    rows_in: int
    rejected: dict[str, int]
    validation_rows: int
    checks: dict[str, int | float]
    stops: tuple[int, ...]


def train_file(job: TrainJob) -> Path:
    """Encoded training rows, an Arrow stream."""
    return job.workdir / "train.arrow"


def validation_file(job: TrainJob) -> Path:
    """Encoded validation rows, an Arrow stream."""
    return job.workdir / "validation.arrow"


def encode_shards(job: TrainJob) -> Tokens:
    """Encode the data set into `workdir` and write the rejected rows' ids to `out/rejects/`; one process does it.

    Validation rows that cannot be used are left out without being counted as rejected: they only measure the loss.

    Raises:
        UsageError: the rows are not fit for training, see `Checks.require_trainable`.
    """
    tokenizer = load_tokenizer(job.student.model, job.student.revision)
    stops = stop_ids(job.student.model, job.student.revision, tokenizer)
    limit = length_limit(job)
    checks, rejected = Checks(length_limit=limit), Counter[str]()
    with (
        pa.OSFile(str(train_file(job)), "wb") as file,
        pa.ipc.new_stream(file, TOKENS) as writer,
        ShardWriter(job.out / "rejects", REJECTS) as rejects,
    ):
        for table, rows in _encoded(job, "train", tokenizer, stops, limit):
            _sort_out(table, rows, rejects, rejected)
            kept = [row for row in rows if isinstance(row, Encoded)]
            for row in kept:
                checks.add(row, stops, tokenizer.bos_token_id)
            writer.write_table(_tokens(kept))
    checks.prompt_not_prefix = rejected["prompt_not_prefix"]
    checks.reasoning_dropped = rejected["reasoning_dropped"]
    checks.special_token = rejected["special_token"]
    checks.require_trainable(tokenizer, stops, job.student.model, rejected)
    rows_in = count_rows(job.data.glob("train-*.parquet"))
    counted = dict(sorted(rejected.items()))
    validation_rows = _encode_validation(job, tokenizer, stops, limit)
    tokens = Tokens(job.launch, rows_in, counted, validation_rows, checks.facts(), stops)
    write_json(job.workdir / "tokens.json", {**asdict(tokens), "stops": list(stops)})
    return tokens


def length_limit(job: TrainJob) -> int:
    """Tokens of the longest row that may be trained: `train.max_length`, or the student's positions if they are fewer.

    Raises:
        UsageError: the student's config cannot be loaded.
    """
    positions = most_positions(job.student.model, job.student.revision)
    return job.train.max_length if positions is None else min(job.train.max_length, positions)


def _encode_validation(job: TrainJob, tokenizer: Any, stops: tuple[int, ...], limit: int) -> int:
    wanted = job.train.evaluation.rows
    kept: list[Encoded] = []
    for _, rows in _encoded(job, "validation", tokenizer, stops, limit):
        if len(kept) >= wanted:
            break
        kept += [row for row in rows if isinstance(row, Encoded)]
    with pa.OSFile(str(validation_file(job)), "wb") as file, pa.ipc.new_stream(file, TOKENS) as writer:
        writer.write_table(_tokens(kept[:wanted]))
    return min(len(kept), wanted)


def _encoded(
    job: TrainJob, split: str, tokenizer: Any, stops: tuple[int, ...], limit: int
) -> Iterator[tuple[pa.Table, list[Encoded | str]]]:
    """Batches of a split with their encoded rows, or the reason why a row cannot be trained."""
    for shard in read_shards(job.data, list(COLUMNS), stem=f"{split}-"):
        for start in range(0, shard.num_rows, BATCH_ROWS):
            table = shard.slice(start, BATCH_ROWS)
            prompts = [plain_messages(messages) for messages in table["prompt"].to_pylist()]
            completions = [plain_messages(messages) for messages in table["completion"].to_pylist()]
            finished = [reason != "length" for reason in table["finish_reason"].to_pylist()]
            rows = zip(encode(tokenizer, prompts, completions, stops), finished, strict=True)
            yield table, [_verdict(row, ok, limit) for row, ok in rows]


def _verdict(row: Encoded | str, finished: bool, limit: int) -> Encoded | str:
    """The row, or why it is not trained. A completion that was cut off would be taught as if it were whole."""
    if isinstance(row, str):
        return row
    if len(row.ids) > limit:
        return "over_length"
    return row if finished else "unfinished"


def _sort_out(table: pa.Table, rows: list[Encoded | str], writer: ShardWriter, rejected: Counter[str]) -> None:
    at = [index for index, row in enumerate(rows) if isinstance(row, str)]
    reasons = [row for row in rows if isinstance(row, str)]
    rejected.update(reasons)
    ids = table.select(["row_id", "prompt_set", "prompt_id"]).take(pa.array(at, pa.int64()))
    writer.write(ids.append_column("reason", pa.array(reasons, pa.string())))


def _tokens(rows: list[Encoded]) -> pa.Table:
    columns = [[list(row.ids) for row in rows], [row.labels for row in rows]]
    return pa.table(dict(zip(TOKENS.names, columns, strict=True)), schema=TOKENS)


def await_tokens(job: TrainJob, *, is_first: bool) -> Tokens:
    """Encode the data set in the first process of a launch; in the others wait until it is done.

    No process group exists yet, so nothing times out while a large set is encoded. If the first process fails, the
    launcher ends the others.
    """
    if is_first:
        (job.workdir / "tokens.json").unlink(missing_ok=True)
        return encode_shards(job)
    return await_file(job.workdir / "tokens.json", lambda value: value["launch"] == job.launch, _tokens_of)


def await_file(path: Path, is_ours: Callable[[Any], bool], read: Callable[[Any], T]) -> T:
    """Wait for a JSON file that another process writes by rename, and read it."""
    while True:
        if path.is_file():
            value = read_json(path)
            if is_ours(value):
                return read(value)
        time.sleep(WAIT_S)


def _tokens_of(value: dict[str, Any]) -> Tokens:
    return Tokens(**{**value, "stops": tuple(value["stops"])})


def lengths_of(path: Path) -> tuple[Indices, Indices]:
    """Tokens and trained tokens of each encoded row, in the order of the file."""
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    lengths: list[Indices] = []
    trained: list[Indices] = []
    for chunk in table["labels"].chunks:
        values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        counts = np.concatenate([[0], np.cumsum(values >= 0)])
        lengths.append(np.diff(offsets).astype(np.int64))
        trained.append((counts[offsets[1:]] - counts[offsets[:-1]]).astype(np.int64))
    if not lengths:
        raise UsageError("no row is left to train on", where=str(path), todo="see rejects/ of the stages before")
    return np.concatenate(lengths), np.concatenate(trained)
