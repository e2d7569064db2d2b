"""Mapping a function over shards. One way so far: in this process, one shard after the other."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

S = TypeVar("S")
R = TypeVar("R")


def map_in_process(function: Callable[[S], R], shards: Iterable[S]) -> Iterator[R]:
    """Yield `function(shard)` for each shard in order; a shard is read when its turn comes."""
    return map(function, shards)
