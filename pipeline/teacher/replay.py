"""Completions that exist already: a JSONL or parquet file, joined to prompts by id or by text."""

import difflib
import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.config_teacher import ReplayTeacher
from pipeline.core.errors import UsageError
from pipeline.core.record import ToolCall
from pipeline.core.stage import Context, check_cancelled
from pipeline.teacher.request import Request
from pipeline.teacher.responses import Outcome
from pipeline.teacher.wire import Reply, clean, dump_json, load_json, read_calls, text_flags

NO_COMPLETION = "no_completion"
ROWS_PER_COMMIT = 4096


class Replayed:
    """A teacher's file, indexed on disk, so that it may be larger than memory. A context manager.

    Raises:
        UsageError: the file is not readable, or a row lacks a column that the config names.
    """

    def __init__(self, teacher: ReplayTeacher, ctx: Context) -> None:
        self._teacher, self._ctx = teacher, ctx
        self._index = sqlite3.connect("", isolation_level=None)  # a temporary file that SQLite removes

    def __enter__(self) -> "Replayed":
        try:
            _fill(self._index, self._teacher, self._ctx)
        except BaseException:
            self._index.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._index.close()

    def outcomes(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """The completion of each request, in order; a request that has none is rejected as `no_completion`. The n-th
        row that belongs to a prompt is its sample n."""
        query = "SELECT body, reasoning, calls, finish FROM completions WHERE prompt = ? AND sample = ?"
        for request in requests:
            key = _join_key(self._teacher, request)
            row = None if key is None else self._index.execute(query, (key, request.sample)).fetchone()
            outcome = Outcome(None, NO_COMPLETION) if row is None else Outcome(_reply(*row), None)
            self._ctx.progress.advance(rejected=int(row is None))
            yield outcome


def _join_key(teacher: ReplayTeacher, request: Request) -> bytes | None:
    """What a prompt is joined by; None if it cannot be."""
    if teacher.prompt is None:
        return _digest(request.prompt_id)
    text = _only_question([(message.role, message.content) for message in request.messages])
    return None if text is None else _digest(text)


def _only_question(turns: Sequence[tuple[object, object]]) -> str | None:
    """The user's text where a conversation, system messages aside, is one message of the user; else None: several
    turns may end with the same words ("Continue") and ask for different things."""
    spoken = [turn for turn in turns if turn[0] != "system"]
    if len(spoken) != 1 or spoken[0][0] != "user":
        return None
    return str(spoken[0][1])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _fill(index: sqlite3.Connection, teacher: ReplayTeacher, ctx: Context) -> None:
    index.execute("PRAGMA journal_mode=OFF")
    index.execute(
        "CREATE TABLE completions (prompt BLOB, sample INTEGER, body BLOB, reasoning BLOB, calls BLOB, finish TEXT,"
        " PRIMARY KEY (prompt, sample)) WITHOUT ROWID"
    )
    samples: Counter[bytes] = Counter()
    rows = _indexed(teacher, samples)
    while chunk := list(islice(rows, ROWS_PER_COMMIT)):
        check_cancelled(ctx)
        index.executemany("INSERT INTO completions VALUES (?, ?, ?, ?, ?, ?)", chunk)


def _indexed(teacher: ReplayTeacher, samples: "Counter[bytes]") -> Iterator[tuple[object, ...]]:
    for number, row in enumerate(_rows(teacher.path), start=1):
        where = f"{teacher.path}, row {number}"
        prompt = _column(row, teacher.prompt_id if teacher.prompt is None else teacher.prompt, where)
        completion = _completion(_column(row, teacher.completion, where), where)
        finish = "stop" if teacher.finish_reason is None else str(_column(row, teacher.finish_reason, where))
        joined_by = prompt if isinstance(prompt, str) else _text_of(prompt)
        if completion is None or joined_by is None:
            continue
        key = _digest(joined_by)
        parts = (None if part is None else _bytes(part) for part in completion)
        yield key, samples[key], *parts, clean(finish)
        samples[key] += 1


def _bytes(text: str) -> bytes:
    """As bytes, since neither lone surrogates nor NUL survive SQLite's text."""
    return text.encode("utf-8", "surrogatepass")


def _reply(body: bytes, reasoning: bytes | None, calls: bytes | None, finish: str) -> Reply:
    text = body.decode("utf-8", "surrogatepass")
    thought = None if reasoning is None else reasoning.decode("utf-8", "surrogatepass")
    return Reply(
        text=clean(text),
        reasoning_content=None if thought is None else clean(thought),
        finish_reason=finish,
        prompt_tokens=None,
        completion_tokens=None,
        flags=text_flags(text, thought),
        tool_calls=() if calls is None else tuple(ToolCall(*call) for call in orjson.loads(calls)),
    )


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    if name in row:
        return row[name]
    near = difflib.get_close_matches(name, row, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"its columns are {sorted(row)}"
    raise UsageError(
        f"the completions have no column {name!r}", where=where, todo=f"correct the teacher's columns: {hint}"
    )


def _completion(value: Any, where: str) -> tuple[str, str | None, str | None] | None:
    """(text, reasoning, JSON of the tool calls) of a completion column; None if it holds none."""
    if value is None or isinstance(value, str):
        return None if value is None else (value, None, None)
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "assistant"]
        content = turns[-1].get("content") if turns else None
        reasoning = turns[-1].get("reasoning_content") if turns else None
        calls = read_calls(turns[-1].get("tool_calls")) if turns else []
        if content is None and calls:
            content = ""
        if content is None or (isinstance(content, str) and isinstance(reasoning, str | None)):
            given = [[call.name, call.arguments, call.id] for call in calls]
            return None if content is None else (content, reasoning, dump_json(given).decode() if given else None)
    todo = "give a column of text, or of lists of {role, content} messages"
    raise UsageError(f"a completion is neither text nor messages but {type(value).__name__}", where=where, todo=todo)


def _text_of(prompt: Any) -> str | None:
    """The text by which a prompt column that is not text joins: the one user message of a conversation (None if it has
    several turns; the assistant's at the end is the completion), or an id that is a number."""
    if not isinstance(prompt, list):
        return str(prompt)
    turns = [(turn.get("role"), turn.get("content", "")) for turn in prompt if isinstance(turn, dict)]
    return _only_question(turns[:-1] if turns and turns[-1][0] == "assistant" else turns)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row, _ = load_json(line.removeprefix(b"\xef\xbb\xbf"))
            if not isinstance(row, dict):
                raise UsageError("not a JSON object", where=f"{path}, line {number}", todo="correct or remove the line")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_COMMIT):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        todo = "give a JSONL or parquet file"
        raise UsageError(f"not readable as parquet: {error}", where=str(path), todo=todo) from error
