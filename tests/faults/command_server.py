"""A small OpenAI-compatible server that a test starts from a command line; it ends itself on a marked prompt."""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

POISON = "POISON"
"""A prompt with this word in it ends the server while it is answered, before any later answer."""


REFUSED = "REFUSED"
"""A prompt with this word in it is answered with status 400."""


def main(port: int, folder: Path, *options: str) -> None:
    """Serve until killed.

    Args:
        folder: gets `starts`, `answered` and `environment`; may hold `root`, the name that the model is served from,
            and `refuse_start`: then it ends at once, if that is empty or holds the number of this start, from 1.
        options: `--delay SECONDS` before each answer.
    """
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()} {' '.join(sys.argv[1:])}\n")
    (folder / "environment").write_text(json.dumps(dict(os.environ)))
    if refuses_start(folder):
        sys.exit("the weights do not fit: out of memory")
    delay = float(options[options.index("--delay") + 1]) if "--delay" in options else 0.0
    server = ThreadingHTTPServer(("127.0.0.1", port), handler(folder, delay))
    server.daemon_threads = True
    server.serve_forever()


def refuses_start(folder: Path) -> bool:
    """Whether this start is to fail."""
    if not (folder / "refuse_start").exists():
        return False
    numbers = (folder / "refuse_start").read_text().split()
    return not numbers or str(len((folder / "starts").read_text().splitlines())) in numbers


def handler(folder: Path, delay: float) -> type[BaseHTTPRequestHandler]:
    """What answers requests."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            root = folder / "root"
            model = {"id": "teacher", "root": root.read_text() if root.exists() else "one"}
            bodies: dict[str, Any] = {"/health": {}, "/version": {"version": "7.1"}, "/v1/models": {"data": [model]}}
            self.send(200 if self.path in bodies else 404, bodies.get(self.path, {}))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = asked["messages"][-1]["content"]
            if POISON in prompt:
                print("RuntimeError: CUDA out of memory" if "large" in prompt else "killed", flush=True)
                time.sleep(delay / 2)
                os._exit(1)
            time.sleep(delay)
            if REFUSED in prompt:
                self.send(400, {"error": {"message": "the prompt is too long", "code": 400}})
                return
            with lock, (folder / "answered").open("a") as file:
                file.write(prompt + "\n")
            choice = {"index": 0, "message": {"content": prompt.upper()}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
            self.send(200, {"model": asked["model"], "choices": [choice], "usage": usage})

        def send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
