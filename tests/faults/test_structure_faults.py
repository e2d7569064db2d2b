"""Forms of answers, tool calls and seeds against a server that does not keep to them."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_limits import Limits
from pipeline.core.config_response import ChoiceResponse
from pipeline.core.config_server import ServerTeacher
from pipeline.core.config_teacher import Retry, Sampling, SeedPolicy, VllmTeacher
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher.ask import Answer, ask
from pipeline.teacher.endpoint import Endpoint, api_endpoints, open_gate
from pipeline.teacher.launch import launch_of, sets_chunking
from pipeline.teacher.lookup import look_up
from pipeline.teacher.request import Asked
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.seeds import settle_seeds, wants_seeds
from pipeline.teacher.segment import Stored
from pipeline.teacher.transport import open_session
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, failure
from tests.support import make_context

QUICK = Retry(budget_s=20, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5)
TOOLS = json.dumps([{"type": "function", "function": {"name": "f"}}])
CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]


class Project:
    """A folder whose teacher is asked prompts."""

    def __init__(self, folder: Path, server: ScriptedServer) -> None:
        self.ctx = make_context(folder)
        given = {"kind": "openai", "base_url": server.url, "provider": "p", "model": "m", "concurrency": 1}
        self.teacher = OpenAITeacher.model_validate({**given, "structured_outputs": "vllm"})
        self.asked = Asked.of(self.teacher, Sampling(temperature=1.0), 0, DigestCache(folder / "digests.json"))

    def ask(self, prompts: Sequence[str], tools: str | None = None, samples: int = 1) -> list[Answer]:
        requests = [
            request
            for prompt in prompts
            for request in self.asked.requests("set", prompt, samples, (Message("user", prompt),), tools)
        ]
        return list(ask(self.teacher, self.asked, QUICK, requests, self.ctx))


def calls_only(_: Seen, __: int) -> Act:
    return completion(None, finish="tool_calls", tool_calls=CALLS)


class TestToolCalls:
    def test_where_tools_were_offered_they_are_the_answer_and_are_asked_for_once(self, tmp_path: Path) -> None:
        with ScriptedServer(calls_only) as server:
            project = Project(tmp_path, server)
            (first,) = project.ask(["p"], TOOLS)
            (again,) = project.ask(["p"], TOOLS)
        assert (first.rejected, first.text, first.finish_reason) == (None, "", "tool_calls")
        assert [(call.name, call.arguments, call.id) for call in first.tool_calls] == [("f", '{"a": 1}', "c1")]
        assert again == first and len(server.seen) == 1
        assert server.seen[0].json["tools"] == json.loads(TOOLS)

    def test_where_none_were_they_are_empty_after_three_tries_and_stay_so(self, tmp_path: Path) -> None:
        with ScriptedServer(calls_only) as server:
            project = Project(tmp_path, server)
            assert [answer.rejected for answer in project.ask(["p"])] == ["empty"]
            assert len(server.seen) == 3
            assert [answer.rejected for answer in project.ask(["p"])] == ["empty"]
        assert len(server.seen) == 3

    def test_the_same_prompt_with_and_without_tools_are_two_questions(self, tmp_path: Path) -> None:
        def script(seen: Seen, _: int) -> Act:
            return calls_only(seen, 0) if "tools" in seen.json else completion("text")

        with ScriptedServer(script) as server:
            project = Project(tmp_path, server)
            (with_tools,), (without,) = project.ask(["p"], TOOLS), project.ask(["p"])
        assert (with_tools.text, without.text) == ("", "text")

    def test_a_stored_answer_of_calls_alone_is_no_answer_to_who_offered_no_tools(self, tmp_path: Path) -> None:
        """Batch mode stores what a job brings without knowing what the prompt offered."""
        asked = Asked("0" * 64, {}, Sampling(), 0)
        requests = [asked.request("set", "p", 0, [Message("user", "p")], tools) for tools in (None, TOOLS)]
        body = completion(None, finish="tool_calls", tool_calls=CALLS).body
        with ResponseStore(tmp_path) as store:
            keys = [bytes.fromhex(request.key) for request in requests]
            store.put([Stored(key, 512, 0, "t", "m", "", OPENAI_CHAT.name, 200, None, body) for key in keys])
            without, offered = look_up(store, asked, requests)
        assert without is not None and without.rejected == "empty"
        assert offered is not None and offered.reply is not None and len(offered.reply.tool_calls) == 1


class TestForms:
    def test_a_form_reaches_the_server_and_another_form_is_another_question(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda *_: completion("yes")) as server:
            project = Project(tmp_path, server)
            for choices in (("yes", "no"), ("yes", "no"), ("no", "yes")):
                project.asked = project.asked.under(ChoiceResponse(kind="choice", choices=choices), "never")
                project.ask(["p"])
        assert [seen.json["structured_outputs"] for seen in server.seen] == [
            {"choice": ["yes", "no"]},
            {"choice": ["no", "yes"]},
        ]


def drawn(honours: bool) -> Callable[[Seen, int], Act]:
    """An engine that answers with its seed, or with whatever number the request has."""

    def script(seen: Seen, number: int) -> Act:
        return completion(f"{seen.json.get('seed') if honours else number}")

    return script


def refuses(seen: Seen, _: int) -> Act:
    return failure(500, "CPU Generator does not use offset") if "seed" in seen.json else completion("fine")


def dies(seen: Seen, _: int) -> Act:
    return Act(reset=True) if "seed" in seen.json else completion("fine")


class TestSeeds:
    @pytest.mark.parametrize(
        ("script", "level", "sent"),
        [
            (drawn(True), "seeded", True),
            (drawn(False), "unseeded", True),
            (lambda *_: completion("same"), "unknown", True),
            (refuses, "seed_refused", False),
            (dies, "seed_refused", False),
        ],
        ids=["honours", "ignores", "always-the-same", "refuses", "dies"],
    )
    def test_the_level_that_an_engine_reaches_is_tried_once_and_recorded(
        self, tmp_path: Path, script: Any, level: str, sent: bool
    ) -> None:
        with ScriptedServer(script) as server:
            endpoints = self.settle(tmp_path, server, "server", "auto")
        assert self.ctx.events.seen == [("seeds_tried", {"level": level, "engine": "engine 1", "sent": sent})]
        assert [endpoint.sends_seeds for endpoint in endpoints] == [sent, sent]

    def test_one_that_would_end_over_a_seed_is_not_tried(self, tmp_path: Path) -> None:
        with ScriptedServer(dies) as server:
            endpoints = self.settle(tmp_path, server, "vllm", "auto", takes_seeds=False)
        assert server.seen == [] and not endpoints[0].sends_seeds
        assert self.ctx.events.seen[0][1]["level"] == "seed_refused"

    @pytest.mark.parametrize(
        ("kind", "policy", "temperature", "wanted"),
        [
            ("vllm", "auto", 1.0, True),
            ("server", "auto", None, True),
            ("vllm", "auto", 0.0, False),
            ("vllm", "never", 1.0, False),
            ("openai", "auto", 1.0, False),
            ("gemini", "auto", 1.0, False),
            ("openai", "always", 1.0, True),
            ("gemini", "always", 1.0, True),
            ("anthropic", "always", 1.0, False),
        ],
    )
    def test_who_is_seeded(self, kind: str, policy: SeedPolicy, temperature: float | None, wanted: bool) -> None:
        asked = Asked("0" * 64, {}, Sampling(temperature=temperature), 0).under(None, policy)
        assert wants_seeds(asked, kind) == wanted

    def test_samples_carry_seeds_that_differ_and_are_the_same_on_every_try(self, tmp_path: Path) -> None:
        with ScriptedServer(calls_only) as server:
            project = Project(tmp_path, server)
            (endpoint,) = api_endpoints(project.teacher)
            endpoint.sends_seeds = True
            requests = [*project.asked.requests("set", "p", 4, (Message("user", "p"),))]
            sent = [json.loads(endpoint.body(request, project.asked.sampling))["seed"] for request in requests]
            again = [json.loads(endpoint.body(request, project.asked.sampling))["seed"] for request in requests]
            greedy = json.loads(endpoint.body(requests[0], Sampling(temperature=0)))
        assert len({*sent}) == 4 and sent == again and all(0 <= seed < 2**31 for seed in sent)
        assert "seed" not in greedy

    def settle(
        self, folder: Path, server: ScriptedServer, kind: str, policy: SeedPolicy, *, takes_seeds: bool = True
    ) -> list[Endpoint]:
        """Two servers of a teacher after their first trial."""
        self.ctx = make_context(folder)
        asked = Asked("0" * 64, {}, Sampling(temperature=1.0), 0).under(None, policy)
        url = OPENAI_CHAT.url(server.url, "m")
        endpoints = [Endpoint(url, OPENAI_CHAT, "m", "engine 1", None, open_gate(1, Limits())) for _ in range(2)]
        endpoints[0].takes_seeds = takes_seeds

        async def run() -> None:
            async with open_session(5) as session:
                await settle_seeds(asked, kind, endpoints, session, self.ctx)

        asyncio.run(run())
        return endpoints


class TestVllmOnACpu:
    def test_it_takes_prompts_whole_where_requests_are_seeded(self, tmp_path: Path) -> None:
        teacher = VllmTeacher(kind="vllm", model=str(tmp_path))
        assert "--no-enable-chunked-prefill" in launch_of(teacher, seeded_on_cpu=True).command
        assert "--no-enable-chunked-prefill" not in launch_of(teacher).command

    @pytest.mark.parametrize(
        ("args", "own"),
        [
            ((), False),
            (("--max-num-seqs", "4"), False),
            (("--max-num-batched-tokens", "64"), True),
            (("--max_num_batched_tokens=64",), True),
            (("--enable-chunked-prefill",), True),
        ],
    )
    def test_whoever_decides_that_on_his_own_is_left_alone(self, args: tuple[str, ...], own: bool) -> None:
        assert sets_chunking(VllmTeacher(kind="vllm", model="./m", args=args)) == own
        assert not sets_chunking(ServerTeacher(kind="server", model="./m", command=("serve", "{port}", *args)))
