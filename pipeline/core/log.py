"""What a run says: messages on stderr, events in `events.jsonl`, a progress bar on a terminal or a line per 30 s."""

import io
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from pipeline.core.stage import Json, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_SECONDS = 30.0
WIDE = 140
"""Columns of a terminal that has room for a bar of 40."""
SMALLEST_BAR = 10
SHORTEST_SECRET = 8
"""Characters. Shorter keys ("EMPTY", "none", "x") are placeholders for servers that want none, and parts of words."""
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def safe_text(text: str) -> str:
    """Text that cannot steer a terminal: control characters and bidi overrides become visible escapes."""
    return UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def scrub(text: str, secrets: tuple[str, ...]) -> str:
    """The text for a terminal or a log: safe (see `safe_text`), and with `***` in place of secret values, which count
    without the blanks around them: they are sent without."""
    for secret in sorted(map(str.strip, secrets), key=len, reverse=True):
        text = text.replace(secret, "***") if len(secret) >= SHORTEST_SECRET else text
    return safe_text(text)


def open_standard_streams() -> None:
    """Open on /dev/null what our caller closed of stdin, stdout and stderr; called once by `main`, never on import.

    Without this the next file that is opened gets the free number, and what is meant for people is written into it.
    What an output's encoding cannot say (a path, on a terminal of ASCII) is then written as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, "r", closefd=False))
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tell(text: str) -> None:
    """Write a last message to stderr; nobody can be told that it cannot be written, so that is no error."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        drop_output(sys.stderr)


def drop_output(stream: TextIO) -> None:
    """Send what an output that fails has not written yet, and all that follows, to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    stream.flush()


class TerminalStream:
    """Standard error for a live display: once it cannot be written to, since its terminal was closed, it is silent."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop it."""
        try:
            return self._stream.write(text)
        except OSError:
            drop_output(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what waits."""
        try:
            self._stream.flush()
        except OSError:
            drop_output(self._stream)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class ScrubbingFormatter(logging.Formatter):
    """Formats a log record and then scrubs all of it, tracebacks included."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """The finished text of a record."""
        return scrub(super().format(record), self._secrets)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at that moment, so that a live bar can print messages above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def configure_logging(secrets: tuple[str, ...], *, verbose: bool) -> None:
    """Send our messages to stderr; called once by `main`, never on import."""
    handler = StderrHandler()
    handler.setFormatter(ScrubbingFormatter(secrets))
    root = logging.getLogger("pipeline")
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False


def finite(value: Json) -> Json:
    """The value with null for each number that JSON does not know: NaN and the infinities."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [finite(item) for item in value]
        case dict():
            return {name: finite(item) for name, item in value.items()}
    return value


class EventLog:
    """Appends events as JSON lines, each with the UTC time and the process id.

    Args:
        path: the file; a torn last line (of a killed process, or a full disk) is closed with a newline, so that it
            stays the only one.
        secrets: values that are written as `***`.
    """

    def __init__(self, path: Path, secrets: tuple[str, ...] = ()) -> None:
        self._secrets = tuple(json.dumps(secret.strip())[1:-1] for secret in secrets)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._is_torn = _lacks_last_newline(path)
        self._file = path.open("ab", buffering=0)  # what a full disk refused must not come up again in `close`

    def emit(self, event: str, **fields: Json) -> None:
        """Append one event; numbers that are not finite become null.

        Raises:
            OSError: the disk does not take it.
        """
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        facts = finite({"time": stamp, "pid": os.getpid(), "event": event, **fields})
        line = json.dumps(facts, ensure_ascii=True, allow_nan=False)
        rest = ("\n" if self._is_torn else "").encode() + scrub(line, self._secrets).encode() + b"\n"
        while rest:
            written = self._file.write(rest) or 0
            self._is_torn = self._is_torn or written > 0
            rest = rest[written:]
        self._is_torn = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lacks_last_newline(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


@contextmanager
def show_progress(step: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A progress display for one step: a live bar on a terminal that can move its cursor, else a log line per 30 s."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM", "") in ("", "dumb", "unknown"):
        yield LineProgress(step, logging.getLogger(__name__).info, time.monotonic)
        return
    with _rich_bar() as bar:
        yield BarProgress(step, bar)


def _rich_bar() -> "RichProgress":
    """rich is imported here, since only a terminal needs it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(file=cast(TextIO, TerminalStream(sys.stderr)))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(40 if console.width >= WIDE else SMALLEST_BAR),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


class _Counts:
    """What progress displays count, and how they put it in words."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.start(0, "rows")

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.total, self.unit = total, unit
        self.done = self.before = done
        self.tokens = self.rejected = 0
        self.note = ""
        self.began = self._now()

    def advance(self, count: int, tokens: int, rejected: int, note: str) -> None:
        self.done += count
        self.tokens += tokens
        self.rejected += rejected
        self.note = note or self.note

    def facts(self, room: int = sys.maxsize) -> str:
        """Rate, tokens, rejects and note; of less room than that, what matters least goes first."""
        seconds = max(self._now() - self.began, 1e-9)
        rate = f"{(self.done - self.before) / seconds:,.1f} {self.unit}/s"
        tokens = f"{self.tokens:,} tokens ({self.tokens / seconds:,.0f}/s)" if self.tokens else ""
        speed = f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens else rate
        rejected = f"{self.rejected:,} rejected" if self.rejected else ""
        note = self.note
        forms = (rate, tokens, rejected, note), (speed, rejected, note), (speed, note or rejected), (note or rate,)
        texts = [", ".join(filter(None, words)) for words in forms]
        return next((text for text in texts if len(text) <= room), texts[-1])

    def remaining(self) -> str:
        """How long the rest takes at this rate; nothing before a hundredth is done, since starting up is no rate."""
        done, total = self.done - self.before, self.total - self.before
        if done * 100 < total or not done or total <= done:
            return ""
        seconds = (self._now() - self.began) / done * (total - done)
        return f", about {seconds / 60:.1f} min left" if seconds >= 60 else f", about {seconds:.0f} s left"


class LineProgress:
    """A line per 30 s, for logs and pipes.

    Args:
        step: name of the step, first in each line.
        write: takes a finished line.
        now: monotonic clock in seconds.
    """

    def __init__(self, step: str, write: Callable[[str], None], now: Callable[[], float]) -> None:
        self._step, self._write, self._now = step, write, now
        self._counts = _Counts(now)
        self._last = now()

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        """Begin counting."""
        self._counts.start(total, unit, done)
        self._last = self._now()

    def advance(self, count: int = 1, *, tokens: int = 0, rejected: int = 0, note: str = "") -> None:
        """Count, and write a line if the last one is 30 s old."""
        self._counts.advance(count, tokens, rejected, note)
        if self._now() - self._last >= LINE_SECONDS:
            self._last = self._now()
            counts = self._counts
            self._write(f"{self._step}: {counts.done:,} of {counts.total:,}, {counts.facts()}{counts.remaining()}")


class BarProgress:
    """A live bar on a terminal.

    Args:
        step: name of the step.
        bar: rich's display, already started.
    """

    def __init__(self, step: str, bar: "RichProgress") -> None:
        self._bar, self._step = bar, step
        self._counts = _Counts(time.monotonic)
        self._task = bar.add_task(step, total=None, facts="")

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        """Begin counting."""
        self._counts.start(total, unit, done)
        self._bar.reset(self._task, total=total, completed=done, facts="")

    def advance(self, count: int = 1, *, tokens: int = 0, rejected: int = 0, note: str = "") -> None:
        """Count and redraw."""
        self._counts.advance(count, tokens, rejected, note)
        self._bar.update(self._task, advance=count, facts=self._counts.facts(self._room()))

    def _room(self) -> int:
        """Columns for the facts, beside a bar of the smallest width, the counts, the time left and blanks between."""
        return (
            self._bar.console.width - SMALLEST_BAR - len(f"{self._step}{self._counts.total}/{self._counts.total}") - 14
        )
