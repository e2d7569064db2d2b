"""F22 and F35 to F38 of the table of faults: signals, budgets, prices, networks, and stored answers that were changed.

| fault | what it is | shown here | and in depth in |
|---|---|---|---|
| F22 | SIGTERM, Ctrl-C, once and twice | TestF22Signals | test_stop_signals, test_kill_loop |
| F35 | a cap of the budget is reached | TestF35Budget | test_budget, test_budget_properties |
| F36 | no price, or an answer without usage | TestF36Unknown | test_budget, test_prices |
| F37 | DNS, certificates, 407 | TestF37Network | test_verdict, test_rate_limits (refused connections) |
| F38 | a stored answer was changed | TestF38ChangedAnswers | test_damaged_answers, test_bit_flips |

Not here: full disks (test_full_disk, test_nth_operation), clocks (test_clock), locks (test_runner_faults).
"""

import json
import signal
import sqlite3
import ssl
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.cli.call import TOGETHER_S
from pipeline.core.config_budget import TokenPrice, nano
from pipeline.teacher.prices import Price
from tests.faults.processes import running
from tests.faults.scripted_server import Act, ScriptedServer, Seen, echo, failure
from tests.faults.table_run import PRICE, SHORT, Project
from tests.support import cli_env, run_cli

RUN = ("run", "run.yaml", "--until", "generate")
TLS = Path(__file__).with_name("tls")
"""Made for these tests and trusted by nobody: a key of 127.0.0.1, a certificate until 2120 and one until 2021."""
RESUME = "resume with: python -m pipeline run run.yaml --data data --until generate"


class TestF22Signals:
    """Once: nothing more is sent, what is in flight is kept, exit 143 or 130 with the command that resumes. Twice: at
    once, and as resumable."""

    def test_once_keeps_what_is_in_flight_and_twice_ends_at_once(self, tmp_path: Path) -> None:
        delay_s, at_a_time = [1.0], 4
        prompts = [f"p{number}" for number in range(24)]

        def script(seen: Seen, number: int) -> Act:
            act = echo(seen, number)
            act.delay_s = delay_s[0]
            return act

        with ScriptedServer(script) as server:
            project = Project.write(tmp_path, server, prompts, teacher={"concurrency": at_a_time})
            with running(*RUN, cwd=tmp_path) as run:
                run.await_(lambda: server.in_flight == at_a_time, "requests in flight")
                run.process.send_signal(signal.SIGTERM)
                assert run.end() == 143
                assert run.said[-1] == f"   do: {RESUME}"
            assert len(server.seen) == at_a_time
            delay_s[0] = 3600.0
            with running(*RUN, cwd=tmp_path) as run:
                run.await_(lambda: len(server.seen) == 2 * at_a_time, "requests in flight")
                run.process.send_signal(signal.SIGINT)
                run.await_(lambda: any("waiting up to" in line for line in run.said), "the first signal is seen")
                time.sleep(2 * TOGETHER_S)
                run.process.send_signal(signal.SIGINT)
                assert run.end() == 130
                assert run.said[-1] == f"   do: {RESUME}"
            delay_s[0] = 0.0
            assert project.run().code == 0
        assert project.texts() == {prompt: prompt.upper() for prompt in prompts}
        assert project.outcomes().count("answer") == len(prompts)
        assert project.billed().count(None) == at_a_time, "what was left hanging may have been billed"
        assert len(server.seen) == len(prompts) + at_a_time


def used(prompt: str) -> tuple[int, int]:
    """Tokens of a prompt and of its answer."""
    return len(prompt) + 8, len(prompt) % 30 + 1


class Till:
    """A script that keeps a bill, in nano-dollars, of each answer that it sends."""

    def __init__(self) -> None:
        self.bills: list[int] = []

    def __call__(self, seen: Seen, number: int) -> Act:
        if number % 9 == 4:
            return failure(429)
        self.bills.append(cost(seen.prompt))
        choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
        usage = dict(zip(("prompt_tokens", "completion_tokens"), used(seen.prompt), strict=True))
        return Act(body=json.dumps({"choices": [choice], "usage": usage}).encode(), delay_s=0.005)


def cost(prompt: str) -> int:
    return Price.of(TokenPrice(**PRICE)).cost(*used(prompt))


class TestF35Budget:
    """A cap is never exceeded: exit 3 with the field to raise; raising it goes on, and nothing is asked twice."""

    def test_a_cap_of_37_percent_in_money_holds_and_a_raised_one_completes(self, tmp_path: Path) -> None:
        prompts = [f"prompt {number} " + "word " * (number % 30) for number in range(160)]
        cap = sum(map(cost, prompts)) * 37 // 100 / 1e9
        till = Till()
        with ScriptedServer(till) as server:
            project = Project.write(tmp_path, server, prompts, budget={"usd": cap})
            for _ in range(2):
                ended = project.run()
                assert ended.code == 3
                assert 0 < sum(till.bills) <= nano(cap), "the bill only grows, so it never was above the cap"
            assert ended.last[0].startswith("error: the budget is reached: $0.0")
            assert ended.last[1].startswith("   at: budget.usd: $0.0")
            assert ended.last[2] == f"   do: raise budget.usd, then {RESUME}"
            project.change(budget={"usd": cap * 20})
            assert project.run().code == 0
        assert len(project.records()) == len(till.bills) == len(prompts)
        assert sum(till.bills) == sum(map(cost, prompts)) == sum(project.billed())


class TestF36Unknown:
    """What is not known is null and never 0: without a price a cap in money is refused, and an answer without usage
    counts at its worst case. Tokens are not estimated."""

    def test_without_a_price_a_cap_in_money_ends_with_2_before_anything_is_sent(self, tmp_path: Path) -> None:
        with ScriptedServer(echo) as server:
            project = Project.write(tmp_path, server, ["a"], teacher={"price": None}, budget={"usd": 5})
            ended = project.run()
            assert (ended.code, server.seen) == (2, [])
            assert ended.last[1] == "   at: teachers.api.price"

    def test_without_a_price_nothing_has_a_cost(self, tmp_path: Path) -> None:
        with ScriptedServer(echo) as server:
            project = Project.write(tmp_path, server, ["a", "b"], teacher={"price": None})
            ended = project.run()
        assert ended.code == 0 and "$" not in ended.said
        assert project.billed() == [None, None]
        assert [row["input_tokens"] for row in project.attempts()] == [7, 7]

    def test_an_answer_without_usage_has_no_tokens_and_counts_at_its_worst_case(self, tmp_path: Path) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
        act = Act(body=json.dumps({"choices": [choice]}).encode())
        with ScriptedServer(lambda seen, number: act) as server:
            project = Project.write(tmp_path, server, ["a", "b", "c"], teacher={"concurrency": 1})
            assert project.run().code == 0
            assert {(record.prompt_tokens, record.completion_tokens) for record in project.records()} == {(None, None)}
            assert project.billed() == [None] * 3
            worst = sum(row["reserved"] for row in project.attempts())
            (tmp_path / "rows.jsonl").write_text('{"id": "d", "prompt": "d"}\n', "utf-8")
            project.change(budget={"usd": worst * 1.2 / 1e9})
            ended = project.run()
            assert (ended.code, len(server.seen)) == (3, 3), "their worst cases leave no room for a fourth"


class TestF37Network:
    """Tried again for a bounded time, then exit 3; certificates are always verified, so that no request leaves."""

    def test_a_host_without_an_address_ends_with_3(self, tmp_path: Path) -> None:
        project = Project.write(tmp_path, "https://no-such-host.invalid/v1", ["a", "b"], retry=SHORT)
        ended = project.run()
        assert ended.code == 3
        assert ended.last[0].startswith("error: ") and "(connection ×" in ended.last[0]
        assert ended.last[1] == "   at: no-such-host.invalid"
        assert ended.last[2].endswith(RESUME)
        assert len(project.attempts()) >= 2 and set(project.billed()) == {0}

    def test_a_proxy_that_wants_to_know_who_we_are_ends_with_3(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda seen, number: failure(407, "Proxy Authentication Required")) as server:
            project = Project.write(tmp_path, server, ["a", "b"], retry=SHORT)
            ended = project.run()
            assert ended.code == 3
            assert "(status:407 ×" in ended.last[0]
            assert 2 < len(server.seen) < 100
        assert set(project.billed()) == {0}

    @pytest.mark.parametrize(
        ("certificate", "trusted", "code", "says"),
        [
            ("valid", True, 0, "1 in, 1 out"),
            ("expired", True, 3, "certificate verify failed: certificate has expired"),
            ("valid", False, 3, "certificate verify failed: self-signed certificate"),
        ],
        ids=["valid", "expired", "of somebody else"],
    )
    def test_only_a_valid_certificate_gets_a_request(
        self, tmp_path: Path, certificate: str, trusted: bool, code: int, says: str
    ) -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(TLS / f"{certificate}.pem", TLS / "key.pem")
        with ScriptedServer(echo, tls) as server:
            Project.write(tmp_path, server, ["a"], retry=SHORT)
            env = cli_env({"SSL_CERT_FILE": str(TLS / f"{certificate}.pem")} if trusted else {})
            done = run_cli(*RUN, cwd=tmp_path, env=env)
            assert done.returncode == code, done.stderr
            assert len(server.seen) == (1 if code == 0 else 0)
        assert says in done.stderr


class TestF38ChangedAnswers:
    """A stored answer that is not what was stored is never used. In a process's own file it is dropped with a warning
    and asked for again; in a folded file a person decides: exit 5."""

    PROMPTS = tuple(f"p{number}" for number in range(12))

    def test_one_in_a_segment_is_dropped_and_asked_for_again(self, tmp_path: Path) -> None:
        stop = {11: failure(429, headers={"Retry-After": "9999"})}
        with ScriptedServer(lambda seen, number: stop.get(number) or echo(seen, number)) as server:
            project = Project.write(tmp_path, server, self.PROMPTS, teacher={"concurrency": 1})
            assert project.run().code == 3
            (segment,) = project.segments
            with closing(sqlite3.connect(segment)) as db, db:
                ((body,),) = db.execute("SELECT body FROM answers WHERE rowid = 3")
                ((other,),) = db.execute("SELECT body FROM answers WHERE rowid = 4")
                assert body != other
                db.execute("UPDATE answers SET body = ? WHERE rowid = 3", (other,))
            ended = project.run()
        assert ended.code == 0
        assert project.texts() == {prompt: prompt.upper() for prompt in self.PROMPTS}
        assert Counter(Counter(server.prompts).values()) == {1: 10, 2: 2}, "the changed one, and the one that waited"
        assert "10 answers in it are intact and kept, the others are asked for again" in ended.said

    def test_a_changed_folded_file_ends_with_5_before_anything_is_sent(self, tmp_path: Path) -> None:
        with ScriptedServer(echo) as server:
            project = Project.write(tmp_path, server, self.PROMPTS)
            assert project.run().code == 0
            (file,) = (tmp_path / "data/responses/answers").iterdir()
            whole = file.read_bytes()
            changed = whole.replace(b"parquet-cpp", b"parquet-cpq")  # where Parquet itself keeps no check sum
            assert changed != whole
            file.write_bytes(changed)
            ended = project.run("--force")
            assert (ended.code, len(server.seen)) == (5, len(self.PROMPTS))
            assert ended.last[1] == f"   at: {file.relative_to(tmp_path)}"
            file.unlink()
            assert project.run("--force").code == 0
        assert len(server.seen) == 2 * len(self.PROMPTS)
