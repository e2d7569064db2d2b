"""Canaries: fixed prompts asked anew at every start, which show that a teacher answers otherwise than at first."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_api import AnthropicTeacher, ApiTeacher, GeminiTeacher, OpenAITeacher
from pipeline.core.config_drift import Canaries
from pipeline.core.config_teacher import Sampling
from pipeline.core.errors import Incomplete
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message, ToolCall
from pipeline.teacher.ask import Asker
from pipeline.teacher.canary import MAX_TOKENS, canary_requests, similarity
from pipeline.teacher.request import Asked
from pipeline.teacher.wire import Reply
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.faults.test_client_faults import QUICK, Asking
from tests.faults.test_native_apis import message, refusal
from tests.support import make_context

PROMPTS = [f"say {i}" for i in range(10)]
TWO = Canaries(count=2)


def is_canary(seen: Seen) -> bool:
    return seen.json["max_tokens"] == MAX_TOKENS


def as_ever(seen: Seen, _: int = 0) -> Act:
    return completion(f"the answer to {seen.prompt} is as it always was")


def otherwise(seen: Seen, _: int = 0) -> Act:
    return completion("something else entirely")


class Run:
    """Runs against one folder, each against a server of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[tuple[str, dict[str, Any]]] = []

    def ask(
        self, prompts: list[str], script: Any, canaries: Canaries | None = TWO, temperature: float = 0.9
    ) -> list[Seen]:
        """Ask all; gives the canaries that the server saw."""
        with ScriptedServer(script) as server:
            subject = Asking(self.folder, server)
            asked = subject.asked(temperature=temperature, max_tokens=100)
            requests = subject.requests(prompts, temperature=temperature, max_tokens=100)
            self.events = subject.ctx.events.seen
            given = None if canaries is None else (canaries, requests)
            with Asker(subject.teacher, asked, QUICK, subject.ctx, canaries=given) as asker:
                asker.fetch(requests)
                asker.done()
                self.texts = [answer.text for answer in asker.answers(requests)]
        return [seen for seen in server.seen if is_canary(seen)]

    def compared(self) -> list[tuple[int, int]]:
        facts = [fields for name, fields in self.events if name == "canaries_asked"]
        return [(each["compared"], each["equal"]) for each in facts]


def test_the_first_prompts_are_asked_greedily_before_the_run_and_at_each_resume_that_asks(tmp_path):
    run = Run(tmp_path)
    first = run.ask(PROMPTS[:5], as_ever)
    assert [seen.prompt for seen in first] == PROMPTS[:2]
    assert {seen.json["temperature"] for seen in first} == {0.0}
    assert run.compared() == [(0, 0)]
    assert len(run.ask(PROMPTS, as_ever)) == 2
    assert run.compared() == [(2, 2)]
    assert run.ask(PROMPTS, otherwise) == [], "nothing was missing, so nothing was asked"


def test_their_answers_are_no_rows(tmp_path):
    run = Run(tmp_path)
    run.ask(PROMPTS, lambda seen, n: otherwise(seen) if is_canary(seen) else as_ever(seen), temperature=0.0)
    assert run.texts == [f"the answer to {prompt} is as it always was" for prompt in PROMPTS]


def test_other_answers_stop_the_run_before_it_asks_anything_else(tmp_path):
    run = Run(tmp_path)
    run.ask(PROMPTS[:5], as_ever)
    with ScriptedServer(otherwise) as server:
        subject = Asking(tmp_path, server)
        canaries = (TWO, subject.requests(PROMPTS))
        asker = Asker(subject.teacher, subject.asked(), QUICK, subject.ctx, canaries=canaries)
        with asker, pytest.raises(Incomplete, match="2 fixed prompts otherwise than at first: 0% alike"):
            asker.fetch(subject.requests(PROMPTS))
        assert all(is_canary(seen) for seen in server.seen)


def test_warn_goes_on(tmp_path):
    run = Run(tmp_path)
    run.ask(PROMPTS[:5], as_ever)
    run.ask(PROMPTS, otherwise, Canaries(count=2, on_drift="warn"))
    assert run.compared() == [(2, 0)]
    assert run.texts[-1] == "something else entirely"


def test_each_later_start_compares_with_the_first_answers_and_not_with_the_last_ones(tmp_path):
    run, warn = Run(tmp_path), Canaries(count=2, on_drift="warn")
    run.ask(PROMPTS[:3], as_ever, warn)
    run.ask(PROMPTS[:6], otherwise, warn)
    run.ask(PROMPTS, otherwise, warn)
    assert run.compared() == [(2, 0)]


def test_a_word_that_differs_is_no_drift_unless_none_may(tmp_path):
    def nearly(seen: Seen, _: int) -> Act:
        return completion(f"the answer to {seen.prompt} is as it always has")

    run = Run(tmp_path)
    run.ask(PROMPTS[:3], as_ever)
    run.ask(PROMPTS[:6], nearly)
    with pytest.raises(Incomplete, match="fixed prompts"):
        run.ask(PROMPTS, nearly, Canaries(count=2, min_similarity=1.0))


def test_they_are_compared_with_canaries_and_not_with_rows_that_were_asked_alike(tmp_path):
    run = Run(tmp_path)
    run.ask(PROMPTS[:5], as_ever, None, temperature=0.0)
    run.ask(PROMPTS, as_ever, temperature=0.0)
    assert run.compared() == [(0, 0)]


def test_without_canaries_none_are_asked(tmp_path):
    assert Run(tmp_path).ask(PROMPTS, as_ever, None) == []


def test_canaries_that_cannot_be_compared_are_said(tmp_path, caplog):
    """A model that thinks its cap away, say."""

    def silent(seen: Seen, _: int) -> Act:
        return completion("", finish="length") if is_canary(seen) else as_ever(seen)

    run = Run(tmp_path)
    run.ask(PROMPTS[:5], silent)
    assert "none of 2 canaries could be compared" in caplog.text
    caplog.clear()
    run.ask(PROMPTS, silent)
    assert run.compared() == [(0, 0)]
    assert "none of 2 canaries could be compared" in caplog.text


def test_canaries_that_were_refused_at_first_are_said(tmp_path, caplog):
    def refused(seen: Seen, _: int) -> Act:
        return completion("", finish="content_filter") if is_canary(seen) else as_ever(seen)

    run = Run(tmp_path)
    run.ask(PROMPTS[:5], refused)
    caplog.clear()
    run.ask(PROMPTS, as_ever)
    assert "none of 2 canaries could be compared" in caplog.text


def test_the_first_time_is_no_reason_to_warn(tmp_path, caplog):
    Run(tmp_path).ask(PROMPTS, as_ever)
    assert "could be compared" not in caplog.text


def test_the_functions_that_are_called_count_and_the_identifiers_of_the_calls_do_not():
    def calling(name: str, arguments: str, call_id: str) -> Reply:
        return Reply("", None, "tool_calls", 1, 1, (), tool_calls=(ToolCall(name, arguments, call_id),))

    first = calling("find", '{"city": "Bern"}', "call_1")
    assert similarity(first, calling("find", '{"city":"Bern"}', "call_2")) == 1.0
    assert similarity(first, calling("find", '{"city": "Rome"}', "call_1")) < 1.0
    assert similarity(first, calling("drop", "{}", "call_1")) == 0.0


class TestTeachersThatThink:
    """Their thinking counts in the cap, and some APIs take no temperature meanwhile."""

    @pytest.mark.parametrize(
        ("teacher", "temperature", "canary"),
        [
            (OpenAITeacher(kind="openai", base_url="https://a.b", provider="p", model="m"), 0.7, (0.0, MAX_TOKENS)),
            (OpenAITeacher(kind="openai", base_url="https://a.b", provider="p", model="m"), None, (None, MAX_TOKENS)),
            (
                OpenAITeacher(kind="openai", base_url="https://a.b", provider="p", model="m", reasoning_effort="low"),
                None,
                (None, 9000),
            ),
            (AnthropicTeacher(kind="anthropic", model="m", thinking_tokens=2000), None, (None, MAX_TOKENS + 2000)),
            (AnthropicTeacher(kind="anthropic", model="m", thinking_tokens=2000), 1.0, (1.0, MAX_TOKENS + 2000)),
            (AnthropicTeacher(kind="anthropic", model="m", reasoning_effort="low"), 1.0, (1.0, 9000)),
            (GeminiTeacher(kind="gemini", model="m", thinking_tokens=512), 0.7, (0.0, MAX_TOKENS + 512)),
            (GeminiTeacher(kind="gemini", model="m", thinking_tokens=0), 0.7, (0.0, MAX_TOKENS)),
        ],
    )
    def test_canaries_leave_room_for_it(
        self, tmp_path: Path, teacher: ApiTeacher, temperature: float | None, canary: tuple[float | None, int]
    ):
        cache = DigestCache(tmp_path / "digests.json")
        asked = Asked.of(teacher, Sampling(temperature=temperature, top_p=None, max_tokens=9000), 0, cache)
        how, _ = canary_requests(teacher, asked, [])
        assert (how.sampling.temperature, how.sampling.max_tokens) == canary

    def test_the_api_takes_them_and_they_are_compared(self, tmp_path):
        def script(seen: Seen, _: int) -> Act:
            if seen.json["max_tokens"] <= seen.json["thinking"]["budget_tokens"]:
                return refusal(400, "invalid_request_error", "`max_tokens` must be greater")
            return message({"type": "text", "text": "as ever"})

        compared = []
        with ScriptedServer(script) as server:
            teacher = AnthropicTeacher(
                kind="anthropic", base_url=server.url, model="claude", api_key=None, thinking_tokens=2000
            )
            for count in (30, 60):
                ctx = make_context(tmp_path)
                cache = DigestCache(tmp_path / "digests.json")
                asked = Asked.of(teacher, Sampling(temperature=None, top_p=None, max_tokens=4000), 0, cache)
                requests = [asked.request("s", f"p{i}", 0, [Message("user", f"q{i}")]) for i in range(count)]
                with Asker(teacher, asked, QUICK, ctx, canaries=(Canaries(count=24), requests)) as asker:
                    asker.fetch(requests)
                    asker.done()
                compared += [fields["compared"] for name, fields in ctx.events.seen if name == "canaries_asked"]
        assert compared == [0, 24]
