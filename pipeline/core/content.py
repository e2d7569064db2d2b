"""Content digests of Arrow tables: equal rows give equal digests, whatever the shards, chunks or dictionaries."""

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK_ROWS = 8192
"""Rows per block; fixed for ever, since it is part of every digest."""


class ContentDigest:
    """Digest of a stream of rows that all have one schema.

    Rows are cut into blocks of `BLOCK_ROWS`. A block's digest is the sha256 over its columns in schema order, each as
    (name, type, validity, int64 lengths, values); the content digest is the sha256 over the list of block digests.
    NaN payloads and negative zero are not made equal.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._blocks = hashlib.sha256()
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def update(self, table: pa.Table) -> None:
        """Add rows. The table's columns must be the schema's, in any chunking."""
        self._pending.append(table.select(self._schema.names))
        self._pending_rows += table.num_rows
        if self._pending_rows < BLOCK_ROWS:
            return
        whole = pa.concat_tables(self._pending)
        blocks = whole.num_rows // BLOCK_ROWS
        for block in range(blocks):
            self._blocks.update(_block_digest(whole.slice(block * BLOCK_ROWS, BLOCK_ROWS)))
        rest = whole.slice(blocks * BLOCK_ROWS)
        self._pending, self._pending_rows = [rest], rest.num_rows

    def hexdigest(self) -> str:
        """64 hex digits over all rows so far; more rows may follow."""
        final = self._blocks.copy()
        if self._pending_rows > 0:
            final.update(_block_digest(pa.concat_tables(self._pending)))
        return final.hexdigest()


def table_digest(schema: pa.Schema, tables: Iterable[pa.Table]) -> str:
    """Content digest of the rows of `tables` in order; see `ContentDigest`."""
    digest = ContentDigest(schema)
    for table in tables:
        digest.update(table)
    return digest.hexdigest()


def _block_digest(block: pa.Table) -> bytes:
    hasher = hashlib.sha256()
    for name, column in zip(block.column_names, block.columns, strict=True):
        hasher.update(name.encode() + b"\0")
        _feed(hasher, column.combine_chunks())
    return hasher.digest()


def _feed(hasher: "hashlib._Hash", array: pa.Array) -> None:
    """Feed one array: type, length, validity, then lengths and values in a form free of offsets and padding."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks != 1 else array.chunk(0)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    hasher.update(f"{_type_name(kind)}:{len(array)}\0".encode())
    hasher.update(b"\1" + _bytes(array.is_valid()) if array.null_count else b"\0")
    if pa.types.is_struct(kind):
        for field, child in zip(kind, array.flatten(), strict=True):
            hasher.update(field.name.encode() + b"\0")
            _feed(hasher, child)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hasher.update(_bytes(pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64())))
        _feed(hasher, array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        filled = pc.fill_null(array, "" if not pa.types.is_binary(kind) else b"")
        hasher.update(_bytes(pc.binary_length(filled).cast(pa.int64())))
        hasher.update(b"".join(_values(filled)))
    elif pa.types.is_boolean(kind):
        hasher.update(_bytes(pc.fill_null(array, False)))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        hasher.update(_bytes(pc.fill_null(array, 0)))
    elif not pa.types.is_null(kind):
        raise TypeError(f"no content digest for the Arrow type {kind}")


def _type_name(kind: pa.DataType) -> str:
    """Name of a type in which offsets' width and dictionary encoding do not count."""
    if pa.types.is_large_string(kind) or pa.types.is_string(kind):
        return "string"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list"
    return f"struct<{kind.num_fields}>" if pa.types.is_struct(kind) else str(kind)


def _bytes(array: pa.Array) -> bytes:
    """Fixed-width values as little-endian bytes; booleans as one byte each."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    values: np.ndarray = array.to_numpy(zero_copy_only=False)
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _values(array: pa.Array) -> Iterable[bytes]:
    """The value bytes of a string array without nulls, rebased to its own slice."""
    width = "<i8" if pa.types.is_large_string(array.type) else "<i4"
    _, offsets, data = array.buffers()
    if data is None or len(array) == 0:
        return
    bounds = np.frombuffer(offsets, dtype=width, count=len(array) + array.offset + 1)
    yield data.slice(int(bounds[array.offset]), int(bounds[-1] - bounds[array.offset])).to_pybytes()
