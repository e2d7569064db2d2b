"""One event loop for as long as a teacher is asked, so that its servers live from one round to the next."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


class Loop:
    """Runs coroutines one after the other: in this thread, or in another where this one runs a loop already (a
    notebook). Tasks that a coroutine leaves behind stand still until the next one runs."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._pool = ThreadPoolExecutor(max_workers=1) if _runs_here() else None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end; what it raises is raised here."""
        return self._runner.run(work) if self._pool is None else self._pool.submit(self._runner.run, work).result()

    def close(self) -> None:
        """Cancel what is left and close the loop."""
        if self._pool is None:
            self._runner.close()
            return
        self._pool.submit(self._runner.close).result()
        self._pool.shutdown()


def _runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
