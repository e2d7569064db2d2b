"""What each outcome of a request means."""

import json

import pytest

from pipeline.teacher.verdict import Abort, Action, about_this_row, judge, judge_transport, retry_after, snippet
from pipeline.teacher.wire import Reply
from pipeline.teacher.wires.openai_chat import read_body


def error(message: str = "no", **fields: object) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


def chat(message: object, finish: object = "stop") -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


RETRY, STRIKE, REJECT, ABORT, ANSWER = Action.RETRY, Action.STRIKE, Action.REJECT, Action.ABORT, Action.ANSWER

TABLE = [
    # status, body, action, reason
    (200, chat({"content": "4"}), ANSWER, ""),
    (200, chat({"content": ""}), ANSWER, ""),
    (200, chat({"content": "4"}, "length"), ANSWER, ""),
    (200, chat({"content": "4"}, "tool_calls"), ANSWER, ""),
    (200, chat({"content": None, "reasoning_content": "hm"}, "length"), ANSWER, ""),
    (200, chat({"content": None}), STRIKE, "empty"),
    (200, chat({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"), STRIKE, "empty"),
    (200, chat({"content": None, "reasoning_content": "hm"}, "stop"), STRIKE, "empty"),
    (200, b'{"choices": []}', STRIKE, "empty"),
    (200, chat({"content": "4"}, None), STRIKE, "bad_payload"),
    (200, chat(None), STRIKE, "bad_payload"),
    (200, chat({"content": [1]}), STRIKE, "bad_payload"),
    (200, chat({"content": "par"}, "content_filter"), REJECT, "content_filter"),
    (200, chat({"content": None, "refusal": "I cannot"}), REJECT, "refusal"),
    (200, b"", RETRY, "bad_payload"),
    (200, b"<html></html>", RETRY, "bad_payload"),
    (200, chat({"content": "4"})[:-5], RETRY, "bad_payload"),
    (200, b"[1, 2]", RETRY, "bad_payload"),
    (200, b'{"detail": "hello"}', RETRY, "bad_payload"),
    (200, b"\xff\xfe\x00", RETRY, "bad_payload"),
    (200, b"[" * 100_000, RETRY, "bad_payload"),
    (200, error(code=429), RETRY, "rate_limited"),
    (200, error(code=502), RETRY, "status:502"),
    (200, error(type="overloaded_error"), RETRY, "status:503"),
    (200, error(), RETRY, "status:500"),
    (200, b'{"error": "something"}', RETRY, "status:500"),
    (200, error(type="invalid_request_error"), REJECT, "bad_request"),
    (200, error(code="invalid_api_key"), ABORT, "status:401"),
    (200, error(code="insufficient_quota"), ABORT, "quota"),
    (204, b"", RETRY, "bad_payload"),
    (301, b"", ABORT, "redirect"),
    (307, b"", ABORT, "redirect"),
    (400, error(), REJECT, "bad_request"),
    (400, b"<html>", REJECT, "bad_request"),
    (400, error(code="content_filter"), REJECT, "content_filter"),
    (401, error("key sk-1"), ABORT, "status:401"),
    (402, error(), ABORT, "quota"),
    (403, error(), ABORT, "status:403"),
    (404, error(), ABORT, "status:404"),
    (405, b"", ABORT, "status:405"),
    (407, b"", RETRY, "status:407"),
    (408, b"", RETRY, "status:408"),
    (409, error(), RETRY, "status:409"),
    (413, b"", REJECT, "bad_request"),
    (422, error(), REJECT, "bad_request"),
    (425, b"", RETRY, "status:425"),
    (429, b"", RETRY, "rate_limited"),
    (429, error(code="insufficient_quota"), ABORT, "quota"),
    (429, error(type="insufficient_quota"), ABORT, "quota"),
    (500, b"", RETRY, "status:500"),
    (499, b"", RETRY, "status:499"),
    (503, b"<html>", RETRY, "status:503"),
    (529, error(type="overloaded_error"), RETRY, "status:529"),
]


KEY_DETAIL = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
NO_CREDIT = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing."
LIMIT = "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."
CAP = "Your project has exceeded its monthly spending cap."


def quota(name: str, delay: str | None = "22s") -> list[dict[str, object]]:
    """The details of a 429 of Gemini's."""
    failure = {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": name}]}
    wait = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
    return [failure, wait] if delay is not None else [failure]


PER_MINUTE = "GenerateRequestsPerMinutePerProjectPerModel"
PER_DAY = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"

TABLE += [
    # Anthropic's errors, in its own form
    (400, error(type="invalid_request_error"), REJECT, "bad_request"),
    (400, error(NO_CREDIT, type="invalid_request_error"), ABORT, "quota"),
    (400, error(LIMIT, type="invalid_request_error"), ABORT, "quota"),
    (400, error(f"the prompt says: {NO_CREDIT}", type="invalid_request_error"), REJECT, "bad_request"),
    (401, error(type="authentication_error"), ABORT, "status:401"),
    (402, error(type="billing_error"), ABORT, "quota"),
    (403, error(type="permission_error"), ABORT, "status:403"),
    (403, error(type="billing_error"), ABORT, "quota"),
    (404, error(type="not_found_error"), ABORT, "status:404"),
    (413, error(type="request_too_large"), REJECT, "bad_request"),
    (429, error(type="rate_limit_error"), RETRY, "rate_limited"),
    (500, error(type="api_error"), RETRY, "status:500"),
    (504, error(type="timeout_error"), RETRY, "status:504"),
    (200, error(type="rate_limit_error"), RETRY, "rate_limited"),
    (200, error(type="billing_error"), ABORT, "quota"),
    (200, error(type="not_found_error"), ABORT, "status:404"),
    (200, error(type="invalid_request_error", code="invalid_api_key"), ABORT, "status:401"),
    # Gemini's errors
    (400, error(status="INVALID_ARGUMENT", code=400), REJECT, "bad_request"),
    (400, error("API key not valid.", status="INVALID_ARGUMENT", details=KEY_DETAIL), ABORT, "status:400"),
    (401, error(status="UNAUTHENTICATED"), ABORT, "status:401"),
    (403, error(status="PERMISSION_DENIED"), ABORT, "status:403"),
    (403, error(status="PERMISSION_DENIED", details=[{"reason": "BILLING_DISABLED"}]), ABORT, "quota"),
    (404, error(status="NOT_FOUND"), ABORT, "status:404"),
    (429, error(status="RESOURCE_EXHAUSTED", details=quota(PER_MINUTE)), RETRY, "rate_limited"),
    (429, error(status="RESOURCE_EXHAUSTED", details=quota(PER_DAY)), ABORT, "quota"),
    (429, error(CAP, status="RESOURCE_EXHAUSTED"), ABORT, "quota"),
    (
        429,
        error(status="RESOURCE_EXHAUSTED", details=[1, {"violations": [2]}, {"violations": 3}]),
        RETRY,
        "rate_limited",
    ),
    (429, b"[" + error(status="RESOURCE_EXHAUSTED", details=quota(PER_DAY)) + b"]", ABORT, "quota"),
    (503, error(status="UNAVAILABLE"), RETRY, "status:503"),
    (504, error(status="DEADLINE_EXCEEDED"), RETRY, "status:504"),
    (200, error(status="PERMISSION_DENIED"), ABORT, "status:403"),
    (200, error(status="RESOURCE_EXHAUSTED", code=8), RETRY, "rate_limited"),
]


@pytest.mark.parametrize(("status", "body", "action", "reason"), TABLE, ids=lambda value: repr(value)[:40])
def test_each_outcome_has_one_meaning(status, body, action, reason):
    verdict = judge(read_body, status, {}, body)
    assert (verdict.action, verdict.reason) == (action, reason)
    assert isinstance(verdict.reply, Reply) == (action is ANSWER)
    assert (verdict.abort is not None) == (action is ABORT)


def test_the_table_covers_all_actions():
    assert {row[2] for row in TABLE} == set(Action) and len(TABLE) >= 50


@pytest.mark.parametrize(
    ("status", "abort"),
    [(401, Abort.KEY), (403, Abort.KEY), (404, Abort.MODEL), (402, Abort.QUOTA), (302, Abort.REDIRECT)],
)
def test_a_stop_says_why(status, abort):
    assert judge(read_body, status, {}, b"").abort is abort


@pytest.mark.parametrize(
    ("status", "action", "reason"),
    [(403, REJECT, "forbidden"), (401, ABORT, "status:401"), (404, ABORT, "status:404"), (402, ABORT, "quota")],
)
def test_a_403_is_about_the_row_once_others_were_answered(status, action, reason):
    verdict = about_this_row(judge(read_body, status, {}, error("key sk-1")))
    assert (verdict.action, verdict.reason) == (action, reason)
    assert (verdict.abort is not None) == (action is ABORT)
    assert status != 403 or verdict.detail == "", "servers quote keys"


@pytest.mark.parametrize(("status", "overload"), [(429, True), (500, True), (503, True), (408, False), (407, False)])
def test_overload_asks_for_fewer_requests_at_a_time(status, overload):
    assert judge(read_body, status, {}, b"").overload is overload


@pytest.mark.parametrize("kind", ["timeout", "connection", "cut_body"])
def test_a_request_without_a_response_is_tried_again(kind):
    assert judge_transport(kind, "x").action is RETRY


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "9999"}, 9999.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "Sun, 22 Nov 2026 10:00:30 GMT"}, 30.0),
        ({"retry-after": "Sun, 22 Nov 2026 09:00:00 GMT"}, 0.0),
        ({"retry-after": "Mon, 04 May 99999 12:34:06 GMT"}, None),
        ({"retry-after": "Sun, 22 Nov 2026 10:00:30 GMT", "date": "Mon, 04 May 99999 12:34:06 GMT"}, 30.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "١٢"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_as_seconds_milliseconds_or_date(headers, seconds):
    now = 1795341600.0  # Sun, 22 Nov 2026 10:00:00 GMT
    assert retry_after(headers, now) == seconds
    assert judge(read_body, 429, headers, b"", now=now).retry_after == seconds


@pytest.mark.parametrize(
    ("delay", "seconds"),
    [("37s", 37.0), ("8.941621227s", 8.941621227), ("0s", 0.0), ("soon", None), ("-3s", None), (None, None)],
)
def test_geminis_delay_stands_in_the_body(delay, seconds):
    body = error(status="RESOURCE_EXHAUSTED", details=quota(PER_MINUTE, delay))
    assert judge(read_body, 429, {}, body).retry_after == seconds
    assert judge(read_body, 503, {}, body).retry_after == seconds
    assert judge(read_body, 429, {"retry-after": "7"}, body).retry_after == 7.0, "a header says it for the transport"


def test_what_a_server_says_is_shortened_and_cannot_forge_log_lines():
    detail = judge(read_body, 400, {}, error("a\nb\x1b[31m" + "x" * 500)).detail
    assert detail.startswith("a\\nb\\x1b[31mxx")
    assert len(detail) <= 200
    assert snippet(b"\xff\n" * 300).isprintable()


def test_the_reply_holds_text_reasoning_and_counts():
    body = json.dumps(
        {
            "choices": [{"message": {"content": "4", "reasoning": "2+2"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5},
        }
    )
    assert judge(read_body, 200, {}, body.encode()).reply == Reply("4", "2+2", "stop", 3, 5, ())


@pytest.mark.parametrize("count", [None, "3", -1, 2.5, True, 2**31])
def test_a_token_count_that_is_none_is_unknown_not_zero(count):
    choice = {"message": {"content": "4"}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": {"completion_tokens": count}}).encode()
    reply = judge(read_body, 200, {}, body).reply
    assert reply is not None and reply.completion_tokens is None and reply.prompt_tokens is None
