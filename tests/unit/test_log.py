"""What a run says: no secret and no control character in a message, events as JSON lines, progress every 30 s."""

import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from pipeline.core.log import (
    LINE_SECONDS,
    EventLog,
    LineProgress,
    configure_logging,
    safe_text,
    scrub,
    show_progress,
)

SECRET = "sk-CANARY-0123456789"


class TestSafeText:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("\x1b[31mred\x1b[0m", "\\u001b[31mred\\u001b[0m"),
            ("\x1b]52;c;aGk=\x07", "\\u001b]52;c;aGk=\\u0007"),
            ("over\rwritten", "over\\u000dwritten"),
            ("\u202egnirts", "\\u202egnirts"),
            ("\x9b31m", "\\u009b31m"),
            ("nul\x00", "nul\\u0000"),
            ("\x7f", "\\u007f"),
        ],
    )
    def test_what_could_steer_a_terminal_becomes_visible(self, text: str, shown: str) -> None:
        assert safe_text(text) == shown

    def test_ordinary_text_stays_as_it_is(self) -> None:
        text = "line\nother\tline, é 🧪 שלום – “quoted”"
        assert safe_text(text) == text


class TestScrubbing:
    def test_secrets_become_stars(self) -> None:
        assert scrub(f"Bearer {SECRET}, again {SECRET}", (SECRET,)) == "Bearer ***, again ***"

    def test_a_secret_that_holds_another_goes_whole(self) -> None:
        assert scrub("abcdefgh-ijkl", ("abcdefgh", "abcdefgh-ijkl")) == "***"

    @pytest.mark.parametrize("secret", ["x", "EMPTY", "no-key"])
    def test_a_placeholder_for_a_server_that_wants_no_key_is_no_secret(self, secret: str) -> None:
        assert scrub(f'{{"event": "x EMPTY no-key {secret}"}}', (secret,)) == f'{{"event": "x EMPTY no-key {secret}"}}'

    @pytest.mark.parametrize("secret", ["", "  ", "\n"])
    def test_an_empty_secret_hides_nothing(self, secret: str) -> None:
        assert scrub("  text\n", (secret,)) == "  text\n"

    def test_a_secret_with_blanks_around_it_is_hidden_without_them_too(self) -> None:
        """A key that was read from a file with its line's end is sent without."""
        assert scrub(f"Bearer {SECRET}, again", (f" {SECRET}\n",)) == "Bearer ***, again"


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    logger = logging.getLogger("pipeline")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


class TestLogging:
    def test_messages_and_their_arguments_are_scrubbed(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging((SECRET,), verbose=False)
        logging.getLogger("pipeline.teacher").warning("answer %r for %s\x1b[2J", {"key": SECRET}, SECRET)
        shown = capsys.readouterr().err
        assert SECRET not in shown
        assert "\x1b" not in shown
        assert "answer {'key': '***'} for ***" in shown

    def test_so_are_tracebacks(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging((SECRET,), verbose=False)
        try:
            raise ValueError(f"headers: {SECRET}")
        except ValueError:
            logging.getLogger("pipeline").exception("failed")
        shown = capsys.readouterr().err
        assert "ValueError: headers: ***" in shown
        assert SECRET not in shown

    def test_debug_messages_need_verbose(self, capsys: pytest.CaptureFixture[str]) -> None:
        for verbose in (False, True):
            configure_logging((), verbose=verbose)
            logging.getLogger("pipeline.x").debug("verbose=%s", verbose)
        shown = capsys.readouterr().err
        assert "verbose=False" not in shown
        assert "verbose=True" in shown

    def test_configuring_twice_does_not_say_everything_twice(self, capsys: pytest.CaptureFixture[str]) -> None:
        for _ in range(2):
            configure_logging((), verbose=False)
        logging.getLogger("pipeline.x").info("once")
        shown = capsys.readouterr().err
        assert shown.count("once") == 1

    def test_messages_follow_stderr_when_a_live_bar_takes_it_over(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging((), verbose=False)
        with redirect_stderr(io.StringIO()) as bar:
            logging.getLogger("pipeline.x").info("above the bar")
        shown = capsys.readouterr().err
        assert "above the bar" in bar.getvalue()
        assert shown == ""


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


class TestEventLog:
    def test_each_event_is_one_json_line_with_time_and_process(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "events.jsonl"
        log = EventLog(path)
        log.emit("step_started", step="filter", rows=3)
        log.emit("odd", text="two\nlines\u2028and é", nested={"a": [1, None]})
        events = [json.loads(line) for line in lines(path)]
        log.close()
        assert [event["event"] for event in events] == ["step_started", "odd"]
        assert events[0]["rows"] == 3
        assert events[1]["text"] == "two\nlines\u2028and é"
        assert all(event["time"].endswith("+00:00") and event["pid"] > 0 for event in events)

    def test_an_event_can_be_read_before_the_log_is_closed(self, tmp_path: Path) -> None:
        log = EventLog(tmp_path / "events.jsonl")
        log.emit("first")
        assert len(lines(tmp_path / "events.jsonl")) == 1
        log.close()

    def test_a_new_process_appends(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            log = EventLog(tmp_path / "events.jsonl")
            log.emit(name)
            log.close()
        assert [json.loads(line)["event"] for line in lines(tmp_path / "events.jsonl")] == ["one", "two"]

    def test_the_torn_last_line_of_a_killed_process_harms_no_other(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        path.write_text('{"event": "whole"}\n{"event": "to', "utf-8")
        log = EventLog(path)
        log.emit("after")
        log.close()
        whole, torn, after = lines(path)
        assert json.loads(whole)["event"] == "whole"
        assert torn == '{"event": "to'
        assert json.loads(after)["event"] == "after"

    def test_numbers_that_are_not_finite_become_null(self, tmp_path: Path) -> None:
        log = EventLog(tmp_path / "events.jsonl")
        log.emit("point", loss=math.nan, nested={"norms": [1.5, math.inf, -math.inf, True]})
        log.close()
        (line,) = lines(tmp_path / "events.jsonl")
        assert "NaN" not in line and "Infinity" not in line
        event = json.loads(line)
        assert (event["loss"], event["nested"]) == (None, {"norms": [1.5, None, None, True]})

    def test_what_json_does_not_know_is_refused(self, tmp_path: Path) -> None:
        log = EventLog(tmp_path / "events.jsonl")
        with pytest.raises(TypeError):
            log.emit("odd", path=tmp_path)  # type: ignore[arg-type]
        log.close()
        assert lines(tmp_path / "events.jsonl") == []


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class TestLineProgress:
    def setup_method(self) -> None:
        self.clock, self.lines = Clock(), list[str]()
        self.progress = LineProgress("generate", self.lines.append, self.clock)
        self.progress.start(1000, "rows")

    def advance(self, seconds: float, count: int, *, tokens: int = 0, rejected: int = 0) -> None:
        self.clock.seconds += seconds
        self.progress.advance(count, tokens=tokens, rejected=rejected)

    def test_nothing_is_said_before_30_seconds(self) -> None:
        self.advance(LINE_SECONDS - 0.1, 10)
        assert self.lines == []

    def test_then_a_line_with_rate_remaining_tokens_and_rejects(self) -> None:
        self.advance(10, 100, tokens=2000, rejected=7)
        self.advance(20, 200, tokens=4000, rejected=1)
        assert self.lines == [
            "generate: 300 of 1,000, 10.0 rows/s, 6,000 tokens (200/s), 8 rejected, about 1.2 min left"
        ]

    def test_a_line_comes_every_30_seconds_however_often_it_advances(self) -> None:
        for _ in range(100):
            self.advance(1, 1)
        assert len(self.lines) == 3

    def test_under_a_minute_seconds_are_told(self) -> None:
        self.advance(30, 900)
        assert self.lines == ["generate: 900 of 1,000, 30.0 rows/s, about 3 s left"]

    def test_at_the_end_no_time_is_left(self) -> None:
        self.advance(30, 1000)
        assert self.lines == ["generate: 1,000 of 1,000, 33.3 rows/s"]

    def test_what_an_earlier_attempt_did_says_nothing_of_the_rate(self) -> None:
        self.progress.start(1000, "steps", done=900)
        self.advance(30, 30)
        assert self.lines == ["generate: 930 of 1,000, 1.0 steps/s, about 1.2 min left"]

    def test_the_last_note_comes_last_and_stays(self) -> None:
        self.progress.advance(10, note="loss 2.500")
        self.progress.advance(10, note="loss 1.250")
        self.advance(30, 280, rejected=1)
        assert self.lines == ["generate: 300 of 1,000, 10.0 rows/s, 1 rejected, loss 1.250, about 1.2 min left"]

    def test_starting_again_counts_from_zero(self) -> None:
        self.advance(29, 500, tokens=5, rejected=5)
        self.progress.start(10, "steps")
        self.advance(30, 3)
        assert self.lines == ["generate: 3 of 10, 0.1 steps/s, about 1.2 min left"]


def test_without_a_terminal_progress_is_lines() -> None:
    with show_progress("filter") as progress:
        assert isinstance(progress, LineProgress)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_rate_tokens_and_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    with show_progress("generate") as progress:
        progress.start(10, "rows")
        progress.advance(4, tokens=80, rejected=1)
    shown = terminal.getvalue()
    assert "generate" in shown
    assert "4/10" in shown
    assert "rows/s, 80 tokens" in shown
    assert "1 rejected" in shown


@pytest.mark.parametrize(
    ("columns", "told", "untold"),
    [
        ("80", ["312/1563", "tokens/s, loss 1.234, 12.3 GB"], ["rejected", "steps/s"]),
        ("100", ["312/1563", "tokens/s, 3 rejected, loss 1.234, 12.3 GB"], ["steps/s"]),
        ("140", ["312/1563", "steps/s, 123,456 tokens (", "3 rejected, loss 1.234, 12.3 GB"], []),
    ],
)
def test_on_a_narrow_terminal_what_matters_least_goes_first(
    monkeypatch: pytest.MonkeyPatch, columns: str, told: list[str], untold: list[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": columns}.items():
        monkeypatch.setenv(name, value)
    with show_progress("train") as progress:
        progress.start(1563, "steps", done=300)
        progress.advance(12, tokens=123_456, rejected=3, note="loss 1.234, 12.3 GB")
    (line,) = {line for line in re.split(r"[\r\n]", terminal.getvalue()) if "loss" in line}
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)
    assert all(text in shown for text in told), shown
    assert not any(text in shown for text in untold), shown
    assert re.search(r"\d:\d\d|-:--:--", shown), "the time left is told"
