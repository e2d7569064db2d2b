"""An OpenAI-compatible server that answers at once with 100 tokens, so that a client's own cost is what is measured.

`python benchmarks/instant_server.py` prints its port and serves until standard input is closed.
"""

import asyncio
import json
import sys
from typing import cast

import uvloop

WORDS = " ".join(["token"] * 100)
"""One answer: 100 tokens, since a word and its blank are one in common vocabularies."""
HEADER_END = b"\r\n\r\n"


def response() -> bytes:
    """The whole HTTP response, made once."""
    message = {"role": "assistant", "content": WORDS}
    usage = {"prompt_tokens": 40, "completion_tokens": 100, "total_tokens": 140}
    body = json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "instant",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": usage,
        }
    ).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Instant(asyncio.Protocol):
    """Answers each request on a connection in turn; pipelined ones too."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._waiting = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to answer."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        assert self._transport is not None
        self._waiting += data
        while (end := self._waiting.find(HEADER_END)) >= 0:
            length = _content_length(self._waiting[:end])
            whole = end + len(HEADER_END) + length
            if len(self._waiting) < whole:
                return
            self._waiting = self._waiting[whole:]
            self._transport.write(self._answer)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


async def serve() -> None:
    """Serve on a free port of this machine until standard input is closed."""
    loop = asyncio.get_running_loop()
    answer = response()
    server = await loop.create_server(lambda: Instant(answer), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(serve())
