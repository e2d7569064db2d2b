"""Rows of a prompt source, one at a time, with the place each comes from."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.config_prompts import FileSource, HubSource
from pipeline.core.errors import UsageError, boundary

BATCH_ROWS = 1024
MAX_LINE_BYTES = 64 * 2**20
MAX_CSV_FIELD = 16 * 2**20


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as the source has it.

    Attributes:
        place: file and line (or data set and row), for error messages.
        values: the row's columns.
    """

    place: str
    values: dict[str, Any]


def read_source(source: FileSource | HubSource, columns: Sequence[str] | None) -> Iterator[SourceRow]:
    """The rows of a source, in its order.

    Args:
        source: where they are.
        columns: the columns that are needed; None: all. A hint: more may come, and missing ones just do not.

    Raises:
        UsageError: the source is missing, or a line of it cannot be read.
    """
    if isinstance(source, HubSource):
        return _read_hub(source)
    if source.kind == "jsonl":
        return _read_jsonl(source.path)
    return _read_csv(source.path) if source.kind == "csv" else _read_parquet(source.path, columns)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        todo = "check the path; it is taken from the current folder"
        raise UsageError(f"cannot read the prompts: {error.strerror}", where=str(path), todo=todo) from error
    with file:
        yield file


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """The lines of a UTF-8 text, with their ends, without a byte order mark."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise UsageError("the line is longer than 64 MiB", where=place, todo="split or remove it")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"not UTF-8 text: {error.reason}", where=place, todo="save the file as UTF-8") from error
        yield text.removeprefix("\ufeff") if number == 1 else text


def _read_jsonl(path: Path) -> Iterator[SourceRow]:
    with _opened(path) as file:
        for number, line in enumerate(_lines(path, file), 1):
            if line.strip() == "":
                continue
            place = f"{path}:{number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                todo = "one JSON object a line; correct or remove this line"
                raise UsageError(f"not JSON: {_json_problem(error)}", where=place, todo=todo) from error
            if not isinstance(values, dict):
                todo = 'write it as {"id": …, "prompt": …}'
                raise UsageError(f"the line holds {kind_of(values)}, not an object", where=place, todo=todo)
            yield SourceRow(place, values)


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} (character {error.pos + 1})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def kind_of(value: Any) -> str:
    """What a value of a row is, in words, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (str, "a text"),
        ((int, float), "a number"),
        (list, "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "a value of another kind")


def _read_csv(path: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(MAX_CSV_FIELD)
    with _opened(path) as file:
        reader = csv.reader(_lines(path, file), strict=True)
        header: list[str] | None = None
        for cells in _csv_rows(path, reader):
            place = f"{path}:{reader.line_num}"
            if header is None:
                header = cells
                _check_header(header, place)
            elif len(cells) == len(header):
                yield SourceRow(place, dict(zip(header, cells, strict=True)))
            else:
                todo = "quote cells that hold commas or line breaks"
                what = f"{len(cells)} cells under a header of {len(header)}"
                raise UsageError(what, where=place, todo=todo)


def _csv_rows(path: Path, reader: "csv._reader") -> Iterator[list[str]]:  # type: ignore[name-defined]
    """The rows that are not blank lines."""
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            todo = "correct the quoting of this line"
            raise UsageError(f"not CSV: {error}", where=f"{path}:{reader.line_num}", todo=todo) from error
        if cells:
            yield cells


def _check_header(header: Sequence[str], place: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UsageError(f"the header names {twice} twice", where=place, todo="give each column its own name")


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[SourceRow]:
    with _opened(path) as raw, _readable(str(path)):
        file = pq.ParquetFile(raw)
        present = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        if present == []:
            present = None
        yield from _rows_of(str(path), file.iter_batches(batch_size=BATCH_ROWS, columns=present))


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Arrow's errors about a damaged or foreign file."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        todo = "check that it is an undamaged parquet file with text in UTF-8"
        raise UsageError(f"not readable as parquet: {error}", where=where, todo=todo) from error


def _rows_of(source: str, batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[SourceRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield SourceRow(f"{source}, row {number}", values)


def _read_hub(source: HubSource) -> Iterator[SourceRow]:
    name = source.dataset if source.config is None else f"{source.dataset} ({source.config})"
    where = f"data set {name}, split {source.split}, revision {source.revision}"
    if find_spec("datasets") is None:
        todo = "install it: pip install -e '.[train]'"
        raise UsageError("hub data sets need the package `datasets`", where=where, todo=todo)
    if Path(source.dataset).exists():
        todo = "run in another folder, or read the local one with kind jsonl, csv or parquet"
        raise UsageError("the current folder holds something of this name, which would be read", where=where, todo=todo)
    return _load_hub(source, where)


def _load_hub(source: HubSource, where: str) -> Iterator[SourceRow]:
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # read on import; reading tells the hub who reads what
    import datasets  # heavy, and needed for hub sources only

    todo = "check the id, config, split and revision, and that the hub can be reached"
    with boundary(UsageError, "cannot load the data set", where=where, todo=todo):
        loaded = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    yield from _rows_of(where, loaded.with_format("arrow").iter(batch_size=BATCH_ROWS))
