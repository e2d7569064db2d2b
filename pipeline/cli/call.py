"""What every call of the command line shares: its options, its stop signals, its way to a session."""

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from pipeline.core.errors import ExitCode
from pipeline.core.load import load_config
from pipeline.core.log import configure_logging
from pipeline.core.stop import Stop
from pipeline.runner.session import Session, open_session

Command = Callable[..., None]
TOGETHER_S = 0.3
"""Signals so close to each other are one: a launcher passes on what the terminal has sent to all processes already."""


@dataclass(slots=True)
class Call:
    """One call of `main`.

    Attributes:
        secrets: values that no message may hold; known once the config is read.
        stop: the request to stop, which a signal makes.
        terminals: which of stdout and stderr were a terminal when we began to catch signals.
        stopped_at: monotonic time of the last signal that counted.
    """

    secrets: tuple[str, ...] = ()
    stop: Stop = field(default_factory=Stop)
    terminals: tuple[int, ...] = ()
    stopped_at: float = 0.0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Catch SIGINT, SIGTERM and SIGHUP (the terminal was closed) inside the block: the first one is a request to
        stop, the second ends at once. A SIGHUP is never the second: the system and the shell both send it. It stays
        ignored where it is, as `nohup` wants.

        Raises:
            KeyboardInterrupt: the second signal came.
        """
        self.terminals = tuple(number for number in (1, 2) if os.isatty(number))
        caught = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            caught.append(signal.SIGHUP)
        old = {number: signal.signal(number, self._handle) for number in caught}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.stop.requested.is_set()
        if number == signal.SIGHUP:
            self._leave_terminals()
        if again and (number == signal.SIGHUP or time.monotonic() - self.stopped_at < TOGETHER_S):
            return
        self.stopped_at = time.monotonic()
        self.stop.request(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED)
        if again:
            raise KeyboardInterrupt
        # Not print: the signal may have come in the middle of one, which Python refuses to enter again.
        with suppress(OSError):  # a terminal that is gone
            os.write(2, b"\nstopping: finishing what is in flight; once more stops at once\n")

    def _leave_terminals(self) -> None:
        """Send to /dev/null what would go to a terminal that is gone: the progress display would fail on it."""
        null = os.open(os.devnull, os.O_WRONLY)
        for number in self.terminals:
            if not os.isatty(number):
                os.dup2(null, number)
        os.close(null)


@dataclass(frozen=True, slots=True)
class Target:
    """What the arguments of a command on a config say.

    Attributes:
        config: the YAML file.
        data: folder of store, responses and runs.
        overrides: the `--set` texts.
        as_json: print the result as JSON.
        verbose: more messages.
    """

    config: Path
    data: Path
    overrides: Sequence[str]
    as_json: bool
    verbose: bool

    def open(self, call: Call) -> Session:
        """The session of this command."""
        session = replace(open_session(load_config(self.config, self.overrides), self.data), stop=call.stop)
        call.secrets = session.secrets
        configure_logging(session.secrets, verbose=self.verbose)
        return session


def _data_folder(context: click.Context, option: click.Parameter, text: str) -> Path:
    """The folder of `--data`; an empty text, as of an unset variable, would be the current folder."""
    if not text:
        raise click.BadParameter("the folder's name is empty", context, option)
    return Path(text)


DATA = click.option("--data", type=click.Path(), default="data", show_default=True, callback=_data_folder,
                    help="Folder of store, responses and runs.")  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
VERBOSE = click.option("--verbose", is_flag=True, help="More messages.")
CONFIG = click.argument("config", type=click.Path(path_type=Path, readable=False))
SET = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a config value; repeatable.")


def on_config(command: Command) -> Command:
    """The argument and options that every command on a config has, given to it as one `Target`."""

    @functools.wraps(command)  # what decorators below this one declared goes with it
    def with_target(
        config: Path, data: Path, overrides: Sequence[str], as_json: bool, verbose: bool, **rest: Any
    ) -> None:
        command(Target(config, data, overrides, as_json, verbose), **rest)

    declared: Command = with_target
    for option in (VERBOSE, JSON, SET, DATA, CONFIG):
        declared = option(declared)
    return declared
