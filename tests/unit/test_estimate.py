"""A plan is priced before anything is spent: what is counted, what low, likely and high mean, and when it warns."""

import json
import random
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline import cli
from pipeline.core.config_budget import TokenPrice
from pipeline.core.config_teacher import OpenAITeacher, Sampling
from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import DigestCache
from pipeline.runner.asking import Asking
from pipeline.runner.estimate import sure_candidates
from pipeline.runner.found import look_up
from pipeline.runner.funds import Fund, alarms, left
from pipeline.teacher.budget import TEMPLATE_TOKENS, Amount, Limits, worst_tokens
from pipeline.teacher.experience import LEAST, LEAST_TIMED, Experience, experience_with
from pipeline.teacher.forecast import Forecast, Load, Span, forecast
from pipeline.teacher.hits import Distinct, Standing, standings
from pipeline.teacher.prices import Price
from pipeline.teacher.request import Asked
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Attempt, Ended, Stored
from tests.faults.batch_server import BatchServer, Fate
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.faults.test_budget import PRICE, Till
from tests.stored_answers import PLAIN, answer, body, key, store
from tests.support import cli_env, logger_is_restored, wait_for, write_project

CAP = 64
NOTHING = Amount()
PER_TOKEN = Price.of(TokenPrice(**PRICE))
SEEN = Experience(attempts=100, input_low=0.2, input_mean=0.25, output_low=10.0, output_mean=20.0, per_second=4.0)


class TestForecast:
    LOAD = Load(requests=100, body_bytes=50_000, text_bytes=36_000, cap=512)

    def test_high_is_what_the_budget_reserves_for_each_request(self) -> None:
        bodies = [b"x" * size for size in (10, 700, 33)]
        load = Load(3, sum(map(len, bodies)), 0, 512)
        worst = sum(PER_TOKEN.cost(worst_tokens(each), 512) for each in bodies)
        for seen in (None, SEEN):
            told = forecast(load, seen, PER_TOKEN)
            assert told.tokens_in.high == sum(map(worst_tokens, bodies))
            assert told.tokens_out.high == 3 * 512
            assert told.nano is not None
            assert worst <= told.nano.high <= worst + 3

    def test_without_experience_low_is_a_guess_and_nothing_is_likely(self) -> None:
        told = forecast(self.LOAD, None, PER_TOKEN)
        assert told.tokens_in == Span(6_000, None, 50_000 + 100 * TEMPLATE_TOKENS)
        assert told.tokens_out == Span(100 * (512 // 20), None, 51_200)
        assert told.likely is None
        assert told.nano is not None and told.nano.likely is None

    def test_with_experience_low_and_likely_come_from_it(self) -> None:
        told = forecast(self.LOAD, SEEN, PER_TOKEN)
        assert (told.tokens_in.low, told.tokens_in.likely) == (10_000, 12_500)
        assert (told.tokens_out.low, told.tokens_out.likely) == (1_000, 2_000)
        assert told.nano is not None
        assert told.nano.low == PER_TOKEN.cost(10_000, 1_000)
        assert told.nano.likely == PER_TOKEN.cost(12_500, 2_000)

    def test_a_price_that_nobody_knows_is_unknown_and_not_nothing(self) -> None:
        assert forecast(self.LOAD, SEEN, None).nano is None
        assert forecast(self.LOAD, SEEN, Price(0, 0)).nano == Span(0, 0, 0)

    @pytest.mark.parametrize("seen", [None, SEEN, replace(SEEN, input_mean=99.0, output_low=99.0, output_mean=1e6)])
    @pytest.mark.parametrize("cap", [1, 19, 4096])
    def test_low_likely_and_high_are_in_their_order(self, seen: Experience | None, cap: int) -> None:
        told = forecast(replace(self.LOAD, cap=cap), seen, PER_TOKEN)
        for span in (told.tokens_in, told.tokens_out, told.nano):
            assert span is not None
            assert span.low <= (span.low if span.likely is None else span.likely) <= span.high

    def test_answers_that_are_cut_may_be_asked_for_again_under_each_higher_cap(self) -> None:
        told, once = forecast(replace(self.LOAD, again=(1024, 2048)), SEEN, None), forecast(self.LOAD, SEEN, None)
        assert told.requests == Span(100, 100, 300)
        assert told.tokens_in.high == 3 * once.tokens_in.high
        assert told.tokens_out.high == 100 * (512 + 1024 + 2048)
        assert told.low == once.low

    def test_a_target_that_may_be_met_early_lowers_the_low_numbers_alone(self) -> None:
        told, whole = forecast(replace(self.LOAD, least=25), SEEN, PER_TOKEN), forecast(self.LOAD, SEEN, PER_TOKEN)
        assert told.requests == Span(25, None, 100)
        assert told.tokens_out == Span(250, None, whole.tokens_out.high)
        assert told.likely is None

    def test_what_may_never_be_sent_counts_in_the_high_numbers_alone(self) -> None:
        told, whole = forecast(replace(self.LOAD, is_sure=False), SEEN, PER_TOKEN), forecast(self.LOAD, SEEN, PER_TOKEN)
        assert (told.low, told.likely, told.high) == (NOTHING, NOTHING, whole.high)
        both = told + whole
        assert (both.low, both.likely, both.high) == (whole.low, whole.likely, whole.high + whole.high)

    def test_of_two_the_sum_is_known_only_if_both_are(self) -> None:
        guess = forecast(self.LOAD, None, None)
        both = guess + forecast(self.LOAD, SEEN, PER_TOKEN)
        assert (both.likely, both.nano) == (None, None)

    def test_what_is_asked_in_batches_may_still_be_asked_online_at_the_full_price(self) -> None:
        half = Price(PER_TOKEN.input // 2, PER_TOKEN.output // 2)
        told = forecast(self.LOAD, SEEN, PER_TOKEN, half)
        assert told.nano is not None
        assert told.nano.low == half.cost(10_000, 1_000)
        assert told.nano.high == forecast(self.LOAD, SEEN, PER_TOKEN).high.nano


class TestAlarms:
    """A cap against what is spent already and what is forecast."""

    LIKE = Forecast(Span(10, 10, 10), Span(100, 150, 300), Span(100, 200, 300), Span(1_000, 2_000, 4_000))

    def chances(self, limits: Limits, spent: Amount = NOTHING, teacher: str | None = None) -> dict[str, str]:
        found = alarms([Fund(teacher, limits, spent)], [("api", self.LIKE)])
        return {alarm.field: alarm.chance for alarm in found}

    @pytest.mark.parametrize(
        ("cap", "told"),
        [
            (999, {"budget.usd": "surely"}),
            (1_000, {"budget.usd": "probably"}),
            (2_000, {"budget.usd": "perhaps"}),
            (4_000, {}),
        ],
    )
    def test_the_worst_news_is_told_once(self, cap: int, told: dict[str, str]) -> None:
        assert self.chances(Limits("budget", nano=cap)) == told
        assert self.chances(Limits("budget", nano=cap + 500), Amount(nano=500)) == told, "what is spent counts too"

    def test_each_cap_is_looked_at(self) -> None:
        assert self.chances(Limits("budget", tokens=599, requests=9)) == {
            "budget.tokens": "perhaps",
            "budget.requests": "surely",
        }

    def test_a_teachers_cap_counts_its_own_requests_alone(self) -> None:
        assert self.chances(Limits("budget.teachers.other", requests=1), teacher="other") == {}
        assert self.chances(Limits("budget.teachers.api", requests=1), teacher="api") != {}

    def test_several_steps_count_together(self) -> None:
        fund = Fund(None, Limits("budget", requests=19), Amount())
        assert [*alarms([fund], [("api", self.LIKE)])] == []
        assert [alarm.chance for alarm in alarms([fund], [("api", self.LIKE), ("api", self.LIKE)])] == ["surely"]

    def test_what_open_jobs_hold_counts_too(self) -> None:
        fund = Fund(None, Limits("budget", nano=5_000, requests=19), Amount(), Amount(nano=4_000, requests=10))
        found = {alarm.field: alarm for alarm in alarms([fund], [("api", self.LIKE)])}
        assert found["budget.requests"].chance == "surely", "they are made"
        assert found["budget.usd"].chance == "probably", "they may cost less than they hold"
        assert "0 requests of it spent, 10 requests held by open jobs" in found["budget.requests"].text
        assert left(fund) == Amount(1_000, 0, 9)

    def test_it_says_what_will_happen(self) -> None:
        fund = Fund(None, Limits("budget", nano=2 * 10**9), Amount(nano=2 * 10**9 - 100))
        (alarm,) = alarms([fund], [("api", self.LIKE)])
        assert alarm.text.startswith("budget.usd: $2.00, $2.00 of it spent; even the low estimate adds $0.000001")
        assert alarm.text.endswith("the run will stop there (exit code 3)")


class TestStandings:
    """Which requests have a stored answer: as `get_many` says, whatever lies in the store."""

    @pytest.mark.parametrize("seed", range(8))
    def test_it_agrees_with_the_response_store(self, tmp_path: Path, seed: int) -> None:
        draw = random.Random(seed)
        names = [f"r{number}" for number in range(60)]
        for fold in (True, True, False):
            store(tmp_path, *[any_answer(draw, draw.choice(names), at) for at in range(40)], fold=fold)
        wanted = Distinct.of(b"".join(map(key, names)))
        found = standings(tmp_path, wanted, CAP, None)
        told = {bytes(one).ljust(32, b"\0"): Standing(each) for one, each in zip(wanted.keys, found, strict=True)}
        with ResponseStore(tmp_path) as responses:
            hits = responses.get_many(dict.fromkeys(map(key, names), CAP))
        assert {one for one, each in told.items() if each >= Standing.REFUSED} == {*hits}
        for one, outcome in hits.items():
            answered = Standing.AT_CAP if outcome.is_cut else Standing.ANSWERED
            assert told[one] == (answered if outcome.rejected is None else Standing.REFUSED)
        assert {*Standing, Standing.MISSING} <= {*told.values()}

    def test_nothing_is_written_and_a_missing_folder_is_no_error(self, tmp_path: Path) -> None:
        wanted = Distinct.of(key("a"))
        assert standings(tmp_path / "none", wanted, CAP, None).tolist() == [Standing.MISSING]
        assert [*tmp_path.iterdir()] == []

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        store(tmp_path, answer("a"))
        (path,) = (tmp_path / "answers").iterdir()
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(CorruptArtefact) as caught:
            standings(tmp_path, Distinct.of(key("a")), CAP, None)
        assert caught.value.where == str(path)

    def test_equal_keys_are_one_request(self) -> None:
        distinct = Distinct.of(key("b") + key("a") + key("b"))
        assert sorted(zip(distinct.first.tolist(), distinct.rows.tolist(), strict=True)) == [(0, 2), (1, 1)]

    def test_keys_that_end_in_zeros_are_told_apart(self, tmp_path: Path) -> None:
        keys = [b"\1" * 31 + b"\0", b"\1" * 30 + b"\0\0", b"\0" * 32]
        store(tmp_path, *(replace(PLAIN, key=each) for each in keys[:2]), fold=False)
        found = standings(tmp_path, Distinct.of(b"".join(keys)), CAP, None)
        assert found.tolist() == [Standing.MISSING, Standing.ANSWERED, Standing.ANSWERED]


def any_answer(draw: random.Random, name: str, at: int) -> Stored:
    """One of the answers that the hit rule tells apart."""
    kinds = (
        {"body": body("fine")},
        {"body": body("cu", "length", (7, 8)), "cap": 8},
        {"body": body("cut here", "length", (7, 64))},
        {"body": b"{}", "status": 400, "rejected": "bad_request"},
        {"body": b"{}", "status": 400, "rejected": "bad_request", "cap": 8},
        {"body": b"", "rejected": "content_filter"},
        {"body": b"nonsense"},
    )
    return answer(name, stored_ms=1000 + at % 7, **draw.choice(kinds))


class TestExperience:
    def test_nothing_is_concluded_from_few(self, tmp_path: Path) -> None:
        remember(tmp_path, [(10, 5)] * (LEAST - 1))
        assert experience_with(tmp_path, "t" * 64, CAP) is None
        assert experience_with(tmp_path / "none", "t" * 64, CAP) is None

    @pytest.mark.parametrize("fold", [True, False])
    def test_it_is_tokens_per_byte_and_per_answer(self, tmp_path: Path, fold: bool) -> None:
        remember(tmp_path, [(50, 10)] * 20 + [(100, 30)] * 20, fold=fold)
        seen = experience_with(tmp_path, "t" * 64, CAP)
        assert seen is not None
        assert (seen.attempts, seen.output_mean, seen.output_low) == (40, 20.0, 10.0)
        assert (seen.input_mean, seen.input_low) == (0.375, 0.25)  # of bodies of 200 bytes

    def test_longer_answers_count_as_if_they_were_cut(self, tmp_path: Path) -> None:
        remember(tmp_path, [(50, 60)] * LEAST)
        seen = experience_with(tmp_path, "t" * 64, 16)
        assert seen is not None and seen.output_mean == 16

    def test_another_teacher_says_nothing_whatever_it_is_called(self, tmp_path: Path) -> None:
        remember(tmp_path, [(50, 60)] * LEAST, teacher="u" * 64)
        assert experience_with(tmp_path, "t" * 64, CAP) is None

    def test_the_pace_is_that_of_the_longest_stretch_of_work(self, tmp_path: Path) -> None:
        pause = 10_000_000
        remember(tmp_path, [(5, 5)] * (LEAST_TIMED + 50), sent_ms=lambda at: at * 20 + (pause if at >= 50 else 0))
        seen = experience_with(tmp_path, "t" * 64, CAP)
        assert seen is not None and seen.per_second == pytest.approx(50, rel=0.02)

    def test_a_short_burst_has_no_pace(self, tmp_path: Path) -> None:
        remember(tmp_path, [(5, 5)] * (LEAST_TIMED - 1), sent_ms=lambda at: at)
        seen = experience_with(tmp_path, "t" * 64, CAP)
        assert seen is not None and seen.per_second is None


def remember(
    folder: Path,
    usages: list[tuple[int, int]],
    *,
    teacher: str = "t" * 64,
    fold: bool = True,
    sent_ms: Any = lambda at: at,
) -> None:
    """Answered attempts with bodies of 200 bytes."""
    reserved = 200 + TEMPLATE_TOKENS + CAP
    intents = [
        Attempt(at, key(f"e{at}"), CAP, 1000 + sent_ms(at - 1), None, "small", "api", None, reserved)
        for at in range(1, len(usages) + 1)
    ]
    outcomes = [Ended(at, "answer", 200, *used, None, None) for at, used in enumerate(usages, 1)]
    answers = [answer(f"e{at}", teacher=teacher) for at in range(1, len(usages) + 1)]
    with ResponseStore(folder) as responses:
        responses.put(answers, intents=intents)
        responses.put(outcomes=outcomes)
        if fold:
            responses.fold()


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with logger_is_restored():
        yield tmp_path


def write(folder: Path, url: str = "http://127.0.0.1:9/v1", rows: int = 48, **sections: Any) -> None:
    """A project whose teacher is an API with a price."""
    api = {"kind": "openai", "base_url": url, "provider": "scripted", "model": "m", "price": PRICE}
    generate = {"teacher": "api", "sampling": {"max_tokens": CAP}, "retry": {"first_wait_s": 0.01}}
    write_project(folder, rows=rows, **{"teachers": {"api": api}, "generate": generate, **sections})


def change(folder: Path, **sections: Any) -> None:
    config = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, **sections}), "utf-8")


def told(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    capsys.readouterr()
    assert cli.main(["plan", "run.yaml", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["plan", "run.yaml"]) == 0
    return capsys.readouterr().out


class TestPlan:
    def test_before_the_prompts_are_made_it_says_how_to_make_them(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(project)
        assert "requests of generate: unknown until the prompts are made: python -m pipeline prompts run.yaml" in shown(
            capsys
        )
        assert told(capsys)["requests"] == []
        assert not (project / "data" / "store").exists(), "nothing is made by planning"

    def test_it_counts_without_asking(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with ScriptedServer(Till()) as server:
            write(project, server.url)
            assert cli.main(["prompts", "run.yaml"]) == 0
            before = sorted(path for path in (project / "data").rglob("*") if "cache" not in path.parts)
            (generate, evaluate) = told(capsys)["requests"]
            assert sorted(path for path in (project / "data").rglob("*") if "cache" not in path.parts) == before
            assert server.seen == []
        assert (generate["step"], evaluate["step"], evaluate["requests"]) == ("generate", "evaluate", 0)
        assert (generate["requests"], generate["answered"], generate["to_ask"]) == (48, 0, 48)
        assert generate["basis"] == {"kind": "guess", "answers": 0}
        assert generate["usd"]["likely"] is None and generate["seconds"] is None
        assert "guess: nothing stored yet" in shown(capsys)

    def test_the_bill_lies_within_and_what_was_answered_makes_it_likely(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        till = Till()
        with ScriptedServer(till) as server:
            write(project, server.url, budget={"requests": 30})
            assert cli.main(["prompts", "run.yaml"]) == 0
            guess = told(capsys)["requests"][0]["usd"]
            assert cli.main(["generate", "run.yaml"]) == 3
            change(project, budget={"usd": 1})
            after = told(capsys)
            spent = till.nano
            assert cli.main(["generate", "run.yaml"]) == 0
        assert guess["low"] < till.nano / 1e9 < guess["high"]
        (rest, _), (fund,) = after["requests"], after["budget"]
        assert (rest["answered"], rest["to_ask"], rest["basis"]["answers"]) == (30, 18, 30)
        assert rest["usd"]["low"] < (till.nano - spent) / 1e9 < rest["usd"]["high"]
        assert rest["usd"]["likely"] == pytest.approx((till.nano - spent) / 1e9, rel=0.2)
        assert fund["spent"]["usd"] == spent / 1e9 and fund["spent"]["requests"] == 30
        assert fund["left"] == {"usd": pytest.approx(1 - spent / 1e9), "tokens": None, "requests": None}
        assert told(capsys)["requests"] == [{**after["requests"][1]}], "a step that has its result asks nobody"

    def test_it_warns_of_a_cap_that_may_or_will_be_reached(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(project, budget={"usd": 0.0001, "tokens": 20_000, "requests": 48, "teachers": {"api": {"requests": 47}}})
        assert cli.main(["prompts", "run.yaml"]) == 0
        warnings = {each["field"]: each["chance"] for each in told(capsys)["warnings"]}
        assert warnings == {
            "budget.usd": "surely",
            "budget.tokens": "perhaps",
            "budget.teachers.api.requests": "surely",
        }
        lines = [line for line in shown(capsys).splitlines() if line.startswith("warning: budget")]
        assert len(lines) == 3
        assert "even the low estimate adds" in lines[0]

    def test_an_unknown_price_is_unknown_money(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        api = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "provider": "nobody", "model": "m"}
        write(project, teachers={"api": api})
        assert cli.main(["prompts", "run.yaml"]) == 0
        assert told(capsys)["requests"][0]["usd"] is None
        assert "money       unknown: no price" in shown(capsys)

    def test_what_must_not_leave_is_counted_apart(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(project)
        secret = {"id": "s", "prompt": "My key is ghp_" + "A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"}
        with (project / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(secret) + "\n")
        change(project, generate={"teacher": "api", "samples": 2, "sampling": {"temperature": 1}})
        assert cli.main(["prompts", "run.yaml"]) == 0
        row = told(capsys)["requests"][0]
        assert (row["requests"], row["blocked"]) == (2 * 48, 2)
        assert "2 more are blocked by generate.outbound" in shown(capsys)

    def test_the_test_prompts_that_evaluate_asks_an_api_are_counted(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = {"kind": "jsonl", "path": "rows.jsonl"}
        sets = {"facts": {"source": source, "columns": {"answer": "completion"}}}
        write(project, prompts={"sets": sets, "validation": 0, "test": 0.4})
        assert cli.main(["prompts", "run.yaml"]) == 0
        generate, evaluate = told(capsys)["requests"]
        assert generate["requests"] + evaluate["requests"] == 48
        assert evaluate["to_ask"] == evaluate["requests"] > 0
        assert evaluate["tokens_out"]["high"] == 256 * evaluate["requests"]

    def test_completions_that_exist_are_asked_of_nobody(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_project(project)
        assert cli.main(["prompts", "run.yaml"]) == 0
        plan = told(capsys)
        assert (plan["requests"], plan["unknown"], plan["warnings"]) == ([], [], [])

    def test_nothing_is_fetched_to_count(
        self, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A model whose weights are not here yet has no identity, so nothing can be looked up."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(project / "hub"))
        write(project, teachers={"api": {"kind": "vllm", "model": "Nobody/Nothing", "revision": "0" * 40}})
        assert cli.main(["prompts", "run.yaml"]) == 0
        (unknown,) = told(capsys)["unknown"]
        assert unknown["why"].startswith("unknown until the weights of Nobody/Nothing are here")

    def test_teachers_are_counted_one_by_one(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        api = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "provider": "scripted", "model": "m"}
        write(project, teachers={"api": {**api, "price": PRICE}, "other": {**api, "model": "n"}})
        route = {"kind": "all", "teachers": ["api", "other"]}
        change(project, generate={"teacher": "api", "sampling": {"max_tokens": CAP}, "route": route})
        assert cli.main(["prompts", "run.yaml"]) == 0
        rows = [each for each in told(capsys)["requests"] if each["step"] == "generate"]
        assert [(each["teacher"], each["to_ask"], each["usd"] is None) for each in rows] == [
            ("api", 48, False),
            ("other", 48, True),
        ]

    def test_answers_that_a_cap_cut_are_asked_for_again_under_a_higher_one(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raised = {"kind": "raise", "caps": [256, 512]}
        with ScriptedServer(cut_below_300) as server:
            write(project, server.url, rows=12)
            assert cli.main(["prompts", "run.yaml"]) == 0
            assert cli.main(["generate", "run.yaml"]) == 0
            change(
                project,
                generate={"teacher": "api", "sampling": {"max_tokens": CAP}, "on_length": raised},
                budget={"requests": 13},
            )
            plan = told(capsys)
            row, before = plan["requests"][0], len(server.seen)
            assert cli.main(["generate", "run.yaml", "--set", "budget.requests=100"]) == 0
            asked = len(server.seen) - before
        assert (row["answered"], row["to_ask"], row["cut"]) == (10, 2, 2)
        assert (row["sent"]["low"], row["sent"]["high"], asked) == (2, 4, 4)
        assert row["usd"]["high"] > 0
        assert [each["chance"] for each in plan["warnings"]] == ["surely"]

    def test_a_target_is_that_of_all_teachers_and_no_more_candidates_are_counted_than_there_may_be(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with ScriptedServer(Till()) as one, ScriptedServer(Till()) as two:
            api = {"kind": "openai", "base_url": one.url, "provider": "scripted", "model": "m", "license": "MIT"}
            other = {**api, "base_url": two.url, "model": "n"}
            generate = {
                "teacher": "api",
                "sampling": {"max_tokens": CAP},
                "accept": {"rows": 6, "max_candidates": 8},
                "route": {"kind": "all", "teachers": ["api", "other"]},
            }
            budget = {"requests": 7}
            write(project, rows=12, teachers={"api": api, "other": other}, generate=generate, budget=budget)
            assert cli.main(["prompts", "run.yaml"]) == 0
            plan = told(capsys)
            assert cli.main(["generate", "run.yaml"]) == 0
            asked = len(one.seen), len(two.seen)
        rows = [each for each in plan["requests"] if each["step"] == "generate"]
        assert tuple(each["sent"]["low"] for each in rows) == asked
        assert sum(asked) == 6
        assert sum(each["sent"]["high"] for each in rows) == sum(each["requests"] for each in rows) == 8
        assert [(each["field"], each["chance"]) for each in plan["warnings"]] == [("budget.requests", "perhaps")]

    def test_what_open_batch_jobs_hold_is_not_asked_again_and_counts_in_the_budget(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with BatchServer() as server:
            server.fate = lambda number: Fate(polls=None)
            generate = {"teacher": "api", "sampling": {"max_tokens": CAP}, "mode": "batch", "batch": {"poll_s": 0.1}}
            write(project, server.url, rows=12, generate=generate, budget={"requests": 20})
            assert cli.main(["prompts", "run.yaml"]) == 0
            command = [sys.executable, "-m", "pipeline", "generate", "run.yaml"]
            with subprocess.Popen(command, cwd=project, env=cli_env(), stderr=subprocess.PIPE) as process:
                wait_for(lambda: bool(server.jobs), "a job")
                process.send_signal(signal.SIGINT)
                process.communicate()
            same = told(capsys)
            change(project, generate={**generate, "draw": 1})
            another = told(capsys)
            text = shown(capsys)
        assert [(each["to_ask"], each["in_jobs"], each["sent"]["high"]) for each in same["requests"][:1]] == [
            (0, 12, 0)
        ]
        assert same["warnings"] == []
        assert same["budget"][0]["held_by_jobs"]["requests"] == 12
        assert [(each["to_ask"], each["in_jobs"]) for each in another["requests"][:1]] == [(12, 0)]
        assert [(each["field"], each["chance"]) for each in another["warnings"]] == [("budget.requests", "surely")]
        assert "0 of 20 requests made, 12 held by open jobs, 8 left" in text


def cut_below_300(seen: Seen, _: int) -> Act:
    """Two prompts have long answers."""
    is_long = seen.prompt in ("Name number 3.", "Name number 5.")
    return completion("fine", finish="length" if is_long and seen.json["max_tokens"] < 300 else "stop")


class TestFound:
    """What is there of a step's requests, and what is sent under which caps."""

    @pytest.mark.parametrize(
        ("stored_caps", "sent"),
        [
            ({}, [(64, 256, 512)]),
            ({8: "cut"}, [(64, 256, 512)]),
            ({64: "whole"}, []),
            ({64: "refused"}, []),
            ({64: "cut"}, [(256, 512)]),
            ({64: "cut", 256: "whole"}, []),
            ({64: "cut", 256: "cut"}, [(512,)]),
            ({64: "cut", 256: "refused"}, [(512,)]),
            ({64: "cut", 256: "refused", 512: "whole"}, []),
            ({64: "cut", 256: "cut", 512: "cut"}, []),
            ({64: "cut", 512: "refused"}, [(256, 512)]),
            ({512: "cut"}, []),
        ],
    )
    def test_each_request_goes_on_where_its_answers_end(
        self, tmp_path: Path, stored_caps: dict[int, str], sent: list[tuple[int, ...]]
    ) -> None:
        bodies = {
            "whole": lambda cap: {"body": body("fine")},
            "cut": lambda cap: {"body": body("cut", "length", (7, cap))},
            "refused": lambda cap: {"body": b"{}", "status": 400, "rejected": "bad_request"},
        }
        store(tmp_path, *(answer("a", cap=cap, **bodies[kind](cap)) for cap, kind in stored_caps.items()))
        found = look_up(tmp_path, asking(tmp_path, again=(256, 512)))
        assert [part.caps for part in found.parts if part.requests > 0] == sent
        assert found.to_ask == len(sent)
        assert found.answered + found.refused + found.to_ask == 1

    @pytest.mark.parametrize(("target", "sure"), [(1, 3), (2, 4), (9, 5)])
    def test_candidates_that_cannot_be_good_are_asked_for_on_the_way_to_those_that_can(
        self, tmp_path: Path, target: int, sure: int
    ) -> None:
        """The first is refused, the second must not leave, the last is another teacher's."""
        store(tmp_path, answer("a", status=400, body=b"{}", rejected="bad_request"))
        hopeful = bytearray(b"\1\0\1\1\1")
        one = asking(tmp_path, "acd", target=target, hopeful=hopeful, ranks=array("q", [0, 2, 3]))
        two = asking(tmp_path, "e", target=target, hopeful=hopeful, ranks=array("q", [4]))
        found = [look_up(tmp_path, one), look_up(tmp_path, two)]
        assert sure_candidates(found) == sure
        sent = [part.load(each.asking, sure).least for each in found for part in each.parts]
        assert sent == [{3: 1, 4: 2, 5: 2}[sure], int(sure == 5)]
        assert sure_candidates([look_up(tmp_path, asking(tmp_path))]) is None

    @pytest.mark.parametrize(("finish", "times"), [("length", 2), ("stop", 0)])
    def test_whether_an_answer_that_was_cut_was_continued_is_not_known(
        self, tmp_path: Path, finish: str, times: int
    ) -> None:
        store(tmp_path, answer("a", body=body("so", finish, (7, CAP))))
        found = look_up(tmp_path, asking(tmp_path, again=(CAP, CAP), continues=True))
        forecasts = [forecast(part.load(asking(tmp_path), None), None, None) for part in found.parts]
        assert (found.answered, found.to_ask, found.continued) == (1, 0, times // 2)
        assert sum(each.requests.low for each in forecasts) == 0
        assert sum(each.requests.high for each in forecasts) == times


def asking(folder: Path, names: str = "a", **changes: Any) -> Asking:
    """A step that makes the request of each name."""
    teacher = OpenAITeacher.model_validate(
        {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "provider": "scripted", "model": "m"}
    )
    asked = Asked.of(teacher, Sampling(max_tokens=CAP), 0, DigestCache(folder / "digests.json"))
    keys, sizes = bytearray(b"".join(map(key, names))), array("q", [200] * len(names))
    return Asking("generate", "api", teacher, asked, keys=keys, sizes=sizes, **changes)


def test_places_are_found_where_there_are_none() -> None:
    assert Distinct.of(b"").keys.dtype == np.dtype("S32")
    assert standings(Path("none"), Distinct.of(b""), CAP, None).tolist() == []
