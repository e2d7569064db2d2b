"""One HTTP exchange with a teacher: verified, without redirects, and never more in memory than a response may hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

import aiohttp

from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.log import SHORTEST_SECRET
from pipeline.teacher.wire import clean

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Longer responses are not read to their end: the row is rejected as `oversize`."""
LARGEST_BODY_BYTES = 64 * 1024 * 1024
"""The same where many logprobs are asked of long answers."""
BYTES_PER_LOGPROB = 400
"""What one token among the best takes in JSON at most, written with spaces; vLLM's takes 110."""
CONNECT_TIMEOUT_S = 30.0
REQUEST_ID_CHARS = 200


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
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
    session: aiohttp.ClientSession,
    url: str,
    headers: Mapping[str, str],
    key: str | None,
    body: bytes,
    most: int = MAX_BODY_BYTES,
) -> Raw | None:
    """POST one body and read the whole response; None if that has more than `most` bytes.

    Args:
        headers: of this one request; they hold the key.
        key: blotted out where the server repeats it.

    Raises:
        TimeoutError, aiohttp.ClientError, OSError: there is no complete response.
    """
    async with session.post(url, data=aiohttp.BytesPayload(body), headers=headers, allow_redirects=False) as response:
        content = await _read(response, most)
        if content is None:
            return None
        return Raw(response.status, response.headers, blot(content, key))


def blot(text: bytes, key: str | None) -> bytes:
    """What a server sent, without our key should it repeat that: plain, or escaped as in a URL or, with its slashes,
    in JSON. Not covered: base64, and parts of a key."""
    if key is not None and len(key) >= SHORTEST_SECRET:
        for form in {key: None, quote(key, safe=""): None, key.replace("/", "\\/"): None}:
            text = text.replace(form.encode(), b"***")
    return text


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes | None:
    declared = response.content_length
    if declared is not None and "Content-Encoding" not in response.headers:
        if declared > most:
            response.close()
            return None
        return await response.read()
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():  # decompressed sizes, so that a bomb ends here too
        parts.append(part)
        size += len(part)
        if size > most:
            response.close()
            return None
    return b"".join(parts)


def most_bytes(max_tokens: int, logprobs: LogprobsAsked | None) -> int:
    """How long a response may be to a request with this cap."""
    if logprobs is None:
        return MAX_BODY_BYTES
    return min(MAX_BODY_BYTES + max_tokens * (logprobs.sent + 1) * BYTES_PER_LOGPROB, LARGEST_BODY_BYTES)


def request_id(raw: Raw, key: str | None) -> str | None:
    """The provider's name of a request, without our key should it hold that."""
    given = raw.headers.get("x-request-id") or raw.headers.get("request-id")
    if given is None:
        return None
    given = blot(given.encode("utf-8", "surrogatepass"), key).decode("utf-8", "surrogatepass")
    return clean(given)[:REQUEST_ID_CHARS]
