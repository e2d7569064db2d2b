"""One event loop for as long as a teacher is asked, so that its servers live from one round to the next."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


class Loop:
    """Runs coroutines one after the other: in this thread, or in another where this one runs a loop already (a
    notebook). Tasks that a coroutine leaves behind stand still until the next one runs; one that is interrupted (by a
    signal's exception) is cancelled and ends before the next, so that nothing of it sees what is closed then."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._pool = ThreadPoolExecutor(max_workers=1) if _runs_here() else None
        self._task: asyncio.Task[Any] | None = None
        """What runs, or ran last."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end; what it raises is raised here."""
        if self._pool is None:
            return self._run_here(work)
        running = self._pool.submit(self._run_here, work)
        try:
            return running.result()
        finally:
            if self._task is not None and not running.done():
                self._runner.get_loop().call_soon_threadsafe(self._task.cancel)

    def _run_here(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(self._remembered(work))
        finally:
            if self._task is not None and not self._task.done():
                self._runner.run(_ended(self._task))

    async def _remembered(self, work: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        return await work

    def close(self) -> None:
        """Cancel what is left and close the loop."""
        if self._pool is None:
            self._runner.close()
            return
        self._pool.submit(self._runner.close).result()
        self._pool.shutdown()


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
