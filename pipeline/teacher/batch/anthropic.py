"""Anthropic's Message Batches: jobs without files or metadata, results as one stream of lines.

Source: Anthropic's API reference, "Message Batches": lines that end as errored, canceled or expired are not billed.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from pipeline.teacher.batch.calls import Calls, Refused, Unclear, no_batches
from pipeline.teacher.batch.provider import Found, Line, Look
from pipeline.teacher.batch.tracker import SAFE_ID, Job, key_in
from pipeline.teacher.wire import body_in_line

COUNTS: Final = ("processing", "succeeded", "errored", "canceled", "expired")
NOT_RUN: Final = {"canceled": "cancelled", "expired": "expired"}
PAGE: Final = 100
PAGES: Final = 50
EARLIER_S: Final = 3600
"""How far the provider's clock may be behind ours: older jobs are none that we just made."""


@dataclass(frozen=True, slots=True)
class AnthropicBatches:
    """The provider; see `Provider`."""

    calls: Calls

    def prefix(self, custom_id: str) -> bytes:
        return f'{{"custom_id":"{custom_id}","params":'.encode()

    async def upload(self, job: Job, requests: Path) -> str | None:
        return None

    async def create(self, job: Job, requests: Path) -> Look:
        def body() -> bytes:
            return b'{"requests":[' + b",".join(requests.read_bytes().splitlines()) + b"]}"

        try:
            answer = await self.calls.json("POST", "/messages/batches", body, once=True, kind="application/json")
        except Refused as refused:
            raise no_batches(self.calls.endpoint, refused) from refused
        look = _look(answer)
        if look is None:
            raise Unclear("the answer has no id")
        return look

    async def find(self, job: Job, claimed: Callable[[str], bool], scratch: Path) -> Found:
        """The API keeps no metadata: a job is ours if its results name our token, which only an ended job shows. Until
        then any unknown job of that time and size may be it."""
        candidates: list[Look] = []
        after, is_sure = "", False
        for _ in range(PAGES):
            try:
                page = await self.calls.json("GET", f"/messages/batches?limit={PAGE}{after}")
            except Refused:
                return Found(None, is_sure=False)
            batches = [one for one in page.get("data", []) if isinstance(one, dict)]
            candidates += [look for one in batches if (look := _candidate(one, job)) and not claimed(look.job_id)]
            oldest = min((_seconds(one.get("created_at")) for one in batches), default=0.0)
            last = str(page.get("last_id"))
            if not page.get("has_more") or oldest < job.intended_ms / 1000 - EARLIER_S or not SAFE_ID.fullmatch(last):
                is_sure = True
                break
            after = f"&after_id={last}"
        for look in candidates:
            if look.ended_as is not None and await self._names(look, job, scratch):
                return Found(look)
        return Found(None, is_sure, wait=any(look.ended_as is None for look in candidates))

    async def look(self, job_id: str) -> Look | None:
        try:
            return _look(await self.calls.json("GET", f"/messages/batches/{job_id}"))
        except Refused:
            return None

    async def cancel(self, job_id: str) -> None:
        with suppress(Refused):  # it has ended
            await self.calls.json("POST", f"/messages/batches/{job_id}/cancel")

    async def fetch(self, look: Look, path: Path) -> bool:
        """From the canonical URL, not `results_url`: the key goes to the teacher's host only."""
        path.unlink(missing_ok=True)
        path.touch(0o600)
        if look.ended_as is None:
            return False
        try:
            await self.calls.download(f"/messages/batches/{look.job_id}/results", path)
        except Refused:  # results are kept for 29 days
            return False
        return True

    def read(self, line: dict[str, Any]) -> Line:
        name, result = line.get("custom_id"), line.get("result")
        result = result if isinstance(result, dict) else {}
        kind = str(result.get("type"))
        if kind in NOT_RUN:
            return Line(name, None, reason=NOT_RUN[kind], is_free=True)
        if kind == "succeeded":
            return Line(name, 200, body_in_line(result.get("message")), request_id=_message_id(result.get("message")))
        error = result.get("error")
        error = error if isinstance(error, dict) else {}
        whole = error if isinstance(error.get("error"), dict) else {"type": "error", "error": error}
        request_id = whole.get("request_id")
        return Line(name, 200, body_in_line(whole), request_id=str(request_id) if request_id else None, is_free=True)

    async def _names(self, look: Look, job: Job, scratch: Path) -> bool:
        """Whether the results of an ended job carry our token."""
        try:
            await self.fetch(look, scratch)
            return any(key_in(name, job.token) is not None for name in _names_in(scratch))
        finally:
            scratch.unlink(missing_ok=True)


def _candidate(batch: dict[str, Any], job: Job) -> Look | None:
    look = _look(batch)
    if (
        look is None
        or look.total != job.lines
        or _seconds(batch.get("created_at")) < job.intended_ms / 1000 - EARLIER_S
    ):
        return None
    return look


def _look(answer: dict[str, Any]) -> Look | None:
    job_id = answer.get("id")
    if not isinstance(job_id, str) or not SAFE_ID.fullmatch(job_id):
        return None
    given = answer["request_counts"] if isinstance(answer.get("request_counts"), dict) else {}
    counts = {name: given[name] if type(given.get(name)) is int else 0 for name in COUNTS}
    total = sum(counts.values())
    ended_as = None
    if answer.get("processing_status") == "ended":
        ended_as = "cancelled" if counts["canceled"] else "expired" if counts["expired"] else "completed"
    return Look(job_id, ended_as, total - counts["processing"], total or None)


def _message_id(message: object) -> str | None:
    found = message.get("id") if isinstance(message, dict) else None
    return found if isinstance(found, str) else None


def _names_in(path: Path) -> Iterator[object]:
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError, RecursionError):
                parsed = json.loads(line)
                if isinstance(parsed, dict):
                    yield parsed.get("custom_id")


def _seconds(time: object) -> float:
    """Unix time of an RFC 3339 time; 0 for what is none."""
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return 0.0
