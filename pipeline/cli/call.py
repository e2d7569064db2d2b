"""What every call of the command line shares: its options, its stop signals, its way to a session."""

import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@dataclass(slots=True)
class Call:
    """One call of `main`.

    Attributes:
        secrets: values that no message may hold; known once the config is read.
        stop: the request to stop, which a signal makes.
    """

    secrets: tuple[str, ...] = ()
    stop: Stop = field(default_factory=Stop)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM inside the block: the first one is a request to stop, the second ends at once.

        Raises:
            KeyboardInterrupt: the second signal came.
        """
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.stop.requested.is_set()
        self.stop.request(ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED)
        if again:
            raise KeyboardInterrupt
        # Not print: the signal may have come in the middle of one, which Python refuses to enter again.
        os.write(2, b"\nstopping: finishing what is in flight; once more stops at once\n")


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


DATA = click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True,
                    help="Folder of store, responses and runs.")  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
VERBOSE = click.option("--verbose", is_flag=True, help="More messages.")
CONFIG = click.argument("config", type=click.Path(path_type=Path))
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
