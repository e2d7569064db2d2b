"""What the workers of tests/unit/test_fanout.py do; apart, so that a worker loads no test library to do it."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import UsageError


def square(number: int) -> int:
    return number * number


def cube(number: int) -> int:
    return number**3


def process_id(number: int) -> int:
    return os.getpid()


def held_signals(number: int) -> set[int]:
    return {int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def after_the_next(folder: Path, number: int) -> int:
    """Shard 0 ends only when shard 1 has ended."""
    if number == 0:
        while not (folder / "1").exists():
            time.sleep(0.01)
    (folder / str(number)).touch()
    return number


def stuck(folder: Path, number: int) -> int:
    """Says which process it is, and never ends; shard 0 ends at once."""
    if number > 0:
        (folder / f"{os.getpid()}.part").touch()
        (folder / f"{os.getpid()}.part").rename(folder / f"{os.getpid()}.pid")
        time.sleep(600)
    return number


def large_result(folder: Path, number: int) -> bytes:
    (folder / f"{os.getpid()}.pid").touch()
    return bytes(50_000_000)


def doubled(shard: bytes) -> bytes:
    return shard + shard


def refuse(bad: int, number: int) -> int:
    if number == bad:
        raise UsageError("row 7 is odd", where="rows.jsonl:7", todo="make it even")
    return number


def foreign(number: int) -> int:
    return 1 // (number - 1)


class Untransportable(Exception):
    """Cannot be made again from what is pickled of it."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def untransportable(number: int) -> int:
    raise Untransportable("cannot", " travel")


def generator(number: int) -> Iterator[int]:
    return (each for each in range(number))
