"""A real server on 127.0.0.1 with the batch endpoints of OpenAI and Anthropic, which keeps its own bill."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = (7, 3)
"""Tokens of prompt and completion of every answer."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a job.

    Attributes:
        answers: how many of its lines are worked through; None: all.
        share: of those, how much of them.
        ends: "completed", "expired" or "failed"; a job that is cancelled ends as cancelled.
        polls: looks at it before it ends; None: it never does on its own.
        partial: whether results can be read while it runs.
        error: (code, message) of a job that fails as a whole.
    """

    answers: int | None = None
    share: float = 1.0
    ends: str = "completed"
    polls: int | None = 1
    partial: bool = False
    error: tuple[str, str] = ("invalid_json_line", "This line is not parseable as valid JSON.")


@dataclass
class Job:
    """A job at the server: `lines` are (custom id, body), `results` what was worked through."""

    number: int
    name: str
    lines: list[tuple[str, dict[str, Any]]]
    fate: Fate
    created: float
    token: str | None
    file_id: str | None
    looks: int = 0
    is_cancelled: bool = False
    ended_as: str | None = None
    results: dict[str, Any] = field(default_factory=dict)


Reply = tuple[int, Any]


def prompt_of(body: dict[str, Any]) -> str:
    """The last message of a request."""
    return str(body["messages"][-1]["content"])


def openai_answer(body: dict[str, Any], text: str, finish: str = "stop", *, tells: bool = True) -> dict[str, Any]:
    """A chat completion; one token is all of its text, where logprobs are told."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if tells and body.get("logprobs"):
        names = [text, *(f"{text}{number}" for number in range(body["top_logprobs"] - 1))]
        top = [{"token": name, "logprob": -1.0 - at, "bytes": [*name.encode()]} for at, name in enumerate(names)]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    usage = {"prompt_tokens": USAGE[0], "completion_tokens": USAGE[1], "total_tokens": sum(USAGE)}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }


def anthropic_answer(body: dict[str, Any], text: str, finish: str = "stop") -> dict[str, Any]:
    """A message."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [{"type": "text", "text": text}],
        "stop_reason": "max_tokens" if finish == "length" else "end_turn",
        "usage": {"input_tokens": USAGE[0], "output_tokens": USAGE[1]},
    }


class BatchServer:
    """Runs in threads; a context manager.

    Attributes:
        fate: decides on a job by its number, from 0.
        line: decides on a line: None: it is answered, else status and error object (OpenAI) or error (Anthropic).
        finish: why the answer to a prompt ends, in OpenAI's word.
        tells: whether the answer to a prompt holds the logprobs that it was asked with; OpenAI only.
        before: called with "METHOD /path" before a call is looked at; what it returns is the reply, None goes on.
        after: called when a call took effect, before its reply leaves; True: the reply never does.
        billed: prompt -> how often it was answered, by jobs and online.
        online: prompts that were asked one by one.
        calls: "METHOD /path" of each call, ids replaced by `*`.
        keys: the keys that calls came with.
    """

    def __init__(self) -> None:
        self.fate: Callable[[int], Fate] = lambda number: Fate()
        self.line: Callable[[str], Reply | None] = lambda prompt: None
        self.finish: Callable[[str], str] = lambda prompt: "stop"
        self.tells: Callable[[str], bool] = lambda prompt: True
        self.before: Callable[[str], Reply | None] = lambda call: None
        self.after: Callable[[str], bool] = lambda call: False
        self.billed: Counter[str] = Counter()
        self.online: list[str] = []
        self.jobs: dict[str, Job] = {}
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """Base URL up to and including /v1."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def by_number(self) -> list[Job]:
        """The jobs in the order in which they were made."""
        return sorted(self.jobs.values(), key=lambda job: job.number)

    def __enter__(self) -> "BatchServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------------------------------------- jobs

    def make(self, lines: list[tuple[str, dict[str, Any]]], token: str | None, file_id: str | None) -> Job:
        """A new job."""
        number = len(self.jobs)
        job = Job(number, f"batch_{number}", lines, self.fate(number), time.time(), token, file_id)
        self.jobs[job.name] = job
        return job

    def look(self, job: Job) -> None:
        """Somebody looks at it: time passes."""
        job.looks += 1
        if job.ended_as is not None:
            return
        fate = job.fate
        if fate.ends == "failed":
            job.ended_as = "failed"
            return
        count = int((len(job.lines) if fate.answers is None else fate.answers) * fate.share)
        if job.is_cancelled or (fate.polls is not None and job.looks > fate.polls):
            self._work(job, count)
            job.ended_as = "cancelled" if job.is_cancelled else fate.ends
        elif fate.partial:
            self._work(job, min(count, job.looks))

    def _work(self, job: Job, count: int) -> None:
        for name, body in job.lines[:count]:
            if name not in job.results:
                failure = self.line(prompt_of(body))
                if failure is None:
                    self.billed[prompt_of(body)] += 1
                job.results[name] = failure or body

    # ------------------------------------------------------------------------------------------------ OpenAI

    def openai_job(self, job: Job) -> dict[str, Any]:
        """The batch object."""
        failed = sum(isinstance(result, tuple) for result in job.results.values())
        shows = job.ended_as in ("completed", "expired", "cancelled") or (job.fate.partial and job.results)
        errors = {"data": [{"code": job.fate.error[0], "message": job.fate.error[1], "line": None}]}
        return {
            "id": job.name,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "errors": errors if job.ended_as == "failed" else None,
            "input_file_id": job.file_id,
            "completion_window": "24h",
            "status": job.ended_as or ("cancelling" if job.is_cancelled else "in_progress"),
            "output_file_id": f"file-out-{job.number}" if shows and len(job.results) > failed else None,
            "error_file_id": f"file-err-{job.number}" if shows and self._openai_errors(job) else None,
            "created_at": int(job.created),
            "request_counts": {"total": len(job.lines), "completed": len(job.results) - failed, "failed": failed},
            "metadata": {"pipeline_token": job.token} if job.token else {},
        }

    def openai_output(self, job: Job) -> list[dict[str, Any]]:
        """Lines of the output file, in another order than they were sent in."""
        return [
            {
                "id": f"batch_req_{name[:8]}",
                "custom_id": name,
                "response": {
                    "status_code": 200,
                    "request_id": f"req-{name[:8]}",
                    "body": self._openai_answer(body),
                },
                "error": None,
            }
            for name, body in reversed(job.results.items())
            if not isinstance(body, tuple)
        ]

    def _openai_answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_of(body)
        return openai_answer(body, prompt.upper(), self.finish(prompt), tells=self.tells(prompt))

    def _openai_errors(self, job: Job) -> list[dict[str, Any]]:
        failed = [
            {
                "custom_id": name,
                "response": {"status_code": result[0], "request_id": "req-x", "body": {"error": result[1]}},
                "error": None,
            }
            for name, result in job.results.items()
            if isinstance(result, tuple)
        ]
        message = "This request could not be executed before the completion window expired."
        late = [
            {"custom_id": name, "response": None, "error": {"code": "batch_expired", "message": message}}
            for name, _ in job.lines
            if name not in job.results and job.ended_as == "expired"
        ]
        return failed + late

    def file(self, name: str) -> bytes | None:
        """The bytes of a file of requests or results."""
        if name in self.files:
            return self.files[name]
        kind, _, number = name.removeprefix("file-").partition("-")
        job = self.jobs.get(f"batch_{number}")
        if job is None or kind not in ("out", "err"):
            return None
        lines = self.openai_output(job) if kind == "out" else self._openai_errors(job)
        return b"\n".join(json.dumps(line).encode() for line in lines)

    # --------------------------------------------------------------------------------------------- Anthropic

    def anthropic_job(self, job: Job) -> dict[str, Any]:
        """The message batch object."""
        failed = sum(isinstance(result, tuple) for result in job.results.values())
        missing, ended = len(job.lines) - len(job.results), job.ended_as is not None
        return {
            "id": job.name,
            "type": "message_batch",
            "processing_status": "ended" if ended else "canceling" if job.is_cancelled else "in_progress",
            "request_counts": {
                "processing": 0 if ended else len(job.lines),
                "succeeded": len(job.results) - failed if ended else 0,
                "errored": failed if ended else 0,
                "canceled": missing if job.ended_as == "cancelled" else 0,
                "expired": missing if job.ended_as == "expired" else 0,
            },
            "created_at": datetime.fromtimestamp(job.created, UTC).isoformat().replace("+00:00", "Z"),
            "results_url": "https://elsewhere.invalid/results" if ended else None,
        }

    def anthropic_results(self, job: Job) -> bytes:
        """Results as JSONL."""
        return b"".join(
            json.dumps({"custom_id": name, "result": self._anthropic_result(job, name)}).encode() + b"\n"
            for name, _ in reversed(job.lines)
        )

    def _anthropic_result(self, job: Job, name: str) -> dict[str, Any]:
        result = job.results.get(name)
        if result is None:
            return {"type": "canceled" if job.ended_as == "cancelled" else "expired"}
        if isinstance(result, tuple):
            return {"type": "errored", "error": {"type": "error", "error": result[1], "request_id": "req_1"}}
        return {
            "type": "succeeded",
            "message": anthropic_answer(result, prompt_of(result).upper(), self.finish(prompt_of(result))),
        }

    # ----------------------------------------------------------------------------------------------- calls

    def answer(self, method: str, path: str, query: str, headers: Message, body: bytes) -> Reply:
        """The reply to a call; bytes go as they are, else as JSON."""
        parts = path.removeprefix("/v1/").split("/")
        match (method, *parts):
            case ("POST", "files"):
                return self._upload(headers, body)
            case ("GET", "files", name, "content"):
                content = self.file(name)
                return (404, {"error": {"message": "no such file"}}) if content is None else (200, content)
            case ("POST", "batches"):
                return self._create(json.loads(body))
            case ("GET", "batches"):
                return 200, self._list(query, "after", self.openai_job)
            case (_, "batches", name, *rest):
                return self._one(name, bool(rest), self.openai_job)
            case ("POST", "messages", "batches"):
                lines = [(one["custom_id"], one["params"]) for one in json.loads(body)["requests"]]
                assert all(len(name) <= 64 for name, _ in lines)
                return 200, self.anthropic_job(self.make(lines, None, None))
            case ("GET", "messages", "batches"):
                return 200, self._list(query, "after_id", self.anthropic_job)
            case ("GET", "messages", "batches", name, "results"):
                job = self.jobs[name]
                ended = job.ended_as is not None
                return (200, self.anthropic_results(job)) if ended else (404, {"error": {"message": "not yet"}})
            case (_, "messages", "batches", name, *rest):
                return self._one(name, bool(rest), self.anthropic_job)
            case ("POST", "chat", "completions") | ("POST", "messages"):
                asked = json.loads(body)
                prompt = prompt_of(asked)
                self.online.append(prompt)
                self.billed[prompt] += 1
                answer = anthropic_answer if parts[0] == "messages" else openai_answer
                return 200, answer(asked, prompt.upper())
        return 404, {"error": {"message": f"no such path: {path}"}}

    def _upload(self, headers: Message, body: bytes) -> Reply:
        boundary = headers.get_param("boundary", header="content-type")
        parts = body.split(f"--{boundary}".encode())[1:-1]
        contents = {
            part.partition(b'name="')[2].partition(b'"')[0]: part.partition(b"\r\n\r\n")[2][:-2] for part in parts
        }
        assert contents[b"purpose"] == b"batch"
        name = f"file-in-{len(self.files)}"
        self.files[name] = contents[b"file"]
        return 200, {"id": name, "object": "file", "bytes": len(contents[b"file"]), "purpose": "batch"}

    def _create(self, asked: dict[str, Any]) -> Reply:
        assert asked["endpoint"] == "/v1/chat/completions" and asked["completion_window"] == "24h"
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        assert all(line["method"] == "POST" and line["url"] == "/v1/chat/completions" for line in lines)
        token = asked["metadata"]["pipeline_token"]
        job = self.make([(line["custom_id"], line["body"]) for line in lines], token, asked["input_file_id"])
        return 200, self.openai_job(job)

    def _list(self, query: str, cursor: str, form: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
        """Two jobs a page, newest first. Time passes for jobs that are listed, too."""
        given = dict(part.split("=") for part in query.split("&"))
        jobs = self.by_number[::-1]
        start = 0 if cursor not in given else [job.name for job in jobs].index(given[cursor]) + 1
        page = jobs[start : start + 2]
        for job in page:
            self.look(job)
        last = page[-1].name if page else None
        return {"data": [form(job) for job in page], "has_more": start + 2 < len(jobs), "last_id": last}

    def _one(self, name: str, cancel: bool, form: Callable[[Job], dict[str, Any]]) -> Reply:
        job = self.jobs.get(name)
        if job is None:
            return 404, {"error": {"message": "no such batch", "type": "not_found_error"}}
        if cancel and job.ended_as is not None:
            return 409, {"error": {"message": "it has ended"}}
        job.is_cancelled |= cancel
        if not cancel:
            self.look(job)
        return 200, form(job)


def _handler_of(server: BatchServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _serve(self, method: str) -> None:
            path, _, query = self.path.partition("?")
            body = self._body()
            call = f"{method} {_without_ids(path)}"
            with server.lock:
                server.calls.append(call)
                server.keys.add(self.headers.get("authorization") or self.headers.get("x-api-key") or "")
                early = server.before(call)
                status, content = early or server.answer(method, path, query, self.headers, body)
                if early is None and server.after(call):
                    self.close_connection = True
                    return
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(raw)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

    return Handler


def _without_ids(path: str) -> str:
    return "/".join(
        "*" if part.startswith(("batch_", "file-")) else part for part in path.removeprefix("/v1").split("/")
    )
