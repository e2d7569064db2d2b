"""Worker processes that map a function over shards: a pipe each, results in order, none outlives its parent.

Not `concurrent.futures.ProcessPoolExecutor`: its workers share one pipe for results, so that one which is killed (by
the kernel, for memory) while it writes a result leaves the parent waiting for the rest for ever; and its workers
outlive a killed parent. Here each worker has a pipe of its own, whose end of file tells of either death at once.

What goes through the pipes is pickled by `multiprocessing`: between our own processes, never read from a file.
"""

import ctypes
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from threading import Event
from types import TracebackType
from typing import Any, Final, TypeVar

from pipeline.core.errors import Incomplete, Interrupted

S = TypeVar("S")
R = TypeVar("R")

POLL_S: Final = 0.2
"""How often a wait for results looks whether a signal asked us to stop."""
QUEUED_BYTES: Final = 16_384
"""A shard up to this size may wait in the pipe of a busy worker: it fits into the kernel's buffer, so that giving it
never waits for the worker, which may itself be waiting for us to take a result."""
WINDOW: Final = 2
"""Shards in flight per worker: the one it works on, and one whose result waits for its turn or that waits itself."""
PR_SET_PDEATHSIG: Final = 1
OUR_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal or a scheduler sends to all processes of a group. The parent alone decides what they mean."""


def usable_cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(slots=True)
class Worker:
    """A worker process and our end of its pipe.

    Attributes:
        mapping: number of the mapping whose function it holds.
        given: numbers of the shards it was given and has not answered, oldest first.
    """

    process: SpawnProcess
    pipe: Connection
    mapping: int = 0
    given: deque[int] = field(default_factory=deque)

    def give(self, mapping: int, function: memoryview, number: int, shard: memoryview) -> None:
        """Send a shard, and the function too if it is not the one that the worker holds."""
        with suppress(ConnectionError):  # it died: whoever waits for its answer will see that
            self.pipe.send_bytes(b"" if self.mapping == mapping else function)
            self.pipe.send_bytes(shard)
        self.mapping = mapping
        self.given.append(number)


@dataclass(slots=True)
class Waiting:
    """What is still to be given to workers, pickled.

    Attributes:
        function: what is mapped.
        shards: the shards that were not read yet.
        number: number of the next shard.
        next: that shard, if it was read already.
    """

    function: memoryview
    shards: Iterator[memoryview]
    number: int = 0
    next: memoryview | None = None

    def peek(self) -> memoryview | None:
        """The next shard, or None at the end."""
        if self.next is None:
            self.next = next(self.shards, None)
        return self.next

    def advance(self) -> None:
        """The next shard was given away."""
        self.number, self.next = self.number + 1, None


class Workers:
    """A `Fanout` over processes; a context manager. See `open_fanout` for the arguments and what is raised.

    Workers are started when shards need them (about a third of a second of CPU each, most of it imports) and stay for
    the next mapping; a lone shard is worked on here. At most `WINDOW` shards per worker are in flight, so memory is
    bounded by that many shards and results.

    Functions, shards and results must be what `pickle` takes: a function of a module, or a `functools.partial` of one.
    A shard is best a path. A table among the results should be no slice, which travels with all that it was cut from.
    Functions see no context: they neither log nor write.

    The workers end with the thread that started them. As with all of `multiprocessing`, a script that uses this needs
    `if __name__ == "__main__":`; `python -m pipeline` does not.
    """

    def __init__(self, count: int, *, step: str, cancel: Event, resume_command: str) -> None:
        self._count, self._cancel = count, cancel
        self._step, self._resume_command = step, resume_command
        self._spawn = get_context("spawn")  # a fork would copy the locks of Arrow's threads as they happen to be
        self._workers: list[Worker] = []
        self._mappings = 0
        self._mapping = False

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._dismiss(self._workers)

    def __call__(self, function: Callable[[S], R], shards: Iterable[S]) -> Iterator[R]:
        """Yield `function(shard)` for each shard, in the order of the shards; what it raises is raised in its turn.

        One mapping at a time: finish or close the iterator before the next begins.
        """
        if self._mapping:
            raise RuntimeError("the mapping before this one is not finished")
        self._mapping = True
        try:
            source = iter(shards)
            first = list(islice(source, 2))
            if len(first) < 2:
                yield from map(function, first)
            else:
                yield from self._map(function, chain(first, source))
        finally:
            self._mapping = False

    def _map(self, function: Callable[[S], R], shards: Iterator[S]) -> Iterator[R]:
        self._mappings += 1
        waiting = Waiting(ForkingPickler.dumps(function), map(ForkingPickler.dumps, shards))
        answers: dict[int, tuple[bool, Any]] = {}
        turn = 0
        try:
            self._hand_out(waiting, WINDOW * self._count)
            while turn < waiting.number:
                while turn not in answers:
                    answers.update(self._collect())
                    self._hand_out(waiting, turn + WINDOW * self._count)
                succeeded, value = answers.pop(turn)
                if not succeeded:
                    raise value
                yield value
                turn += 1
                self._hand_out(waiting, turn + WINDOW * self._count)
        finally:  # the consumer stopped, or something was raised: nobody wants what is in flight
            self._dismiss([worker for worker in self._workers if worker.given])

    def _hand_out(self, waiting: Waiting, limit: int) -> None:
        """Give shards up to number `limit` to workers, as far as these have room."""
        while waiting.number < limit and (shard := waiting.peek()) is not None:
            worker = self._with_room(len(shard))
            if worker is None:
                return
            worker.give(self._mappings, waiting.function, waiting.number, shard)
            waiting.advance()

    def _with_room(self, size: int) -> Worker | None:
        """A worker that a shard of this size can be given to: an idle one, a new one, one that works on its last."""
        least = min(self._workers, key=lambda worker: len(worker.given), default=None)
        if least is not None and not least.given:
            return least
        if least is None or len(self._workers) < self._count:
            return self._start()
        return least if size <= QUEUED_BYTES and len(least.given) < WINDOW else None

    def _start(self) -> Worker:
        ours, theirs = self._spawn.Pipe()
        process = self._spawn.Process(target=serve, args=(theirs,), daemon=True)
        try:
            with _held_signals():
                process.start()
        except OSError as error:
            what = f"cannot start a worker process: {error.strerror}"
            raise Incomplete(what, where=f"step {self._step}", todo=self._with_fewer()) from error
        theirs.close()  # the worker's copy is then the only one, so that its death ends the pipe
        worker = Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        """Wait a while for answers; by number of their shard."""
        busy = {worker.pipe: worker for worker in self._workers if worker.given}
        ready = wait([*busy], timeout=POLL_S)
        if self._cancel.is_set():
            todo = f"resume with: {self._resume_command}"
            raise Interrupted("stopped by a signal", where=f"step {self._step}", todo=todo)
        return dict(self._take(worker) for pipe, worker in busy.items() if pipe in ready)

    def _take(self, worker: Worker) -> tuple[int, tuple[bool, Any]]:
        try:
            answer = worker.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._died(worker) from error
        return worker.given.popleft(), ForkingPickler.loads(answer)

    def _died(self, worker: Worker) -> Incomplete:
        worker.process.join(timeout=POLL_S)
        code = worker.process.exitcode
        how = f"ended with exit code {code}" if code is None or code >= 0 else f"died: {signal.strsignal(-code)}"
        where = f"step {self._step}, process {worker.process.pid}"
        return Incomplete(f"a worker process {how}", where=where, todo=self._with_fewer())

    def _with_fewer(self) -> str:
        fewer = f"fanout.workers below {self._count}" if self._count > 1 else "fanout.kind to in_process"
        return f"see whether memory ran out (dmesg); if so set {fewer}; resume with: {self._resume_command}"

    def _dismiss(self, workers: Sequence[Worker]) -> None:
        """End workers, whatever they do. A worker that is left here by an interrupt ends when it next sees its pipe."""
        leaving = [*workers]
        for worker in leaving:
            worker.pipe.close()
            worker.process.kill()
        for worker in leaving:
            worker.process.join()
            self._workers.remove(worker)


@contextmanager
def _held_signals() -> Iterator[None]:
    """Processes started in the block never see `OUR_SIGNALS`, from their first instruction; we see them afterwards."""
    resource_tracker.ensure_running()  # starting it, as `multiprocessing` would do in the block, lets signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OUR_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------------------- inside a worker


def serve(pipe: Connection) -> None:
    """A worker's life: answer shards until the pipe ends. The kernel kills it with its parent, even within a shard."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    service = Service()
    with suppress(EOFError, OSError):  # the parent closed the pipe or died, perhaps within a message
        while True:
            function = pipe.recv_bytes()
            pipe.send_bytes(service.answer(function, pipe.recv_bytes()))


class Service:
    """Answers shards with the function that came last."""

    def __init__(self) -> None:
        self._function: Callable[[Any], Any] | None = None

    def answer(self, function: bytes, shard: bytes) -> memoryview:
        """(True, result) or (False, exception), pickled; an empty `function` is the one before."""
        try:
            if function:
                self._function = ForkingPickler.loads(function)
            assert self._function is not None
            return ForkingPickler.dumps((True, self._function(ForkingPickler.loads(shard))))
        except Exception as error:  # noqa: BLE001 (the `main` of this process: the parent raises it again)
            return ForkingPickler.dumps((False, _portable(error)))


def _portable(error: Exception) -> Exception:
    """The exception with its traceback as a note; one that cannot travel is replaced by a description."""
    error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # noqa: BLE001 (an exception of any library, which may fail in any way)
        described = RuntimeError(f"{type(error).__name__}: {error}")
        described.__notes__ = error.__notes__
        return described
    return error
