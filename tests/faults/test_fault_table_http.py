"""F4 to F9 of the table of faults: what a server refuses, and connections that break; each with its exact outcome.

| fault | what it is | shown here | and in depth in |
|---|---|---|---|
| F4 | 429 that says how long | TestF04RateLimited | test_rate_limits, test_limits_properties, test_verdict |
| F5 | storms of 429, 503, 529 | TestF05Storm | test_limits, test_breaker (recovery, in virtual time), test_storm |
| F6 | 500 twice, then an answer | TestF06PassingError | test_client_faults |
| F7 | one prompt is refused, or all | TestF07BadRequest | test_client_faults |
| F8 | the key is refused | TestF08WrongKey | test_client_faults, test_canary_key |
| F9 | the connection breaks in an answer | TestF09BrokenAnswer | test_client_faults, test_storm |
| F10–F14, F16, F28 | what a success says | test_fault_table_answers | |
| F22, F35–F38 | runs | test_fault_table_runs | |

Each test goes through the command line; "unknown" is an attempt without a cost, which counts at its worst case.
"""

import random
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, echo, failure
from tests.faults.table_run import QUICK, SHORT, Project

CANARY = "sk-CANARY-51c2"
SERVER_TIME = 1_700_000_000.0


class Clocked:
    """A script that notes when each request arrived."""

    def __init__(self, fails: dict[int, Act]) -> None:
        self.fails = fails
        self.arrived: list[float] = []

    def __call__(self, seen: Seen, number: int) -> Act:
        self.arrived.append(time.monotonic())
        return self.fails.get(number) or echo(seen, number)

    def gap(self, number: int) -> float:
        """Seconds between a request and the next."""
        return self.arrived[number + 1] - self.arrived[number]


@pytest.fixture
def state() -> Iterator[None]:
    """Restores the random numbers that waits are drawn from."""
    before = random.getstate()
    yield
    random.setstate(before)


class TestF04RateLimited:
    """The endpoint pauses as long as it says, for all rows, at no expense of a row's time; the number of requests in
    flight is lowered; a wait beyond all patience ends with exit 3."""

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"Retry-After": "1"}, 1.0),
            ({"Retry-After": "60", "retry-after-ms": "300"}, 0.3),
            ({"Date": formatdate(SERVER_TIME), "Retry-After": formatdate(SERVER_TIME + 1)}, 1.0),
        ],
        ids=["seconds", "milliseconds", "date"],
    )
    def test_no_row_is_sent_before_the_time_that_the_server_names(
        self, tmp_path: Path, headers: dict[str, str], seconds: float
    ) -> None:
        script = Clocked({0: failure(429, headers=headers)})
        with ScriptedServer(script) as server:
            project = Project.write(tmp_path, server, ["a", "b", "c"], teacher={"concurrency": 1})
            assert project.run().code == 0
        assert project.texts() == {"a": "A", "b": "B", "c": "C"}
        assert script.gap(0) >= seconds
        assert project.outcomes() == ["retry:rate_limited", "answer", "answer", "answer"]
        assert project.billed()[0] == 0, "it was turned away at the door"

    def test_waits_that_the_server_asked_for_are_not_taken_off_a_row_s_time(self, tmp_path: Path) -> None:
        refused: list[float] = []

        def script(seen: Seen, number: int) -> Act:
            if seen.prompt == "a" and len(refused) < 3:
                refused.append(time.monotonic())
                return failure(429, headers={"retry-after-ms": "400"})
            act = echo(seen, number)
            act.delay_s = 0.05
            return act

        others = [f"p{number}" for number in range(60)]
        with ScriptedServer(script) as server:
            project = Project.write(tmp_path, server, ["a", *others], retry=SHORT, teacher={"concurrency": 2})
            assert project.run().code == 0
        assert refused[-1] - refused[0] > SHORT["budget_s"]
        assert project.texts()["a"] == "A"

    def test_a_burst_halves_the_requests_in_flight_once(self, tmp_path: Path) -> None:
        at_a_time: list[int] = []

        def script(seen: Seen, number: int) -> Act:
            at_a_time.append(server.in_flight)
            act = failure(429, headers={"retry-after-ms": "50"}) if number < 8 else echo(seen, number)
            act.delay_s = 0.3
            return act

        with ScriptedServer(script) as server:
            project = Project.write(tmp_path, server, [f"p{number}" for number in range(8)])
            assert project.run().code == 0
        assert max(at_a_time[:8]) == 8
        assert max(at_a_time[8:]) in (4, 5), "and one more for a window of answers"

    def test_an_absurd_wait_ends_with_3_and_what_was_answered_is_kept(self, tmp_path: Path) -> None:
        prompts = [f"p{number}" for number in range(12)]
        script = Clocked({5: failure(429, headers={"Retry-After": "9999"})})
        with ScriptedServer(script) as server:
            project = Project.write(tmp_path, server, prompts, teacher={"concurrency": 1})
            ended = project.run()
            assert ended.code == 3
            assert ended.last[0].startswith("error: the API asks us to wait 9999 s (rate_limited)")
            assert ended.last[2] == "   do: run again later; answers received so far are kept"
            assert len(server.seen) == 6
            script.fails.clear()
            assert project.run().code == 0
        assert len(server.seen) == 6 + len(prompts) - 5


class TestF05Storm:
    """Waits grow and are drawn at random; the breaker leaves a failing endpoint alone; not a row is lost."""

    @pytest.mark.parametrize("status", [429, 503, 529])
    def test_a_storm_costs_attempts_and_no_row(self, tmp_path: Path, status: int) -> None:
        storm, prompts = 20, [f"p{number}" for number in range(24)]
        script = Clocked(dict.fromkeys(range(storm), failure(status)))
        with ScriptedServer(script) as server:
            project = Project.write(tmp_path, server, prompts, teacher={"concurrency": 4})
            assert project.run().code == 0
        assert project.texts() == {prompt: prompt.upper() for prompt in prompts}
        reason = "retry:rate_limited" if status == 429 else f"retry:status:{status}"
        assert sorted(project.outcomes()) == ["answer"] * len(prompts) + [reason] * storm
        assert set(project.billed()[:storm]) == {0 if status == 429 else None}, "a 5xx may have been billed"
        if status != 429:
            assert max(script.gap(number) for number in range(storm)) >= 0.5, "the breaker was open"

    @pytest.mark.usefixtures("state")
    def test_waits_double_and_are_drawn_at_random(self, tmp_path: Path) -> None:
        """Full jitter: the first is drawn below two seconds, the second below four."""
        random.seed(1434)
        first, second = (random.Random(1434).random() * 2, 0.12547 * 4)
        script = Clocked(dict.fromkeys(range(2), failure(503)))
        with ScriptedServer(script) as server:
            slow = {**QUICK, "first_wait_s": 2, "max_wait_s": 60}
            project = Project.write(tmp_path, server, ["a"], retry=slow)
            assert project.run().code == 0
        assert first < 0.01 and script.gap(0) < 2
        assert script.gap(1) >= second


class TestF06PassingError:
    """Three attempts on record, one row, and what the answer cost is known."""

    def test_two_errors_and_an_answer_are_three_attempts_and_a_row(self, tmp_path: Path) -> None:
        with ScriptedServer(Clocked(dict.fromkeys(range(2), failure(500)))) as server:
            project = Project.write(tmp_path, server, ["a"])
            assert project.run().code == 0
        assert project.texts() == {"a": "A"}
        assert project.outcomes() == ["retry:status:500", "retry:status:500", "answer"]
        assert project.billed() == [None, None, 7 * 2_500 + 3 * 10_000]
        assert [row["status"] for row in project.attempts()] == [500, 500, 200]


class TestF07BadRequest:
    """Not sent again; the row is refused, the others go on; where all are refused it is the config: exit 2. A 404 is
    never one row's fault: the API does not know the URL or the model."""

    @pytest.mark.parametrize("status", [400, 422])
    def test_the_row_is_refused_and_what_the_server_said_is_told_without_the_key(
        self, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SOME_KEY", CANARY)
        refusal = failure(status, f"\x1b[2Jno, {CANARY}, " + "x" * 999)
        with ScriptedServer(lambda seen, number: refusal if seen.prompt == "bad" else echo(seen, number)) as server:
            project = Project.write(tmp_path, server, ["a", "bad", "b"], teacher={"api_key": "${env:SOME_KEY}"})
            ended, again = project.run(), project.run("--force")
            assert (ended.code, again.code) == (0, 0)
        assert project.texts() == {"a": "A", "bad": "bad_request", "b": "B"}
        assert project.manifest()["rejected"] == {"bad_request": 1}
        assert sorted(server.prompts) == ["a", "b", "bad"]
        (said,) = [line for line in ended.said.splitlines() if "bad refused: bad_request" in line]
        assert "no, ***, xxx" in said and CANARY not in said
        assert "\x1b" not in said and len(said) < 300

    def test_refusals_without_an_answer_in_between_end_with_2_and_leave_no_refusal_behind(self, tmp_path: Path) -> None:
        prompts = [f"p{number}" for number in range(60)]
        fails = dict.fromkeys(range(999), failure(400, "temperature is not supported"))
        with ScriptedServer(Clocked(fails)) as server:
            project = Project.write(tmp_path, server, prompts)
            ended = project.run()
            assert ended.code == 2
            assert 20 <= len(server.seen) <= 44, "few left while the twentieth refusal was on its way"
            assert ended.last[0].endswith("requests: temperature is not supported")
            fails.clear()
            assert project.run().code == 0
        assert project.manifest()["rejected"] == {}

    def test_an_unknown_model_ends_with_2_at_once(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda seen, number: failure(404, "no such model")) as server:
            project = Project.write(tmp_path, server, [f"p{number}" for number in range(60)])
            ended = project.run()
        assert ended.code == 2
        assert ended.last[0].endswith("(status:404): no such model")
        assert len(server.seen) <= 8


class TestF08WrongKey:
    """Exit 2 at once; the message has the name of the variable and never its value."""

    @pytest.mark.parametrize("status", [401, 403])
    def test_it_stops_at_once_and_names_the_variable(
        self, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SOME_KEY", CANARY)
        prompts = [f"p{number}" for number in range(500)]
        with ScriptedServer(lambda seen, number: failure(status, f"wrong key {CANARY[:9]}…")) as server:
            project = Project.write(tmp_path, server, prompts, teacher={"api_key": "${env:SOME_KEY}"})
            ended = project.run()
        assert ended.code == 2
        assert ended.last[0] == f"error: the API refuses the key (status:{status})"
        assert ended.last[2] == "   do: check the value of the environment variable SOME_KEY"
        assert CANARY[:9] not in ended.said, "what the server said is left out: it may quote a part"
        assert len(server.seen) <= 8
        assert not project.has("generate")


class TestF09BrokenAnswer:
    """What an attempt came to is not known; the row is asked again; nothing partial is ever a row."""

    WHOLE = completion("a long enough answer").body
    BROKEN = (
        Act(reset=True),
        Act(body=WHOLE, cut=len(WHOLE) - 20),
        Act(body=b"%x\r\n" % len(WHOLE) + WHOLE, cut=len(WHOLE) - 20, headers={"Transfer-Encoding": "chunked"}),
        Act(body=WHOLE, headers={"Content-Length": str(len(WHOLE) - 20)}),
        Act(body=WHOLE, cut=0),
    )

    @pytest.mark.parametrize("broken", BROKEN, ids=["reset", "cut", "cut chunk", "too short a length", "headers only"])
    def test_the_row_is_asked_again_and_nothing_partial_is_kept(self, tmp_path: Path, broken: Act) -> None:
        script = Clocked(dict.fromkeys(range(2), broken))
        with ScriptedServer(script) as server:
            project = Project.write(tmp_path, server, ["a", "b", "c"])
            assert project.run().code == 0
        assert project.texts() == {"a": "A", "b": "B", "c": "C"}
        failed = [row for row in project.attempts() if row["outcome"] != "answer"]
        assert {row["outcome"] for row in failed} <= {"retry:cut_body", "retry:connection", "retry:bad_payload"}
        assert [row["cost"] for row in failed] == [None] * len(failed) and len(failed) >= 2
