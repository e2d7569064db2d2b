"""The outbound guard: which teachers it stands before, what counts in keys, and the test prompts of `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import EvaluateStep, RunConfig
from pipeline.core.config_base import identity
from pipeline.core.config_outbound import OutboundConfig
from pipeline.core.record import Message, Prompt
from pipeline.runner.steps import STAGES
from pipeline.stages.evaluate.answers import ask_teacher, chat, guard_questions
from pipeline.stages.evaluate.questions import Questions
from pipeline.text.outbound import Guard, Tally
from pipeline.text.verifiers import exact
from tests.faults.scripted_server import ScriptedServer, echo
from tests.support import a_prompt, make_context, minimal_config

KEY = "gh" + "p_aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5"
MAIL = "jane" + "@gmail.com"

TEACHERS = {
    "vllm": {"kind": "vllm", "model": "./teacher"},
    "replay": {"kind": "replay", "path": "rows.jsonl", "origin": "people"},
    "openai": {"kind": "openai", "base_url": "https://api.host/v1", "provider": "p", "model": "m"},
    "loopback": {"kind": "openai", "base_url": "http://127.0.0.1:8000/v1", "provider": "p", "model": "m"},
    "anthropic": {"kind": "anthropic", "model": "m"},
    "gemini": {"kind": "gemini", "model": "m"},
}
SAMPLING = {"temperature": None, "top_p": None, "max_tokens": 4096}
"""What all of them take."""


def step(name: str, teacher: str, **outbound: Any) -> Any:
    """What a step is given of a run with this teacher."""
    generate = {"teacher": "t", "sampling": SAMPLING, "outbound": outbound}
    config = minimal_config(teachers={"t": TEACHERS[teacher]}, generate=generate, evaluate={"max_tokens": 4096})
    return next(spec for spec in STAGES if spec.kind == name).config(RunConfig.model_validate(config))


def test_whoever_is_not_run_here_is_guarded_whatever_the_url() -> None:
    guarded = {name for name in TEACHERS if step("evaluate", name).outbound is not None}
    assert guarded == {"openai", "loopback", "anthropic", "gemini"}


def test_by_default_secrets_are_blocked_and_personal_data_passes() -> None:
    check = Guard(OutboundConfig()).check
    assert check([Message("user", f"x {KEY}")]).reason == "outbound:github_token"
    assert check([Message("user", f"x {MAIL}")]).kinds == ()


def test_off_for_both_does_not_look() -> None:
    assert [Guard(policy).acts for policy in (None, OutboundConfig(secrets="off"), OutboundConfig())] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("outbound", [{"secrets": "redact"}, {"personal": "redact"}, {"secrets": False}])
def test_the_policy_counts_in_the_keys_of_what_it_changes(outbound: dict[str, Any]) -> None:
    for name in ("generate", "evaluate"):
        assert identity(step(name, "openai", **outbound)) != identity(step(name, "openai"))
    assert identity(step("evaluate", "vllm", **outbound)) == identity(step("evaluate", "vllm"))


def test_a_bare_off_of_yaml_is_the_word() -> None:
    assert OutboundConfig.model_validate({"secrets": False}) == OutboundConfig(secrets="off")
    with pytest.raises(ValueError, match="secrets"):
        OutboundConfig.model_validate({"secrets": True})


def test_all_turns_and_the_reasoning_are_looked_at() -> None:
    turns = [
        Message("system", f"a {KEY}"),
        Message("user", f"b {MAIL}"),
        Message("assistant", "c", f"thinks of {KEY}"),
        Message("user", "d"),
    ]
    checked = Guard(OutboundConfig(secrets="redact", personal="redact")).check(turns)
    assert checked.messages == (
        Message("system", "a [REDACTED:github_token]"),
        Message("user", "b [REDACTED:email]"),
        Message("assistant", "c", "thinks of [REDACTED:github_token]"),
        Message("user", "d"),
    )
    assert checked.redacted and checked.kinds == ("github_token", "email", "github_token")


def test_a_prompt_that_is_blocked_for_one_kind_is_not_sent_redacted_for_another() -> None:
    checked = Guard(OutboundConfig(personal="redact")).check([Message("user", f"{MAIL} {KEY}")])
    assert (checked.reason, checked.redacted) == ("outbound:github_token", False)


def test_prompts_are_counted_once_and_matches_by_kind() -> None:
    guard, tally = Guard(OutboundConfig(personal="redact")), Tally()
    tally.add(guard.check([Message("user", text)]) for text in ("", f"{MAIL} {MAIL}", f"{KEY} {MAIL}"))
    counts = {"prompts_blocked": 1, "prompts_redacted": 1, "matches": {"email": 3, "github_token": 1}}
    assert tally.metrics() == counts


# ------------------------------------------------------------------------------------------------ test prompts


def asked(name: str, text: str) -> Prompt:
    return a_prompt(prompt_id=name, split="test", prompt=(Message("user", text),), answer="yes")


QUESTIONS = Questions(
    test=(asked("clean", "Is it?"), asked("key", f"Is it {KEY}?"), asked("mail", f"Is it {MAIL}?")),
    validation=(),
    examples=(),
    rejected=((asked("none", "What?"), "no_reference"),),
    verifier=exact,
)


def evaluate_step(server: ScriptedServer, **outbound: Any) -> EvaluateStep:
    base = step("evaluate", "loopback", **outbound)
    return base.model_copy(update={"teacher": base.teacher.model_copy(update={"base_url": server.url})})


class TestTestPrompts:
    def test_those_that_must_not_leave_are_left_out_for_all_models(self, tmp_path: Path) -> None:
        with ScriptedServer(echo) as server:
            cfg = evaluate_step(server, personal="redact")
            questions, metrics = guard_questions(cfg, QUESTIONS)
            found, refused = ask_teacher(cfg, questions.test, make_context(tmp_path))
            assert sorted(server.prompts) == ["Is it [REDACTED:email]?", "Is it?"]
        assert questions.counts() == {"no_reference": 1, "outbound:github_token": 1}
        assert len(questions.test) + len(questions.rejected) == 4
        asked_locally = [question.messages[0]["content"] for question in chat(questions.test)]
        assert asked_locally == ["Is it?", "Is it [REDACTED:email]?"], "the same questions for the local models"
        assert found is not None and len(found.texts) == 2 and refused == {}
        assert metrics["outbound"]["matches"] == {"email": 1, "github_token": 1}

    @pytest.mark.parametrize("teacher", ["vllm", "replay"])
    def test_a_teacher_that_is_asked_nothing_changes_nothing(self, teacher: str) -> None:
        cfg = step("evaluate", teacher, secrets="block", personal="block")
        assert guard_questions(cfg, QUESTIONS) == (QUESTIONS, {})
        assert guard_questions(cfg.model_copy(update={"outbound": OutboundConfig()}), QUESTIONS) == (QUESTIONS, {})

    def test_off_changes_nothing(self) -> None:
        assert guard_questions(step("evaluate", "openai", secrets="off"), QUESTIONS) == (QUESTIONS, {})
