"""Batch mode without a network: custom ids, the config's refusals, prices, what a line of results says."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_batch import BatchConfig, mode_refusals
from pipeline.core.errors import CorruptArtefact
from pipeline.teacher.batch.anthropic import AnthropicBatches
from pipeline.teacher.batch.openai import OpenAIBatches, end_line
from pipeline.teacher.batch.provider import Line
from pipeline.teacher.batch.tracker import INTENDED, Job, Tracker, custom_id, key_in, new_token
from pipeline.teacher.prices import Price, batch_price_of
from pipeline.teacher.verdict import Action, judge
from pipeline.teacher.wires.anthropic import ANTHROPIC
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT


class TestCustomIds:
    @given(st.binary(min_size=32, max_size=32))
    def test_hold_the_key_in_what_every_provider_takes(self, key: bytes) -> None:
        token = new_token()
        name = custom_id(key, token)
        assert len(name) <= 64 and name.replace("-", "").replace("_", "").isalnum()
        assert key_in(name, token) == key

    @pytest.mark.parametrize("name", [None, 7, "", "request-1", custom_id(bytes(32), "0" * 16)])
    def test_of_other_jobs_are_none_of_ours(self, name: object) -> None:
        assert key_in(name, "1" * 16) is None


class TestConfig:
    @pytest.mark.parametrize("kind", ["vllm", "server", "gemini", "replay"])
    def test_kinds_without_batch_jobs_are_refused(self, kind: str) -> None:
        (why,) = mode_refusals("batch", kind)
        assert why.startswith("generate.mode: ") and f"`{kind}`" in why
        assert [*mode_refusals("online", kind)] == []

    @pytest.mark.parametrize("kind", ["openai", "anthropic"])
    def test_kinds_with_batch_jobs_are_not(self, kind: str) -> None:
        assert [*mode_refusals("batch", kind)] == []

    def test_a_time_for_stragglers_needs_stragglers(self) -> None:
        with pytest.raises(ValidationError, match="stragglers: online"):
            BatchConfig(online_after_s=60)
        assert BatchConfig(stragglers="online", online_after_s=60).online_after_s == 60


def teacher(price: dict[str, float] | None, model: str = "m") -> OpenAITeacher:
    return OpenAITeacher.model_validate(
        {"kind": "openai", "base_url": "https://a.example/v1", "provider": "openai", "model": model, "price": price}
    )


class TestPrice:
    def test_the_discount_is_taken_off_and_rounded_up(self) -> None:
        assert batch_price_of(teacher({"input": 2.5, "output": 10, "batch_discount": 0.5})) == Price(
            1_250_000_000, 5 * 10**9
        )
        third = batch_price_of(teacher({"input": 0.000000001, "output": 1, "batch_discount": 0.3}))
        assert third == Price(1, 700_000_000)

    def test_comes_from_the_table_where_the_config_has_none(self) -> None:
        assert batch_price_of(teacher(None, "gpt-5-nano")) == Price(25_000_000, 200_000_000)

    def test_is_unknown_where_nobody_knows_it(self) -> None:
        assert batch_price_of(teacher(None)) is None


class TestRecords:
    def test_of_versions_that_knew_no_logprobs_are_read(self, tmp_path: Path) -> None:
        tracker = Tracker(tmp_path, "f" * 64)
        given: dict[str, Any] = dict.fromkeys(("kind", "base_url", "identity", "model", "wire", "run", "teacher"), "x")
        given |= {"price_input": None, "price_output": None, "worst_nano": 0, "worst_tokens": 0, "intended_ms": 1}
        job = Job(token=new_token(), state=INTENDED, cap=1, room=None, lines=1, **given)
        tracker.save(job)
        (path,) = tracker.folder.glob("*.json")
        record = json.loads(path.read_text())
        del record["logprobs"], record["token_ids"]
        path.write_text(json.dumps(record))
        assert tracker.jobs() == [job]
        del record["cap"]
        path.write_text(json.dumps(record))
        with pytest.raises(CorruptArtefact):
            tracker.jobs()


NO_CALLS: Any = None


class TestLines:
    def openai(self, **line: Any) -> Line:
        return OpenAIBatches(NO_CALLS).read({"custom_id": "x", **line})

    def test_a_line_of_openai_is_what_an_online_call_brings(self) -> None:
        body = {"choices": [{"message": {"content": "lone \ud800"}, "finish_reason": "stop"}]}
        line = self.openai(response={"status_code": 200, "request_id": "r1", "body": body})
        assert line.status == 200 and line.request_id == "r1"
        verdict = judge(OPENAI_CHAT.read, 200, {}, line.body)
        assert verdict.reply is not None and verdict.reply.text == "lone \ufffd"
        assert verdict.reply.flags == ("sanitized",), "what was odd about it is still seen"

    def test_a_body_too_deep_to_be_written_again_is_no_completion(self) -> None:
        body: Any = 1
        for _ in range(1020):
            body = {"a": body}
        line = self.openai(response={"status_code": 200, "body": body})
        assert judge(OPENAI_CHAT.read, 200, {}, line.body).reply is None
        result = {"type": "succeeded", "message": body}
        line = AnthropicBatches(NO_CALLS).read({"custom_id": "x", "result": result})
        assert judge(ANTHROPIC.read, 200, {}, line.body).reply is None

    @pytest.mark.parametrize("code", ["batch_expired", "batch_cancelled"])
    def test_what_a_job_did_not_come_to_is_free(self, code: str) -> None:
        line = self.openai(response=None, error={"code": code, "message": "late"})
        assert line.status is None and line.is_free

    def test_an_unknown_error_may_pass(self) -> None:
        line = self.openai(response=None, error={"code": "odd", "message": "?"})
        assert judge(OPENAI_CHAT.read, line.status or 0, {}, line.body).action is Action.RETRY

    @pytest.mark.parametrize(
        ("kind", "action"),
        [
            ("invalid_request_error", Action.REJECT),
            ("overloaded_error", Action.RETRY),
            ("authentication_error", Action.ABORT),
        ],
    )
    def test_an_error_of_anthropic_means_what_it_means_online(self, kind: str, action: Action) -> None:
        error = {"type": "error", "error": {"type": kind, "message": "no"}}
        line = AnthropicBatches(NO_CALLS).read({"custom_id": "x", "result": {"type": "errored", "error": error}})
        assert judge(ANTHROPIC.read, line.status or 0, {}, line.body).action is action
        assert line.is_free


def test_no_results_are_lost_in_a_line_without_an_end(tmp_path: Path) -> None:
    """Two files one after the other: the first may end without a line break."""
    path = tmp_path / "results"
    for content, wanted in ((b"", b""), (b"{}", b"{}\n"), (b"{}\n", b"{}\n")):
        path.write_bytes(content)
        end_line(path)
        assert path.read_bytes() == wanted
