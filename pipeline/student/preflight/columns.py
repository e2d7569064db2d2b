"""Whether the shards of a data set are alike, and are conversations: readers look at the first row only."""

from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import CorruptArtefact, boundary
from pipeline.core.record import shard_paths
from pipeline.student.preflight.findings import Finding, fine, flawed

CONVERSATIONS: Final = ("prompt", "completion")
FIX: Final = "make the data set anew: python -m pipeline dataset CONFIG --force; its shards are lists of messages"


def check_columns(data: Path) -> Finding:
    """PF07: `prompt` and `completion` of every shard are lists of messages with the same fields.

    Raises:
        CorruptArtefact: a shard's schema cannot be read.
    """
    paths = [path for split in ("train", "validation") for path in shard_paths(data, stem=f"{split}-")]
    seen: dict[str, pa.DataType] = {}
    figure = f"{len(paths):,} shards"
    for path in paths:
        schema = _schema(path)
        for name in CONVERSATIONS:
            if name not in schema.names:
                return flawed("PF07", "error", figure, f"{path.name} has no column {name!r}", fix=FIX)
            kind = schema.field(name).type
            if not is_messages(kind):
                message = f"{name!r} of {path.name} is {kind}, no list of messages with role and content"
                return flawed("PF07", "error", figure, message, fix=FIX)
            if fields_of(seen.setdefault(name, kind)) != fields_of(kind):
                there, here = (", ".join(sorted(fields_of(each))) for each in (seen[name], kind))
                message = f"messages of {name!r} have the fields {here} in {path.name} and {there} in {paths[0].name}"
                return flawed("PF07", "error", figure, message, fix=FIX)
    return fine("PF07", figure)


def _schema(path: Path) -> pa.Schema:
    with boundary(CorruptArtefact, "a shard cannot be read", where=str(path), todo="run again: it will be rebuilt"):
        return pq.read_schema(path)


def is_messages(kind: pa.DataType) -> bool:
    """Whether a column holds lists of structs with texts `role` and `content`."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    fields = fields_of(kind)
    return all(fields.get(name) in ("string", "large_string") for name in ("role", "content"))


def fields_of(kind: pa.DataType) -> dict[str, str]:
    """Name -> type of the messages' fields."""
    message = kind.value_type
    return {message.field(at).name: str(message.field(at).type) for at in range(message.num_fields)}
