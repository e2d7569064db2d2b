"""A real HTTP server on 127.0.0.1 that does what a script says, faults included."""

import asyncio
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 429: "Too Many Requests", 500: "Internal Server Error"}
NEVER_S = 3600.0


@dataclass
class Act:
    """What the server does with one request.

    `cut` sends only so many bytes of the body and closes, or with `stall` falls silent; `reset` sends nothing but a TCP
    reset; `drip_s` sends the body one byte per so many seconds.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: int | None = None
    reset: bool = False
    drip_s: float | None = None
    stall: bool = False


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    json: dict[str, Any]
    method: str = "POST"

    @property
    def prompt(self) -> str:
        """Text of the last message, in OpenAI's, Anthropic's or Gemini's form."""
        if "contents" in self.json:
            return self.json["contents"][-1]["parts"][0]["text"]
        return self.json["messages"][-1]["content"]


Script = Callable[[Seen, int], Act]


def completion(text: str | None = "fine", *, finish: str | None = "stop", **message: Any) -> Act:
    """A well-formed answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return Act(body=json.dumps({"id": "x", "model": "m", "choices": [choice], "usage": usage}).encode())


def failure(status: int, message: str = "no", *, headers: dict[str, str] | None = None, **error: Any) -> Act:
    """An error in OpenAI's form."""
    return Act(status=status, body=json.dumps({"error": {"message": message, **error}}).encode(), headers=headers or {})


def echo(seen: Seen, _: int) -> Act:
    """Answers with the prompt in capitals."""
    return completion(seen.prompt.upper())


def no_route(_: Seen) -> Act:
    """What a server without a list of models or a health route says."""
    return failure(404, "Not Found")


class ScriptedServer:
    """Runs in a thread; a context manager. `script(request, n)` decides, n counting all POST requests from 0.

    Args:
        tls: serve with this certificate; None: without encryption.
        on_get: what it does with a GET; by default it has no such route.
    """

    def __init__(
        self, script: Script, tls: ssl.SSLContext | None = None, on_get: Callable[[Seen], Act] = no_route
    ) -> None:
        self._script, self._tls, self.on_get = script, tls, on_get
        self.probes: list[Seen] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self.seen: list[Seen] = []
        self.port = 0
        self.in_flight = 0
        self.most_in_flight = 0

    @property
    def url(self) -> str:
        """Base URL up to and including /v1."""
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}/v1"

    @property
    def prompts(self) -> list[str]:
        """The prompts asked for, in order of arrival."""
        return [seen.prompt for seen in self.seen]

    def at(self, port: int) -> "ScriptedServer":
        """The same, to listen at a certain port."""
        self.port = port
        return self

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (seen := await _read(reader)) is not None:
                if seen.method == "GET":
                    self.probes.append(seen)
                    await _perform(self.on_get(seen), writer)
                    continue
                number = len(self.seen)
                self.seen.append(seen)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    if not await _perform(self._script(seen, number), writer):
                        return
                finally:
                    self.in_flight -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Seen | None:
    start = await reader.readline()
    if not start:
        return None
    headers = {}
    while (line := (await reader.readline()).strip()) != b"":
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    method, path, _ = start.decode().split()
    return Seen(path, headers, json.loads(body) if body else {}, method)


async def _perform(act: Act, writer: asyncio.StreamWriter) -> bool:
    """Do it; False if the connection is at its end."""
    await asyncio.sleep(act.delay_s)
    if act.reset:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
        return False
    length = {} if "Transfer-Encoding" in act.headers else {"Content-Length": str(len(act.body))}
    headers = {"Content-Type": "application/json", **length, **act.headers}
    head = f"HTTP/1.1 {act.status} {REASONS.get(act.status, 'Status')}\r\n"
    writer.write((head + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n").encode())
    for byte in act.body if act.drip_s is not None else b"":
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(act.drip_s)
    if act.drip_s is None:
        writer.write(act.body if act.cut is None else act.body[: act.cut])
    await writer.drain()
    if act.stall:
        await asyncio.sleep(NEVER_S)
    return act.cut is None
