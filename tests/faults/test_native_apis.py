"""Teachers in Anthropic's and Gemini's own formats, and thinking inside texts, from the command line to the rows."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.config import EvaluateStep, RunConfig
from pipeline.core.record import Record, iter_records, read_shards
from pipeline.runner.steps import STAGES
from pipeline.stages.evaluate.answers import Answered, ask_teacher
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.support import a_prompt, make_context, minimal_config, run_cli, write_project

CANARY = "sk-CANARY-3f70"
QUICK = {"budget_s": 20, "first_wait_s": 0.01, "max_wait_s": 0.05, "timeout_s": 5}


def answer(value: Any, status: int = 200, **headers: str) -> Act:
    return Act(status=status, body=json.dumps(value).encode(), headers=headers)


@dataclass(frozen=True)
class Api:
    """One API as the scripted server plays it.

    Attributes:
        kind: of teacher.
        route: the path that requests arrive at.
        header: in which the key is expected.
        acts: what it does with a prompt; see `CASES`.
        wrong_key: its error for a key that it does not know.
        used_up: its error for an account without credit.
    """

    kind: str
    version: str
    route: str
    header: str
    acts: Mapping[str, Act]
    wrong_key: Act
    used_up: Act


def message(*content: Any, stop_reason: str = "end_turn") -> Act:
    usage = {"input_tokens": 10, "cache_read_input_tokens": 4, "output_tokens": 6}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None}
    return answer({**head, "content": [*content], "stop_reason": stop_reason, "usage": usage})


def refusal(status: int, kind: str, text: str, **headers: str) -> Act:
    """An error of Anthropic's."""
    return answer({"type": "error", "error": {"type": kind, "message": text}}, status, **headers)


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def candidate(*parts: Any, finish: str = "STOP") -> Act:
    usage = {"promptTokenCount": 14, "candidatesTokenCount": 4, "thoughtsTokenCount": 2}
    found = {"content": {"role": "model", "parts": [*parts]}, "finishReason": finish}
    return answer({"candidates": [found], "usageMetadata": usage})


def failure(status: int, name: str, text: str, *details: Any) -> Act:
    """An error of Google's."""
    return answer({"error": {"code": status, "status": name, "message": text, "details": [*details]}}, status)


def retry_info(delay: str) -> dict[str, str]:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


ANTHROPIC = Api(
    kind="anthropic",
    version="/v1",
    route="/v1/messages",
    header="x-api-key",
    acts={
        "well": message(text("fi"), text("ne")),
        "limited": refusal(429, "rate_limit_error", "slow down", **{"retry-after": "0.05"}),
        "overloaded": refusal(529, "overloaded_error", "Overloaded"),
        "refused": message(stop_reason="refusal"),
        "cut": message(text("fin"), stop_reason="max_tokens"),
        "thinking": message({"type": "thinking", "thinking": "hm", "signature": "E"}, text("fine")),
        "patience": refusal(429, "rate_limit_error", "slow down", **{"retry-after": "37"}),
    },
    wrong_key=refusal(401, "authentication_error", f"invalid x-api-key {CANARY}"),
    used_up=refusal(400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
)
GEMINI = Api(
    kind="gemini",
    version="/v1beta",
    route="/v1beta/models/m:generateContent",
    header="x-goog-api-key",
    acts={
        "well": candidate({"text": "fi"}, {"text": "ne"}),
        "limited": failure(429, "RESOURCE_EXHAUSTED", "slow down", retry_info("0.05s")),
        "overloaded": failure(529, "UNAVAILABLE", "The model is overloaded."),
        "refused": answer({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {}}),
        "cut": candidate({"text": "fin"}, finish="MAX_TOKENS"),
        "thinking": candidate({"text": "hm", "thought": True}, {"text": "fine"}),
        "patience": failure(429, "RESOURCE_EXHAUSTED", "slow down", retry_info("37s")),
    },
    wrong_key=failure(400, "INVALID_ARGUMENT", f"API key not valid: {CANARY}", {"reason": "API_KEY_INVALID"}),
    used_up=failure(
        429, "RESOURCE_EXHAUSTED", "You exceeded your quota", {"violations": [{"quotaId": "RequestsPerDay"}]}
    ),
)
BOTH = pytest.mark.parametrize("api", [ANTHROPIC, GEMINI], ids=lambda api: api.kind)
CASES = ("well", "limited", "overloaded", "refused", "cut", "thinking")
PASSING = ("limited", "overloaded")


def playing(api: Api) -> Callable[[Seen, int], Act]:
    """Does what each prompt's act says; what passes, once."""
    tries: Counter[str] = Counter()

    def script(seen: Seen, _: int) -> Act:
        tries[seen.prompt] += 1
        return api.acts["well" if seen.prompt in PASSING and tries[seen.prompt] > 1 else seen.prompt]

    return script


def write(folder: Path, prompts: tuple[str, ...], teacher: dict[str, Any], **generate: Any) -> None:
    write_project(folder, teachers={"api": teacher}, generate={"teacher": "api", "retry": QUICK, **generate})
    lines = [json.dumps({"id": prompt, "prompt": prompt}) for prompt in prompts]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def native(api: Api, server: ScriptedServer, **more: Any) -> dict[str, Any]:
    """The teacher at the server; its key is where the config's default says."""
    given = {"base_url": f"http://127.0.0.1:{server.port}{api.version}", "model": "m"}
    neutral = {"license": "MIT", "provider": "scripted"}  # else the terms of the kind's provider would be judged
    return {"kind": api.kind, **given, **neutral, **more}


def run(folder: Path) -> "subprocess.CompletedProcess[str]":
    keys = {"ANTHROPIC_API_KEY": CANARY, "GEMINI_API_KEY": CANARY}
    return run_cli("run", "run.yaml", "--until", "generate", cwd=folder, env=keys)


def records(folder: Path) -> dict[str, Record]:
    return {record.prompt_id: record for record in iter_records(folder / "data/runs/small/generate/rows")}


def rejects(folder: Path) -> dict[str, str]:
    tables = read_shards(folder / "data/runs/small/generate/rejects")
    return {row["prompt_id"]: row["reason"] for table in tables for row in table.to_pylist()}


def holds_key(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@BOTH
class TestOneRunOfEachApi:
    def test_each_answer_ends_as_what_it_is_and_is_asked_for_once(self, tmp_path: Path, api: Api) -> None:
        with ScriptedServer(playing(api)) as server:
            write(tmp_path, CASES, native(api, server))
            done = run(tmp_path)
            assert done.returncode == 0, done.stderr
            assert Counter(server.prompts) == {case: 2 if case in PASSING else 1 for case in CASES}
            found = {case: record.completion[0] for case, record in records(tmp_path).items()}
            assert {case: turn.content for case, turn in found.items()} == {
                **dict.fromkeys(("well", "limited", "overloaded", "thinking"), "fine"),
                "cut": "fin",
            }
            assert {case for case, turn in found.items() if turn.reasoning_content == "hm"} == {"thinking"}
            kept = records(tmp_path).values()
            assert {record.prompt_id for record in kept if record.finish_reason != "stop"} == {"cut"}
            assert {(record.prompt_tokens, record.completion_tokens) for record in kept} == {(14, 6)}
            assert rejects(tmp_path) == {"refused": "refusal" if api.kind == "anthropic" else "content_filter"}
            manifest = json.loads((tmp_path / "data/runs/small/generate/manifest.json").read_text("utf-8"))
            facts = {name: manifest["metrics"]["teachers"]["api"][name] for name in ("kind", "model", "origin")}
            assert facts == {"kind": api.kind, "model": "m", "origin": "API of scripted"}
            before = len(server.seen)
            assert run_cli("generate", "run.yaml", "--force", cwd=tmp_path).returncode == 0, "and without a key"
            assert len(server.seen) == before

    def test_the_key_travels_in_its_header_alone(self, tmp_path: Path, api: Api) -> None:
        with ScriptedServer(playing(api)) as server:
            write(tmp_path, ("well",), native(api, server))
            assert run(tmp_path).returncode == 0
        (seen,) = server.seen
        assert (seen.path, seen.headers[api.header]) == (api.route, CANARY)
        assert [name for name, value in seen.headers.items() if CANARY in value] == [api.header]
        assert CANARY not in json.dumps(seen.json)
        assert (seen.headers.get("anthropic-version") == "2023-06-01") == (api.kind == "anthropic")
        assert holds_key(tmp_path) == []


@BOTH
class TestWhatStopsARun:
    def test_a_wrong_key_stops_at_once_and_is_shown_nowhere(self, tmp_path: Path, api: Api) -> None:
        with ScriptedServer(lambda *_: api.wrong_key) as server:
            write(tmp_path, CASES, native(api, server, concurrency=1))
            done = run(tmp_path)
        assert (done.returncode, len(server.seen)) == (2, 1)
        assert f"{api.kind.upper()}_API_KEY" in done.stderr
        assert CANARY not in done.stdout + done.stderr and holds_key(tmp_path) == []

    def test_an_account_that_is_used_up_is_resumed_later(self, tmp_path: Path, api: Api) -> None:
        with ScriptedServer(lambda *_: api.used_up) as server:
            write(tmp_path, CASES, native(api, server, concurrency=1))
            done = run(tmp_path)
        assert (done.returncode, len(server.seen)) == (3, 1), done.stderr
        assert "quota or credit is used up" in done.stderr

    def test_the_wait_that_the_api_asks_for_is_believed(self, tmp_path: Path, api: Api) -> None:
        with ScriptedServer(playing(api)) as server:
            write(tmp_path, ("patience",), native(api, server))
            done = run(tmp_path)
        assert (done.returncode, len(server.seen)) == (3, 1), done.stderr
        assert "asks us to wait 37 s" in done.stderr

    def test_what_the_api_would_refuse_in_every_row_is_never_sent(self, tmp_path: Path, api: Api) -> None:
        wrong = {"anthropic": {"presence_penalty": 0.5}, "gemini": {"stop": list("abcdef")}}[api.kind]
        with ScriptedServer(playing(api)) as server:
            write(tmp_path, CASES, native(api, server), sampling=wrong)
            done = run(tmp_path)
        assert (done.returncode, server.seen) == (2, [])
        assert f"generate.sampling.{next(iter(wrong))}" in done.stderr

    def test_thinking_that_leaves_an_evaluation_no_room_is_said_before_anything_is_paid_for(
        self, tmp_path: Path, api: Api
    ) -> None:
        settings = {"temperature": None, "max_tokens": 4096}
        with ScriptedServer(playing(api)) as server:
            write(tmp_path, CASES, native(api, server, thinking_tokens=1024), sampling=settings)
            config = tmp_path / "run.yaml"
            data = yaml.safe_load(config.read_text("utf-8"))
            data["prompts"] |= {"test": 0.5}
            data["prompts"]["sets"]["facts"]["columns"] = {"answer": "prompt"}
            config.write_text(yaml.safe_dump(data), "utf-8")
            done = run_cli("run", "run.yaml", cwd=tmp_path, env={f"{api.kind.upper()}_API_KEY": CANARY})
        assert (done.returncode, server.seen) == (2, [])
        assert "evaluate.max_tokens: 256 leaves no room" in done.stderr

    def test_the_doctor_misses_the_key_by_its_name(self, tmp_path: Path, api: Api) -> None:
        with ScriptedServer(playing(api)) as server:
            write(tmp_path, CASES, native(api, server))
            variable = f"{api.kind.upper()}_API_KEY"
            assert f"{variable} is not set" in run_cli("doctor", "run.yaml", cwd=tmp_path, env={variable: ""}).stdout


class TestEvaluation:
    @pytest.mark.parametrize(
        ("sampling", "teacher", "sent"),
        [
            ({}, {}, {"temperature": 0.0}),
            ({"temperature": None}, {}, {}),
            ({"temperature": 1, "max_tokens": 4096}, {"thinking_tokens": 1024}, {}),
        ],
        ids=["greedily", "no temperature", "thinking"],
    )
    def test_a_teacher_that_takes_no_temperature_is_told_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: Any, teacher: Any, sent: Any
    ) -> None:
        monkeypatch.setenv("ANTHROPIC_API_KEY", CANARY)
        spec = next(spec for spec in STAGES if spec.kind == "evaluate")
        with ScriptedServer(lambda *_: ANTHROPIC.acts["well"]) as server:
            teachers = {"api": native(ANTHROPIC, server, **teacher)}
            config = minimal_config(teachers=teachers, generate={"teacher": "api", "sampling": sampling})
            step = spec.config(RunConfig.model_validate({**config, "evaluate": {"max_tokens": 4096}}))
            assert isinstance(step, EvaluateStep)
            answered, refused = ask_teacher(step, [a_prompt()], make_context(tmp_path))
        assert answered is not None and (answered.texts, refused) == (("fine",), {})
        (seen,) = server.seen
        assert {name: seen.json[name] for name in ("temperature", "top_p") if name in seen.json} == sent

    def test_thinking_inside_a_local_teachers_text_is_not_scored(self) -> None:
        answered = Answered(("<think>5?</think> 4", "hm"), ("stop", "length"))
        assert answered.without_reasoning(("<think>", "</think>")).texts == ("4", "")


class TestThinkingInsideTheText:
    def test_a_rule_that_is_declared_later_reads_the_stored_answers_anew(self, tmp_path: Path) -> None:
        texts = {"whole": "<think>hm</think>\n\nfine", "open": "hm</think>fine", "plain": "fine"}

        def script(seen: Seen, _: int) -> Act:
            return completion("hm, so", finish="length") if seen.prompt == "cut" else completion(texts[seen.prompt])

        with ScriptedServer(script) as server:
            teacher = {"kind": "openai", "base_url": server.url, "provider": "here", "model": "m"}
            write(tmp_path, (*texts, "cut"), teacher)
            assert run(tmp_path).returncode == 0
            assert {name: each.completion[0].content for name, each in records(tmp_path).items()} == {
                **texts,
                "cut": "hm, so",
            }
            write(tmp_path, (*texts, "cut"), {**teacher, "reasoning_tags": ["<think>", "</think>"]})
            done = run(tmp_path)
            assert done.returncode == 0, done.stderr
            assert len(server.seen) == 4, "nothing was asked again"
        found = {name: each.completion[0] for name, each in records(tmp_path).items()}
        assert {name: turn.content for name, turn in found.items()} == {**dict.fromkeys(texts, "fine"), "cut": ""}
        assert {name: turn.reasoning_content for name, turn in found.items()} == {
            "whole": "hm",
            "open": "hm",
            "plain": None,
            "cut": "hm, so",
        }
