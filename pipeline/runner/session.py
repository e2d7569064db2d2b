"""One invocation on one run: its config, its data folder, and the commands that people can type about it."""

import shlex
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.config_api import secret_values
from pipeline.core.config_base import ConfigModel
from pipeline.core.errors import disk_errors
from pipeline.core.lineage import DigestCache
from pipeline.core.load import Loaded
from pipeline.core.stop import Stop
from pipeline.core.store import Store
from pipeline.runner.steps import Step, spec_of

if TYPE_CHECKING:
    from pipeline.runner.locked import Locked


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that steps share.

    Attributes:
        loaded: the config with where it came from.
        data: folder of store, responses, work and runs.
        store: the artefacts.
        digests: remembered digests of the files that the config names.
        secrets: values that no message may hold.
        stop: set by whoever catches signals.
        quiet: no progress display.
        invoked: the command and its options, as typed after `python -m pipeline`, without config and data folder.
        locked: the lock file that this invocation keeps to; None: it writes the lock file instead.
    """

    loaded: Loaded
    data: Path
    store: Store
    digests: DigestCache
    secrets: tuple[str, ...] = ()
    stop: Stop = field(default_factory=Stop)
    quiet: bool = False
    invoked: tuple[str, ...] = ("run",)
    locked: "Locked | None" = None

    @property
    def folder(self) -> Path:
        """`<data>/runs/<name>`."""
        return self.data / "runs" / self.loaded.run_name

    def config_of(self, step: Step) -> ConfigModel:
        """The config that the step is given."""
        return spec_of(step).config(self.loaded.config)

    def workdir_of(self, step: Step, key: str) -> Path:
        """The folder of a step's key that survives a crash."""
        return self.data / "work" / step.kind / key

    def command(self, *words: str) -> str:
        """A command on this run as one types it, for example `command("run", "--until", "filter")`."""
        typed = ["python", "-m", "pipeline", words[0], str(self.loaded.path), "--data", str(self.data), *words[1:]]
        return shlex.join([*typed, *(word for override in self.loaded.overrides for word in ("--set", override))])

    @property
    def resume_command(self) -> str:
        """What goes on where this invocation stops."""
        return self.command(*self.invoked)

    def disk_errors(self) -> AbstractContextManager[None]:
        """Turn a disk that is full, failing or write-protected into an error for a person."""
        todo = f"make room or give write access, then resume with: {self.resume_command}"
        return disk_errors(str(self.data), todo)


def open_session(loaded: Loaded, data: Path, *, quiet: bool = False) -> Session:
    """A session on the data folder `data`; makes nothing on disk yet."""
    digests = DigestCache(data / "cache" / "digests.json")
    secrets = secret_values(loaded.config.teachers.values())
    return Session(loaded, data, Store(data / "store"), digests, secrets, quiet=quiet)
