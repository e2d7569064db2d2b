"""`python -m tests.faults.storm_server SEED`: a server that fails in many ways and keeps a bill.

Prints its port and serves until standard input is closed. What becomes of a request follows from the seed, the prompt
and how often it came before. `GET /bill` tells what was seen and billed so far. Of the requests that end without an
answer it bills those that it may have been at work on: all that are cut, garbled or left hanging, and half of the 500s
and resets.
"""

import asyncio
import hashlib
import json
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.request import urlopen

import uvloop

from tests.support import cli_env

FAULTS = {"429": 0.10, "500": 0.05, "reset": 0.05, "cut": 0.02, "garbled": 0.02, "hang": 0.01}
"""Shares of the requests; the others are answered."""
BILLED = frozenset({"answer", "cut", "garbled", "hang"})
DELAY_S = 0.004
HEADER_END = b"\r\n\r\n"


def text_of(prompt: str) -> str:
    """The answer to a prompt."""
    return f"{prompt} is {hashlib.sha256(prompt.encode()).hexdigest()[:24]}"


def used_by(prompt: str) -> tuple[int, int]:
    """Tokens of a prompt and of its answer."""
    return len(prompt) + 8, len(prompt) * 7 % 30 + 1


def fate_of(seed: int, prompt: str, before: int) -> tuple[str, bool]:
    """What becomes of a prompt that came so often before, and whether it is billed."""
    dice = hashlib.sha256(f"{seed} {before} {prompt}".encode()).digest()
    share, billed = int.from_bytes(dice[:4], "big") / 2**32, dice[4] % 2 == 0
    for fault, portion in FAULTS.items():
        if share < portion:
            return fault, fault in BILLED or (fault in ("500", "reset") and billed)
        share -= portion
    return "answer", True


@dataclass
class Till:
    """Everything that the server has seen."""

    seed: int
    before: Counter[str] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0

    def take(self, prompt: str) -> str:
        """Note a request; what becomes of it."""
        fate, is_billed = fate_of(self.seed, prompt, self.before[prompt])
        self.before[prompt] += 1
        self.fates[fate] += 1
        if is_billed:
            tokens = used_by(prompt)
            self.input_tokens += tokens[0]
            self.output_tokens += tokens[1]
        return fate

    def bill(self) -> dict[str, Any]:
        return {
            "requests": self.before.total(),
            "prompts": len(self.before),
            "fates": dict(self.fates),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
        }


def response(status: str, value: Any, *headers: str) -> bytes:
    """A whole HTTP response."""
    body = json.dumps(value).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + HEADER_END + body


def completion(prompt: str) -> bytes:
    """The response that answers."""
    tokens = used_by(prompt)
    choice = {"index": 0, "message": {"role": "assistant", "content": text_of(prompt)}, "finish_reason": "stop"}
    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*tokens, sum(tokens)), strict=True))
    return response("200 OK", {"id": "x", "model": "m", "choices": [choice], "usage": usage})


class Stormy(asyncio.Protocol):
    """One connection, on which a request comes after the other's response."""

    def __init__(self, till: Till) -> None:
        self._till = till
        self._waiting = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._waiting += data
        head, end, rest = self._waiting.partition(HEADER_END)
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        if not end or len(rest) < length:
            return
        self._waiting = rest[length:]
        if head.startswith(b"GET"):
            known = head.startswith(b"GET /bill")
            self._write(response("200 OK", self._till.bill()) if known else response("404 Not Found", {}))
            return
        prompt = json.loads(rest[:length])["messages"][-1]["content"]
        asyncio.get_running_loop().call_later(DELAY_S, self._perform, self._till.take(prompt), prompt)

    def _perform(self, fate: str, prompt: str) -> None:
        match fate:
            case "answer":
                self._write(completion(prompt))
            case "429":
                self._write(response("429 Too Many Requests", {"error": {"message": "slow down"}}, "retry-after-ms: 5"))
            case "500":
                self._write(response("500 Internal Server Error", {"error": {"message": "oh"}}))
            case "garbled":
                whole = completion(prompt)
                self._write(whole[:-9] + b"#########")
            case "cut":
                self._write(completion(prompt)[:-30])
                self._end(at_once=False)
            case "reset":
                self._end(at_once=True)
            case "hang":
                pass

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _end(self, *, at_once: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if at_once:
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()
        else:
            self._transport.close()


async def serve(seed: int) -> None:
    """Serve on a free port of this machine until standard input is closed."""
    loop, till = asyncio.get_running_loop(), Till(seed)
    server = await loop.create_server(lambda: Stormy(till), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@dataclass(frozen=True, slots=True)
class StormServer:
    """The server as a process of its own, seen from outside."""

    port: int

    @property
    def url(self) -> str:
        """Base URL up to and including /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    def bill(self) -> dict[str, Any]:
        """What it has seen and billed so far."""
        with urlopen(f"http://127.0.0.1:{self.port}/bill", timeout=60) as reply:
            found: dict[str, Any] = json.load(reply)
        return found


@contextmanager
def storming(seed: int) -> Iterator[StormServer]:
    """Such a server for the block."""
    command = [sys.executable, "-m", "tests.faults.storm_server", str(seed)]
    with subprocess.Popen(command, env=cli_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield StormServer(int(process.stdout.readline()))
        finally:
            process.stdin.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
