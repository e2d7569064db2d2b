"""Whether an endpoint still serves the model it served at first, asked of its list of models after an outage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp

from pipeline.core.errors import Incomplete, UsageError
from pipeline.teacher.endpoint import Endpoint

PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5)


@dataclass(frozen=True, slots=True)
class Listed:
    """What a list of models says of the one that is asked for.

    Attributes:
        named: whether the list holds its name.
        root: what is served under that name, where the server tells (vLLM: the folder or hub id).
    """

    named: bool
    root: str | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """One look at an endpoint.

    Attributes:
        alive: whether it answers at all.
        listed: None: it has no list of models, or an empty one.
    """

    alive: bool
    listed: Listed | None = None


async def look_at(session: aiohttp.ClientSession, endpoint: Endpoint) -> Look:
    """Ask an endpoint for its models; where it has no such route, or that fails, whether it is healthy. Costs no
    tokens.

    Raises:
        UsageError: the variable that holds its key is not set.
    """
    if endpoint.models_url is None:
        return Look(True)
    status, body = await get(session, endpoint.models_url, endpoint.wire.headers(endpoint.read_key()))
    listed = listed_in(body, endpoint.model) if status == 200 else None
    if listed is not None or (status is not None and status < 500):
        return Look(True, listed)
    url = urlsplit(endpoint.models_url)
    status, _ = await get(session, f"{url.scheme}://{url.netloc}/health", {})
    return Look(status == 200)


def listed_in(body: Any, model: str) -> Listed | None:
    """What the body of a list of models (`{"data": [{"id": …}]}`) says of one; None for what is no such list."""
    entries = body.get("data") if isinstance(body, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    for entry in entries:
        if isinstance(entry, dict) and entry.get("id") == model:
            root = entry.get("root")
            return Listed(True, root if isinstance(root, str) else None)
    return Listed(False)


def is_back(first: Look, now: Look) -> bool:
    """Whether an endpoint answers again, its list of models too if it had one."""
    return now.alive and (first.listed is None or now.listed is not None)


def later_first(first: Look, now: Look) -> Look:
    """What to compare with from now on: the first look at which there was a list of models."""
    return now if first.listed is None else first


def check_alike(endpoints: Sequence[Endpoint], firsts: Mapping[str, Look]) -> None:
    """Compare the first looks at the URLs of one teacher with the first of them that lists its model.

    Not covered: URLs without a list of models, and lists that do not say what is served under the name (`root`, which
    vLLM gives), since all of them hold the name.

    Args:
        firsts: URL -> look.

    Raises:
        UsageError: one of them serves something else.
    """
    looks = [(each, firsts[each.url].listed) for each in endpoints if each.url in firsts]
    seen = [(each, listed) for each, listed in looks if listed is not None]
    named = [(each, listed) for each, listed in seen if listed.named]
    for each, listed in seen:
        if named and not listed.named:
            _raise_unlike(each, f"{each.host} does not list {each.model!r}, {named[0][0].host} does")
    rooted = [(each, listed.root) for each, listed in named if listed.root is not None]
    for each, root in rooted:
        other, before = rooted[0]
        if not is_same_root(root, before):
            _raise_unlike(each, f"{each.host} serves {root!r} as {each.model!r}, {other.host} serves {before!r}")


def is_same_root(one: str, other: str) -> bool:
    """Whether two hosts may serve the same: equal names, or equal last parts where one of them is a folder, which may
    lie elsewhere on each host."""
    if one == other or not (one.startswith("/") or other.startswith("/")):
        return one == other
    return one.rstrip("/").rpartition("/")[2] == other.rstrip("/").rpartition("/")[2]


def _raise_unlike(endpoint: Endpoint, what: str) -> NoReturn:
    todo = "give only URLs of one model as `base_url` and `replicas`, or correct what is served there"
    raise UsageError(f"the URLs of the teacher serve different models: {what}", where=endpoint.host, todo=todo)


def check_same(endpoint: Endpoint, first: Look, now: Look, resume_command: str) -> None:
    """Compare with the first look. A name that was in no list at first is not looked for.

    Raises:
        Incomplete: the endpoint serves something else.
    """
    if first.listed is None or not first.listed.named or now.listed is None or now.listed == first.listed:
        return
    if not now.listed.named:
        what = f"since its outage {endpoint.host} does not serve {endpoint.model!r}"
    else:
        what = f"since its outage {endpoint.host} serves {now.listed.root!r} as {endpoint.model!r}, "
        what += f"before it was {first.listed.root!r}"
    todo = f"when it serves the same model again, resume with: {resume_command}"
    raise Incomplete(what, where=endpoint.host, todo=todo)


async def get(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> tuple[int | None, Any]:
    """Status and JSON of a route; (None, None) without an answer, (status, None) without JSON."""
    try:
        async with session.get(url, headers=headers, timeout=PROBE_TIMEOUT, allow_redirects=False) as response:
            try:
                return response.status, await response.json(content_type=None)
            except ValueError:
                return response.status, None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None, None
