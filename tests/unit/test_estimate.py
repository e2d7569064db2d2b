"""A plan is priced before anything is spent: what is counted, what low, likely and high mean, and when it warns."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline import cli
from pipeline.core.config_budget import TokenPrice
from pipeline.core.errors import CorruptArtefact
from pipeline.runner.funds import Fund, alarms
from pipeline.teacher.budget import TEMPLATE_TOKENS, Amount, Limits, worst_tokens
from pipeline.teacher.experience import LEAST, LEAST_TIMED, Experience, experience_with
from pipeline.teacher.forecast import Forecast, Load, Span, forecast
from pipeline.teacher.hits import Distinct, Standing, standings
from pipeline.teacher.prices import Price
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Attempt, Ended, Stored
from tests.faults.scripted_server import ScriptedServer
from tests.faults.test_budget import PRICE, Till
from tests.stored_answers import PLAIN, answer, body, key, store
from tests.support import logger_is_restored, write_project

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
            assert told[one] == (Standing.ANSWERED if outcome.rejected is None else Standing.REFUSED)
        assert {Standing.MISSING, Standing.CUT, Standing.REFUSED, Standing.ANSWERED} <= {*told.values()}

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
        lines = [line for line in shown(capsys).splitlines() if line.startswith("warning: ")]
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


def test_places_are_found_where_there_are_none() -> None:
    assert Distinct.of(b"").keys.dtype == np.dtype("S32")
    assert standings(Path("none"), Distinct.of(b""), CAP, None).tolist() == []
