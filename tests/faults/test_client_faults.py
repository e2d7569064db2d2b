"""What a teacher's faults lead to: asked again, refused, stopped; never lost, never paid for twice."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_budget import Spending
from pipeline.core.config_teacher import Retry, Sampling
from pipeline.core.errors import Incomplete, Interrupted, UsageError
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher import transport
from pipeline.teacher.ask import Answer, ask
from pipeline.teacher.fetch import Counts, Work
from pipeline.teacher.fetcher import Fetcher
from pipeline.teacher.lookup import Looked
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.responses import ResponseStore
from tests.faults.scripted_server import Act, ScriptedServer, completion, echo, failure
from tests.support import make_context

QUICK = Retry(budget_s=20, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5)
CANARY = "sk-CANARY-8d1f"


class Asking:
    """A teacher at a scripted server and the folder its answers are kept in."""

    def __init__(self, folder: Path, server: ScriptedServer, **teacher: object) -> None:
        self.ctx = make_context(folder)
        self.folder = folder
        self.teacher = OpenAITeacher.model_validate(
            {"kind": "openai", "base_url": server.url, "provider": "scripted", "model": "m", **teacher}
        )

    def asked(self, **sampling: object) -> Asked:
        cache = DigestCache(self.folder / "digests.json")
        return Asked.of(self.teacher, Sampling.model_validate(sampling), 0, cache)

    def requests(self, prompts: list[str], **sampling: object) -> list[Request]:
        asked = self.asked(**sampling)
        return [asked.request("set", f"p{i}", 0, [Message("user", prompt)]) for i, prompt in enumerate(prompts)]

    def ask(self, prompts: list[str], retry: Retry = QUICK, **sampling: object) -> list[Answer]:
        requests = self.requests(prompts, **sampling)
        return list(ask(self.teacher, self.asked(**sampling), retry, requests, self.ctx))

    def texts(self, prompts: list[str], retry: Retry = QUICK) -> list[str | None]:
        return [answer.rejected or answer.text for answer in self.ask(prompts, retry)]

    def asked_count(self) -> int:
        events = [fields for name, fields in self.ctx.events.seen if name == "teacher_asked"]
        return sum(fields["asked"] for fields in events)


def test_answers_come_back_in_the_order_of_the_requests_whatever_the_order_of_arrival(tmp_path):
    prompts = [f"prompt {i}" for i in range(60)]
    with ScriptedServer(lambda seen, n: Act(**{**vars(echo(seen, n)), "delay_s": (n * 7 % 10) / 200})) as server:
        answers = Asking(tmp_path, server).ask(prompts)
    assert [answer.text for answer in answers] == [prompt.upper() for prompt in prompts]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert answers[0].prompt_tokens == 7 and answers[0].completion_tokens == 3


def test_an_answer_is_never_asked_for_twice(tmp_path):
    prompts = [f"prompt {i}" for i in range(30)]
    with ScriptedServer(echo) as server:
        asking = Asking(tmp_path, server)
        first = asking.ask(prompts)
        second = asking.ask([*prompts, "one more"])
    assert second[:30] == first
    assert len(server.seen) == 31


def test_prompts_with_equal_messages_are_asked_once_and_all_get_the_answer(tmp_path):
    with ScriptedServer(echo) as server:
        assert Asking(tmp_path, server).texts(["same", "other", "same", "same"]) == ["SAME", "OTHER", "SAME", "SAME"]
    assert Counter(server.prompts) == {"same": 1, "other": 1}


def test_prompts_that_come_again_while_they_are_in_flight_or_just_answered_are_not_asked_again(tmp_path):
    with ScriptedServer(echo) as server:
        answers = Asking(tmp_path, server).ask([f"p{i % 1100}" for i in range(9000)])
    assert [answer.text for answer in answers] == [f"P{i % 1100}" for i in range(9000)]
    assert len(server.seen) == 1100


def test_a_look_up_that_began_before_the_answer_was_stored_does_not_ask_again(tmp_path):
    with ScriptedServer(echo) as server, ResponseStore(tmp_path / "data" / "responses") as store:
        asking = Asking(tmp_path, server)
        (request,) = asking.requests(["a"])

        def outdated_look_up() -> Iterator[Looked]:
            while not store.get_many({bytes.fromhex(request.key): 512}):
                time.sleep(0.01)
            time.sleep(0.1)
            yield Looked([request], 0, 0)  # what it saw before the answer came

        with Fetcher(store, asking.teacher, QUICK, asking.ctx, Spending()) as fetcher:
            work = Work(Looked([request], 0, 0), outdated_look_up(), Counts(), asking.ctx.progress.advance)
            fetcher.ask_for(asking.asked(), work)
    assert server.prompts == ["a"]
    assert asking.ctx.progress.done == 2, "both rows count"


def test_passing_failures_are_tried_again_until_the_answer_comes(tmp_path):
    tries: Counter[str] = Counter()
    faults = {
        "500": failure(500),
        "503": failure(503),
        "529": failure(529),
        "408": failure(408),
        "409": failure(409),
        "429": failure(429),
        "reset": Act(reset=True),
        "cut": Act(body=completion().body, cut=20),
        "error in 200": Act(body=b'{"error": {"message": "overloaded", "code": 503}}'),
        "half json": Act(body=completion().body[:-9]),
        "html": Act(body=b"<html>maintenance</html>"),
        "empty body": Act(body=b""),
        "no choices": Act(body=b'{"choices": []}'),
        "null content": completion(None),
        "no finish reason": completion("x", finish=None),
    }

    def script(seen, n):
        tries[seen.prompt] += 1
        return faults[seen.prompt] if seen.prompt in faults and tries[seen.prompt] <= 2 else echo(seen, n)

    with ScriptedServer(script) as server:
        prompts = [*faults, "well"]
        assert Asking(tmp_path, server).texts(prompts) == [prompt.upper() for prompt in prompts]
    assert tries == {**dict.fromkeys(faults, 3), "well": 1}


def test_a_silent_server_times_out_and_the_row_is_asked_again(tmp_path):
    hang = Act(body=completion("late").body, delay_s=30)
    drip = Act(body=completion("late").body, drip_s=1.0)
    with ScriptedServer(lambda seen, n: (hang, drip)[n] if n < 2 else echo(seen, n)) as server:
        assert Asking(tmp_path, server).texts(["a"], Retry(**{**QUICK.model_dump(), "timeout_s": 0.4})) == ["A"]
    assert len(server.seen) == 3


def test_refused_rows_leave_with_a_reason_and_are_never_sent_again(tmp_path):
    refusals = {
        "bad": failure(400, "prompt too long"),
        "unprocessable": failure(422),
        "filtered": failure(400, "policy", code="content_filter"),
        "cut off": completion("par", finish="content_filter"),
        "refused": completion(None, refusal="I cannot"),
    }
    with ScriptedServer(lambda seen, n: refusals.get(seen.prompt) or echo(seen, n)) as server:
        asking = Asking(tmp_path, server)
        prompts = ["well", *refusals]
        expected = ["WELL", "bad_request", "bad_request", "content_filter", "content_filter", "refusal"]
        assert asking.texts(prompts) == expected
        assert asking.texts(prompts) == expected
    assert len(server.seen) == len(prompts)


def test_a_refusal_is_asked_again_with_another_cap_since_servers_refuse_caps_that_do_not_fit(tmp_path):
    def script(seen, n):
        return failure(400, "max_tokens too large") if seen.json["max_tokens"] > 512 else echo(seen, n)

    with ScriptedServer(script) as server:
        asking = Asking(tmp_path, server)
        asking.ask(["well"])
        assert [answer.rejected for answer in asking.ask(["well", "a"], max_tokens=1000)] == [None, "bad_request"]
        assert [answer.rejected for answer in asking.ask(["well", "a"], max_tokens=100)] == [None, None]


def test_a_row_for_which_the_model_says_nothing_is_rejected_after_three_tries(tmp_path):
    faults = {"none": Act(body=b'{"choices": []}'), "null": completion(None), "no end": completion("x", finish=None)}
    with ScriptedServer(lambda seen, n: faults.get(seen.prompt) or echo(seen, n)) as server:
        asking = Asking(tmp_path, server)
        for _ in range(2):
            assert asking.texts([*faults, "well"]) == ["empty", "empty", "bad_payload", "WELL"]
    assert Counter(server.prompts) == {"none": 3, "null": 3, "no end": 3, "well": 1}


def test_a_row_that_gets_nonsense_is_rejected_in_the_end_if_others_were_answered_meanwhile(tmp_path):
    def script(seen, n):
        return Act(body=b"{nonsense") if seen.prompt == "broken" else Act(**{**vars(echo(seen, n)), "delay_s": 0.1})

    short = Retry(budget_s=1, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5)
    with ScriptedServer(script) as server:
        asking = Asking(tmp_path, server)
        for _ in range(2):
            assert asking.texts(["broken", "well"], short) == ["bad_payload", "WELL"]
    assert server.prompts.count("well") == 1


def test_nonsense_for_everybody_is_an_outage_and_costs_no_row(tmp_path):
    short = Retry(budget_s=0.5, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5)
    with (
        ScriptedServer(lambda seen, n: Act(body=b"<html>maintenance</html>")) as server,
        pytest.raises(Incomplete, match="bad_payload"),
    ):
        Asking(tmp_path, server).ask(["a", "b", "c"], short)
    with ScriptedServer(echo) as later:
        assert Asking(tmp_path, later).texts(["a", "b", "c"]) == ["A", "B", "C"]


def test_a_server_that_answers_nonsense_to_everybody_costs_no_row(tmp_path):
    def script(seen, n):
        return Act(body=b"<html>down for maintenance</html>") if n < 40 else echo(seen, n)

    with ScriptedServer(script) as server:
        assert Asking(tmp_path, server).texts(["a", "b", "c"]) == ["A", "B", "C"]


def test_an_oversize_response_is_refused_without_being_read(tmp_path):
    huge = transport.MAX_BODY_BYTES + 1
    declared = Act(body=b"x" * 100, headers={"Content-Length": str(huge)}, cut=100)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    endless = Act(body=chunk * 80, headers={"Transfer-Encoding": "chunked"}, cut=len(chunk) * 80)
    acts = {"declared": declared, "endless": endless}
    with ScriptedServer(lambda seen, n: acts.get(seen.prompt) or echo(seen, n)) as server:
        asking = Asking(tmp_path, server)
        for _ in range(2):
            assert asking.texts(["declared", "endless", "well"]) == ["oversize", "oversize", "WELL"]
    assert len(server.seen) == 3


def test_a_compressed_bomb_is_refused(tmp_path):
    import gzip

    bomb = gzip.compress(b" " * (50 * 1024 * 1024) + completion().body)
    act = Act(body=bomb, headers={"Content-Encoding": "gzip"})
    with ScriptedServer(lambda seen, n: act if seen.prompt == "bomb" else echo(seen, n)) as server:
        assert Asking(tmp_path, server).texts(["bomb", "well"]) == ["oversize", "WELL"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_stops_at_once_and_names_the_variable_not_the_value(tmp_path, monkeypatch, status, caplog):
    monkeypatch.setenv("SOME_KEY", CANARY)
    with ScriptedServer(lambda seen, n: failure(status, f"wrong key {CANARY}")) as server:
        asking = Asking(tmp_path, server, api_key="${env:SOME_KEY}", concurrency=4)
        with pytest.raises(UsageError) as caught:
            asking.ask([f"p{i}" for i in range(500)])
    assert "SOME_KEY" in str(caught.value)
    assert CANARY not in str(caught.value) + caplog.text
    assert "wrong key" not in str(caught.value), "servers quote parts of keys"
    assert len(server.seen) <= 8
    assert server.seen[0].headers["authorization"] == f"Bearer {CANARY}"


def test_a_row_that_is_forbidden_while_others_are_answered_is_refused_once_and_for_all(tmp_path):
    def script(seen, n):
        return failure(403, "moderated") if seen.prompt == "p5" else echo(seen, n)

    prompts = [f"p{i}" for i in range(40)]
    with ScriptedServer(script) as server:
        asking = Asking(tmp_path, server, concurrency=1)
        for _ in range(2):
            assert asking.texts(prompts) == [f"P{i}" if i != 5 else "forbidden" for i in range(40)]
        assert len(server.seen) == 40
        assert asking.texts([*prompts, "p5", "last"])[-1] == "LAST"


def test_any_number_of_forbidden_rows_stops_nothing_while_others_are_answered(tmp_path):
    with ScriptedServer(lambda seen, n: failure(403) if int(seen.prompt) % 3 == 1 else echo(seen, n)) as server:
        answers = Asking(tmp_path, server, concurrency=1).ask([str(i) for i in range(120)])
    assert Counter(answer.rejected for answer in answers) == {None: 80, "forbidden": 40}


def test_a_forbidden_row_that_is_the_only_one_left_is_refused_too(tmp_path):
    with ScriptedServer(lambda seen, n: failure(403, "no") if seen.prompt == "bad" else echo(seen, n)) as server:
        asking = Asking(tmp_path, server)
        assert asking.texts(["a"]) == ["A"]
        for _ in range(2):
            assert asking.texts(["a", "bad"]) == ["A", "forbidden"]
    assert len(server.seen) == 2


@pytest.mark.parametrize(("status", "most"), [(403, 40), (401, 12)])
def test_a_key_that_is_withdrawn_in_mid_run_stops_it_and_refuses_no_row(tmp_path, status, most):
    prompts = [f"p{i}" for i in range(100)]
    with (
        ScriptedServer(lambda seen, n: echo(seen, n) if n < 5 else failure(status, "withdrawn")) as server,
        pytest.raises(UsageError, match="refuses the key"),
    ):
        Asking(tmp_path, server, concurrency=2).ask(prompts)
    assert len(server.seen) <= most
    with ScriptedServer(echo) as later:
        assert {answer.rejected for answer in Asking(tmp_path, later).ask(prompts)} == {None}
    assert len(later.seen) == 95


def test_a_key_that_a_server_repeats_is_not_stored(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SOME_KEY", CANARY)
    echoing = {"bad": failure(400, f"bad {CANARY}"), "good": completion(f"your key is {CANARY}")}
    with ScriptedServer(lambda seen, n: echoing[seen.prompt]) as server:
        answers = Asking(tmp_path, server, api_key="${env:SOME_KEY}").ask(["good", "bad"])
    assert answers[0].text == "your key is ***"
    assert CANARY not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_an_unset_key_variable_is_an_error_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with ScriptedServer(echo) as server, pytest.raises(UsageError, match="SOME_KEY"):
        Asking(tmp_path, server, api_key="${env:SOME_KEY}").ask(["a"])
    assert server.seen == []


def test_a_redirect_is_not_followed(tmp_path):
    with ScriptedServer(echo) as elsewhere:
        act = Act(status=307, headers={"Location": f"{elsewhere.url}/chat/completions"})
        with ScriptedServer(lambda seen, n: act) as server, pytest.raises(UsageError, match="redirect"):
            Asking(tmp_path, server).ask(["a"])
    assert elsewhere.seen == []


def test_a_used_up_quota_stops_and_what_was_answered_stays(tmp_path):
    def script(seen, n):
        return echo(seen, n) if n < 5 else failure(429, "quota", code="insufficient_quota")

    prompts = [f"p{i}" for i in range(100)]
    with ScriptedServer(script) as server, pytest.raises(Incomplete, match="quota"):
        Asking(tmp_path, server, concurrency=1).ask(prompts)
    with ScriptedServer(echo) as later:
        Asking(tmp_path, later).ask(prompts)
    assert len(later.seen) == 95


def test_an_unknown_model_stops_at_once(tmp_path):
    with (
        ScriptedServer(lambda seen, n: failure(404, "no such model")) as server,
        pytest.raises(UsageError, match="no such model"),
    ):
        Asking(tmp_path, server, concurrency=2).ask([f"p{i}" for i in range(100)])
    assert len(server.seen) <= 4


def test_a_config_that_every_request_is_refused_for_stops_and_leaves_no_refusals_behind(tmp_path):
    prompts = [f"p{i}" for i in range(300)]
    with (
        ScriptedServer(lambda seen, n: failure(400, "temperature is not supported")) as server,
        pytest.raises(UsageError, match="temperature is not supported"),
    ):
        Asking(tmp_path, server, concurrency=4).ask(prompts)
    assert len(server.seen) <= 30
    with ScriptedServer(echo) as corrected:
        assert {answer.rejected for answer in Asking(tmp_path, corrected).ask(prompts)} == {None}


def test_retry_after_is_obeyed_by_all_rows_of_the_endpoint(tmp_path):
    times: list[float] = []

    def script(seen, n):
        times.append(time.monotonic())
        return failure(429, headers={"Retry-After": "1"}) if n == 0 else echo(seen, n)

    with ScriptedServer(script) as server:
        assert Asking(tmp_path, server, concurrency=1).texts(["a", "b", "c"]) == ["A", "B", "C"]
    assert times[1] - times[0] >= 1.0


def test_an_absurd_retry_after_ends_the_run_instead_of_sleeping(tmp_path):
    with (
        ScriptedServer(lambda seen, n: failure(429, headers={"Retry-After": "9999"})) as server,
        pytest.raises(Incomplete, match="9999"),
    ):
        Asking(tmp_path, server).ask(["a", "b"])


def test_rows_that_run_out_of_time_stay_pending_and_are_asked_next_time(tmp_path):
    short = Retry(budget_s=0.5, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5)
    broken = ScriptedServer(lambda seen, n: failure(500) if seen.prompt in "ab" else echo(seen, n))
    with broken as server, pytest.raises(Incomplete, match="2 rows have no answer yet"):
        Asking(tmp_path, server).ask(["a", *(f"p{i}" for i in range(2000)), "b"], short)
    with ScriptedServer(echo) as later:
        answers = Asking(tmp_path, later).ask(["a", *(f"p{i}" for i in range(2000)), "b"], short)
    assert {answer.rejected for answer in answers} == {None}
    assert sorted(later.prompts) == ["a", "b"]


def test_a_server_that_is_down_is_said_once_and_ends_the_run_when_the_budget_is_used_up(tmp_path, caplog):
    with ScriptedServer(echo) as server:
        asking = Asking(tmp_path, server)
    short = Retry(budget_s=0.5, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5)
    with pytest.raises(Incomplete, match="connection"):
        asking.ask([f"p{i}" for i in range(3000)], short)
    assert caplog.text.count("does not answer") == 1


def test_overload_lowers_the_number_of_requests_in_flight(tmp_path):
    limit = 6
    refused = Counter[bool]()

    with ScriptedServer(lambda seen, n: echo(seen, n)) as server:

        def script(seen, n):
            busy = server.in_flight > limit
            refused[busy] += 1
            act = failure(429) if busy else echo(seen, n)
            act.delay_s = 0.005
            return act

        server._script = script
        answers = Asking(tmp_path, server, concurrency=64).ask([f"p{i}" for i in range(600)])
    assert {answer.rejected for answer in answers} == {None}
    assert refused[True] < refused[False] / 2


def test_the_first_signal_lets_requests_in_flight_finish_and_keeps_their_answers(tmp_path):
    prompts = [f"p{i}" for i in range(200)]

    def script(seen, n):
        if n == 20:
            asking.ctx.cancel.set()
        act = echo(seen, n)
        act.delay_s = 0.3
        return act

    with ScriptedServer(script) as server:
        asking = Asking(tmp_path, server, concurrency=8)
        with pytest.raises(Interrupted):
            asking.ask(prompts)
        sent = len(server.seen)
    assert sent < 100
    with ScriptedServer(echo) as later:
        Asking(tmp_path, later).ask(prompts)
    assert len(later.seen) == 200 - sent


KILLED = """
import sys
from pathlib import Path
from tests.faults.test_client_faults import Asking
class Server: url = sys.argv[2]
Asking(Path(sys.argv[1]), Server, concurrency=8).ask([f"p{i}" for i in range(120)])
"""


def test_answers_survive_kill_nine_and_only_the_unfinished_are_asked_again(tmp_path):
    def script(seen, n):
        act = echo(seen, n)
        act.delay_s = 0.02
        return act

    with ScriptedServer(script) as server:
        for kill_at in (20, 50, 80):
            command = [sys.executable, "-c", KILLED, str(tmp_path), server.url]
            process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."})
            deadline = time.monotonic() + 60
            while len(server.seen) < kill_at and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        sent = len(server.seen)
        answers = Asking(tmp_path, server).ask([f"p{i}" for i in range(120)])
    assert [answer.text for answer in answers] == [f"P{i}" for i in range(120)]
    twice = sum(count - 1 for count in Counter(server.prompts).values())
    assert twice <= 3 * 8, "only what was in flight when it was killed may be asked twice"
    assert sent >= 80
    unknown = [row for row in _attempts(tmp_path) if row["outcome"] is None]
    assert len(server.seen) <= len(_attempts(tmp_path)) <= len(server.seen) + 3 * 8, "what was sent is on record"
    assert len(unknown) >= twice


def _attempts(folder: Path) -> list[dict[str, object]]:
    import pyarrow.parquet as pq

    files = sorted((folder / "data" / "responses" / "attempts").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_strange_text_survives(tmp_path):
    strange = {
        "surrogate": Act(body=completion("X").body.replace(b'"X"', b'"a\\ud800b"')),
        "nul": completion("a\0b"),
        "bytes": Act(body=completion("X").body.replace(b'"X"', b'"a\xff"')),
        "emoji": completion("👩‍👩‍👧 é e\u0301 \u202e"),
    }
    with ScriptedServer(lambda seen, n: strange[seen.prompt]) as server:
        answers = Asking(tmp_path, server).ask(list(strange))
    assert [answer.text for answer in answers] == ["a\ufffdb", "a\0b", "a\ufffd", "👩‍👩‍👧 é e\u0301 \u202e"]
    assert [answer.flags for answer in answers] == [("sanitized",), ("nul",), ("sanitized",), ()]


def test_works_where_a_loop_runs_already(tmp_path):
    async def notebook_cell() -> list[Answer]:
        return asking.ask(["a"])

    with ScriptedServer(echo) as server:
        asking = Asking(tmp_path, server)
        assert asyncio.run(notebook_cell())[0].text == "A"


def test_two_processes_may_ask_at_the_same_time(tmp_path):
    prompts = [f"p{i}" for i in range(300)]
    with ScriptedServer(echo) as server:
        results: list[list[Answer]] = []
        threads = [threading.Thread(target=lambda: results.append(Asking(tmp_path, server).ask(prompts))) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [[answer.text for answer in answers] for answers in results] == [[p.upper() for p in prompts]] * 2


FULL = """
import resource, sys
from pathlib import Path
from tests.faults.test_client_faults import Asking
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
class Server: url = sys.argv[2]
try:
    Asking(Path(sys.argv[1]), Server, concurrency=4).ask([f"p{i}" for i in range(600)])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_when_no_more_can_be_written_the_run_stops_and_is_resumable(tmp_path):
    with ScriptedServer(echo) as server:
        command = [sys.executable, "-c", FULL, str(tmp_path), server.url]
        env = {**os.environ, "PYTHONPATH": "."}
        run = subprocess.run(
            command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, check=True
        )
        assert run.stdout.startswith("Incomplete error: an answer cannot be stored")
        sent = len(server.seen)
        assert 0 < sent < 600
        answers = Asking(tmp_path, server).ask([f"p{i}" for i in range(600)])
    assert [answer.text for answer in answers] == [f"P{i}" for i in range(600)]
    assert len(server.seen) - 600 <= 2 * 4, "only what was in flight is asked again"


def test_the_body_of_a_request_holds_what_the_config_says(tmp_path):
    with ScriptedServer(echo) as server:
        Asking(tmp_path, server).ask(["a"], temperature=0.5, top_p=0.9, top_k=4, stop=["\n"], max_tokens=9)
        Asking(tmp_path, server).ask(["b"])
    assert json.loads(json.dumps(server.seen[0].json)) == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "stop": ["\n"],
        "max_tokens": 9,
    }
    assert set(server.seen[1].json) == {"model", "messages", "max_tokens", "temperature", "top_p"}


def test_what_a_model_refuses_to_be_told_is_not_sent(tmp_path):
    with ScriptedServer(echo) as server:
        asking = Asking(tmp_path, server, max_tokens_field="max_completion_tokens")
        asking.ask(["a"], temperature=None, top_p=None, max_tokens=9)
    assert server.seen[0].json == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_completion_tokens": 9,
    }


def test_a_setting_that_the_api_refuses_from_now_on_is_no_fault_of_the_rows(tmp_path):
    """What it answered before proves nothing of how it is asked today."""
    with ScriptedServer(echo) as server:
        Asking(tmp_path, server).ask(["first", "second"])
    with ScriptedServer(lambda seen, n: failure(400, "unknown field: seed")) as server:
        asking = Asking(tmp_path, server)
        with pytest.raises(UsageError, match="unknown field: seed"):
            asking.ask(["first", "second", *(f"new {number}" for number in range(60))])
    with ScriptedServer(echo) as server:
        assert Asking(tmp_path, server).texts(["new 1", "new 59"]) == ["NEW 1", "NEW 59"]
