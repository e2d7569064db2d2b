"""One HTTP exchange with a teacher: verified, without redirects, and never more in memory than a response may hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from pipeline.teacher.wire import clean

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Longer responses are not read to their end: the row is rejected as `oversize`."""
CONNECT_TIMEOUT_S = 30.0
REQUEST_ID_CHARS = 200


@dataclass(frozen=True, slots=True)
class Raw:
    """A complete response; header names are looked up in any case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def open_session(timeout_s: float) -> aiohttp.ClientSession:
    """A session for one run: kept connections, verified certificates, no cookies, no proxies from the environment.

    Args:
        timeout_s: from connecting to the last byte of a response.
    """
    connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "pipeline"},
        trust_env=False,
    )


async def send(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], key: str | None, body: bytes
) -> Raw | None:
    """POST one body and read the whole response; None if that is longer than `MAX_BODY_BYTES`.

    Args:
        headers: of this one request; they hold the key.
        key: blotted out where the server repeats it.

    Raises:
        TimeoutError, aiohttp.ClientError, OSError: there is no complete response.
    """
    async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
        content = await _read(response)
        if content is None:
            return None
        if key is not None and key.encode() in content:
            content = content.replace(key.encode(), b"***")
        return Raw(response.status, response.headers, content)


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    declared = response.content_length
    if declared is not None and "Content-Encoding" not in response.headers:
        if declared > MAX_BODY_BYTES:
            response.close()
            return None
        return await response.read()
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():  # decompressed sizes, so that a bomb ends here too
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            response.close()
            return None
    return b"".join(parts)


def request_id(raw: Raw, key: str | None) -> str | None:
    """The provider's name of a request, without our key should it hold that."""
    given = raw.headers.get("x-request-id") or raw.headers.get("request-id")
    if given is None:
        return None
    return clean(given if key is None else given.replace(key, "***"))[:REQUEST_ID_CHARS]
