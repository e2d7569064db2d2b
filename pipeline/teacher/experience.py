"""What a teacher's past attempts say of those to come: tokens per byte, tokens per answer, answers per second.

An attempt counts if it was answered, the server counted its tokens, and the answer is stored under the identity of the
very teacher. Not covered: answers that were imported (they have no attempts), answers by several servers where now
there are fewer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.teacher.budget import TEMPLATE_TOKENS
from pipeline.teacher.hits import FETCH_ROWS, KEY, Keys, key_column, places
from pipeline.teacher.segment import attempt_columns, open_segment, segment_paths
from pipeline.teacher.walk import folded_errors, folded_files, readable

LEAST: Final = 20
"""Attempts below which nothing is concluded."""
MOST: Final = 50_000
"""Attempts of each file that are looked at."""
LOW: Final = 0.1
"""Share of the attempts that took less than what is told as low."""
PAUSE_MS: Final = 60_000
"""A longer time without a request is a pause between two runs."""
LEAST_TIMED: Final = 200
"""Attempts below which a stretch of work says nothing of speed: what leaves first leaves all at once."""
COLUMNS: Final = ("key", "cap", "sent_ms", "outcome", "reserved_tokens", "input_tokens", "output_tokens")
NUMBERS: Final = ("cap", "sent_ms", "reserved_tokens", "input_tokens", "output_tokens")

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Experience:
    """What was seen.

    Attributes:
        attempts: how many it comes from.
        input_low, input_mean: prompt tokens per byte of a request's body; a tenth of the attempts took less than `low`.
        output_low, output_mean: tokens of an answer.
        per_second: answers, while it worked last; None: it never worked long enough to tell.
    """

    attempts: int
    input_low: float
    input_mean: float
    output_low: float
    output_mean: float
    per_second: float | None


@dataclass(frozen=True, slots=True)
class _Sample:
    """Answered attempts of one file.

    Attributes:
        keys: their request keys.
        columns: the `NUMBERS`.
        share: how many of the file's attempts they are, as a share.
    """

    keys: Keys
    columns: dict[str, Numbers]
    share: float

    @property
    def last_ms(self) -> int:
        """When the last of them left."""
        return int(self.columns["sent_ms"].max())

    def only(self, mask: npt.NDArray[np.bool_]) -> "_Sample":
        return _Sample(self.keys[mask], {name: each[mask] for name, each in self.columns.items()}, self.share)


def experience_with(folder: Path, identity: str, cap: int) -> Experience | None:
    """What the response store knows of a teacher; None: too little.

    Args:
        folder: `data/responses`; it may be missing.
        identity: of the teacher, 64 hex digits.
        cap: `max_tokens` of what is to be asked; longer answers count as if they were cut there.

    Raises:
        CorruptArtefact: a file is damaged.
        Incomplete: the disk fails, or a file disappears meanwhile.
    """
    with readable(folder):
        samples = [sample for sample in _samples(folder) if len(sample.keys) > 0]
        samples = [one for one in _answered_by(folder, identity, samples) if len(one.keys) > 0]
    attempts = sum(len(sample.keys) for sample in samples)
    if attempts < LEAST:
        return None
    columns = {name: np.concatenate([sample.columns[name] for sample in samples]) for name in NUMBERS}
    sizes = np.maximum(columns["reserved_tokens"] - columns["cap"] - TEMPLATE_TOKENS, 1)
    outputs = np.minimum(columns["output_tokens"], cap)
    rates = [(sample.last_ms, rate) for sample in samples if (rate := _per_second(sample)) is not None]
    return Experience(
        attempts=attempts,
        input_low=float(np.quantile(columns["input_tokens"] / sizes, LOW)),
        input_mean=float(columns["input_tokens"].sum() / sizes.sum()),
        output_low=float(np.quantile(outputs, LOW)),
        output_mean=float(outputs.mean()),
        per_second=max(rates)[1] if rates else None,
    )


def _samples(folder: Path) -> Iterator[_Sample]:
    """Answered attempts: of a segment the newest, of a folded file the first by key, which is as good as any."""
    for path in segment_paths(folder / "segments"):
        with open_segment(path) as db:
            if db is None:
                continue
            selected = attempt_columns(db, COLUMNS)
            query = f"SELECT {selected} FROM attempts WHERE outcome = 'answer' ORDER BY id DESC LIMIT {MOST}"
            rows = db.execute(query).fetchall()
        columns = [[row[at] for row in rows] for at in range(len(COLUMNS))]
        yield _sample(pa.table(dict(zip(COLUMNS, map(pa.array, columns), strict=True))), 1.0)
    for path in sorted((folder / "attempts").glob("*.parquet")):
        with folded_errors(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not {*COLUMNS} <= {*file.schema_arrow.names}:
                continue  # written before attempts were priced
            groups: list[int] = []
            count = 0
            while len(groups) < file.num_row_groups and count < MOST:
                count += file.metadata.row_group(len(groups)).num_rows
                groups.append(len(groups))
            table = file.read_row_groups(groups, columns=[*COLUMNS], use_threads=False)
            yield _sample(table, count / max(file.metadata.num_rows, 1))


def _sample(table: pa.Table, share: float) -> _Sample:
    if table.num_rows == 0:
        return _Sample(np.empty(0, KEY), {name: np.empty(0, np.int64) for name in NUMBERS}, share)
    told = pc.equal(table["outcome"].cast(pa.string()), "answer")
    for name in NUMBERS:
        told = pc.and_(told, pc.is_valid(table[name]))
    rows = table.filter(told)
    columns = {name: rows[name].cast(pa.int64()).to_numpy() for name in NUMBERS}
    keys = key_column(rows.set_column(0, "key", rows["key"].cast(pa.binary(32))))
    return _Sample(keys, columns, share)


def _answered_by(folder: Path, identity: str, samples: list[_Sample]) -> Iterator[_Sample]:
    """Of the samples the attempts whose answer is stored under the identity."""
    if not samples:
        return
    wanted = np.unique(np.concatenate([sample.keys for sample in samples]))
    is_its = np.zeros(len(wanted), np.bool_)
    for keys in _keys_of(folder, identity):
        at = places(wanted, keys)
        is_its[at[at >= 0]] = True
    for sample in samples:
        yield sample.only(is_its[places(wanted, sample.keys)])


def _keys_of(folder: Path, identity: str) -> Iterator[Keys]:
    """The keys of a teacher's stored answers, some at a time."""
    for path in segment_paths(folder / "segments"):
        with open_segment(path) as db:
            if db is None:
                continue
            cursor = db.execute("SELECT key FROM answers WHERE teacher = ?", (identity,))
            while rows := cursor.fetchmany(FETCH_ROWS):
                yield np.array([row[0] for row in rows], KEY)
    for path in folded_files(folder):
        with folded_errors(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(FETCH_ROWS, columns=["key", "teacher"], use_threads=False):
                is_its = pc.equal(batch["teacher"].cast(pa.string()), identity)
                yield key_column(pa.Table.from_batches([batch]).filter(is_its))


def _per_second(sample: _Sample) -> float | None:
    """Answered requests a second over the longest stretch of work, without its first and last tenth."""
    sent = np.sort(sample.columns["sent_ms"])
    stretches = np.split(sent, np.nonzero(np.diff(sent) > PAUSE_MS)[0] + 1)
    longest = max(stretches, key=len)
    if len(longest) < LEAST_TIMED:
        return None
    first, last = np.quantile(longest, (0.1, 0.9))
    return None if last <= first else float(0.8 * len(longest) / sample.share / (last - first) * 1000)
