"""Requests and answers in each format, as the documentation of the APIs shows them."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_api import AnthropicTeacher, GeminiTeacher, OpenAITeacher
from pipeline.core.config_base import identity
from pipeline.core.config_refusals import sampling_refusals, takes_temperature, thinking_refusals
from pipeline.core.config_teacher import Sampling, Teacher, VllmTeacher
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher.endpoint import WIRE_OF_KIND, api_endpoints
from pipeline.teacher.reasoning import split_reasoning, tags_of
from pipeline.teacher.request import Asked, request_key
from pipeline.teacher.wire import Ask, Reply, Thinking, Unusable
from pipeline.teacher.wires import WIRES
from pipeline.teacher.wires.anthropic import ANTHROPIC
from pipeline.teacher.wires.gemini import GEMINI
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

TALK = (
    Message("system", "Be brief."),
    Message("user", "Hello"),
    Message("assistant", "Hi.", "They greet me."),
    Message("system", "Be kind."),
    Message("user", "1+1?"),
)
FULL = {"temperature": 0.5, "top_p": None, "top_k": 40, "stop": ["\n\n", "END"], "max_tokens": 99}


def body(wire: Any, messages: tuple[Message, ...] = TALK, thinking: Thinking | None = None, **sampling: Any) -> Any:
    """A request as JSON."""
    ask = Ask("m", messages, Sampling.model_validate(sampling), thinking=thinking or Thinking())
    return json.loads(wire.body(ask))


def read(wire: Any, answer: Any) -> Reply | Unusable:
    return wire.read(json.dumps(answer).encode())


def reason(wire: Any, answer: Any) -> str:
    """Why an answer is of no use."""
    found = read(wire, answer)
    assert isinstance(found, Unusable), found
    return found.reason


class TestAnthropicRequest:
    def test_system_messages_go_apart_and_turns_keep_their_order(self) -> None:
        assert body(ANTHROPIC, **FULL) == {
            "model": "m",
            "max_tokens": 99,
            "system": "Be brief.\n\nBe kind.",
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "1+1?"},
            ],
            "temperature": 0.5,
            "top_k": 40,
            "stop_sequences": ["\n\n", "END"],
        }

    def test_what_is_neutral_or_not_told_is_left_out(self) -> None:
        sent = body(ANTHROPIC, (Message("user", "Hello"),), temperature=None)
        assert sent == {"model": "m", "max_tokens": 512, "messages": [{"role": "user", "content": "Hello"}]}
        assert body(ANTHROPIC, temperature=None, top_p=0.9)["top_p"] == 0.9
        assert body(ANTHROPIC)["temperature"] == 0.0

    def test_thinking_is_a_budget_or_an_effort_whose_text_is_asked_for(self) -> None:
        assert body(ANTHROPIC, thinking=Thinking(tokens=2048))["thinking"] == {"type": "enabled", "budget_tokens": 2048}
        sent = body(ANTHROPIC, thinking=Thinking(effort="high"))
        assert sent["thinking"] == {"type": "adaptive", "display": "summarized"}
        assert sent["output_config"] == {"effort": "high"}

    def test_the_key_travels_in_its_header_beside_the_version(self) -> None:
        assert ANTHROPIC.headers("sk") == {"anthropic-version": "2023-06-01", "x-api-key": "sk"}
        assert ANTHROPIC.headers(None) == {"anthropic-version": "2023-06-01"}
        assert ANTHROPIC.url("https://a.example/v1", "m") == "https://a.example/v1/messages"


def message(*content: Any, stop_reason: Any = "end_turn", **more: Any) -> dict[str, Any]:
    """A message of Anthropic's."""
    usage = {"input_tokens": 12, "output_tokens": 7, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 20}
    head = {"id": "msg_01", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None}
    return {**head, "content": [*content], "stop_reason": stop_reason, "usage": usage, **more}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


class TestAnthropicAnswer:
    def test_text_blocks_are_joined_and_thinking_is_kept_apart(self) -> None:
        thought = {"type": "thinking", "thinking": "1 and 1", "signature": "EqQB"}
        hidden = {"type": "redacted_thinking", "data": "EmwK"}
        found = read(ANTHROPIC, message(thought, hidden, {**thought, "thinking": "is 2"}, text("It is"), text(" 2.")))
        assert found == Reply("It is 2.", "1 and 1\n\nis 2", "stop", 132, 7, (), model="m")

    @pytest.mark.parametrize(
        ("stop_reason", "ours"),
        [
            ("end_turn", "stop"),
            ("stop_sequence", "stop"),
            ("max_tokens", "length"),
            ("model_context_window_exceeded", "length"),
            ("tool_use", "tool_calls"),
            ("pause_turn", "pause_turn"),
        ],
    )
    def test_stop_reasons_have_our_names(self, stop_reason: str, ours: str) -> None:
        found = read(ANTHROPIC, message(text("x"), stop_reason=stop_reason))
        assert isinstance(found, Reply) and found.finish_reason == ours

    def test_one_that_was_cut_while_thinking_is_an_answer_without_text(self) -> None:
        thought = {"type": "thinking", "thinking": "hm", "signature": ""}
        found = read(ANTHROPIC, message(thought, stop_reason="max_tokens"))
        assert found == Reply("", "hm", "length", 132, 7, (), model="m")

    def test_thinking_whose_text_is_left_out_is_none(self) -> None:
        found = read(ANTHROPIC, message({"type": "thinking", "thinking": "", "signature": "E"}, text("2")))
        assert isinstance(found, Reply) and found.reasoning_content is None

    @pytest.mark.parametrize(
        ("answer", "why"),
        [
            (message(stop_reason="refusal"), "refusal"),
            (message(text("I"), stop_reason="refusal"), "refusal"),
            (message(), "empty"),
            (message({"type": "tool_use", "id": "t", "input": {}}, stop_reason="tool_use"), "empty"),
            (message(text("x"), stop_reason=None), "bad_payload"),
            (message("x"), "bad_payload"),
            (message(text("x"), content="x"), "unknown"),
            ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "error"),
            ([], "unknown"),
            ({"completion": "x"}, "unknown"),
        ],
    )
    def test_what_is_no_answer_says_why(self, answer: Any, why: str) -> None:
        assert reason(ANTHROPIC, answer) == why

    def test_counts_that_are_missing_are_unknown_not_zero(self) -> None:
        found = read(ANTHROPIC, message(text("x"), usage=None))
        assert isinstance(found, Reply) and (found.prompt_tokens, found.completion_tokens) == (None, None)


class TestGeminiRequest:
    def test_roles_system_instruction_and_settings_have_their_own_names(self) -> None:
        sent = body(GEMINI, **FULL, presence_penalty=0.5, frequency_penalty=-1)
        assert sent == {
            "systemInstruction": {"parts": [{"text": "Be brief.\n\nBe kind."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Hello"}]},
                {"role": "model", "parts": [{"text": "Hi."}]},
                {"role": "user", "parts": [{"text": "1+1?"}]},
            ],
            "generationConfig": {
                "maxOutputTokens": 99,
                "temperature": 0.5,
                "topK": 40,
                "presencePenalty": 0.5,
                "frequencyPenalty": -1,
                "stopSequences": ["\n\n", "END"],
            },
        }

    def test_the_whole_distribution_is_asked_for_since_the_default_is_another(self) -> None:
        sent = body(GEMINI, (Message("user", "Hello"),))
        assert sent["generationConfig"] == {"maxOutputTokens": 512, "temperature": 0.0, "topP": 1.0}
        assert "systemInstruction" not in sent

    @pytest.mark.parametrize(
        ("thinking", "sent"),
        [
            (Thinking(tokens=0), {"thinkingBudget": 0, "includeThoughts": False}),
            (Thinking(tokens=800), {"thinkingBudget": 800, "includeThoughts": True}),
            (Thinking(effort="low"), {"thinkingLevel": "low", "includeThoughts": True}),
        ],
    )
    def test_thinking_is_a_budget_or_a_level(self, thinking: Thinking, sent: Any) -> None:
        assert body(GEMINI, thinking=thinking)["generationConfig"]["thinkingConfig"] == sent

    def test_the_key_travels_in_a_header_and_never_in_the_url(self) -> None:
        assert GEMINI.headers("AIza") == {"x-goog-api-key": "AIza"} and GEMINI.headers(None) == {}
        assert (
            GEMINI.url("https://g.example/v1beta", "gem-2.5")
            == "https://g.example/v1beta/models/gem-2.5:generateContent"
        )
        assert GEMINI.url("https://g.example", "tunedModels/x") == "https://g.example/tunedModels/x:generateContent"


def candidate(*parts: Any, finish: Any = "STOP", **more: Any) -> dict[str, Any]:
    """A response of Gemini's."""
    usage = {"promptTokenCount": 8, "candidatesTokenCount": 5, "thoughtsTokenCount": 40, "totalTokenCount": 53}
    found = {"content": {"role": "model", "parts": [*parts]}, "finishReason": finish, "index": 0}
    return {"candidates": [found], "usageMetadata": usage, "modelVersion": "gem-2.5", "responseId": "r", **more}


class TestGeminiAnswer:
    def test_text_parts_are_joined_thoughts_kept_apart_and_both_counted_as_output(self) -> None:
        found = read(GEMINI, candidate({"text": "hm", "thought": True}, {"text": "It is"}, {"text": " 2."}))
        assert found == Reply("It is 2.", "hm", "stop", 8, 45, (), model="gem-2.5")

    @pytest.mark.parametrize(
        ("finish", "ours"), [("STOP", "stop"), ("MAX_TOKENS", "length"), ("OTHER", "other"), ("LANGUAGE", "language")]
    )
    def test_finish_reasons_have_our_names(self, finish: str, ours: str) -> None:
        found = read(GEMINI, candidate({"text": "x"}, finish=finish))
        assert isinstance(found, Reply) and found.finish_reason == ours

    def test_a_function_call_beside_text_is_one_of_ours(self) -> None:
        found = read(GEMINI, candidate({"text": "x"}, {"functionCall": {"name": "f", "args": {}}}))
        assert isinstance(found, Reply) and found.finish_reason == "tool_calls"

    def test_one_that_was_cut_while_thinking_is_an_answer_without_text(self) -> None:
        answer = candidate(finish="MAX_TOKENS")
        del answer["candidates"][0]["content"]["parts"], answer["usageMetadata"]["candidatesTokenCount"]
        assert read(GEMINI, answer) == Reply("", None, "length", 8, 40, (), model="gem-2.5")

    @pytest.mark.parametrize(
        ("answer", "why"),
        [
            *((candidate({"text": "x"}, finish=name), "content_filter") for name in ("SAFETY", "RECITATION", "SPII")),
            *((candidate(finish=name), "content_filter") for name in ("BLOCKLIST", "PROHIBITED_CONTENT")),
            ({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {}}, "content_filter"),
            (candidate(), "empty"),
            (candidate({"text": "hm", "thought": True}), "empty"),
            (candidate({"functionCall": {"args": {}}}), "empty"),
            ({"candidates": [], "usageMetadata": {}}, "empty"),
            ({"usageMetadata": {}}, "empty"),
            (candidate({"text": "x"}, finish=None), "bad_payload"),
            ({"error": {"code": 503, "status": "UNAVAILABLE", "message": "overloaded"}}, "error"),
            ({"detail": "hello"}, "unknown"),
            ([], "unknown"),
        ],
    )
    def test_what_is_no_answer_says_why(self, answer: Any, why: str) -> None:
        assert reason(GEMINI, answer) == why


class TestOpenAI:
    def test_an_effort_is_sent_where_it_is_given(self) -> None:
        assert body(OPENAI_CHAT, thinking=Thinking(effort="low"))["reasoning_effort"] == "low"
        assert "reasoning_effort" not in body(OPENAI_CHAT)

    def test_a_content_of_parts_is_text_and_thinking(self) -> None:
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
        choice = {"message": {"content": [thinking, text("It is"), text(" 2.")]}, "finish_reason": "stop"}
        assert read(OPENAI_CHAT, {"choices": [choice]}) == Reply("It is 2.", "hm", "stop", None, None, ())

    def test_an_error_inside_a_choice_is_an_error(self) -> None:
        choice = {"error": {"code": 502, "message": "provider"}, "message": {"content": ""}, "finish_reason": "error"}
        assert reason(OPENAI_CHAT, {"choices": [choice]}) == "error"


@pytest.mark.parametrize("wire", [OPENAI_CHAT, ANTHROPIC, GEMINI], ids=lambda wire: wire.name)
class TestEveryFormat:
    def test_lone_surrogates_travel_as_replacement_characters(self, wire: Any) -> None:
        sent = body(wire, (Message("system", "a\ud800"), Message("user", "b\udfff")), stop=["c\ud800"])
        assert "a\ufffd" in repr(sent) and "b\ufffd" in repr(sent) and "c\ufffd" in repr(sent)

    def test_no_bytes_make_it_raise(self, wire: Any) -> None:
        nested = ["{}", "[]", "null", '""', "1", '[{"text": 1}]', '{"parts": 1}', '{"parts": [1]}', '{"type": []}']
        names = ("choices", "content", "candidates", "usage", "usageMetadata", "promptFeedback", "error")
        bodies = [
            b"",
            b"\xff",
            b"[" * 99_999,
            *(f'{{"{name}": {value}}}'.encode() for name in names for value in nested),
        ]
        wrapped = [f'{{"candidates": [{{"finishReason": "STOP", "content": {value}}}]}}'.encode() for value in nested]
        for each in (*bodies, *wrapped):
            assert isinstance(wire.read(each), Unusable)

    def test_what_cannot_be_stored_is_repaired_and_flagged(self, wire: Any) -> None:
        answers = {
            OPENAI_CHAT.name: {"choices": [{"message": {"content": "a\ud800\0"}, "finish_reason": "stop"}]},
            ANTHROPIC.name: message(text("a\ud800\0")),
            GEMINI.name: candidate({"text": "a\ud800\0"}),
        }
        found = read(wire, answers[wire.name])
        assert isinstance(found, Reply) and (found.text, found.flags) == ("a\ufffd\0", ("nul", "sanitized"))


def test_the_names_of_formats_are_pinned_since_stored_answers_carry_them() -> None:
    assert [*WIRES] == ["openai-chat", "anthropic-messages", "gemini-generate"]
    assert {kind: wire.name for kind, wire in WIRE_OF_KIND.items()} == dict(
        zip(("openai", "anthropic", "gemini"), WIRES, strict=True)
    )


# ------------------------------------------------------------------------------------------------------- the config


def anthropic(**changes: Any) -> AnthropicTeacher:
    return AnthropicTeacher.model_validate({"kind": "anthropic", "model": "claude", **changes})


def gemini(**changes: Any) -> GeminiTeacher:
    return GeminiTeacher.model_validate({"kind": "gemini", "model": "gem", **changes})


class TestTeachers:
    def test_a_model_is_all_that_is_needed(self) -> None:
        ours, theirs = api_endpoints(anthropic())[0], api_endpoints(gemini())[0]
        assert ours.url == "https://api.anthropic.com/v1/messages"
        assert theirs.url == "https://generativelanguage.googleapis.com/v1beta/models/gem:generateContent"
        assert (ours.key_variable, theirs.key_variable) == ("ANTHROPIC_API_KEY", "GEMINI_API_KEY")

    def test_thinking_reaches_the_request(self) -> None:
        ask = api_endpoints(anthropic(thinking_tokens=2048))[0].ask(TALK, Sampling())
        assert ask.thinking == Thinking(tokens=2048)
        openai = {"kind": "openai", "base_url": "https://a.example", "provider": "p", "model": "m"}
        teacher = OpenAITeacher.model_validate({**openai, "reasoning_effort": "low", "max_tokens_field": "max_tokens"})
        assert api_endpoints(teacher)[0].ask(TALK, Sampling()).thinking == Thinking(effort="low")

    @pytest.mark.parametrize("make", [anthropic, gemini])
    @pytest.mark.parametrize("change", [{"thinking_tokens": 2048}, {"reasoning_effort": "low"}, {"provider": "other"}])
    def test_how_much_one_thinks_counts_in_the_key_of_a_request(self, tmp_path: Path, make: Any, change: Any) -> None:
        cache = DigestCache(tmp_path / "digests.json")
        keys = {request_key(Asked.of(each, Sampling(), 0, cache), TALK, 0) for each in (make(), make(**change))}
        assert len(keys) == 2

    def test_fields_that_came_later_count_only_where_they_are_given(self) -> None:
        openai = {"kind": "openai", "base_url": "https://a.example/v1", "provider": "p", "model": "m"}
        plain = {"kind": "openai", "provider": "p", "model": "m", "license": "unknown"}
        assert identity(OpenAITeacher.model_validate(openai)) == plain, "steps of finished runs hang on it"
        given = {"reasoning_effort": "low", "reasoning_tags": ["<a>", "</a>"]}
        assert identity(OpenAITeacher.model_validate({**openai, **given})) == plain | given
        local = VllmTeacher(kind="vllm", model="./m")
        assert {*identity(local)} == {
            *("kind", "model", "revision", "license", "dtype", "max_model_len", "quantization"),
        }

    @pytest.mark.parametrize("make", [anthropic, gemini])
    def test_thinking_is_asked_for_in_one_way_only(self, make: Any) -> None:
        with pytest.raises(ValueError, match="not both"):
            make(thinking_tokens=2048, reasoning_effort="low")

    @pytest.mark.parametrize("model", ["models/gem", "a/b", "gem?key=1", "../x", ""])
    def test_a_name_that_would_change_the_url_is_refused(self, model: str) -> None:
        with pytest.raises(ValueError, match="model"):
            gemini(model=model)


class TestRefusals:
    """What the API would answer with 400 for every row is said when the config is read."""

    @pytest.mark.parametrize(
        ("teacher", "sampling", "field"),
        [
            (anthropic(), {"presence_penalty": 1}, "presence_penalty"),
            (anthropic(), {"frequency_penalty": 1}, "frequency_penalty"),
            (anthropic(), {"temperature": 1.5}, "temperature"),
            (anthropic(), {"temperature": 0.5, "top_p": 0.9}, "top_p"),
            (anthropic(), {"stop": ["\n"]}, "stop"),
            (anthropic(thinking_tokens=1024), {"max_tokens": 2000}, "temperature"),
            (anthropic(reasoning_effort="low"), {"temperature": None, "top_p": 0.9}, "top_p"),
            (anthropic(reasoning_effort="low"), {"temperature": None, "top_k": 9}, "top_k"),
            (anthropic(thinking_tokens=1024), {"temperature": None, "max_tokens": 1024}, "max_tokens"),
            (gemini(thinking_tokens=512), {}, "max_tokens"),
            (gemini(), {"stop": ["a", "b", "c", "d", "e", "f"]}, "stop"),
        ],
    )
    def test_each_names_its_field(self, teacher: Teacher, sampling: Any, field: str) -> None:
        (refusal,) = sampling_refusals(teacher, Sampling.model_validate(sampling))
        assert refusal.startswith(f"generate.sampling.{field}: ")

    @pytest.mark.parametrize(
        ("teacher", "sampling"),
        [
            (anthropic(), {}),
            (anthropic(), {"temperature": None, "top_p": 0.9}),
            (anthropic(), {"temperature": 1, "top_p": None, "top_k": 5}),
            (anthropic(thinking_tokens=1024), {"temperature": 1, "max_tokens": 2000}),
            (anthropic(reasoning_effort="max"), {"temperature": None}),
            (gemini(thinking_tokens=0), {"presence_penalty": 1, "temperature": 2, "stop": ["\n"] * 5}),
        ],
    )
    def test_what_the_apis_take_is_not_refused(self, teacher: Teacher, sampling: Any) -> None:
        assert [*sampling_refusals(teacher, Sampling.model_validate(sampling))] == []

    def test_an_evaluation_needs_room_behind_the_thinking_too(self) -> None:
        (refusal,) = thinking_refusals(anthropic(thinking_tokens=1024), 256, "evaluate.max_tokens")
        assert refusal.startswith("evaluate.max_tokens: 256 leaves no room")

    def test_an_evaluation_tells_no_temperature_to_who_takes_none(self) -> None:
        silent = Sampling(temperature=None)
        assert takes_temperature(anthropic(), Sampling()) and takes_temperature(gemini(thinking_tokens=9), Sampling())
        assert not takes_temperature(anthropic(), silent) and not takes_temperature(gemini(), silent)
        assert not takes_temperature(anthropic(reasoning_effort="low"), Sampling(temperature=1))
        assert takes_temperature(VllmTeacher(kind="vllm", model="./m"), silent)


class TestReasoningInsideTheText:
    TAGS = ("<think>", "</think>")

    @pytest.mark.parametrize(
        ("text", "finish", "reasoning", "answer"),
        [
            ("<think>\nhm\n</think>\n\n4", "stop", "hm", "4"),
            ("hm</think>4 ", "stop", "hm", "4 "),
            ("<think></think>4", "stop", None, "4"),
            ("<think>hm</think>", "stop", "hm", ""),
            ("<think>a</think>b</think>c", "stop", "a", "b</think>c"),
            ("<think>hm</think>4", "length", "hm", "4"),
            ("<think>\nhm", "length", "hm", ""),
            ("hm, so", "length", "hm, so", ""),
            (" <think>hm", "stop", "hm", ""),
            ("4", "stop", None, "4"),
            (" 4 <think>", "stop", None, " 4 <think>"),
            ("", "stop", None, ""),
        ],
    )
    def test_is_what_stands_before_the_closing_tag(
        self, text: str, finish: str, reasoning: str | None, answer: str
    ) -> None:
        assert split_reasoning(text, finish, self.TAGS) == (reasoning, answer)

    def test_is_looked_for_only_where_the_config_says_so(self) -> None:
        assert tags_of(VllmTeacher(kind="vllm", model="./m")) is None
        assert tags_of(VllmTeacher(kind="vllm", model="./m", reasoning_tags=self.TAGS)) == self.TAGS
        assert tags_of(anthropic()) is None
