"""Mapping a function over shards: in this process, or over worker processes. The config's `fanout` says which."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

from pipeline.core.config_fanout import FanoutConfig, InProcess
from pipeline.core.stage import Fanout

S = TypeVar("S")
R = TypeVar("R")


@contextmanager
def open_fanout(config: FanoutConfig, *, step: str, cancel: Event, resume_command: str) -> Iterator[Fanout]:
    """Lend a step its `Fanout`; at the end of the block no process that it started is left.

    Args:
        config: which kind.
        step: name of the step, for messages.
        cancel: set when a signal asked us to stop: a map over processes then raises within half a second.
        resume_command: as in `Context`.

    Raises (while mapping, with `processes` only):
        Interrupted: `cancel` is set.
        Incomplete: a worker process died, or cannot be started.
    """
    if isinstance(config, InProcess):
        yield map_in_process
        return
    from pipeline.core.workers import Workers, usable_cpus  # `multiprocessing` is needed for this kind only

    count = usable_cpus() if config.workers is None else config.workers
    with Workers(count, step=step, cancel=cancel, resume_command=resume_command) as workers:
        yield workers


def map_in_process(function: Callable[[S], R], shards: Iterable[S]) -> Iterator[R]:
    """Yield `function(shard)` for each shard in order; a shard is read when its turn comes."""
    return map(function, shards)
