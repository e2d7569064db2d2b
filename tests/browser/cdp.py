"""A small client for the DevTools protocol: starts a headless Chromium of its own and drives one page of it."""

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """The Chromium to drive: `$CHROMIUM`, or the first on the path."""
    named = os.environ.get("CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome")
    return named or next((found for name in names if (found := shutil.which(name)) is not None), None)


class Page:
    """One page. `events` collects what the browser reports: requests, console messages, exceptions, violations."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self.events: list[tuple[str, dict[str, Any]]] = []

    async def read(self) -> None:
        """Take in messages until the socket closes."""
        async for message in self._socket:
            found = message.json()
            if "id" in found:
                self._waiting.pop(found["id"]).set_result(found)
                continue
            self.events.append((found["method"], found["params"]))
            if found["method"] == "Page.loadEventFired":
                self._loaded.set()

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; a protocol error is an AssertionError."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        found = await asyncio.wait_for(answer, 60)
        assert "error" not in found, (method, found["error"])
        return dict(found["result"])

    async def open(self, file: Path) -> None:
        """Open a local file and wait until it has loaded."""
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            await self.send(f"{domain}.enable")
        self._loaded.clear()
        await self.send("Page.navigate", url=file.as_uri())
        await asyncio.wait_for(self._loaded.wait(), 60)

    async def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression (promises are awaited); the page's policy does not bind it."""
        found = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def resize(self, width: int, height: int = 900) -> None:
        """Lay the page out for a screen of this size."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def prefer(self, scheme: str, media: str = "") -> None:
        """Prefer the `light` or `dark` colour scheme, optionally as the medium `print`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.send("Emulation.setEmulatedMedia", media=media, features=features)

    async def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        box = await self.evaluate(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    async def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key, for example `Tab`, 9; `text` is what it types ("\\r" for Enter, " " for the space bar)."""
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, text=text)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def screenshot(self, file: Path) -> None:
        """Write a PNG of the whole page, for people."""
        found = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def open_page(chromium: str) -> AsyncIterator[Page]:
    """A page of a fresh browser with a profile of its own; both are gone afterwards."""
    profile = Path(tempfile.mkdtemp(prefix="report-browser-"))
    process = await asyncio.create_subprocess_exec(
        chromium,
        *FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = await _port(profile)
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/json") as answer:
            targets = await answer.json()
            address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                reader = asyncio.create_task(page.read())
                try:
                    yield page
                finally:
                    reader.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        shutil.rmtree(profile, ignore_errors=True)


async def _port(profile: Path) -> int:
    """The port that the browser chose, once it has written it."""
    file = profile / "DevToolsActivePort"
    for _ in range(600):
        if file.is_file() and (lines := file.read_text("utf-8").split()):
            return int(lines[0])
        await asyncio.sleep(0.1)
    raise AssertionError("Chromium did not say its debugging port within 60 s")
