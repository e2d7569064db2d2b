"""A few encoded rows with the messages they were made of: for checks that need both, and for a person to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import Any, Final

import pyarrow.compute as pc

from pipeline.core.columns import text_array
from pipeline.core.record import read_shards
from pipeline.core.stage import Json
from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.survey import read_blocks
from pipeline.student.shards import train_file
from pipeline.student.tokenise import IGNORED, plain_messages

SAMPLE_ROWS: Final = 64
"""The data set's order is decided by a hash, so that its first rows are a sample."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row that is trained.

    Attributes:
        row_id: its id.
        ids, labels: as they are in the token shard.
        teacher: who answered.
        tools: JSON text of the functions that it offers, or None.
        prompt, completion: its messages, without fields that are None.
    """

    row_id: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    teacher: str
    tools: str | None
    prompt: tuple[Mapping[str, Any], ...]
    completion: tuple[Mapping[str, Any], ...]

    @property
    def start(self) -> int:
        """Where the first label is that counts; the number of ids if none does."""
        return next((at for at, label in enumerate(self.labels) if label != IGNORED), len(self.labels))

    @property
    def trained(self) -> tuple[int, ...]:
        """The labels that count."""
        return tuple(label for label in self.labels if label != IGNORED)


def read_sample(job: TrainJob, rows: int = SAMPLE_ROWS) -> tuple[SampleRow, ...]:
    """The first rows that are trained, with their messages."""
    encoded = {
        row["row_id"]: row
        for row in islice((row for batch in read_blocks(train_file(job)) for row in batch.to_pylist()), rows)
    }
    wanted, found = text_array([*encoded]), dict[str, dict[str, Any]]()
    for table in read_shards(job.data, stem="train-"):  # a data set without tools has no such column to ask for
        if len(found) == len(encoded):
            break
        for row in table.filter(pc.is_in(table["row_id"], value_set=wanted)).to_pylist():
            found[row["row_id"]] = row
    return tuple(
        SampleRow(
            row_id,
            tuple(row["input_ids"]),
            tuple(row["labels"]),
            str(found[row_id]["teacher"]),
            found[row_id].get("tools"),
            tuple(plain_messages(found[row_id]["prompt"])),
            tuple(plain_messages(found[row_id]["completion"])),
        )
        for row_id, row in encoded.items()
        if row_id in found
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of tokens that follow each other and are treated alike."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """A row as a person reads it."""

    row_id: str
    tokens: int
    trained: int
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Json]:
        """The row for a file."""
        pieces: list[Json] = [asdict(piece) for piece in self.pieces]
        return {"row_id": self.row_id, "tokens": self.tokens, "trained": self.trained, "pieces": pieces}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Shown":
        """What `to_json` gave."""
        return cls(**{**value, "pieces": tuple(Piece(**piece) for piece in value["pieces"])})


def show(tokenizer: Any, rows: Sequence[SampleRow]) -> list[Shown]:
    """Rows as text, cut where trained and masked tokens, or special and plain ones, meet."""
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return [_show(tokenizer, row, special) for row in rows]


def _show(tokenizer: Any, row: SampleRow, special: set[int]) -> Shown:
    tokens = [(id_, label != IGNORED, id_ in special) for id_, label in zip(row.ids, row.labels, strict=True)]
    pieces = []
    for (trained, is_special), run in groupby(tokens, key=lambda token: token[1:]):
        ids = [token[0] for token in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append(Piece(text, trained, is_special))
    return Shown(row.row_id, len(row.ids), len(row.trained), tuple(pieces))
