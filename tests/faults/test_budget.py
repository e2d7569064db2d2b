"""A cap holds whatever fails: the server's own bill never exceeds it, and raising it goes on without asking twice."""

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.core.config_budget import Budget, Caps, Spending, TokenPrice, nano
from pipeline.core.config_teacher import OpenAITeacher, Retry, Sampling
from pipeline.core.errors import CorruptArtefact, ExitCode, Incomplete, RunLocked, UsageError
from pipeline.core.lineage import DigestCache, file_sha256
from pipeline.core.record import Message
from pipeline.core.runs import hold_lock
from pipeline.teacher.accounts import spent_by
from pipeline.teacher.ask import Answer, ask
from pipeline.teacher.budget import Amount
from pipeline.teacher.history import attempts_of
from pipeline.teacher.prices import Price
from pipeline.teacher.request import Asked
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import SCHEMA, Attempt, Ended, read_attempts
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, failure
from tests.faults.shim.project import RUN, write_api_project
from tests.support import cli_env, make_context, run_cli, wait_for, write_project

PRICE = {"input": 2.5, "output": 10}
MAX_TOKENS = 64
CONCURRENCY = 16
PROMPTS = [f"prompt number {number} " + "word " * (number % 40) for number in range(240)]
QUICK = Retry(budget_s=20, first_wait_s=0.005, max_wait_s=0.02, timeout_s=5)


def usage_of(prompt: str) -> tuple[int, int]:
    """(tokens in, tokens out) of a prompt: a function of it, so that the price of a set is known."""
    return len(prompt) // 4 + 8, len(prompt) * 7 % MAX_TOKENS + 1


def price_of_set(prompts: list[str]) -> int:
    return sum(Price.of(TokenPrice(**PRICE)).cost(*usage_of(prompt)) for prompt in prompts)


@dataclass
class Till:
    """A server's script that keeps its own bill, of what it has answered and of nothing else."""

    fails: Callable[[int], Act | None] = lambda number: None
    with_usage: bool = True
    delay_s: float = 0.004
    nano: int = 0
    tokens: int = 0
    answered: Counter[str] = field(default_factory=Counter)

    def __call__(self, seen: Seen, number: int) -> Act:
        fault = self.fails(number)
        if fault is not None and fault.status != 200:
            return fault
        used = usage_of(seen.prompt)
        self.nano += Price.of(TokenPrice(**PRICE)).cost(*used)
        self.tokens += sum(used)
        self.answered[seen.prompt] += 1
        choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
        usage = {"usage": {"prompt_tokens": used[0], "completion_tokens": used[1]}} if self.with_usage else {}
        body = json.dumps({"id": "x", "model": "m", "choices": [choice], **usage}).encode()
        whole = Act(body=body, delay_s=self.delay_s, headers={"x-request-id": f"req-{number}"})
        return whole if fault is None else Act(**{**vars(whole), "cut": fault.cut, "reset": fault.reset})


def ten_tokens(seen: Seen, _: int) -> Act:
    """Seven of them in."""
    return completion(seen.prompt)


def some_500s(number: int) -> Act | None:
    return failure(500) if number % 15 == 7 else None


class Spender:
    """A run that asks a scripted server under caps."""

    def __init__(
        self, folder: Path, server: Any, price: dict[str, float] | None = PRICE, concurrency: int = CONCURRENCY
    ) -> None:
        self.ctx = make_context(folder)
        self.folder = folder
        self.teacher = OpenAITeacher.model_validate(
            {"kind": "openai", "base_url": server.url, "provider": "scripted", "model": "m"}
            | {"concurrency": concurrency, "price": price}
        )

    def ask(self, prompts: list[str] = PROMPTS, retry: Retry = QUICK, **budget: Any) -> list[Answer]:
        cache = DigestCache(self.folder / "digests.json")
        asked = Asked.of(self.teacher, Sampling(max_tokens=MAX_TOKENS), 0, cache)
        requests = [asked.request("set", f"p{i}", 0, [Message("user", prompt)]) for i, prompt in enumerate(prompts)]
        spending = Spending(run="small", teacher="api", budget=Budget.model_validate(budget))
        return list(ask(self.teacher, asked, retry, requests, self.ctx, spending))

    def stopped(self, **budget: Any) -> Incomplete:
        with pytest.raises(Incomplete) as caught:
            self.ask(**budget)
        assert caught.value.exit_code == ExitCode.INCOMPLETE
        return caught.value

    def spent(self) -> Amount:
        price = None if self.teacher.price is None else Price.of(self.teacher.price)
        parts = spent_by(self.folder / "data" / "responses", "small", {"api": price})
        return sum(parts.values(), Amount())

    @property
    def last(self) -> dict[str, Any]:
        return [fields for name, fields in self.ctx.events.seen if name == "teacher_asked"][-1]


WORST_NANO = Price.of(TokenPrice(**PRICE)).cost(256 + 500, MAX_TOKENS)
"""More than the worst case of any of the prompts."""


class TestMoney:
    CAP = price_of_set(PROMPTS) * 37 // 100 / 1e9

    @pytest.mark.parametrize("fails", [some_500s, lambda number: None], ids=["some 500s", "no faults"])
    def test_the_bill_never_exceeds_the_cap_and_raising_it_goes_on_without_asking_twice(
        self, tmp_path: Path, fails: Callable[[int], Act | None]
    ) -> None:
        till = Till(fails)
        with ScriptedServer(till) as server:
            spender = Spender(tmp_path, server)
            for _ in range(2):  # the same command again spends no more
                error = spender.stopped(usd=self.CAP)
                assert till.nano <= nano(self.CAP)
                assert spender.spent().nano <= nano(self.CAP)
            assert spender.spent().nano > nano(self.CAP) - WORST_NANO, "it stops when the next does not fit, not before"
            assert server.most_in_flight > CONCURRENCY / 2
            answered = sum(till.answered.values())
            assert 0 < answered < len(PROMPTS)
            assert error.what.startswith("the budget is reached: $0.0")
            assert error.where.startswith("budget.usd: $0.0")
            assert error.todo == f"raise budget.usd, then resume with: {spender.ctx.resume_command}"
            assert len(spender.ask(usd=self.CAP * 20)) == len(PROMPTS)
        assert set(till.answered.values()) == {1}
        assert len(till.answered) == len(PROMPTS)

    @pytest.mark.parametrize("fault", [Act(cut=30), Act(reset=True)], ids=["cut", "reset"])
    def test_what_was_billed_and_never_arrived_counts_at_its_worst_case(self, tmp_path: Path, fault: Act) -> None:
        till = Till(lambda number: fault if number % 5 == 0 else None)
        with ScriptedServer(till) as server:
            spender = Spender(tmp_path, server)
            spender.stopped(usd=self.CAP)
            assert till.nano <= nano(self.CAP)
            assert spender.last["unknown"] > 0

    def test_answers_without_usage_count_at_their_worst_case(self, tmp_path: Path) -> None:
        till = Till(with_usage=False)
        with ScriptedServer(till) as server:
            spender = Spender(tmp_path, server)
            spender.stopped(usd=self.CAP)
            assert till.nano <= nano(self.CAP)
            assert spender.last["cost_usd"] == 0 and spender.last["unknown"] == sum(till.answered.values())

    def test_reasoning_that_only_the_total_counts_is_paid_for(self, tmp_path: Path) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 70}
        act = Act(body=json.dumps({"choices": [choice], "usage": usage}).encode())
        with ScriptedServer(lambda seen, number: act) as server:
            spender = Spender(tmp_path, server)
            (answer, *_) = spender.ask(PROMPTS[:3], usd=1)
        assert answer.completion_tokens == 2
        assert spender.spent().nano == 3 * Price.of(TokenPrice(**PRICE)).cost(10, 60)

    def test_two_runs_of_one_budget_do_not_spend_it_at_once(self, tmp_path: Path) -> None:
        """`--set` makes another run of the same budget."""
        with ScriptedServer(Till()) as server, hold_lock(tmp_path / "data" / "responses" / "budget-small.lock"):
            with pytest.raises(RunLocked):
                Spender(tmp_path, server).ask(usd=1)
            assert server.seen == []
            assert len(Spender(tmp_path, server).ask(PROMPTS[:2])) == 2, "without caps nobody waits"

    def test_what_is_turned_away_at_the_door_costs_nothing(self, tmp_path: Path) -> None:
        till = Till(lambda number: failure(429) if number % 2 else None)
        with ScriptedServer(till) as server:
            spender = Spender(tmp_path, server)
            spender.ask(PROMPTS[:60], usd=(price_of_set(PROMPTS[:60]) + CONCURRENCY * WORST_NANO) / 1e9)
            assert spender.spent().nano == till.nano == price_of_set(PROMPTS[:60])
        assert spender.last["unknown"] == 0 and spender.last["requests"] > 60

    def test_an_attempt_to_connect_costs_nothing(self, tmp_path: Path) -> None:
        with ScriptedServer(Till()) as server:
            url = server.url
        spender = Spender(tmp_path, type("Gone", (), {"url": url}))
        with pytest.raises(Incomplete):
            spender.ask(PROMPTS[:3], QUICK.model_copy(update={"budget_s": 0.1}), usd=1)  # nobody listens there
        assert spender.spent().nano == 0 and spender.spent().requests > 3

    def test_a_killed_run_goes_on_within_the_same_cap(self, tmp_path: Path) -> None:
        """What was in flight at a kill may have been billed or not, so it counts at its worst case."""
        till, cap = Till(some_500s), price_of_set(PROMPTS) * 8 // 10 / 1e9
        with ScriptedServer(till) as server:
            for _ in range(3):
                before = sum(till.answered.values())
                arguments = [sys.executable, "-c", DYING, str(tmp_path), server.url, str(cap)]
                process = subprocess.Popen(arguments, env=cli_env(), stderr=subprocess.DEVNULL)
                wait_for(lambda start=before: sum(till.answered.values()) > start + 9, "some more answers")
                process.kill()
                process.wait()
            spender = Spender(tmp_path, server)
            spender.stopped(usd=cap)
            assert till.nano <= nano(cap)
            assert till.nano <= spender.spent().nano <= nano(cap)
            assert len(spender.ask(usd=cap * 20)) == len(PROMPTS)

    def test_a_cap_of_one_teacher_holds_beside_the_run_s(self, tmp_path: Path) -> None:
        till = Till()
        with ScriptedServer(till) as server:
            error = Spender(tmp_path, server).stopped(usd=100, teachers={"api": {"usd": self.CAP}})
        assert error.where.startswith("budget.teachers.api.usd: ")
        assert till.nano <= nano(self.CAP)

    def test_without_a_price_nothing_is_asked(self, tmp_path: Path) -> None:
        with ScriptedServer(Till()) as server:
            with pytest.raises(UsageError, match=r"budget\.usd is set, but the price") as caught:
                Spender(tmp_path, server, price=None).ask(usd=1)
            assert server.seen == []
        assert caught.value.where == "teachers.api.price"


DYING = """
import sys
from pathlib import Path
from tests.faults.test_budget import Spender
Spender(Path(sys.argv[1]), type("Server", (), {"url": sys.argv[2]}), concurrency=4).ask(usd=float(sys.argv[3]))
"""


@pytest.mark.parametrize("price", [PRICE, None], ids=["priced", "unpriced"])
class TestOtherCaps:
    def test_no_more_requests_leave_than_are_allowed(self, tmp_path: Path, price: dict[str, float] | None) -> None:
        till = Till(some_500s)
        with ScriptedServer(till) as server:
            spender = Spender(tmp_path, server, price)
            for _ in range(2):
                error = spender.stopped(requests=100)
                assert len(server.seen) == 100
            assert error.what.startswith("the budget is reached: 100 requests of 100 spent")
            assert error.where == "budget.requests: 100"
            spender.ask(requests=1000)
        assert set(till.answered.values()) == {1}

    def test_no_more_tokens_are_used_than_are_allowed(self, tmp_path: Path, price: dict[str, float] | None) -> None:
        till, cap = Till(some_500s), sum(sum(usage_of(prompt)) for prompt in PROMPTS) * 37 // 100
        with ScriptedServer(till) as server:
            spender = Spender(tmp_path, server, price)
            error = spender.stopped(tokens=cap)
            assert till.tokens <= cap
            assert spender.spent().tokens <= cap
            assert error.where == f"budget.tokens: {cap:,}"
            spender.ask(tokens=cap * 100)
        assert set(till.answered.values()) == {1}


class TestAccounts:
    """What a run has spent, as its attempts on record say."""

    def test_every_attempt_is_on_record_with_what_it_came_to(self, tmp_path: Path) -> None:
        with ScriptedServer(Till(lambda number: failure(500) if number == 0 else None)) as server:
            spender = Spender(tmp_path, server)
            spender.ask(PROMPTS[:1])
        (file,) = (tmp_path / "data" / "responses" / "attempts").iterdir()
        failed, answered = sorted(pq.read_table(file).to_pylist(), key=lambda row: row["id"])
        used = usage_of(PROMPTS[0])
        common = {"run": "small", "teacher": "api", "reserved": failed["reserved"]}
        assert common.items() <= failed.items() and common.items() <= answered.items()
        assert failed["status"] == 500 and (failed["input_tokens"], failed["output_tokens"]) == (None, None)
        assert failed["cost"] is None, "unknown is not nothing"
        assert answered["status"] == 200 and (answered["input_tokens"], answered["output_tokens"]) == used
        assert answered["cost"] == price_of_set(PROMPTS[:1]) < answered["reserved"]
        assert answered["request_id"] == "req-1"

    def test_what_two_files_hold_counts_once(self, tmp_path: Path) -> None:
        with ResponseStore(tmp_path) as store:
            store.put(intents=[attempt(1), attempt(2)], outcomes=[Ended(1, "answer", 200, 10, 5, 70)])
            store.close()
            (segment,) = (tmp_path / "segments").glob("*.sqlite")
            content = segment.read_bytes()
            store.fold()
            folded = spent_by(tmp_path, "small", {})
            segment.write_bytes(content)  # a fold that died before it removed it
            assert spent_by(tmp_path, "small", {}) == folded
            store.put(intents=[attempt(1)])
            store.fold()  # folds the old one again, beside another
        total = spent_by(tmp_path, "small", {})["api"]
        assert folded == {"api": Amount(70 + 1000, 15 + 100, 2)}
        assert total == Amount(70 + 2000, 15 + 200, 3)

    def test_other_runs_and_files_of_before_do_not_count(self, tmp_path: Path) -> None:
        with ResponseStore(tmp_path) as store:
            store.put(intents=[attempt(1, run="other"), attempt(2, run=None)])
            store.fold()
            assert spent_by(tmp_path, "small", {}) == {}
            assert spent_by(tmp_path, None, {}) == {}

    def test_what_was_written_before_attempts_were_priced_is_still_read(self, tmp_path: Path) -> None:
        (tmp_path / "segments").mkdir()
        path = tmp_path / "segments" / "1-old.sqlite"
        with closing(sqlite3.connect(path)) as db:
            start, _, _ = SCHEMA.partition("CREATE TABLE attempts")
            columns = "id INTEGER PRIMARY KEY, key BLOB, cap INTEGER, sent_ms INTEGER, outcome TEXT"
            db.executescript(f"{start} CREATE TABLE attempts ({columns});")
            db.execute("INSERT INTO attempts VALUES (7, ?, 64, 5, 'answer')", (bytes(32),))
            db.commit()
        old = Attempt(7, bytes(32), 64, 5, "answer")
        (sent,) = attempts_of(tmp_path, bytes(32))
        assert (sent.cap, sent.outcome, sent.run, sent.cost) == (64, "answer", None, None)
        assert spent_by(tmp_path, "small", {}) == {}
        assert [*read_attempts(path)] == [old]
        with ResponseStore(tmp_path) as store:
            store.fold()
        (file,) = (tmp_path / "attempts").iterdir()
        table = pq.read_table(file).select(["segment", "id", "key", "cap", "sent_ms", "outcome"])
        file.unlink()
        pq.write_table(table, tmp_path / "old.parquet")
        folded = tmp_path / "attempts" / f"{file_sha256(tmp_path / 'old.parquet')}.parquet"
        (tmp_path / "old.parquet").rename(folded)
        assert attempts_of(tmp_path, bytes(32)) == (sent,)
        assert spent_by(tmp_path, "small", {}) == {}

    def test_attempts_without_a_price_count_at_today_s(self, tmp_path: Path) -> None:
        with ResponseStore(tmp_path) as store:
            store.put(
                intents=[attempt(1, reserved=None), attempt(2, reserved=None)],
                outcomes=[Ended(1, "answer", 200, 10, 5)],
            )
            price = Price(1_000_000, 2_000_000)
            assert spent_by(tmp_path, "small", {"api": price})["api"].nano == (10 + 2 * 5) + (100 - 64 + 2 * 64)

    def test_each_teacher_has_its_own_price(self, tmp_path: Path) -> None:
        with ResponseStore(tmp_path) as store:
            intents = [attempt(1, reserved=None), attempt(2, reserved=None, teacher="other")]
            store.put(intents=intents, outcomes=[Ended(number, "answer", 200, 10, 5) for number in (1, 2)])
            prices = {"api": Price(1_000_000, 0), "other": Price(0, 3_000_000)}
            spent = spent_by(tmp_path, "small", prices, Budget(usd=1))
        assert {name: amount.nano for name, amount in spent.items()} == {"api": 10, "other": 15}

    @pytest.mark.parametrize("budget", [Budget(usd=1), Budget(teachers={"other": Caps(usd=1)})])
    def test_a_cap_in_money_does_not_hold_where_a_teacher_s_earlier_attempts_have_no_price(
        self, tmp_path: Path, budget: Budget
    ) -> None:
        with ResponseStore(tmp_path) as store:
            store.put(intents=[attempt(1), attempt(2, reserved=None, teacher="other")])
            with pytest.raises(UsageError) as caught:
                spent_by(tmp_path, "small", {"api": Price(1, 1)}, budget)
            assert caught.value.where == "teachers.other.price"
            uncapped = Budget(tokens=5, teachers={"api": Caps(usd=1)})
            assert spent_by(tmp_path, "small", {"api": Price(1, 1)}, uncapped)["other"] == Amount(0, 100, 1)

    def test_attempts_that_surely_cost_nothing_need_no_price(self, tmp_path: Path) -> None:
        with ResponseStore(tmp_path) as store:
            store.put(intents=[attempt(1, reserved=None)], outcomes=[Ended(1, "http_429", 429, 0, 0)])
            assert spent_by(tmp_path, "small", {}, Budget(usd=1))["api"].nano == 0

    def test_a_damaged_file_is_never_passed_over(self, tmp_path: Path) -> None:
        with ResponseStore(tmp_path) as store:
            store.put(intents=[attempt(1)])
            store.fold()
            (file,) = (tmp_path / "attempts").iterdir()
            file.write_bytes(file.read_bytes()[:-5] + b"?PAR1")
            with pytest.raises(CorruptArtefact):
                spent_by(tmp_path, "small", {})


def attempt(number: int, *, run: str | None = "small", reserved: int | None = 1000, teacher: str = "api") -> Attempt:
    return Attempt(number, bytes(32), 64, 5, None, run, teacher, reserved, 100)


class TestRuns:
    """The same through the command line."""

    def project(self, folder: Path, server: ScriptedServer, **changes: Any) -> None:
        write_api_project(folder, server, rows=40)
        config = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
        config["teachers"]["api"] |= changes.pop("teacher", {})
        (folder / "run.yaml").write_text(yaml.safe_dump({**config, **changes}), "utf-8")

    def test_a_reached_budget_ends_with_3_and_a_raised_one_completes(self, tmp_path: Path) -> None:
        till = Till()
        with ScriptedServer(till) as server:
            self.project(tmp_path, server, budget={"requests": 15})
            done = run_cli(*RUN, cwd=tmp_path)
            assert done.returncode == 3, done.stderr
            assert len(server.seen) == 15
            assert done.stderr.splitlines()[-3].startswith("error: the budget is reached: 15 requests of 15 spent")
            self.project(tmp_path, server, budget={"requests": 40})
            done = run_cli(*RUN, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        assert set(till.answered.values()) == {1} and len(till.answered) == 40

    def test_an_unknown_price_under_a_cap_in_money_ends_with_2_before_anything(self, tmp_path: Path) -> None:
        with ScriptedServer(Till()) as server:
            self.project(tmp_path, server, budget={"usd": 5})
            done = run_cli(*RUN, cwd=tmp_path)
            assert done.returncode == 2, done.stderr
            assert server.seen == []
            assert done.stderr.splitlines()[-3:] == [
                "error: budget.usd is set, but the price of the teacher's tokens is not known",
                "   at: teachers.api.price",
                "   do: give it, in USD per million tokens: `price: {input: 2.5, output: 10}`",
            ]
            assert not os.path.lexists(tmp_path / "data" / "runs" / "small" / "prompts"), "no stage ran"

    def test_what_any_of_several_teachers_answered_before_there_were_prices_counts(self, tmp_path: Path) -> None:
        """Each request costs $1, and at worst less than $50."""
        with ScriptedServer(ten_tokens) as one, ScriptedServer(ten_tokens) as two:
            common = {"kind": "openai", "license": "MIT", "model": "m"}
            teachers = {
                "a": {**common, "provider": "a", "base_url": one.url, "price": {"input": 1e5, "output": 1e5}},
                "b": {**common, "provider": "b", "base_url": two.url, "price": {"input": 1e5, "output": 1e5}},
            }
            unpriced = {name: {**each, "price": None} for name, each in teachers.items()}
            route = {"kind": "all", "teachers": ["a", "b"]}
            generate = {"teacher": "a", "sampling": {"max_tokens": 1}, "route": route}
            write_project(tmp_path, rows=40, teachers=unpriced, generate=generate)
            for step in ("prompts", "generate"):
                done = run_cli(step, "run.yaml", cwd=tmp_path)
                assert done.returncode == 0, done.stderr
            asked = len(one.seen) + len(two.seen)
            generate |= {"draw": 1}
            write_project(tmp_path, rows=40, teachers=teachers, generate=generate, budget={"usd": asked + 10})
            done = run_cli("generate", "run.yaml", cwd=tmp_path)
            assert done.returncode == 3, done.stderr
            assert f"the budget is reached: ${asked}.00 of ${asked + 10}.00 spent" in done.stderr
            assert len(one.seen) + len(two.seen) == asked

            teachers["b"]["price"] = None  # and nobody is asked of whom the cap cannot be kept
            write_project(
                tmp_path, rows=40, teachers=teachers, generate={**generate, "route": None}, budget={"usd": 500}
            )
            done = run_cli("generate", "run.yaml", cwd=tmp_path)
            assert done.returncode == 2, done.stderr
            assert "teachers.b.price" in done.stderr
            assert len(one.seen) + len(two.seen) == asked

    def test_caps_of_a_teacher_that_is_not_there_are_a_mistake(self, tmp_path: Path) -> None:
        with ScriptedServer(Till()) as server:
            self.project(tmp_path, server, budget={"teachers": {"apj": {"usd": 5}}})
            done = run_cli(*RUN, cwd=tmp_path)
        assert done.returncode == 2
        assert "budget.teachers 'apj' is not one of teachers" in done.stderr
