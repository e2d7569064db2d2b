"""A provider that exchanges the model behind a name is noticed, also after a resume."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import Incomplete
from pipeline.teacher.drift import is_same_model
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.faults.test_client_faults import Asking

PROMPTS = [f"prompt {i}" for i in range(12)]


def answer(seen: Seen, model: str | None = "m", fingerprint: str | None = None) -> Act:
    """The prompt in capitals, from a certain model."""
    act = completion(seen.prompt.upper())
    body = act.body.replace(b'"model": "m"', f'"model": "{model}", "system_fingerprint": "{fingerprint}"'.encode())
    return Act(body=body)


def asking(folder: Path, server: ScriptedServer, **teacher: object) -> Asking:
    return Asking(folder, server, concurrency=1, **teacher)


def names(subject: Asking) -> list[str]:
    return [name for name, _ in subject.ctx.events.seen if name.endswith("_changed")]


class TestModel:
    def test_another_one_stops_the_run_and_its_answer_is_kept(self, tmp_path):
        with ScriptedServer(lambda seen, n: answer(seen, "m" if n < 4 else "cheaper")) as server:
            subject = asking(tmp_path, server)
            with pytest.raises(Incomplete, match="another model: cheaper, before m"):
                subject.ask(PROMPTS)
            before = len(server.seen)
            assert before <= 6, "it stops at once"
            later = asking(tmp_path, server, on_model_change="warn")
            assert len(later.ask(PROMPTS)) == 12
            assert len(server.seen) == 12, "nothing was asked twice"
        assert names(subject) == ["model_changed"]

    def test_a_resume_compares_with_the_first_answers(self, tmp_path):
        with ScriptedServer(lambda seen, n: answer(seen, "m" if n < 4 else "other")) as server:
            asking(tmp_path, server).ask(PROMPTS[:4])
            with pytest.raises(Incomplete, match="another model"):
                asking(tmp_path, server).ask(PROMPTS)

    def test_another_step_of_the_same_teacher_compares_too(self, tmp_path):
        """More prompts, or another sampling: its answers stand beside those of the step before."""
        with ScriptedServer(lambda seen, n: answer(seen, "m" if n < 4 else "other")) as server:
            asking(tmp_path, server).ask(PROMPTS[:4])
            later = asking(tmp_path, server)
            (tmp_path / "another step").mkdir()
            later.ctx = replace(later.ctx, workdir=tmp_path / "another step")
            with pytest.raises(Incomplete, match="another model: other, before m"):
                later.ask(PROMPTS, temperature=0.3)

    def test_warn_goes_on_and_says_each_change_once(self, tmp_path):
        with ScriptedServer(lambda seen, n: answer(seen, "m" if n < 4 else "other")) as server:
            subject = asking(tmp_path, server, on_model_change="warn")
            assert subject.texts(PROMPTS) == [prompt.upper() for prompt in PROMPTS]
        assert names(subject) == ["model_changed"]

    def test_a_dated_snapshot_is_the_model_and_another_one_is_not(self, tmp_path):
        dates = ["m", "m-2026-01-31", "m", "m-2026-05-01"]
        with ScriptedServer(lambda seen, n: answer(seen, dates[min(n // 2, 3)])) as server:
            subject = asking(tmp_path, server)
            with pytest.raises(Incomplete, match="m-2026-05-01, before m-2026-01-31"):
                subject.ask(PROMPTS)

    def test_a_gateway_that_calls_it_otherwise_from_the_first_answer_on_is_no_change(self, tmp_path):
        with ScriptedServer(lambda seen, n: answer(seen, "vendor/model")) as server:
            subject = asking(tmp_path, server)
            subject.ask(PROMPTS)
        assert names(subject) == []


class TestFingerprint:
    def script(self, seen: Seen, number: int) -> Act:
        return answer(seen, "m", f"fp_{number // 2 % 2}")

    def test_backends_that_alternate_are_said_once_each(self, tmp_path):
        with ScriptedServer(self.script) as server:
            subject = asking(tmp_path, server)
            subject.ask(PROMPTS)
        assert names(subject) == ["fingerprint_changed"]

    def test_ignore_says_nothing(self, tmp_path):
        with ScriptedServer(self.script) as server:
            subject = asking(tmp_path, server, on_fingerprint_change="ignore")
            subject.ask(PROMPTS)
        assert names(subject) == []

    def test_stop_stops_at_the_first_other_one_and_again_after_a_resume(self, tmp_path):
        with ScriptedServer(lambda seen, n: answer(seen, "m", "fp_0" if n < 2 else "fp_1")) as server:
            for _ in range(2):
                with pytest.raises(Incomplete, match="another fingerprint: fp_1, before fp_0"):
                    asking(tmp_path, server, on_fingerprint_change="stop").ask(PROMPTS)


def test_a_damaged_memory_is_none(tmp_path):
    with ScriptedServer(lambda seen, n: answer(seen)) as server:
        subject = asking(tmp_path, server)
        subject.ask(PROMPTS[:1])
        (memory,) = (subject.ctx.data / "responses").glob("answers-from-*.json")
        assert memory.stat().st_mode & 0o777 == 0o600
        memory.write_text("torn")
        assert len(subject.ask(PROMPTS)) == 12


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("gpt-x", "gpt-x-2026-01-01", True),
        ("gpt-4", "gpt-4-0613", True),
        ("gemini-2.5-flash", "models/Gemini-2.5-flash-001", True),
        ("claude-x", "claude-x@20260101", True),
        ("gpt-x-2026-01-01", "gpt-x-2026-02-01", False),
        ("gpt-x", "gpt-x-mini", False),
        ("llama-3", "llama-3-70b", False),
    ],
)
def test_names_of_one_model(one, other, same):
    assert is_same_model(one, other) is is_same_model(other, one) is same
