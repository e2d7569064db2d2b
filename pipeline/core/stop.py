"""A request to stop, as a signal makes it and as everything that works looks for it."""

import threading
from dataclasses import dataclass, field

from pipeline.core.errors import ExitCode, Interrupted, Terminated


@dataclass(slots=True)
class Stop:
    """Set once by whoever catches the signal.

    Attributes:
        requested: set when everything shall finish what is in flight and end.
        exit_code: what the process will end with: `INTERRUPTED` after SIGINT, `TERMINATED` after SIGTERM and
            SIGHUP.
    """

    requested: threading.Event = field(default_factory=threading.Event)
    exit_code: ExitCode = ExitCode.INTERRUPTED

    def request(self, exit_code: ExitCode) -> None:
        """Ask everything to stop."""
        self.exit_code = exit_code
        self.requested.set()

    @property
    def error(self) -> type[Interrupted]:
        """What work is ended with, by the signal that asked."""
        return Terminated if self.exit_code is ExitCode.TERMINATED else Interrupted

    def check(self, command: str) -> None:
        """Raise if a signal asked a command to stop that goes on when it is repeated.

        Raises:
            Interrupted, Terminated: it did.
        """
        if self.requested.is_set():
            raise self.error("stopped by a signal", where=command, todo="run the same command again")
