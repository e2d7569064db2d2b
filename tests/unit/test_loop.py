"""One event loop for many coroutines: what an interrupted one leaves behind."""

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest

from pipeline.teacher.loop import Loop

NEVER_S = 3600.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def handler() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


async def wait(seen: list[str], *, begun: "threading.Event | None" = None) -> None:
    """Wait for ever; `seen` says how that ends."""
    if begun is None:
        asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGUSR1)
    else:
        begun.set()
    try:
        await asyncio.sleep(NEVER_S)
    finally:
        seen.append("cancelled")


async def note(seen: list[str], what: str) -> str:
    seen.append(what)
    return what


def test_what_a_coroutine_returns_and_raises_comes_out(loop: Loop) -> None:
    async def fail() -> None:
        raise ValueError("no")

    assert loop.run(note([], "yes")) == "yes"
    with pytest.raises(ValueError, match="no"):
        loop.run(fail())
    assert loop.run(note([], "again")) == "again"


@pytest.mark.usefixtures("handler")
def test_an_interrupted_one_has_ended_before_the_next_runs(loop: Loop) -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        loop.run(wait(seen))
    loop.run(note(seen, "next"))
    assert seen == ["cancelled", "next"]


@pytest.mark.usefixtures("handler")
def test_an_interrupted_notebook_does_not_wait_for_it() -> None:
    """There the work runs in another thread, which no signal reaches."""
    seen: list[str] = []

    async def cell() -> None:
        loop, begun = Loop(), threading.Event()
        here = threading.get_ident()
        interrupt = threading.Thread(target=lambda: begun.wait() and signal.pthread_kill(here, signal.SIGUSR1))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            loop.run(wait(seen, begun=begun))
        interrupt.join()
        loop.run(note(seen, "next"))
        loop.close()

    asyncio.run(cell())
    assert seen == ["cancelled", "next"]
