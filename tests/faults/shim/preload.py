"""Builds the shim and runs commands of the pipeline under it, whole runs in a fraction of a second each."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

import pytest

from tests.support import cli_env

SOURCE = Path(__file__).with_name("shim.c")


class Kind(IntEnum):
    """`enum kind` of shim.c: what the n-th operation fails with."""

    NONE = 0
    NO_SPACE = 1
    IO_ERROR = 2
    FULL_DISK = 3
    DEAD_DISK = 4
    KILL = 5
    KILL_HALFWAY = 6


KINDS = tuple(kind for kind in Kind if kind is not Kind.NONE)
KILLS = (Kind.KILL, Kind.KILL_HALFWAY)


@dataclass(frozen=True, slots=True)
class Fault:
    """The `at`-th operation under the command's folder fails as `kind`.

    Attributes:
        reads: the reading operations are counted; else the changing ones.
        coarse: of many writes in a row to one file only the first two and every 16th count.
    """

    kind: Kind
    at: int
    reads: bool = False
    coarse: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code, or minus the signal.
        count: operations under the folder.
        fired: operations that failed.
        jumps: how often the clock jumped.
        what: the first of them, "write data/…"; empty if none did.
        stdout, stderr: what it said.
    """

    code: int
    count: int
    fired: int
    jumps: int
    what: str
    stdout: str
    stderr: str


class Host:
    """The process that forks; see host.py."""

    def __init__(self, process: "subprocess.Popen[str]", scratch: Path) -> None:
        self._process = process
        self._scratch = scratch
        self._orders = 0

    def run(
        self,
        project: Path,
        *arguments: str,
        fault: Fault | None = None,
        trace: Path | None = None,
        seed: int | None = None,
        act: str | None = None,
    ) -> Ended:
        """Run `python -m pipeline <arguments>` with `project` as current folder.

        Args:
            act: a function of acts.py that is called with the arguments instead.
            fault: what fails; None: nothing.
            trace: gets a line "operation, path, other path" (tabs between) for each changing operation.
            seed: the time of day jumps; None: it does not.
        """
        said = {name: self._scratch / name for name in ("stdout", "stderr")}
        self._orders += 1
        order = {
            "number": self._orders,
            "cwd": str(project),
            "act": act,
            "arguments": arguments,
            **{name: str(path) for name, path in said.items()},
            "root": str(project) if fault is not None or trace is not None else None,
            **asdict(fault or Fault(Kind.NONE, 0)),
            "trace": None if trace is None else str(trace),
            "seed": seed,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        while answer.pop("number") != self._orders:  # a test was stopped while it waited for that one
            answer = json.loads(self._process.stdout.readline())
        return Ended(**answer, **{name: path.read_text("utf-8", "replace") for name, path in said.items()})


@contextmanager
def hosting(scratch: Path) -> Iterator[Host]:
    """A host for the block; skips the test where nothing can be compiled.

    Args:
        scratch: an empty folder for the commands' output.
    """
    env = cli_env({"LD_PRELOAD": str(build()), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    command = [sys.executable, "-m", "tests.faults.shim.host"]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield Host(process, scratch)
        finally:
            process.stdin.close()


def build() -> Path:
    """The compiled shim, kept in the temporary folder under the digest of its source."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler: apt-get install gcc libc6-dev")
    name = f"pipeline-shim-{os.getuid()}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([compiler, *flags, "-o", str(fresh), str(SOURCE), "-ldl"], check=True)
        fresh.replace(library)
    return library


def lines(trace: Path) -> Sequence[tuple[str, str, str]]:
    """The operations of a trace: name, path, other path."""
    return [tuple(line.split("\t")) for line in trace.read_text("utf-8").splitlines()]  # type: ignore[misc]
