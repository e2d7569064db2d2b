"""What an outcome of a request means, once for all callers: answer, try again, refuse this row, or stop."""

import email.utils
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipeline.teacher.wire import Reply, Unusable, load_json


class Action(Enum):
    """What to do next."""

    ANSWER = "answer"
    """Keep it."""
    RETRY = "retry"
    """The failure may pass: try again within the time budget; a row that exceeds it stays pending."""
    STRIKE = "strike"
    """The model answered, but with nothing usable: try again; a row with three strikes is rejected."""
    REJECT = "reject"
    """This row will never be answered; it is not sent again."""
    ABORT = "abort"
    """Every further request would fail alike: stop at once, keep what was answered."""


class Abort(Enum):
    """Why everything stops."""

    KEY = "the API refuses the key"
    MODEL = "the API does not know this URL or model"
    QUOTA = "the account's quota or credit is used up"
    REDIRECT = "the server redirects elsewhere; redirects are not followed, since they carry keys and prompts away"


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Verdict:
    """What an outcome means.

    Attributes:
        action: what to do.
        reason: class of the failure ("rate_limited", "server_error:503", "bad_request"); "" for an answer.
        overload: the endpoint has too much to do, so send less at a time.
        retry_after: seconds that the server asked us to wait.
        abort: why everything stops, for ABORT.
        detail: at most 200 characters of what the server said, control characters escaped.
        reply: the answer, for ANSWER.
    """

    action: Action
    reason: str = ""
    overload: bool = False
    retry_after: float | None = None
    abort: Abort | None = None
    detail: str = ""
    reply: Reply | None = None


BAD_PAYLOAD = "bad_payload"
"""A success without a completion. A gateway's maintenance page or this row's bad luck: only time tells, so that a row
is rejected for it when its time budget is used up while others were answered."""
EMPTY = "empty"
"""An answer that says nothing."""
FORBIDDEN = "forbidden"
"""A row that the API refuses with 403 while it answers others."""
BUSY = frozenset({408, 409, 425, 429, 499})
REFUSED = frozenset({401, 403})
UNKNOWN = frozenset({404, 405, 410})
QUOTA_CODES = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "insufficient_credits", "billing_error", "BILLING_DISABLED"}
)
QUOTA_MESSAGES = (
    "your credit balance is too low",
    "you have reached your specified api usage limits",
    "your project has exceeded its monthly spending cap",
)
"""How messages begin in which Anthropic (400) and Google (429) say it under the type of another error."""
FILTER_CODES = frozenset({"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"})
KEY_CODES = frozenset({"invalid_api_key", "authentication_error", "API_KEY_INVALID", "UNAUTHENTICATED"})
STATUS_OF_CODE = {
    **dict.fromkeys(KEY_CODES, 401),
    **dict.fromkeys(("permission_error", "PERMISSION_DENIED"), 403),
    **dict.fromkeys(("not_found_error", "model_not_found", "NOT_FOUND"), 404),
    **dict.fromkeys(("invalid_request_error", "context_length_exceeded", "BadRequestError"), 400),
    **dict.fromkeys(("request_too_large", "INVALID_ARGUMENT", "FAILED_PRECONDITION"), 400),
    **dict.fromkeys(("rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"), 429),
    **dict.fromkeys(("overloaded_error", "server_error", "api_error", "UNAVAILABLE"), 503),
    **dict.fromkeys(("timeout_error", "DEADLINE_EXCEEDED"), 504),
}
"""HTTP statuses that the names of errors stand for, where an error object comes without one: inside a 200."""
DAILY = "PerDay"
"""In the names of Gemini's quotas that no wait of seconds brings back, whatever its error object says."""


def judge(
    read: Callable[[bytes], Reply | Unusable],
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: float | None = None,
) -> Verdict:
    """The verdict on a complete HTTP response.

    Args:
        read: what a success says in the format that was asked in (`Wire.read`).
        headers: looked up by lower-case name; aiohttp's mapping knows names in any case.
        now: Unix time against which a Retry-After date is read; None: the clock.
    """
    if status == 200:
        return _judge_success(read(body), headers, body, now)
    error = _error_of(body)
    if 200 <= status < 300:
        return Verdict(Action.RETRY, BAD_PAYLOAD, detail=snippet(body))
    if 300 <= status < 400:
        return Verdict(Action.ABORT, "redirect", abort=Abort.REDIRECT)
    return _judge_failure(status, headers, error, _detail(error, body), now)


def about_this_row(verdict: Verdict) -> Verdict:
    """The verdict where the API has answered other rows with the same key: a 403 is then this row's (gateways refuse
    single prompts with it), a 401 still the key's. What the server said is left out: it may quote the key."""
    if verdict.abort is Abort.KEY and verdict.reason == "status:403":
        return Verdict(Action.REJECT, FORBIDDEN)
    return verdict


def as_asked(verdict: Verdict, *, offers_tools: bool) -> Verdict:
    """The verdict where an answer of tool calls alone came to a request that offered no tools: it says nothing."""
    if verdict.reply is None or offers_tools or not verdict.reply.is_only_calls:
        return verdict
    return Verdict(Action.STRIKE, EMPTY, detail="tool calls, though no tools were offered")


def judge_transport(kind: str, detail: str) -> Verdict:
    """The verdict on a request that got no complete response: `timeout`, `connection` or `cut_body`.

    TLS and DNS failures are `connection`: they are tried again and end with the time budget; certificates are always
    verified.
    """
    return Verdict(Action.RETRY, kind, overload=kind == "timeout", detail=detail[:200])


def why_unconnected(error: Exception) -> str:
    """Why there is no connection, in the words of the system ("Connection refused"): for `judge_transport`.

    Args:
        error: of a socket or of aiohttp, which wraps those.
    """
    cause = getattr(error, "certificate_error", getattr(error, "os_error", error))
    has_own_numbers = isinstance(cause, socket.gaierror | ssl.SSLError)
    if isinstance(cause, OSError) and cause.errno is not None and not has_own_numbers:
        return os.strerror(cause.errno)
    return str(getattr(cause, "strerror", None) or cause)


def _judge_success(read: Reply | Unusable, headers: Mapping[str, str], body: bytes, now: float | None) -> Verdict:
    if isinstance(read, Reply):
        return Verdict(Action.ANSWER, reply=read)
    return _judge_unusable(read, headers, body, now)


def _judge_unusable(read: Unusable, headers: Mapping[str, str], body: bytes, now: float | None) -> Verdict:
    if read.reason in ("content_filter", "refusal"):
        return Verdict(Action.REJECT, read.reason)
    if read.reason == "error" and read.error is not None:
        return _judge_failure(_error_status(read.error), headers, read.error, _detail(read.error, body), now)
    if read.reason == "unknown":
        return Verdict(Action.RETRY, BAD_PAYLOAD, detail=snippet(body))
    return Verdict(Action.STRIKE, read.reason, detail=snippet(body))


def _judge_failure(
    status: int, headers: Mapping[str, str], error: Mapping[str, Any], detail: str, now: float | None
) -> Verdict:
    codes = _codes(error)
    if status == 402 or codes & QUOTA_CODES or _is_used_up(error):
        return Verdict(Action.ABORT, "quota", abort=Abort.QUOTA, detail=detail)
    if codes & FILTER_CODES:
        return Verdict(Action.REJECT, "content_filter", detail=detail)
    if status in REFUSED or (status == 400 and codes & KEY_CODES):
        return Verdict(Action.ABORT, f"status:{status}", abort=Abort.KEY, detail=detail)
    if status in UNKNOWN:
        return Verdict(Action.ABORT, f"status:{status}", abort=Abort.MODEL, detail=detail)
    if status == 429:
        return Verdict(Action.RETRY, "rate_limited", True, _wait(headers, error, now), detail=detail)
    if status in BUSY or status == 407 or status >= 500:
        return Verdict(Action.RETRY, f"status:{status}", status >= 500, _wait(headers, error, now), detail=detail)
    return Verdict(Action.REJECT, "bad_request", detail=detail)


def _error_status(error: Mapping[str, Any]) -> int:
    """The HTTP status that an error object inside a 200 stands for; unknown errors may pass, so 500."""
    code = error.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        return code
    named = {STATUS_OF_CODE[name] for name in _codes(error) & STATUS_OF_CODE.keys()}
    return next((status for status in (401, 403, 404, *sorted(named)) if status in named), 500)


def _codes(error: Mapping[str, Any]) -> set[str]:
    """The names under which an error object says what it is about, those of Google's details among them."""
    reasons = {str(detail.get("reason")) for detail in _details(error)}
    return {str(error.get(name)) for name in ("code", "type", "status")} | reasons


def _details(error: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """`google.rpc` messages inside an error object, such as ErrorInfo, QuotaFailure and RetryInfo."""
    details = error.get("details")
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _is_used_up(error: Mapping[str, Any]) -> bool:
    """Whether an error is about credit, a spending cap or a day's quota, though its code says less."""
    if str(error.get("message")).lower().startswith(QUOTA_MESSAGES):
        return True
    lists = [detail["violations"] for detail in _details(error) if isinstance(detail.get("violations"), list)]
    return any(isinstance(one, dict) and DAILY in str(one.get("quotaId")) for each in lists for one in each)


def _wait(headers: Mapping[str, str], error: Mapping[str, Any], now: float | None) -> float | None:
    """Seconds a server asks us to wait: in its headers, else in Google's RetryInfo ("37s", "8.94s")."""
    asked = retry_after(headers, now)
    if asked is not None:
        return asked
    delays = [str(detail.get("retryDelay")).removesuffix("s") for detail in _details(error)]
    return max((float(delay) for delay in delays if _is_decimal(delay)), default=None)


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.replace(".", "", 1).isdigit()


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds a server asks us to wait: `retry-after-ms`, or `retry-after` as seconds or an HTTP date.

    A date in the past is 0; what cannot be read is None. A date is compared with the server's own (`date`), and with
    our clock, which may be wrong, only where the server does not say what time it is.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if _is_decimal(value):
            return float(value) * unit
    asked = _seconds_of(headers.get("retry-after", ""))
    if asked is None:
        return None
    answered = _seconds_of(headers.get("date", ""))
    if answered is not None:
        now = answered
    return max(0.0, asked - (time.time() if now is None else now))


def _seconds_of(date: str) -> float | None:
    """Unix time of an HTTP date; None for what is none, or lies outside the calendar."""
    parsed = email.utils.parsedate_tz(date)
    try:
        return None if parsed is None else email.utils.mktime_tz(parsed)
    except (ValueError, OverflowError):
        return None


def snippet(body: bytes) -> str:
    """The first 200 characters of a body, control and non-ASCII characters escaped, for logs and error messages."""
    return body[:200].decode("utf-8", "replace").encode("unicode_escape").decode("ascii")[:200]


def _error_of(body: bytes) -> Mapping[str, Any]:
    """The error object of a response that failed, or an empty one."""
    parsed, _ = load_json(body)
    if isinstance(parsed, list) and parsed:  # Google's OpenAI-compatible surface
        parsed = parsed[0]
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else None
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) else {}


def _detail(error: Mapping[str, Any], body: bytes) -> str:
    message = error.get("message")
    return snippet(message.encode("utf-8", "replace")) if isinstance(message, str) else snippet(body)
