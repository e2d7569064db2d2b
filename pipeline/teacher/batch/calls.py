"""Single calls of batch endpoints: tried again while the failure may pass, never where a repetition could cost."""

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from pipeline.core.config_teacher import Retry
from pipeline.core.errors import Incomplete, UsageError, boundary
from pipeline.teacher.complaints import abort_error
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.transport import CONNECT_TIMEOUT_S, blot
from pipeline.teacher.verdict import Abort, Action, Verdict, judge, judge_transport, why_unconnected
from pipeline.teacher.wire import Unusable, load_json

log = logging.getLogger(__name__)

ANSWER_BYTES = 64 * 1024 * 1024
"""Longer answers of endpoints that give JSON are not read."""
CHUNK_BYTES = 1024 * 1024


class Unclear(Exception):
    """A call that must not be repeated was sent, and nobody knows whether it took effect."""


class Refused(Exception):
    """The provider will not do it, whatever the number of times it is asked.

    Attributes:
        status: HTTP status.
        detail: at most 200 characters of what it said.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


@dataclass(frozen=True, slots=True)
class Calls:
    """The batch endpoints of one server.

    Attributes:
        session: see `open_batch_session`.
        endpoint: whose key and format they share.
        base_url: up to and including `/v1`.
        retry: from the config.
    """

    session: aiohttp.ClientSession
    endpoint: Endpoint
    base_url: str
    retry: Retry

    async def json(
        self, method: str, path: str, body: Callable[[], object] | None = None, *, once: bool = False, kind: str = ""
    ) -> dict[str, Any]:
        """Call an endpoint that answers with a JSON object.

        Args:
            body: makes what is sent, anew for each try.
            once: the call takes effect each time that it arrives, so that it is repeated only if it surely did not.
            kind: content type of the body; "": the body says it itself.

        Raises:
            Refused: with a status that no repetition changes (400, 404, 409, 413, 422).
            Unclear: see `once`.
            UsageError: the key is refused.
            Incomplete: `retry.budget_s` is over, or the account's credit.
        """

        async def take(response: aiohttp.ClientResponse) -> dict[str, Any]:
            parsed, _ = load_json(blot(await _read(response), self.endpoint.read_key()))
            if not isinstance(parsed, dict):
                raise aiohttp.ClientPayloadError("the answer is no JSON object")
            return parsed

        answer: dict[str, Any] = await self._try(method, path, take, body, once, kind)
        return answer

    async def download(self, path: str, target: Path) -> None:
        """Append what an endpoint gives to a file; a part that was cut off is read again from its beginning."""
        start = target.stat().st_size if target.exists() else 0

        async def take(response: aiohttp.ClientResponse) -> None:
            todo = "free disk space, then run again; the results stay at the provider"
            with boundary(Incomplete, "results cannot be stored", where=str(target), todo=todo):
                descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.truncate(start)
                file.seek(start)
                async for part in response.content.iter_chunked(CHUNK_BYTES):
                    with boundary(Incomplete, "results cannot be stored", where=str(target), todo=todo):
                        file.write(part)
                file.flush()
                os.fsync(file.fileno())

        await self._try("GET", path, take, None, False, "")

    async def _try(
        self,
        method: str,
        path: str,
        take: Callable[[aiohttp.ClientResponse], Any],
        body: Callable[[], object] | None,
        once: bool,
        kind: str,
    ) -> Any:
        first_failure, failures = None, 0
        while True:
            outcome = await self._once(method, path, take, body, kind)
            if not isinstance(outcome, Failure):
                return outcome
            self._check(outcome, once=once)
            now = time.monotonic()
            if first_failure is None:
                first_failure = now
                log.warning("%s: %s; trying again", self.endpoint.host, outcome.verdict.reason)
            bound = min(self.retry.max_wait_s, self.retry.first_wait_s * 2 ** min(failures, 30))
            wait = (outcome.verdict.retry_after or 0.0) + random.uniform(0, bound)
            if now + wait - first_failure > self.retry.budget_s:
                what = f"the batch endpoints have not answered for {self.retry.budget_s:g} s ({outcome.verdict.reason})"
                todo = "run again later: open jobs stay at the provider and are found again"
                raise Incomplete(what, where=self.endpoint.host, todo=todo)
            failures += 1
            await asyncio.sleep(wait)

    def _check(self, failure: "Failure", *, once: bool) -> None:
        """Raise unless the call may be repeated."""
        verdict = failure.verdict
        if verdict.abort in (Abort.KEY, Abort.QUOTA, Abort.REDIRECT):
            raise abort_error(self.endpoint, verdict)
        if verdict.action in (Action.REJECT, Action.ABORT) or failure.status == 409:
            raise Refused(failure.status, verdict.detail)
        if once and failure.may_have_worked:
            raise Unclear(verdict.reason)

    async def _once(
        self,
        method: str,
        path: str,
        take: Callable[[aiohttp.ClientResponse], Any],
        body: Callable[[], object] | None,
        kind: str,
    ) -> Any:
        key = self.endpoint.read_key()
        headers = self.endpoint.wire.headers(key) | ({"Content-Type": kind} if kind else {})
        data, url = None if body is None else body(), self.base_url + path
        try:
            async with self.session.request(method, url, data=data, headers=headers, allow_redirects=False) as response:
                if response.status == 200:
                    return await take(response)
                content = blot(await _read(response), key)
                return _failure(response.status, response.headers, content)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Failure(0, judge_transport("connection", why_unconnected(error)), may_have_worked=False)
        except TimeoutError:
            return Failure(0, judge_transport("timeout", f"silent for {self.retry.timeout_s:g} s"))
        except (aiohttp.ClientError, OSError) as error:
            return Failure(0, judge_transport("connection", why_unconnected(error)))


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that did not bring what was asked for.

    Attributes:
        status: HTTP status; 0: there was no complete response.
        may_have_worked: the call may have taken effect all the same.
    """

    status: int
    verdict: Verdict
    may_have_worked: bool = True


def _failure(status: int, headers: Mapping[str, str], content: bytes) -> Failure:
    verdict = judge(lambda _: Unusable("unknown"), status, headers, content)
    return Failure(status, verdict, may_have_worked=not 300 <= status < 500 or status in (408, 499))


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """An answer, cut off at `ANSWER_BYTES`."""
    content = bytearray()
    async for part in response.content.iter_chunked(CHUNK_BYTES):
        content += part
        if len(content) > ANSWER_BYTES:
            response.close()
            break
    return bytes(content)


@asynccontextmanager
async def open_batch_session(timeout_s: float) -> AsyncIterator[aiohttp.ClientSession]:
    """A session for batch endpoints: as `transport.open_session`, but files may take as long as bytes flow.

    Args:
        timeout_s: silence after which a call has failed.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=timeout_s)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity", "User-Agent": "pipeline"},
        trust_env=False,
    ) as session:
        yield session


def no_batches(endpoint: Endpoint, refused: Refused) -> UsageError:
    """What a person is told whose server takes no batch jobs, or not this one."""
    if refused.status in (404, 405, 410):
        what = f"the server has no batch endpoints (status {refused.status})"
        return UsageError(what, where=endpoint.host, todo="use `generate.mode: online`, or correct `base_url`")
    what = f"the provider refuses the batch job: {refused.detail}"
    return UsageError(what, where=endpoint.host, todo="correct the teacher's settings, `sampling` or `generate.batch`")
