"""The data set's shards as token shards: encoded once, by one process, and memory-mapped by all of them."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config_train import END_TOKENS
from pipeline.core.errors import UsageError
from pipeline.core.record import ShardWriter, count_rows, read_shards
from pipeline.student.checks import Checks
from pipeline.student.jobs import TrainJob
from pipeline.student.order import Indices
from pipeline.student.process import write_json
from pipeline.student.text_path import TextPath
from pipeline.student.tokenise import Encoded, load_tokenizer, most_positions, plain_messages, read_json, stop_ids
from pipeline.student.turns import without_ends

TOKENS: Final = pa.schema(
    [("row_id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))]
)
REJECTS: Final = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("row_id", "prompt_set", "prompt_id", "reason")]
)
BATCH_ROWS: Final = 1024
WAIT_S: Final = 0.5
NAMED: Final = 3
USUAL: Final = 0.5
"""Share of a teacher's rows that end with an end token, from which on it is taken for the teacher's own."""

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


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes the splits of one data set for one student.

    Attributes:
        data: see `TrainJob`.
        path: from messages to ids.
        limit: see `length_limit`.
        ends: see `end_tokens_of`.
    """

    data: Path
    path: TextPath
    limit: int
    ends: Mapping[str, tuple[str, ...]] | None

    @classmethod
    def of(cls, job: TrainJob) -> "Encoder":
        """The encoder of a training.

        Raises:
            UsageError: model or tokenizer cannot be used.
        """
        tokenizer = load_tokenizer(job.student.model, job.student.revision)
        stops = stop_ids(job.student.model, job.student.revision, tokenizer)
        limit, ends = length_limit(job), end_tokens_of(job)
        given = job.train.end_tokens if ends is None else ()
        path = TextPath.of(tokenizer, stops, reasoning=job.train.reasoning, end_tokens=given)
        return cls(job.data, path, limit, ends)

    def batches(self, split: str) -> Iterator[tuple[pa.Table, list[Encoded | str]]]:
        """Batches of a split with their encoded rows, or the reason why a row cannot be trained."""
        for shard in read_shards(self.data, stem=f"{split}-"):  # all columns: where no row has tools there is none
            for start in range(0, shard.num_rows, BATCH_ROWS):
                table = shard.slice(start, BATCH_ROWS)
                prompts = [plain_messages(messages) for messages in table["prompt"].to_pylist()]
                completions = [plain_messages(messages) for messages in table["completion"].to_pylist()]
                finished = [reason != "length" for reason in table["finish_reason"].to_pylist()]
                tools = table["tools"].to_pylist() if "tools" in table.column_names else None
                teachers = table["teacher"].to_pylist()
                cut = None if self.ends is None else [self.ends.get(teacher, ()) for teacher in teachers]
                rows = self.path.encode(prompts, completions, tools, cut)
                yield table, [_verdict(row, ok, self.limit) for row, ok in zip(rows, finished, strict=True)]


def no_check(tokens: Tokens) -> None:
    """For `encode_shards`: all rows are fine."""


def encode_shards(job: TrainJob, check: Callable[[Tokens], None] = no_check) -> Tokens:
    """Encode the data set into `workdir` and write the rejected rows' ids to `out/rejects/`; one process does it.

    Validation rows that cannot be used are left out without being counted as rejected: they only measure the loss.

    Args:
        check: called when all is encoded and before the other processes learn of it, which then would go on; it may
            refuse.

    Raises:
        UsageError: model or tokenizer cannot be used, the template refuses every row, or what `check` raises.
    """
    encoder = Encoder.of(job)
    path = encoder.path
    rows_in = count_rows(job.data.glob("train-*.parquet"))
    checks, rejected = Checks(rows_in=rows_in, length_limit=encoder.limit), Counter[str]()
    with (
        pa.OSFile(str(train_file(job)), "wb") as file,
        pa.ipc.new_stream(file, TOKENS) as writer,
        ShardWriter(job.out / "rejects", REJECTS) as rejects,
    ):
        for table, rows in encoder.batches("train"):
            _sort_out(table, rows, rejects, rejected)
            for row, teacher_tokens in zip(rows, table["completion_tokens"].to_pylist(), strict=True):
                if isinstance(row, Encoded):
                    checks.add(row, path.stops, path.tokenizer.bos_token_id, teacher_tokens)
            writer.write_table(_tokens(table, rows))
    for reason, count in rejected.items():
        checks.reject(reason, count)
    _refuse_if_all_are(job, path, rejected, rows_in)
    counted = dict(sorted(rejected.items()))
    validation_rows = _encode_validation(job, encoder)
    tokens = Tokens(job.launch, rows_in, counted, validation_rows, checks.facts(), path.stops)
    check(tokens)
    write_json(job.workdir / "tokens.json", {**asdict(tokens), "stops": list(path.stops)})
    return tokens


def _refuse_if_all_are(job: TrainJob, path: TextPath, rejected: Counter[str], rows_in: int) -> None:
    if path.refusal is None or rejected["template_refuses"] < rows_in:
        return
    first = next(read_shards(job.out / "rejects"))["row_id"].to_pylist()[:NAMED]
    what = f"{path.refusal.what}; it refuses all {rows_in:,} rows"
    raise UsageError(what, where=f"{path.refusal.where}: rows {', '.join(first)}", todo=path.refusal.todo)


def end_tokens_of(job: TrainJob) -> Mapping[str, tuple[str, ...]] | None:
    """Teacher -> the end tokens that are cut off its rows; None: `train.end_tokens` are cut off all rows.

    Rows that the teacher's cap cut have no end and do not count.
    """
    if job.train.end_tokens != "auto":
        return None
    rows, ended = Counter[str](), Counter[tuple[str, str]]()
    for table in read_shards(job.data, ["teacher", "completion", "finish_reason"], stem="train-"):
        whole = table.filter(pc.not_equal(table["finish_reason"], "length"))
        last = pc.list_parent_indices(whole["completion"])
        contents = pc.struct_field(pc.list_flatten(whole["completion"]), "content").to_pylist()
        content_of = dict(zip(last.to_pylist(), contents, strict=True))  # the last turn of each row
        for at, teacher in enumerate(whole["teacher"].to_pylist()):
            rows[teacher] += 1
            _, found = without_ends(content_of.get(at, ""), END_TOKENS)
            ended.update((teacher, token) for token in {*found})
    return {
        teacher: tuple(token for token in END_TOKENS if ended[teacher, token] >= USUAL * count)
        for teacher, count in rows.items()
    }


def length_limit(job: TrainJob) -> int:
    """Tokens of the longest row that may be trained: `train.max_length`, or the student's positions if they are fewer.

    Raises:
        UsageError: the student's config cannot be loaded.
    """
    positions = most_positions(job.student.model, job.student.revision)
    return job.train.max_length if positions is None else min(job.train.max_length, positions)


def rejected_validation(job: TrainJob) -> Counter[str]:
    """How many validation rows cannot be used, for each reason; they are encoded for that.

    Raises:
        UsageError: as `encode_shards`.
    """
    batches = Encoder.of(job).batches("validation")
    return Counter(row for _, rows in batches for row in rows if isinstance(row, str))


def _encode_validation(job: TrainJob, encoder: Encoder) -> int:
    wanted, written = job.train.evaluation.rows, 0
    with pa.OSFile(str(validation_file(job)), "wb") as file, pa.ipc.new_stream(file, TOKENS) as writer:
        for table, rows in encoder.batches("validation"):
            part = _tokens(table, rows).slice(0, wanted - written)
            writer.write_table(part)
            written += part.num_rows
            if written >= wanted:
                break
    return written


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


def _tokens(table: pa.Table, rows: list[Encoded | str]) -> pa.Table:
    """The rows of a batch that are trained."""
    ids = table["row_id"].to_pylist()
    kept = [(row_id, row.ids, row.labels) for row_id, row in zip(ids, rows, strict=True) if isinstance(row, Encoded)]
    columns = [list(column) for column in zip(*kept, strict=True)] or [[], [], []]
    return pa.table(dict(zip(TOKENS.names, columns, strict=True)), schema=TOKENS)


def await_tokens(job: TrainJob, *, is_first: bool, check: Callable[[Tokens], None] = no_check) -> Tokens:
    """Encode the data set in the first process of a launch; in the others wait until it is done.

    No process group exists yet, so nothing times out while a large set is encoded. If the first process fails, the
    launcher ends the others.
    """
    if is_first:
        (job.workdir / "tokens.json").unlink(missing_ok=True)
        return encode_shards(job, check)
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


def row_ids_of(path: Path, indices: Sequence[int]) -> list[str]:
    """The data set's ids of some encoded rows, by their places in the file."""
    with pa.memory_map(str(path)) as file:
        column = pa.ipc.open_stream(file).read_all()["row_id"]
    return [str(column[at]) for at in map(int, indices)]
