"""The Batch API as OpenAI defines it, which other servers speak too: files, jobs, an output file and an error file.

Source: OpenAI's API reference, "Batch" and "Files". Lines that a job did not come to are not billed.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from pipeline.teacher.batch.calls import Calls, Refused, Unclear, no_batches
from pipeline.teacher.batch.provider import Found, Line, Look
from pipeline.teacher.batch.tracker import SAFE_ID, Job
from pipeline.teacher.verdict import snippet
from pipeline.teacher.wire import body_in_line

ROUTE: Final = "/v1/chat/completions"
ENDED: Final = {"completed": "completed", "expired": "expired", "cancelled": "cancelled", "failed": "failed"}
NOT_RUN: Final = {"batch_expired": "expired", "batch_cancelled": "cancelled"}
TOKEN: Final = "pipeline_token"
PAGE: Final = 100
PAGES: Final = 50
EARLIER_S: Final = 3600
"""How far the provider's clock may be behind ours: older jobs are none that we just made."""


@dataclass(frozen=True, slots=True)
class OpenAIBatches:
    """The provider; see `Provider`."""

    calls: Calls

    def prefix(self, custom_id: str) -> bytes:
        return f'{{"custom_id":"{custom_id}","method":"POST","url":"{ROUTE}","body":'.encode()

    async def upload(self, job: Job, requests: Path) -> str | None:
        def form() -> aiohttp.FormData:
            data = aiohttp.FormData()
            data.add_field("purpose", "batch")
            file = requests.open("rb")
            data.add_field("file", file, filename=f"{job.token}.jsonl", content_type="application/jsonl")
            return data

        try:
            answer = await self.calls.json("POST", "/files", form)
        except Refused as refused:
            raise no_batches(self.calls.endpoint, refused) from refused
        return _id_in(answer)

    async def create(self, job: Job, requests: Path) -> Look:
        wanted = {
            "input_file_id": job.file_id,
            "endpoint": ROUTE,
            "completion_window": "24h",
            "metadata": {TOKEN: job.token},
        }
        body = json.dumps(wanted).encode()
        try:
            answer = await self.calls.json("POST", "/batches", lambda: body, once=True, kind="application/json")
        except Refused as refused:
            raise no_batches(self.calls.endpoint, refused) from refused
        look = _look(answer)
        if look is None:
            raise Unclear("the answer has no id")
        return look

    async def find(self, job: Job, claimed: Callable[[str], bool], scratch: Path) -> Found:
        after = ""
        for _ in range(PAGES):
            try:
                page = await self.calls.json("GET", f"/batches?limit={PAGE}{after}")
            except Refused:
                return Found(None, is_sure=False)
            batches = [one for one in page.get("data", []) if isinstance(one, dict)]
            mine = next((one for one in batches if _is(one, job)), None)
            if mine is not None:
                return Found(_look(mine))
            oldest = min((_number(one.get("created_at")) for one in batches), default=0)
            last = str(page.get("last_id"))
            if not page.get("has_more") or oldest < job.intended_ms / 1000 - EARLIER_S or not SAFE_ID.fullmatch(last):
                return Found(None)
            after = f"&after={last}"
        return Found(None, is_sure=False)

    async def look(self, job_id: str) -> Look | None:
        try:
            return _look(await self.calls.json("GET", f"/batches/{job_id}"))
        except Refused:
            return None

    async def cancel(self, job_id: str) -> None:
        with suppress(Refused):  # it has ended
            await self.calls.json("POST", f"/batches/{job_id}/cancel", lambda: b"{}", kind="application/json")

    async def fetch(self, look: Look, path: Path) -> bool:
        path.unlink(missing_ok=True)
        path.touch(0o600)
        complete = True
        for file_id in look.results:
            try:
                await self.calls.download(f"/files/{file_id}/content", path)
            except Refused:
                complete = False
            end_line(path)
        return complete

    def read(self, line: dict[str, Any]) -> Line:
        name, response, error = line.get("custom_id"), line.get("response"), line.get("error")
        if isinstance(response, dict):
            status, body = response.get("status_code"), body_in_line(response.get("body"))
            request_id = response.get("request_id")
            known = status if isinstance(status, int) and 100 <= status < 600 else 200
            return Line(name, known, body, request_id=str(request_id) if request_id else None)
        code = str(error.get("code")) if isinstance(error, dict) else "unknown"
        if code in NOT_RUN:
            return Line(name, None, reason=NOT_RUN[code], is_free=True)
        return Line(name, 200, body_in_line({"error": error or {}}), is_free=True)


def _look(answer: dict[str, Any]) -> Look | None:
    job_id = answer.get("id")
    if not isinstance(job_id, str) or not SAFE_ID.fullmatch(job_id):
        return None
    counts = answer["request_counts"] if isinstance(answer.get("request_counts"), dict) else {}
    files = [answer.get(name) for name in ("output_file_id", "error_file_id")]
    errors = answer["errors"].get("data") if isinstance(answer.get("errors"), dict) else None
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    line = f" (line {first['line']})" if first.get("line") else ""
    return Look(
        job_id=job_id,
        ended_as=ENDED.get(str(answer.get("status"))),
        done=_number(counts.get("completed")) + _number(counts.get("failed")),
        total=_number(counts.get("total")) or None,
        results=tuple(file for file in files if isinstance(file, str) and SAFE_ID.fullmatch(file)),
        complaint=snippet(str(first.get("message", "")).encode()) + line,
        is_too_much=first.get("code") == "token_limit_exceeded",
    )


def _is(batch: dict[str, Any], job: Job) -> bool:
    metadata = batch.get("metadata")
    if isinstance(metadata, dict) and metadata.get(TOKEN) == job.token:
        return True
    return job.file_id is not None and batch.get("input_file_id") == job.file_id


def _id_in(answer: dict[str, Any]) -> str:
    found = answer.get("id")
    if not isinstance(found, str) or not SAFE_ID.fullmatch(found):
        raise Unclear("the answer has no id")
    return found


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) and value >= 0 else 0


def end_line(path: Path) -> None:
    """What is appended next begins on a line of its own."""
    with path.open("rb+") as file:
        if file.seek(0, 2) and file.seek(-1, 2) is not None and file.read(1) != b"\n":
            file.write(b"\n")
