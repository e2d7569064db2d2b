"""Canaries: fixed prompts asked anew at every start, which show that a teacher answers otherwise than at first."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_drift import Canaries
from pipeline.core.errors import Incomplete
from pipeline.teacher.ask import Asker
from pipeline.teacher.canary import MAX_TOKENS
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.faults.test_client_faults import QUICK, Asking

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
            with Asker(subject.teacher, asked, QUICK, subject.ctx, canaries=canaries) as asker:
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
        asker = Asker(subject.teacher, subject.asked(), QUICK, subject.ctx, canaries=TWO)
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
