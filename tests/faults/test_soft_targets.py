"""Servers that give other logprobs than were asked for: noticed before much is paid, and never kept as soft targets."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.errors import UsageError
from pipeline.teacher.ask import Answer
from pipeline.teacher.request import Asked
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, failure
from tests.faults.test_client_faults import QUICK, Asking

WANTED = LogprobsAsked(3, 3, False)
SCORES = {"A": 0.0, "B": -1.0, "C": -2.5, "D": -4.0}
"""Logits of the tokens that this model knows."""
PROMPTS = [f"prompt {i}" for i in range(6)]


def told(seen: Seen, temperature: float | None = None, first: str = "A", count: int = 1) -> Act:
    """An answer of one token with logprobs of the logits; divided by a temperature where one is given."""
    scaled = {name: score / (temperature or 1.0) for name, score in SCORES.items()}
    total = math.log(math.fsum(math.exp(score) for score in scaled.values()))
    tokens = [{"token": name, "logprob": score - total, "bytes": [*name.encode()]} for name, score in scaled.items()]
    top = tokens[: seen.json["top_logprobs"]]
    sampled = next(token for token in tokens if token["token"] == first)
    body = json.loads(completion(first * count).body)
    body["choices"][0]["logprobs"] = {"content": [{**sampled, "top_logprobs": top}] * count}
    return Act(body=json.dumps(body).encode())


def is_trial(seen: Seen) -> bool:
    return seen.json["max_tokens"] == 1


class Targeting(Asking):
    """Asks for logprobs."""

    wanted = WANTED

    def asked(self, **sampling: object) -> Asked:
        return replace(super().asked(**sampling), logprobs=self.wanted)

    @property
    def scales(self) -> list[str]:
        return [fields["scale"] for name, fields in self.ctx.events.seen if name == "temperature_tried"]


def script(answer: Callable[[Seen], Act], trial: Callable[[Seen], Act] = told) -> Callable[[Seen, int], Act]:
    return lambda seen, _: trial(seen) if is_trial(seen) else answer(seen)


def test_logprobs_arrive_and_are_asked_for_once(tmp_path: Path) -> None:
    with ScriptedServer(script(told)) as server:
        answers = Targeting(tmp_path, server).ask(PROMPTS)
        asked = len(server.seen)
        again = Targeting(tmp_path, server).ask(PROMPTS)
        assert len(server.seen) == asked == len(PROMPTS) + 2, "two trials"
    for answer in (*answers, *again):
        assert answer.logprobs is not None and answer.logprobs.top_texts == (b"A", b"B", b"C")


def test_stored_answers_without_them_are_asked_again_and_stay_for_who_wants_none(tmp_path: Path) -> None:
    with ScriptedServer(lambda seen, _: told(seen) if "logprobs" in seen.json else completion("old")) as server:
        Asking(tmp_path, server).ask(PROMPTS)
        assert [answer.text for answer in Targeting(tmp_path, server).ask(PROMPTS)] == ["A"] * 6
        asked = len(server.seen)
        assert Asking(tmp_path, server).texts(PROMPTS) == ["old"] * 6
        assert len(server.seen) == asked


class TestTemperature:
    def test_raw_ones_are_taken_and_the_trial_is_asked_once(self, tmp_path: Path) -> None:
        with ScriptedServer(script(told)) as server:
            first, second = Targeting(tmp_path, server), Targeting(tmp_path, server)
            first.ask(PROMPTS[:3], temperature=0.7)
            second.ask(PROMPTS, temperature=0.7)
            assert sum(map(is_trial, server.seen)) == 2
        assert first.scales == second.scales == ["raw"]

    def scaled(self, seen: Seen) -> Act:
        return told(seen, seen.json["temperature"])

    def test_scaled_ones_stop_it_before_any_row_is_asked(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda seen, _: self.scaled(seen)) as server:
            with pytest.raises(UsageError, match="scaled by the temperature") as caught:
                Targeting(tmp_path, server).ask(PROMPTS, temperature=0.7)
            assert all(map(is_trial, server.seen)) and len(server.seen) == 2
        assert "temperature: 1" in caught.value.todo and "accept_scaled" in caught.value.todo

    def test_scaled_by_1_they_are_the_models_own(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda seen, _: self.scaled(seen)) as server:
            subject = Targeting(tmp_path, server)
            assert len(subject.ask(PROMPTS, temperature=1.0)) == 6
        assert subject.scales == ["scaled"]

    def test_they_can_be_accepted(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda seen, _: self.scaled(seen)) as server:
            subject = Targeting(tmp_path, server)
            subject.wanted = replace(WANTED, accept_scaled=True)
            assert len(subject.ask(PROMPTS, temperature=0.7)) == 6

    def test_where_no_temperature_is_told_nothing_is_tried(self, tmp_path: Path) -> None:
        with ScriptedServer(script(told)) as server:
            subject = Targeting(tmp_path, server)
            subject.ask(PROMPTS, temperature=None)
            assert not any(map(is_trial, server.seen))
        assert subject.scales == ["untold"]


class TestAServerThatGivesNone:
    def test_stops_before_any_row_is_asked(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda *_: completion("A")) as server:
            with pytest.raises(UsageError, match="answers without the 3 logprobs"):
                Targeting(tmp_path, server).ask(PROMPTS)
            assert all(map(is_trial, server.seen))

    def test_is_tried_again_once_it_may_give_them(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda *_: completion("A")) as server, pytest.raises(UsageError):
            Targeting(tmp_path, server).ask(PROMPTS)
        with ScriptedServer(script(told)) as server:
            assert len(Targeting(tmp_path, server).ask(PROMPTS)) == 6

    def test_or_refuses_the_question_stops_too(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda *_: failure(400, "logprobs are not supported")) as server:
            with pytest.raises(UsageError, match="refuses to answer with logprobs"):
                Targeting(tmp_path, server).ask(PROMPTS)
            assert all(map(is_trial, server.seen))


class TestOneAnswer:
    def answers(self, folder: Path, bad: Act, times: int) -> tuple[list[Answer], int]:
        """The first prompt is answered badly so many times, then well; and how often it was asked."""
        count = 0

        def answer(seen: Seen) -> Act:
            nonlocal count
            if seen.prompt != PROMPTS[0]:
                return told(seen)
            count += 1
            return bad if count <= times else told(seen)

        with ScriptedServer(script(answer)) as server:
            return Targeting(folder, server).ask(PROMPTS, QUICK), count

    def test_that_lacks_them_is_asked_again(self, tmp_path: Path) -> None:
        answers, asked = self.answers(tmp_path, completion("A"), times=2)
        assert [answer.rejected for answer in answers] == [None] * 6 and asked == 3

    def test_that_always_lacks_them_is_rejected_and_kept_for_who_wants_none(self, tmp_path: Path) -> None:
        answers, asked = self.answers(tmp_path, completion("A"), times=9)
        assert [answer.rejected for answer in answers] == ["bad_logprobs", *[None] * 5] and asked == 3
        with ScriptedServer(script(told)) as server:
            assert Targeting(tmp_path, server).texts(PROMPTS) == ["bad_logprobs", *["A"] * 5]
            assert Asking(tmp_path, server).texts(PROMPTS) == ["A"] * 6
            assert server.seen == [], "it was paid for"

    def test_whose_logprobs_end_before_it_does_is_no_answer(self, tmp_path: Path) -> None:
        body = json.loads(completion("AAA").body)
        body["choices"][0]["logprobs"] = {"content": json.loads(self.one())["choices"][0]["logprobs"]["content"]}
        answers, _ = self.answers(tmp_path, Act(body=json.dumps(body).encode()), times=9)
        assert answers[0].rejected == "bad_logprobs"

    def one(self) -> bytes:
        return told(Seen("", {}, {"top_logprobs": 3})).body
