"""Soft targets: what is asked, what a body must hold, which stored answers stand, and what the side file keeps."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.core.config import RunConfig
from pipeline.core.config_base import identity
from pipeline.core.config_logprobs import LogprobsAsked, LogprobsConfig, logprobs_flags, names_other_mode
from pipeline.core.config_teacher import GenerateConfig, Sampling, Teacher
from pipeline.core.lineage import Manifest
from pipeline.core.record import RECORD_SCHEMA, read_shards
from pipeline.core.sink import RowSink
from pipeline.core.store import Artefact
from pipeline.core.targets import (
    TARGET_SCHEMA,
    TargetFacts,
    TargetWriter,
    TokenLogprobs,
    count_in,
    read_targets,
    tokenizer_digest,
)
from pipeline.runner.contents import recompute
from pipeline.teacher import folded
from pipeline.teacher.carry import _serves
from pipeline.teacher.logprobs import (
    BadLogprobs,
    find_logprobs,
    held_logprobs,
    read_logprobs,
    started_for,
    wanted_logprobs,
    with_logprobs,
)
from pipeline.teacher.request import Asked, output_flags
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Stored
from pipeline.teacher.temperature import scale_of, trial_requests
from pipeline.teacher.transport import LARGEST_BODY_BYTES, MAX_BODY_BYTES, most_bytes
from pipeline.teacher.verdict import Action, judge
from pipeline.teacher.wanted import Wanted, coverage
from pipeline.teacher.wire import Ask, Reply
from pipeline.teacher.wires.gemini import GEMINI
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT
from tests.support import EMPTY_PROMPT, EMPTY_RECORD, minimal_config

CHAT = OPENAI_CHAT.name
IDS = LogprobsAsked(2, 3, True)
TEXTS = LogprobsAsked(2, 2, False)

Pairs = Sequence[tuple[Any, float]]


def token(name: Any, logprob: float) -> dict[str, Any]:
    """A token as vLLM gives it with ids (an int), or as OpenAI does (a text)."""
    text = f"token_id:{name}" if isinstance(name, int) else name
    return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}


def chat(*positions: tuple[tuple[Any, float], Pairs], text: str | None = None, **choice: Any) -> bytes:
    """A chat completion's body; each position is the sampled token and the list of the best."""
    content = [{**token(*sampled), "top_logprobs": [token(*each) for each in top]} for sampled, top in positions]
    names = [sampled[0] for sampled, _ in positions]
    if text is None:
        text = "".join(name for name in names if isinstance(name, str))
    ids = {"token_ids": names} if names and isinstance(names[0], int) else {}
    message = {"role": "assistant", "content": text}
    one = {"message": message, "finish_reason": "stop", "logprobs": {"content": content}, **ids, **choice}
    usage = {"prompt_tokens": 3, "completion_tokens": len(positions), "total_tokens": 3 + len(positions)}
    return json.dumps({"choices": [one], "usage": usage}).encode()


def plain(text: str = "plain") -> bytes:
    """A body without logprobs."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}).encode()


BEST = ((7, -0.5), [(7, -0.5), (3, -1.5), (9, -2.5)])
"""The sampled token is the best."""
BEYOND = ((8, -9.0), [(8, -9.0), (7, -0.25), (3, -2.0)])
"""It is beyond the best: vLLM names it first, and the third best makes room for it."""


def tops(told: TokenLogprobs) -> list[list[tuple[Any, float]]]:
    """The best tokens of each position."""
    names = told.top_ids.tolist() if told.top_ids is not None else list(told.top_texts or ())
    pairs = list(zip(names, told.top_logprobs.tolist(), strict=True))
    ends = np.cumsum(told.sizes).tolist()
    return [pairs[end - size : end] for end, size in zip(ends, told.sizes.tolist(), strict=True)]


def why(body: bytes, asked: LogprobsAsked = IDS, wire: str = CHAT) -> str:
    """Why a body is refused."""
    with pytest.raises(BadLogprobs) as caught:
        read_logprobs(wire, body, asked)
    return str(caught.value)


class TestTheSampledToken:
    def test_among_the_best_it_has_its_rank(self) -> None:
        told = read_logprobs(CHAT, chat(((3, -1.5), [(3, -1.5), (7, -0.5), (9, -2.5)])), IDS)
        assert told.ids is not None and told.ids.tolist() == [3]
        assert (told.logprobs.tolist(), told.ranks.tolist()) == ([-1.5], [2])
        assert tops(told) == [[(7, -0.5), (3, -1.5)]]

    def test_beyond_the_best_it_is_kept_without_a_rank_and_apart_from_them(self) -> None:
        told = read_logprobs(CHAT, chat(BEST, BEYOND), IDS)
        assert told.ids is not None and told.ids.tolist() == [7, 8]
        assert told.ranks.tolist() == [1, 0]
        assert told.logprobs.tolist() == [-0.5, -9.0]
        assert tops(told) == [[(7, -0.5), (3, -1.5)], [(7, -0.25), (3, -2.0)]]

    def test_in_a_list_that_is_sorted_the_last_is_among_the_best(self) -> None:
        told = read_logprobs(
            CHAT, chat((("c", -2.5), [("a", -0.5), ("b", -1.5), ("c", -2.5)])), LogprobsAsked(3, 3, False)
        )
        assert told.ranks.tolist() == [3]
        assert tops(told) == [[(b"a", -0.5), (b"b", -1.5), (b"c", -2.5)]]

    def test_outside_of_the_list_it_is_kept_too(self) -> None:
        told = read_logprobs(CHAT, chat((("z", -7.0), [("a", -0.5), ("b", -1.5)])), TEXTS)
        assert (told.texts, told.ranks.tolist(), told.logprobs.tolist()) == ((b"z",), [0], [-7.0])

    def test_its_rank_is_known_one_beyond_what_is_kept(self) -> None:
        told = read_logprobs(CHAT, chat(((9, -2.5), [(7, -0.5), (3, -1.5), (9, -2.5)])), IDS)
        assert told.ranks.tolist() == [3] and tops(told) == [[(7, -0.5), (3, -1.5)]]

    def test_a_value_at_the_floor_is_none(self) -> None:
        """OpenAI's word for a token that is not in its list."""
        told = read_logprobs(CHAT, chat((("z", -9999.0), [("a", -0.5), ("b", -1.5)])), TEXTS)
        assert math.isnan(told.logprobs[0]) and told.ranks.tolist() == [0]


class TestTheBestTokens:
    def test_equal_ones_stand_in_the_order_of_their_ids(self) -> None:
        body = chat(((5, -1.5), [(5, -1.5), (9, -1.5), (2, -1.5), (1, -3.0)]))
        told = read_logprobs(CHAT, body, LogprobsAsked(3, 4, True))
        assert tops(told) == [[(2, -1.5), (5, -1.5), (9, -1.5)]] and told.ranks.tolist() == [2]

    def test_what_has_no_probability_is_left_out(self) -> None:
        told = read_logprobs(CHAT, chat(((5, 0.0), [(5, 0.0), (1, -9999.0), (2, -9999.0)])), IDS)
        assert tops(told) == [[(5, 0.0)]]

    def test_a_repeated_one_counts_once(self) -> None:
        told = read_logprobs(CHAT, chat(((7, -0.5), [(7, -0.5), (7, -0.5), (3, -1.5)])), IDS)
        assert tops(told) == [[(7, -0.5), (3, -1.5)]]
        assert "2 of 3" in why(chat(((7, -0.5), [(7, -0.5), (7, -0.5), (3, -1.5)])), LogprobsAsked(3, 4, True))

    def test_different_tokens_of_one_text_are_both_kept(self) -> None:
        told = read_logprobs(CHAT, chat((("a", -0.5), [("a", -0.5), ("a", -1.5)])), TEXTS)
        assert tops(told) == [[(b"a", -0.5), (b"a", -1.5)]]

    def test_float32_keeps_what_vllm_computed(self) -> None:
        value = -15.916243553161621
        told = read_logprobs(CHAT, chat(((7, -0.5), [(7, -0.5), (3, value)])), IDS)
        assert float(told.top_logprobs[1]) == value


class TestBodiesThatAreRefused:
    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (plain(), "there are none"),
            (b"<html>", "there are none"),
            (chat(BEST, logprobs={}), "there are none"),
            (chat(BEST, logprobs={"content": None}), "there are none"),
            (chat(BEST, ((7, -0.5), [(7, -0.5)])), "comes with 1 of 2"),
            (chat(BEST, BEYOND, token_ids=[7]), "other tokens"),
            (chat(BEST, BEYOND, token_ids=[7, 9]), "other tokens"),
            (chat(((7, -0.5), [(7, -0.6), (3, -1.5)])), "two values for one token"),
            (chat(((7, -0.5), [(7, -0.5), (3, -1.5), (3, -1.6)])), "two values for one token"),
            (chat(((7, 3.5), [(7, 3.5), (3, 1.5)])), "no log-probability"),
            (chat(((7, -0.1), [(7, -0.1), (3, -0.2)])), "more than 1"),
            (chat((("a", -0.5), [("a", -0.5), ("b", -1.5)])), "without their ids"),
            (chat(((7, None), [(7, -0.5), (3, -1.5)])), "no number"),  # type: ignore[arg-type]
            (chat(BEST).replace(b"-1.5", b"NaN"), "no log-probability"),
            (chat(BEST).replace(b"token_id:3", b"token_id:99999999999"), "without their ids"),
        ],
    )
    def test_because(self, body: bytes, reason: str) -> None:
        assert reason in why(body)

    def test_of_a_count_that_is_not_theirs_where_there_are_no_other_ids(self) -> None:
        body = json.loads(chat(BEST, BEYOND, token_ids=None))
        assert find_logprobs(CHAT, json.dumps(body).encode(), IDS) is not None
        body["usage"]["completion_tokens"] = 3
        assert "2 tokens of 3" in why(json.dumps(body).encode())

    def test_texts_must_hold_the_answer(self) -> None:
        best = [("a", -0.5), ("b", -1.5)]
        two = ((" a", -2.0), best), (("b", -1.5), best)
        assert read_logprobs(CHAT, chat(*two, text="ab"), TEXTS).texts == (b" a", b"b")  # a server strips texts
        assert "other tokens" in why(chat(*two, text="abc"), TEXTS)
        assert "other tokens" in why(chat(text="a"), TEXTS)
        assert len(read_logprobs(CHAT, chat(text=""), TEXTS)) == 0  # it said nothing

    def test_a_format_without_any(self) -> None:
        assert "the format has none" in why(plain(), wire="anthropic-messages")

    def test_the_answer_beside_them_is_read_without_parsing_them(self) -> None:
        """As vLLM writes it, whatever marks the text holds."""
        text = 'a "logprobs":{"content":[{ b ]},"finish_reason": "c'
        body = json.loads(chat(BEST, BEYOND, text=text))
        (choice,) = body["choices"]
        for name in ("finish_reason", "token_ids"):
            choice[name] = choice.pop(name)  # behind the logprobs
        compact = json.dumps(body, separators=(",", ":"))
        broken = compact.replace('"token_id:8","logprob":-9.0', '"token_id:8","logprob":?')
        assert broken != compact
        for each in (compact, broken, json.dumps(body)):
            read = OPENAI_CHAT.read(each.encode())
            assert isinstance(read, Reply) and (read.text, read.finish_reason) == (text, "stop")
        assert read_logprobs(CHAT, compact.encode(), IDS).ranks.tolist() == [1, 0]

    def test_lacking_ones_are_a_strike_and_other_verdicts_stay(self) -> None:
        verdict = with_logprobs(judge(OPENAI_CHAT.read, 200, {}, plain()), CHAT, plain(), IDS)
        assert (verdict.action, verdict.reason) == (Action.STRIKE, "bad_logprobs:2")
        good = judge(OPENAI_CHAT.read, 200, {}, chat(BEST))
        assert with_logprobs(good, CHAT, chat(BEST), IDS) is good
        assert with_logprobs(good, CHAT, chat(BEST), None) is good
        busy = judge(OPENAI_CHAT.read, 429, {}, b"")
        assert with_logprobs(busy, CHAT, b"", IDS) is busy


class TestGemini:
    BODY: ClassVar[dict[str, Any]] = {
        "candidates": [
            {
                "content": {"parts": [{"text": "Hi!"}], "role": "model"},
                "finishReason": "STOP",
                "logprobsResult": {
                    "chosenCandidates": [
                        {"token": "Hi", "tokenId": 11, "logProbability": -0.25},
                        {"token": "!", "tokenId": 5, "logProbability": -6.0},
                    ],
                    "topCandidates": [
                        {"candidates": [{"token": "Hi", "tokenId": 11, "logProbability": -0.25},
                                        {"token": "Yo", "tokenId": 12, "logProbability": -1.75}]},
                        {"candidates": [{"token": ".", "tokenId": 6, "logProbability": -0.125},
                                        {"token": "?", "tokenId": 7, "logProbability": -2.5}]},
                    ],
                },
            }
        ]
    }  # fmt: skip

    def test_ids_and_texts_are_both_kept(self) -> None:
        told = read_logprobs(GEMINI.name, json.dumps(self.BODY).encode(), TEXTS)
        assert told.ids is not None and told.ids.tolist() == [11, 5]
        assert told.texts == (b"Hi", b"!") and told.top_texts == (b"Hi", b"Yo", b".", b"?")
        assert told.ranks.tolist() == [1, 0]
        assert tops(told) == [[(11, -0.25), (12, -1.75)], [(6, -0.125), (7, -2.5)]]

    def test_best_ones_of_other_positions_are_refused(self) -> None:
        body = json.loads(json.dumps(self.BODY))
        body["candidates"][0]["logprobsResult"]["topCandidates"].pop()
        assert "of 2 tokens" in why(json.dumps(body).encode(), TEXTS, GEMINI.name)


class TestRequests:
    def body(self, wire: Any, logprobs: LogprobsAsked | None) -> Any:
        return json.loads(wire.body(Ask("m", EMPTY_PROMPT.prompt, Sampling(), logprobs=logprobs)))

    def test_vllm_gives_ids_twice(self) -> None:
        sent = self.body(OPENAI_CHAT, LogprobsAsked(20, 21, True))
        assert (sent["logprobs"], sent["top_logprobs"]) == (True, 21)
        assert sent["return_tokens_as_token_ids"] is sent["return_token_ids"] is True

    def test_other_servers_are_sent_no_fields_that_they_may_refuse(self) -> None:
        sent = self.body(OPENAI_CHAT, LogprobsAsked(20, 20, False))
        assert sent["top_logprobs"] == 20 and not {"return_token_ids", "return_tokens_as_token_ids"} & sent.keys()

    def test_gemini(self) -> None:
        sent = self.body(GEMINI, LogprobsAsked(5, 5, False))["generationConfig"]
        assert (sent["responseLogprobs"], sent["logprobs"]) == (True, 5)

    @pytest.mark.parametrize("wire", [OPENAI_CHAT, GEMINI])
    def test_without_them_nothing_is_said(self, wire: Any) -> None:
        assert "ogprobs" not in json.dumps(self.body(wire, None))

    def test_long_answers_with_many_may_be_long(self) -> None:
        assert most_bytes(512, None) == MAX_BODY_BYTES
        assert most_bytes(4096, LogprobsAsked(20, 21, True)) > 4096 * 21 * 110
        assert most_bytes(10**6, LogprobsAsked(64, 65, True)) == LARGEST_BODY_BYTES


VLLM = {"kind": "vllm", "model": "./teacher"}
OPENAI = {"kind": "openai", "base_url": "https://a.example/v1", "provider": "p", "model": "m"}
REPLAY = minimal_config()["teachers"]["humans"]


def config(teacher: dict[str, Any], **generate: Any) -> RunConfig:
    return RunConfig.model_validate(minimal_config(teachers={"t": teacher}, generate={"teacher": "t", **generate}))


def refusal(teacher: dict[str, Any], **generate: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(teacher, **generate)
    return str(caught.value)


def teacher_of(run: RunConfig) -> Teacher:
    return run.teachers["t"]


class TestConfig:
    def test_off_by_default_and_in_no_key_then(self) -> None:
        assert "logprobs" not in identity(GenerateConfig(teacher="t"))

    def test_number_and_form_count_and_nothing_else(self) -> None:
        def counted(**fields: Any) -> Any:
            return identity(GenerateConfig(teacher="t", logprobs=LogprobsConfig(**fields)))["logprobs"]

        assert counted(top_k=5) == counted(top_k=5, api_limit=50, accept_scaled=True) == {"top_k": 5}
        assert counted(top_k=5, token_ids=True) != counted(top_k=5) != counted(top_k=6)

    @pytest.mark.parametrize("top_k", [0, 65])
    def test_from_1_to_64(self, top_k: int) -> None:
        assert "top_k" in refusal(VLLM, logprobs={"top_k": top_k})

    @pytest.mark.parametrize("teacher", [{"kind": "anthropic", "model": "m"}, REPLAY])
    def test_teachers_that_give_none(self, teacher: dict[str, Any]) -> None:
        refused = refusal(teacher, logprobs={"top_k": 5}, sampling={"top_p": None})
        assert f"a teacher of kind {teacher['kind']} gives none" in refused

    @pytest.mark.parametrize("teacher", [OPENAI, {"kind": "gemini", "model": "m"}])
    def test_apis_take_20_unless_the_config_knows_better(self, teacher: dict[str, Any]) -> None:
        assert "at most 20, not 21" in refusal(teacher, logprobs={"top_k": 21})
        config(teacher, logprobs={"top_k": 20})
        config(teacher, logprobs={"top_k": 21, "api_limit": 30})

    @pytest.mark.parametrize("args", [["--logprobs-mode", "processed_logprobs"], ["--logprobs-mode=raw_logits"]])
    def test_other_than_raw_ones_are_refused(self, args: list[str]) -> None:
        assert "must be raw_logprobs" in refusal({**VLLM, "args": args}, logprobs={"top_k": 5})
        config({**VLLM, "args": args})
        server = {"kind": "server", "model": "./t", "command": ["vllm", "serve", "--port", "{port}", *args]}
        assert "must be raw_logprobs" in refusal(server, logprobs={"top_k": 5})

    def test_the_flag_is_read_as_vllm_reads_it(self) -> None:
        assert names_other_mode(("--logprobs_mode", "processed_logits"))
        assert names_other_mode(("--logprobs_mode=processed_logits",))
        assert not names_other_mode(("--logprobs-mode", "raw_logprobs", "--max-logprobs", "64"))

    def test_forms_and_continued_answers_are_refused(self) -> None:
        """vLLM's raw logprobs are of the tokens that the form leaves; parts of an answer meet between tokens."""
        assert "allowed tokens" in refusal(
            VLLM, logprobs={"top_k": 5}, response={"kind": "choice", "choices": ["a", "b"]}
        )
        assert "seams" in refusal(VLLM, logprobs={"top_k": 5}, on_length={"kind": "continue"})

    def test_vllm_is_asked_for_one_more_and_for_ids(self) -> None:
        asked = LogprobsConfig(top_k=20)
        assert wanted_logprobs(None, teacher_of(config(VLLM))) is None
        assert wanted_logprobs(asked, teacher_of(config(VLLM))) == LogprobsAsked(20, 21, True)
        assert wanted_logprobs(asked, teacher_of(config(OPENAI))) == LogprobsAsked(20, 20, False)
        behind = config({**OPENAI, "structured_outputs": "vllm"})
        assert wanted_logprobs(asked, teacher_of(behind)) == LogprobsAsked(20, 21, True)
        assert wanted_logprobs(LogprobsConfig(top_k=1), teacher_of(config(OPENAI))) == LogprobsAsked(1, 2, False)

    def test_a_server_of_ours_is_started_for_them_and_its_answers_keep_their_keys(self) -> None:
        teacher = teacher_of(config({**VLLM, "args": ["--max-logprobs", "5"]}))
        started = started_for(teacher, LogprobsAsked(64, 65, True))  # type: ignore[type-var]
        assert started.args == ("--max-logprobs", "5", "--max-logprobs", "65", "--logprobs-mode", "raw_logprobs")
        assert output_flags(teacher)["args"] == [["--max-logprobs", "5"]]
        assert started_for(teacher, None) is teacher  # type: ignore[type-var]
        assert logprobs_flags(LogprobsAsked(1, 2, True))[1] == "20"  # the trial asks for more than one

    def test_they_are_in_no_request_key(self) -> None:
        with_them, without = (Asked("0" * 64, {}, Sampling(), 0, logprobs=each) for each in (IDS, None))
        assert [asked.request("s", "p", 0, EMPTY_PROMPT.prompt).key for asked in (with_them, without)] == [
            without.request("s", "p", 0, EMPTY_PROMPT.prompt).key
        ] * 2


KEY = bytes(32)


def stored(body: bytes, rejected: str | None = None, at: int = 1) -> Stored:
    return Stored(KEY, 64, at, "t", "m", "", CHAT, 200, rejected, body)


class TestWhichStoredAnswersStand:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Any:
        with ResponseStore(tmp_path / "responses") as store:
            yield store

    def text(self, store: ResponseStore, asked: LogprobsAsked | None) -> str | None:
        found = store.get_many({KEY: 64}, None, asked).get(KEY)
        return None if found is None else found.rejected or (found.reply.text if found.reply else None)

    def test_one_without_them_stands_for_who_wants_none(self, store: ResponseStore) -> None:
        store.put([stored(plain())])
        assert self.text(store, None) == "plain"
        assert self.text(store, IDS) is None

    def test_one_with_more_stands_and_one_with_fewer_does_not(self, store: ResponseStore) -> None:
        store.put([stored(chat(BEST, text="three"))])
        assert self.text(store, LogprobsAsked(2, 3, True)) == "three"
        assert self.text(store, LogprobsAsked(3, 4, True)) == "three"
        assert self.text(store, LogprobsAsked(4, 5, True)) is None

    def test_texts_do_not_stand_for_ids(self, store: ResponseStore) -> None:
        store.put([stored(chat((("a", -0.5), [("a", -0.5), ("b", -1.5)])))])
        assert self.text(store, TEXTS) == "a"
        assert self.text(store, IDS) is None

    def test_the_oldest_that_holds_them_wins(self, store: ResponseStore) -> None:
        store.put([stored(plain(), at=1), stored(chat(BEST, text="b"), at=3), stored(chat(BEST, text="a"), at=2)])
        assert self.text(store, IDS) == "a"
        assert self.text(store, None) == "plain"

    def test_a_refusal_for_lack_of_them_is_one_to_who_wants_as_many_only(self, store: ResponseStore) -> None:
        store.put([stored(plain(), "bad_logprobs:2")])
        assert self.text(store, LogprobsAsked(2, 3, True)) == "bad_logprobs"
        assert self.text(store, LogprobsAsked(3, 4, True)) == "bad_logprobs"
        assert self.text(store, LogprobsAsked(1, 2, True)) is None
        assert self.text(store, None) == "plain"

    def test_a_good_answer_beside_such_a_refusal_wins(self, store: ResponseStore) -> None:
        store.put([stored(plain(), "bad_logprobs:2", at=1), stored(chat(BEST, text="good"), at=2)])
        assert self.text(store, IDS) == "good"

    def test_they_are_in_memory_only_for_who_reads_them(self, store: ResponseStore) -> None:
        store.put([stored(chat(BEST))])
        assert store.get_many({KEY: 64}, None, IDS)[KEY].logprobs is None
        kept = store.get_many({KEY: 64}, None, IDS, keep_logprobs=True)[KEY].logprobs
        assert kept is not None and tops(kept) == [[(7, -0.5), (3, -1.5)]]

    def test_the_same_holds_when_they_are_counted(self, store: ResponseStore, tmp_path: Path) -> None:
        store.put([stored(plain())])
        store.close()
        wanted = [Wanted({KEY: 1}, (64,), {}, {KEY: each} if each else {}) for each in (None, IDS)]
        assert [coverage(tmp_path / "responses", each).answered for each in wanted] == [1, 0]

    def test_an_import_brings_them_beside_an_answer_without(self) -> None:
        assert not _serves(stored(plain()), stored(chat(BEST)))
        assert not _serves(stored(chat(BEST)), stored(chat(((7, -0.5), [(7, -0.5), (3, -1.5), (9, -2.5), (1, -4.0)]))))
        assert _serves(stored(chat(BEST)), stored(plain()))
        assert _serves(stored(chat(BEST)), stored(chat(BEST)))
        assert held_logprobs(CHAT, chat(BEST)) == LogprobsAsked(3, 3, True)
        assert held_logprobs(CHAT, plain()) is None

    def test_row_groups_of_long_bodies_are_short(self, store: ResponseStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folded, "GROUP_BYTES", 1000)
        store.put([stored(plain("x" * 300), at=at) for at in range(10)])
        store.fold()
        groups = [table.num_rows for table in row_groups(store)]
        assert sum(groups) == 10 and max(groups) <= 4


def row_groups(store: ResponseStore) -> list[Any]:
    import pyarrow.parquet as pq

    (path,) = store._answers.glob("*.parquet")
    with pq.ParquetFile(path) as file:
        return [file.read_row_group(at) for at in range(file.num_row_groups)]


class TestSideFile:
    FACTS = TargetFacts(2, {"t": "f" * 64, "u": None}, {"t": "raw", "u": "untold"})

    def write(self, folder: Path, answers: dict[str, TokenLogprobs]) -> str:
        with TargetWriter(folder, self.FACTS) as writer:
            writer.write([*answers], [*answers.values()])
        return writer.written().content

    def test_rows_are_read_as_they_were_written(self, tmp_path: Path) -> None:
        ids = read_logprobs(CHAT, chat(BEST, BEYOND), IDS)
        texts = read_logprobs(CHAT, chat((("z", -9999.0), [("a", -0.5), ("b", -1.5)])), TEXTS)
        both = read_logprobs(GEMINI.name, json.dumps(TestGemini.BODY).encode(), TEXTS)
        answers = {"a" * 32: ids, "b" * 32: texts, "c" * 32: both}
        self.write(tmp_path, answers)
        for (row_id, told), (expected_id, expected) in zip(
            read_targets(tmp_path / "targets"), answers.items(), strict=True
        ):
            assert row_id == expected_id
            assert tops(told) == tops(expected)
            assert (told.texts, told.top_texts) == (expected.texts, expected.top_texts)
            assert str(told.ids) == str(expected.ids) and told.ranks.tolist() == expected.ranks.tolist()
            assert np.array_equal(told.logprobs, expected.logprobs, equal_nan=True)

    def test_facts_that_hold_for_all_rows_are_in_its_metadata(self, tmp_path: Path) -> None:
        self.write(tmp_path, {"a" * 32: read_logprobs(CHAT, chat(BEST), IDS)})
        (table,) = read_shards(tmp_path / "targets")
        told = {name.decode(): json.loads(value) for name, value in table.schema.metadata.items()}
        assert told == self.FACTS.json()
        assert table.schema.equals(TARGET_SCHEMA)

    def test_another_probability_is_another_content(self, tmp_path: Path) -> None:
        one = read_logprobs(CHAT, chat(BEST), IDS)
        other = read_logprobs(CHAT, chat(((7, -0.5), [(7, -0.5), (3, -1.25)])), IDS)
        digests = {self.write(tmp_path / str(n), {"a" * 32: each}) for n, each in enumerate((one, one, other))}
        assert len(digests) == 2

    def test_it_is_part_of_the_result_of_generate_and_is_verified_with_it(self, tmp_path: Path) -> None:
        """What trains on soft targets must see that they are others, and so must a lock file."""
        with RowSink(tmp_path, RECORD_SCHEMA) as sink:
            sink.keep([EMPTY_RECORD])
        rows = sink.result(1).content
        artefact = Artefact(tmp_path, Manifest("0" * 64, "generate", {}, rows, {}, 1, 1, {}, {}, {}))
        assert recompute(artefact) == rows
        targets = self.write(tmp_path, {EMPTY_RECORD.row_id: read_logprobs(CHAT, chat(BEST), IDS)})
        assert recompute(artefact) == count_in(rows, targets) != rows

    def test_rows_and_answers_must_be_as_many(self, tmp_path: Path) -> None:
        with TargetWriter(tmp_path, self.FACTS) as writer, pytest.raises(ValueError, match="1 rows, but targets of 0"):
            writer.write(["a" * 32], [])

    def test_no_rows_are_a_file_with_a_schema(self, tmp_path: Path) -> None:
        self.write(tmp_path, {})
        assert list(read_targets(tmp_path / "targets")) == []

    def test_a_tokenizer_is_known_by_its_files(self, tmp_path: Path) -> None:
        assert tokenizer_digest(tmp_path) is None
        (tmp_path / "vocab.json").write_text("{}")
        first = tokenizer_digest(tmp_path)
        (tmp_path / "merges.txt").write_text("a b")
        second = tokenizer_digest(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        third = tokenizer_digest(tmp_path)
        (tmp_path / "merges.txt").write_text("b a")
        assert len({first, second, third}) == 3 and tokenizer_digest(tmp_path) == third


def told(pairs: Pairs) -> TokenLogprobs:
    """One position whose best token is sampled."""
    k = len(pairs)
    return read_logprobs(CHAT, chat((pairs[0], pairs)), LogprobsAsked(k, k + 1, True))


def at_temperature(pairs: Pairs, temperature: float) -> Pairs:
    """The same distribution, scaled and renormalised over its own tokens."""
    total = math.log(sum(math.exp(value / temperature) for _, value in pairs))
    return [(name, value / temperature - total) for name, value in pairs]


class TestTemperature:
    PAIRS: Pairs = ((1, -0.6), (2, -1.4), (3, -2.2), (4, -3.0))

    def test_the_same_at_both_is_raw(self) -> None:
        assert scale_of(told(self.PAIRS), told([(name, value + 0.01) for name, value in self.PAIRS])) == "raw"

    def test_twice_as_far_apart_is_scaled(self) -> None:
        assert scale_of(told(self.PAIRS), told(at_temperature(self.PAIRS, 0.5))) == "scaled"

    @pytest.mark.parametrize(
        "cold",
        [
            [(5, -0.6), (6, -1.4), (7, -2.2), (8, -3.0)],
            [(1, -0.6), (5, -1.4), (6, -2.2), (7, -3.0)],
            [(1, -0.6), (2, -2.2), (3, -1.4), (4, -3.0)],
            at_temperature(PAIRS, 0.7),
        ],
    )
    def test_anything_else_is_unknown(self, cold: Pairs) -> None:
        assert scale_of(told(self.PAIRS), told(cold)) == "unknown"

    def test_tokens_as_likely_as_each_other_tell_nothing(self) -> None:
        flat = [(1, -1.4), (2, -1.45), (3, -1.4)]
        assert scale_of(told(flat), told(flat)) == "unknown"

    def test_the_trial_has_keys_of_its_own_and_asks_for_one_token(self) -> None:
        asked = Asked("0" * 64, {}, Sampling(temperature=0.7, top_p=0.9), 3, logprobs=LogprobsAsked(1, 2, True))
        trials = trial_requests(asked)
        assert [how.sampling.temperature for how, _ in trials] == [1.0, 0.5]
        assert {how.sampling.max_tokens for how, _ in trials} == {1}
        assert [how.logprobs for how, _ in trials] == [LogprobsAsked(4, 5, True)] * 2
        keys = {request.key for _, request in (*trials, *trial_requests(asked, 1))}
        assert len(keys) == 4
        other = Asked("0" * 64, {}, Sampling(temperature=0.1), 4, logprobs=LogprobsAsked(1, 2, True))
        assert {request.key for _, request in trial_requests(other)} <= keys, "one trial for all settings of a teacher"
