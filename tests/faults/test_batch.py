"""Batch jobs: what was answered is kept and never billed twice, whatever becomes of the job, of us or of the server."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline.core.config_api import AnthropicTeacher, ApiTeacher, OpenAITeacher
from pipeline.core.config_batch import BatchConfig
from pipeline.core.config_budget import Budget, Spending
from pipeline.core.config_length import Raise
from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.config_teacher import Retry, Sampling, SeedPolicy
from pipeline.core.errors import (
    CorruptArtefact,
    ExitCode,
    Incomplete,
    Interrupted,
    PipelineError,
    RunLocked,
    UsageError,
)
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.core.runs import hold_lock
from pipeline.teacher.accounts import spent_by
from pipeline.teacher.ask import KEEP, Answer, Asker
from pipeline.teacher.batch.tracker import Tracker, all_open_jobs
from pipeline.teacher.budget import Amount
from pipeline.teacher.history import attempts_of
from pipeline.teacher.prices import Price, batch_price_of
from pipeline.teacher.request import Asked, Request
from pipeline.teacher.segment import read_answers, segment_paths
from tests.faults.batch_server import USAGE, BatchServer, Fate
from tests.faults.generate_runs import Stage, numbered
from tests.support import make_context, wait_for

MAX_TOKENS = 64
PRICE = {"input": 2, "output": 8, "batch_discount": 0.5}
HALF = Price(1_000_000_000, 4_000_000_000)
PROMPTS = [f"prompt {number}" for number in range(20)]
QUICK = Retry(budget_s=10, first_wait_s=0.005, max_wait_s=0.02, timeout_s=5)
KINDS = ("openai", "anthropic")
NO_LOGPROBS: LogprobsAsked | None = None
LOGPROBS = LogprobsAsked(top_k=2, sent=2, ids=False)
AUTO: SeedPolicy = "auto"
UNTOLD = Sampling(temperature=None, top_p=None, max_tokens=MAX_TOKENS)
"""No temperature is told, so that there is no trial of what it does to logprobs."""


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


class Buyer:
    """A run that asks the server, by jobs unless told otherwise."""

    def __init__(self, folder: Path, server: BatchServer, kind: str = "openai", **teacher: Any) -> None:
        self.folder, self.server, self.name = folder, server, "api"
        self.sampling, self.logprobs, self.seeds = Sampling(max_tokens=MAX_TOKENS), NO_LOGPROBS, AUTO
        self.ctx = make_context(folder)
        common = {"kind": kind, "base_url": server.url, "provider": "scripted", "model": "m", "price": PRICE}
        key = {"api_key": None} if kind == "anthropic" else {}
        model = AnthropicTeacher if kind == "anthropic" else OpenAITeacher
        self.teacher: ApiTeacher = model.model_validate({**common, **key, **teacher})

    @property
    def asked(self) -> Asked:
        asked = Asked.of(self.teacher, self.sampling, 0, DigestCache(self.folder / "digests.json"))
        return replace(asked, logprobs=self.logprobs, seeds=self.seeds)

    def requests(self, prompts: list[str]) -> list[Request]:
        return [self.asked.request("set", f"p{at}", 0, [Message("user", prompt)]) for at, prompt in enumerate(prompts)]

    def ask(
        self,
        prompts: list[str] = PROMPTS,
        *,
        online: bool = False,
        caps: tuple[int, ...] = (),
        usd: float | None = None,
        requests_cap: int | None = None,
        **batch: Any,
    ) -> list[Answer]:
        config = BatchConfig.model_validate({"poll_s": 0.02, "job_requests": 8, **batch})
        spending = Spending(run="small", teacher=self.name, budget=Budget(usd=usd, requests=requests_cap))
        on_length = Raise(kind="raise", caps=caps) if caps else KEEP
        requests = self.requests(prompts)
        mode = None if online else config
        with Asker(self.teacher, self.asked, QUICK, self.ctx, spending, on_length=on_length, batch=mode) as asker:
            asker.fetch(requests)
            asker.done()
            return asker.answers(requests)

    def stopped(self, error: type[PipelineError] = Incomplete, **how: Any) -> PipelineError:
        with pytest.raises(error) as caught:
            self.ask(**how)
        return caught.value

    @property
    def responses(self) -> Path:
        return self.folder / "data" / "responses"

    def spent(self) -> Amount:
        return sum(spent_by(self.responses, "small", {}).values(), Amount())

    def attempts(self, prompt: str) -> list[str | None]:
        (request,) = self.requests([prompt])
        return [sent.outcome for sent in attempts_of(self.responses, bytes.fromhex(request.key))]

    def open_jobs(self) -> int:
        return len(all_open_jobs(self.responses))

    def leftovers(self) -> list[str]:
        """Files of jobs that hold prompts or answers."""
        found = (self.responses / "batches").glob("*/*")
        return [path.name for path in found if path.suffix not in (".json", ".lock")]


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


WANTED = [prompt.upper() for prompt in PROMPTS]
ONCE = Counter(PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
class TestJobs:
    def test_all_is_answered_and_billed_once(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        buyer = Buyer(tmp_path, server, kind)
        assert texts(buyer.ask()) == WANTED
        assert server.billed == ONCE and server.online == []
        assert sorted(len(job.lines) for job in server.by_number) == [4, 8, 8], "made at the same time"
        assert buyer.ctx.progress.done == len(PROMPTS)  # type: ignore[attr-defined]
        assert buyer.open_jobs() == 0 and buyer.leftovers() == []
        assert texts(buyer.ask(online=True)) == WANTED
        assert server.billed == ONCE, "the other mode finds the same answers"

    def test_expired_jobs_keep_what_was_answered_and_the_rest_is_sent_again_then_online(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        """Jobs expire half-way for ever: two rounds of jobs, then the mode is changed."""
        server.fate = lambda number: Fate(share=0.5, ends="expired")
        buyer = Buyer(tmp_path, server, kind)
        error = buyer.stopped(rounds=2)
        answered = server.billed.total()
        assert error.exit_code == ExitCode.INCOMPLETE
        assert "rows have no answer yet (expired" in error.what and "mode: online" in error.todo
        assert len(PROMPTS) / 2 <= answered < len(PROMPTS)
        again = [prompt for job in server.by_number[3:] for _, prompt in map(_asked, job.lines)]
        first = [
            prompt for job in server.by_number[:3] for name, prompt in map(_asked, job.lines) if name not in job.results
        ]
        assert set(again) <= set(first), "only what was not answered is sent again"
        assert texts(buyer.ask(online=True)) == WANTED
        assert server.billed == ONCE
        assert len(server.online) == len(PROMPTS) - answered
        prices = answered * HALF.cost(*USAGE) + len(server.online) * 2 * HALF.cost(*USAGE)
        assert buyer.spent().nano == prices, "jobs at the discount, online calls in full, expired lines nothing"

    def test_at_most_so_many_jobs_are_open(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        most = 0

        def count(call: str) -> None:
            nonlocal most
            most = max(most, sum(job.ended_as is None for job in server.jobs.values()))

        server.before = count
        server.fate = lambda number: Fate(polls=3)
        Buyer(tmp_path, server, kind).ask(job_requests=2, open_jobs=2)
        assert most == 2

    def test_a_job_has_at_most_so_many_bytes(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        Buyer(tmp_path, server, kind).ask(job_bytes=1024)
        assert len(server.jobs) > 3
        assert all(len(content) <= 1024 for content in server.files.values())

    def test_equal_prompts_are_one_line(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        buyer = Buyer(tmp_path, server, kind)
        assert texts(buyer.ask(["a", "b", "a", "a"])) == ["A", "B", "A", "A"]
        assert server.billed == {"a": 1, "b": 1}
        assert buyer.ctx.progress.done == 4  # type: ignore[attr-defined]

    def test_stragglers_are_asked_online_in_the_same_run(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        """Jobs that never end are cancelled, what they brought is kept."""
        server.fate = lambda number: Fate(answers=5, polls=None)
        buyer = Buyer(tmp_path, server, kind)
        assert texts(buyer.ask(stragglers="online", online_after_s=0.05)) == WANTED
        assert server.billed == ONCE
        assert [job.ended_as for job in server.by_number] == ["cancelled"] * 3
        assert sorted(server.online) == sorted(set(PROMPTS) - {p for job in server.by_number for p in _answered(job)})

    def test_stragglers_wait_unless_told_otherwise(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        server.fate = lambda number: Fate(answers=0, ends="expired")
        buyer = Buyer(tmp_path, server, kind)
        buyer.stopped(rounds=2)
        assert len(server.jobs) == 6 and server.online == []
        server.fate = lambda number: Fate()
        assert texts(buyer.ask()) == WANTED

    def test_refused_lines_are_stored_like_online_ones(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        bad = {"type": "invalid_request_error", "message": "too long"}
        server.line = lambda prompt: (400, bad) if prompt == PROMPTS[3] else None
        buyer = Buyer(tmp_path, server, kind)
        answers = buyer.ask()
        assert [answer.rejected for answer in answers if answer.rejected] == ["bad_request"]
        assert [answer.rejected for answer in buyer.ask()] == [answer.rejected for answer in answers]
        assert len(server.jobs) == 3, "it is not sent again"
        assert buyer.attempts(PROMPTS[3]) == ["reject"]
        assert buyer.spent().nano == 19 * HALF.cost(*USAGE)

    def test_lines_that_may_do_later_are_sent_again_alone(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        tries: Counter[str] = Counter()

        def overloaded(prompt: str) -> tuple[int, Any] | None:
            tries[prompt] += 1
            return (
                (529, {"type": "overloaded_error", "message": "busy"})
                if prompt == "prompt 3" and tries[prompt] < 2
                else None
            )

        server.line = overloaded
        buyer = Buyer(tmp_path, server, kind)
        assert texts(buyer.ask()) == WANTED
        assert [prompt for _, prompt in map(_asked, server.by_number[-1].lines)] == ["prompt 3"]
        assert server.billed == ONCE
        assert len(buyer.attempts("prompt 3")) == 2

    def test_when_every_line_is_refused_it_is_the_config(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        server.line = lambda prompt: (400, {"type": "invalid_request_error", "message": "no such field"})
        error = Buyer(tmp_path, server, kind).stopped(UsageError)
        assert "refused all" in error.what and "no such field" in error.what
        server.line = lambda prompt: None
        assert texts(Buyer(tmp_path, server, kind).ask()) == WANTED, "nothing of it was believed"

    def test_a_second_process_waits_for_nothing_and_adopts_nothing(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        buyer = Buyer(tmp_path, server, kind)
        tracker = Tracker(buyer.responses, buyer.asked.identity)
        with hold_lock(tracker.lock):
            buyer.stopped(RunLocked)
        assert server.calls == []

    def test_a_signal_leaves_the_jobs_open_and_the_same_command_waits_for_them(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        server.fate = lambda number: Fate(polls=None)
        buyer = Buyer(tmp_path, server, kind)
        with stopping(buyer, lambda: _recorded(buyer)):
            error = buyer.stopped(Interrupted)
        assert error.exit_code == ExitCode.INTERRUPTED
        assert "batch jobs stay open at the provider" in error.what and "mode: online" in error.todo
        assert buyer.open_jobs() == 3
        for job in server.jobs.values():
            job.fate = Fate(polls=0)
        assert texts(buyer.ask()) == WANTED
        assert len(server.jobs) == 3 and server.billed == ONCE

    def test_online_mode_ends_open_jobs_first_and_asks_only_for_the_rest(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        server.fate = lambda number: Fate(answers=6, polls=None)
        buyer = Buyer(tmp_path, server, kind)
        leave_jobs_open(buyer)
        assert texts(buyer.ask(online=True)) == WANTED
        assert [job.ended_as for job in server.by_number] == ["cancelled"] * 3
        assert server.billed == ONCE and 0 < len(server.online) < len(PROMPTS)
        assert buyer.open_jobs() == 0

    def test_jobs_of_an_earlier_cap_do_not_pass_for_answers_to_a_higher_one(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        """A `length` under 64 tokens is no answer under 128; a complete answer is."""
        server.fate = lambda number: Fate(polls=None)
        buyer = Buyer(tmp_path, server, kind)
        leave_jobs_open(buyer)
        for job in server.jobs.values():
            job.fate = Fate(polls=0)
        server.fate = lambda number: Fate()
        server.finish = lambda prompt: "length" if prompt == "prompt 0" and len(server.jobs) == 3 else "stop"
        higher = Asked.of(buyer.teacher, Sampling(max_tokens=128), 0, DigestCache(tmp_path / "digests.json"))
        requests = [higher.request("set", f"p{at}", 0, [Message("user", text)]) for at, text in enumerate(PROMPTS)]
        with Asker(buyer.teacher, higher, QUICK, buyer.ctx, batch=BatchConfig(poll_s=0.02)) as asker:
            asker.fetch(requests)
            assert {answer.finish_reason for answer in asker.answers(requests)} == {"stop"}
        assert len(server.jobs) == 4 and server.billed == ONCE + Counter(["prompt 0"])


@contextmanager
def stopping(buyer: Buyer, when: Callable[[], bool]) -> Iterator[None]:
    """A signal comes during the block, as soon as something holds, or as that turns out never to come."""

    def wait() -> None:
        try:
            wait_for(when, "the moment of the signal")
        finally:
            buyer.ctx.cancel.set()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        yield
        waiting.result()
    buyer.ctx.cancel.clear()


def leave_jobs_open(buyer: Buyer) -> None:
    """Submit, and be stopped by a signal."""
    with stopping(buyer, lambda: _recorded(buyer)):
        buyer.stopped(Interrupted)


def _recorded(buyer: Buyer) -> bool:
    jobs = all_open_jobs(buyer.responses)
    return len(jobs) == 3 and all(job.job_id is not None for job in jobs)


def _asked(line: tuple[str, dict[str, Any]]) -> tuple[str, str]:
    return line[0], line[1]["messages"][-1]["content"]


def _answered(job: Any) -> list[str]:
    return [body["messages"][-1]["content"] for body in job.results.values()]


class TestPartialResults:
    def test_what_a_running_job_shows_is_kept_before_it_ends(self, tmp_path: Path, server: BatchServer) -> None:
        server.fate = lambda number: Fate(polls=6, partial=True)
        buyer = Buyer(tmp_path, server)
        lost: list[str] = []

        def gone(call: str) -> None:
            """After three lines were shown the results disappear, as they do after days."""
            for job in server.jobs.values():
                if job.looks == 5 and not lost:
                    lost.append(job.name)
                    buyer.ctx.cancel.set()

        server.before = gone
        buyer.stopped(Interrupted, prompts=PROMPTS[:8])
        stored = sum(buyer.attempts(prompt) == ["answer"] for prompt in PROMPTS[:8])
        assert 0 < stored < 8
        buyer.ctx.cancel.clear()
        assert texts(buyer.ask(PROMPTS[:8])) == WANTED[:8]
        assert all(buyer.attempts(prompt) == ["answer"] for prompt in PROMPTS[:8]), "each line is on record once"
        assert buyer.spent().nano == 8 * HALF.cost(*USAGE)


class TestWholeJobs:
    def test_a_job_that_is_not_valid_ends_with_the_provider_s_words(self, tmp_path: Path, server: BatchServer) -> None:
        server.fate = lambda number: Fate(ends="failed", error=("model_not_found", "The model `m` does not exist."))
        buyer = Buyer(tmp_path, server)
        error = buyer.stopped(UsageError, job_requests=20)
        assert error.exit_code == ExitCode.USAGE and "The model `m` does not exist." in error.what
        assert buyer.spent().nano == 0, "a job that was not run costs nothing"
        server.fate = lambda number: Fate()
        assert texts(buyer.ask()) == WANTED

    def test_a_full_queue_makes_fewer_and_smaller_jobs(self, tmp_path: Path, server: BatchServer) -> None:
        """OpenAI fails a job when the tokens of all open jobs exceed the account's limit."""
        full = Fate(ends="failed", error=("token_limit_exceeded", "Enqueued token limit reached for m"))
        server.fate = lambda number: full if number < 4 else Fate()
        buyer = Buyer(tmp_path, server)
        assert texts(buyer.ask()) == WANTED
        assert server.billed == ONCE
        assert all(len(job.lines) < 8 for job in server.by_number[4:])

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_job_that_the_provider_no_longer_knows_counts_at_its_worst_case(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        server.fate = lambda number: Fate(polls=None)
        buyer = Buyer(tmp_path, server, kind)
        leave_jobs_open(buyer)
        server.jobs.clear()
        server.fate = lambda number: Fate()
        assert texts(buyer.ask()) == WANTED
        assert sorted(buyer.attempts(PROMPTS[0]), key=str) == ["answer", "retry:lost"]
        assert buyer.spent().nano > len(PROMPTS) * HALF.cost(*USAGE)

    def test_a_moved_teacher_is_refused_while_its_jobs_are_open(self, tmp_path: Path, server: BatchServer) -> None:
        server.fate = lambda number: Fate(polls=None)
        leave_jobs_open(Buyer(tmp_path, server))
        with BatchServer() as other:
            error = Buyer(tmp_path, other).stopped(UsageError)
            assert server.url in error.what and other.calls == []

    def test_a_server_without_batch_endpoints_is_said_to_have_none(self, tmp_path: Path, server: BatchServer) -> None:
        server.before = lambda call: (404, {"detail": "Not Found"})
        error = Buyer(tmp_path, server).stopped(UsageError)
        assert "no batch endpoints" in error.what and "mode: online" in error.todo

    def test_a_damaged_record_of_a_job_is_not_passed_over(self, tmp_path: Path, server: BatchServer) -> None:
        server.fate = lambda number: Fate(polls=None)
        buyer = Buyer(tmp_path, server)
        leave_jobs_open(buyer)
        record = next((buyer.responses / "batches").glob("*/*.json"))
        record.write_text(record.read_text()[:40])
        assert buyer.stopped(CorruptArtefact).where == str(record)


@pytest.mark.parametrize("kind", KINDS)
class TestCalls:
    def test_passing_failures_of_every_call_are_tried_again(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        seen: Counter[str] = Counter()

        def each_fails_twice(call: str) -> tuple[int, Any] | None:
            seen[call] += 1
            return (503 if seen[call] == 1 else 429, {"error": {"message": "busy"}}) if seen[call] < 3 else None

        server.before = each_fails_twice
        buyer = Buyer(tmp_path, server, kind)
        assert texts(buyer.ask()) == WANTED
        assert server.billed == ONCE

    def test_a_refused_key_ends_it_and_the_variable_is_named(
        self, tmp_path: Path, server: BatchServer, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OUR_KEY", "sk-CANARY-batch")
        server.before = lambda call: (401, {"error": {"message": "bad key sk-CANARY-batch"}})
        buyer = Buyer(tmp_path, server, kind, api_key="${env:OUR_KEY}")
        error = buyer.stopped(UsageError)
        assert "OUR_KEY" in error.todo and "CANARY" not in str(error)
        assert len(server.calls) <= 4, "it is not tried again"
        assert buyer.open_jobs() == 0 or kind == "openai"

    def test_the_key_is_in_no_file(
        self, tmp_path: Path, server: BatchServer, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where the server quotes it in an answer; one job ends, whichever was made first."""
        monkeypatch.setenv("OUR_KEY", "sk-CANARY-batch")
        server.line = lambda prompt: (
            (400, {"type": "invalid_request_error", "message": "sk-CANARY-batch"}) if prompt[-1] in "13579" else None
        )
        server.fate = lambda number: Fate(polls=None if number else 1)
        buyer = Buyer(tmp_path, server, kind, api_key="${env:OUR_KEY}")

        def bodies() -> list[bytes]:
            segments = segment_paths(buyer.responses / "segments")
            return [one.body for path in segments for one in read_answers(path)]

        def is_refused_once() -> bool:
            with suppress(PipelineError, OSError):  # what is being written cannot always be read
                return len(server.jobs) >= 3 and any(b"***" in body for body in bodies())
            return False

        with stopping(buyer, is_refused_once):
            buyer.stopped(Interrupted)
        assert any("sk-CANARY-batch" in key for key in server.keys)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not [path for path in files if b"CANARY" in path.read_bytes()]
        assert not any(b"CANARY" in body for body in bodies())
        private = [path for path in files if "batches" in path.parts]
        assert private and all(path.stat().st_mode & 0o077 == 0 for path in private if path.suffix != ".lock")

    def test_a_job_whose_making_was_not_confirmed_is_found_again(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        lost: list[str] = []

        def the_first_reply_is_lost(call: str) -> bool:
            if call in ("POST /batches", "POST /messages/batches") and not lost:
                lost.append(call)
                return True
            return False

        server.after = the_first_reply_is_lost
        buyer = Buyer(tmp_path, server, kind)
        assert texts(buyer.ask(PROMPTS[:8])) == WANTED[:8]
        assert len(lost) == 1 and len(server.jobs) == 1
        assert set(server.billed.values()) == {1}

    def test_a_job_whose_making_failed_is_made_again(self, tmp_path: Path, server: BatchServer, kind: str) -> None:
        failed: list[str] = []

        def the_first_fails(call: str) -> tuple[int, Any] | None:
            if call in ("POST /batches", "POST /messages/batches") and not failed:
                failed.append(call)
                return 500, {"error": {"message": "internal"}}
            return None

        server.before = the_first_fails
        buyer = Buyer(tmp_path, server, kind)
        assert texts(buyer.ask(PROMPTS[:8])) == WANTED[:8]
        assert len(server.jobs) == 1 and buyer.spent().requests == 8, "a job that is surely not there costs nothing"

    def test_what_nobody_can_tell_of_is_counted_at_its_worst_case(
        self, tmp_path: Path, server: BatchServer, kind: str
    ) -> None:
        """The reply to the making of a job is lost, and the server cannot list its jobs."""
        lost: list[str] = []

        def the_first_reply_is_lost(call: str) -> bool:
            lost.extend([call] if call.endswith("/batches") and call.startswith("POST") else [])
            return len(lost) == 1 and call == lost[0]

        server.after = the_first_reply_is_lost
        server.before = lambda call: (
            (404, {"error": {}}) if call.startswith("GET") and call.endswith("/batches") else None
        )
        buyer = Buyer(tmp_path, server, kind)
        assert texts(buyer.ask(PROMPTS[:8])) == WANTED[:8]
        assert buyer.attempts(PROMPTS[0]) == ["retry:lost", "answer"]
        unknown = buyer.spent().nano - 8 * HALF.cost(*USAGE)
        assert unknown > 8 * HALF.cost(0, MAX_TOKENS), "the bill may hold the lost job: its worst case is spent"


class TestBudget:
    def test_a_cap_makes_smaller_jobs_and_ends_with_the_same_command_to_go_on(
        self, tmp_path: Path, server: BatchServer
    ) -> None:
        buyer = Buyer(tmp_path, server)
        worst = HALF.cost(256 + 140, MAX_TOKENS) / 1e9
        error = buyer.stopped(usd=1.3 * worst)
        assert error.exit_code == ExitCode.INCOMPLETE and "the budget is reached" in error.what
        assert buyer.spent().nano <= 1.3 * worst * 1e9
        assert 0 < server.billed.total() < len(PROMPTS)
        assert texts(buyer.ask(usd=100 * worst)) == WANTED
        assert server.billed == ONCE

    def test_open_jobs_count_in_the_budget_of_the_next_process(self, tmp_path: Path, server: BatchServer) -> None:
        """Their worst case is held: what they leave is too little for one online call of another prompt."""
        server.fate = lambda number: Fate(polls=None)
        buyer = Buyer(tmp_path, server)
        leave_jobs_open(buyer)
        jobs = all_open_jobs(buyer.responses)
        held = sum(job.worst_nano for job in jobs)
        bodies = [orjson.dumps(body) for job in server.jobs.values() for _, body in job.lines]
        assert held == sum(HALF.cost(len(body) + 256, MAX_TOKENS) for body in bodies)
        error = buyer.stopped(prompts=["another prompt"], usd=(held + 1000) / 1e9, job_requests=1, open_jobs=9)
        assert "the budget is reached" in error.what
        assert "open batch jobs hold up to 20 requests" in error.what, "why so little is spent and nothing fits"
        assert len(server.jobs) == 3

    def test_jobs_that_stay_open_count_once_whatever_the_number_of_rounds(
        self, tmp_path: Path, server: BatchServer
    ) -> None:
        server.fate = lambda number: Fate(polls=None if number < 3 else 1)
        server.finish = lambda prompt: "length" if prompt == "a" else "stop"
        buyer = Buyer(tmp_path, server)
        leave_jobs_open(buyer)
        caps = (2 * MAX_TOKENS, 4 * MAX_TOKENS)
        assert texts(buyer.ask(["a", "b", "c"], caps=caps, requests_cap=20 + 3 + 2)) == ["A", "B", "C"]
        assert [len(job.lines) for job in server.by_number[3:]] == [3, 1, 1]
        error = buyer.stopped(prompts=["d"], requests_cap=20 + 3 + 2)
        assert "the budget is reached" in error.what, "they do count"

    def test_online_calls_do_not_wait_for_jobs_that_stay_open(self, tmp_path: Path, server: BatchServer) -> None:
        """Nobody looks at these jobs any more when a straggler does not fit: it is the end, and not a wait for ever."""
        server.fate = lambda number: Fate(polls=None) if number < 3 else Fate(answers=0, ends="expired")
        buyer = Buyer(tmp_path, server)
        leave_jobs_open(buyer)
        error = buyer.stopped(prompts=["a"], requests_cap=20 + 1, rounds=1, stragglers="online")
        assert "the budget is reached" in error.what and server.online == []

    def test_the_jobs_of_another_teacher_of_the_run_count_too(self, tmp_path: Path, server: BatchServer) -> None:
        server.fate = lambda number: Fate(polls=None)
        leave_jobs_open(Buyer(tmp_path, server))
        held = sum(job.worst_nano for job in all_open_jobs(tmp_path / "data" / "responses"))
        other = Buyer(tmp_path, server, model="another")
        spending = Spending(run="small", teacher="other", budget=Budget(usd=(held + 1000) / 1e9))
        requests = other.requests(["x"])
        with Asker(other.teacher, other.asked, QUICK, other.ctx, spending) as asker, pytest.raises(Incomplete):
            asker.fetch(requests)
        assert server.online == []

    def test_the_price_is_the_batch_price(self, tmp_path: Path, server: BatchServer) -> None:
        buyer = Buyer(tmp_path, server)
        buyer.ask()
        assert batch_price_of(buyer.teacher) == HALF
        assert buyer.spent() == Amount(20 * HALF.cost(*USAGE), 20 * sum(USAGE), 20)


class TestSoftTargets:
    """Lines ask for logprobs as online calls do, and what comes without them is paid for a few times, not for ever."""

    def test_lines_ask_for_logprobs(self, tmp_path: Path, server: BatchServer) -> None:
        buyer = targeting(tmp_path, server)
        assert all(answer.logprobs is not None for answer in buyer.ask())
        assert all(answer.logprobs is not None for answer in buyer.ask())
        assert server.billed == ONCE

    @pytest.mark.parametrize("rounds", [1, 2, 3, 9])
    def test_what_comes_without_them_is_refused_in_the_end(
        self, tmp_path: Path, server: BatchServer, rounds: int
    ) -> None:
        server.tells = lambda prompt: prompt != "prompt 3"
        buyer = targeting(tmp_path, server)
        paid = ONCE + Counter({"prompt 3": min(rounds, 3) - 1})
        for _ in range(2):
            answers = buyer.ask(rounds=rounds)
            assert [answer.rejected for answer in answers if answer.rejected is not None] == ["bad_logprobs"]
            assert server.billed == paid
        buyer.logprobs = None
        assert texts(buyer.ask()) == WANTED and server.billed == paid, "it is an answer for who wants none"

    def test_a_server_that_refuses_them_is_found_out_before_any_job(self, tmp_path: Path, server: BatchServer) -> None:
        server.before = lambda call: (400, {"error": {"message": "no logprobs"}}) if "chat" in call else None
        buyer = targeting(tmp_path, server)
        buyer.sampling = Sampling(max_tokens=MAX_TOKENS)
        error = buyer.stopped(UsageError)
        assert "refuses to answer with logprobs" in error.what and server.jobs == {}

    def test_stragglers_without_them_get_their_tries_online(self, tmp_path: Path, server: BatchServer) -> None:
        server.tells = lambda prompt: prompt != "prompt 3"
        answers = targeting(tmp_path, server).ask(rounds=1, stragglers="online")
        assert texts(answers) == WANTED and server.online == ["prompt 3"]

    def test_answers_to_earlier_jobs_stand_for_runs_without(self, tmp_path: Path, server: BatchServer) -> None:
        """Jobs were sent before logprobs were wanted: their answers are kept, and asked for anew with logprobs."""
        server.fate = lambda number: Fate(polls=None)
        buyer = targeting(tmp_path, server)
        buyer.logprobs = None
        leave_jobs_open(buyer)
        for job in server.jobs.values():
            job.fate = Fate(polls=0)
        buyer.logprobs = LOGPROBS
        with stopping(buyer, lambda: len(server.jobs) == 6 and _recorded(buyer)):
            buyer.stopped(Interrupted, rounds=1)
        buyer.logprobs = None
        assert texts(buyer.ask()) == WANTED and server.billed == ONCE
        for job in server.jobs.values():
            job.fate = Fate(polls=0)
        buyer.logprobs = LOGPROBS
        assert all(answer.logprobs is not None for answer in buyer.ask())
        assert server.billed == ONCE + ONCE and len(server.jobs) == 6

    def test_answers_to_earlier_jobs_with_them_stand_for_both(self, tmp_path: Path, server: BatchServer) -> None:
        server.fate = lambda number: Fate(polls=None)
        buyer = targeting(tmp_path, server)
        leave_jobs_open(buyer)
        for job in server.jobs.values():
            job.fate = Fate(polls=0)
        buyer.logprobs = None
        assert texts(buyer.ask()) == WANTED
        buyer.logprobs = LOGPROBS
        assert all(answer.logprobs is not None for answer in buyer.ask())
        assert server.billed == ONCE


def targeting(folder: Path, server: BatchServer) -> Buyer:
    """A run that wants logprobs."""
    buyer = Buyer(folder, server)
    buyer.sampling, buyer.logprobs = UNTOLD, LOGPROBS
    return buyer


@pytest.mark.parametrize(("policy", "expected"), [("always", 3), ("auto", 0), ("never", 0)])
def test_lines_carry_seeds_where_online_calls_do(
    tmp_path: Path, server: BatchServer, policy: SeedPolicy, expected: int
) -> None:
    buyer = Buyer(tmp_path, server)
    buyer.sampling, buyer.seeds = Sampling(temperature=1, max_tokens=MAX_TOKENS), policy
    buyer.ask(PROMPTS[:3])
    assert len({body["seed"] for job in server.by_number for _, body in job.lines if "seed" in body}) == expected


class TestLongerAnswers:
    """Rounds under higher caps: the teacher has answered by then, so that a refusal is about the row and its cap."""

    def test_a_cap_that_is_refused_takes_nothing_away(self, tmp_path: Path, server: BatchServer) -> None:
        server.finish = lambda prompt: "length" if prompt == "prompt 1" else "stop"
        buyer = Buyer(tmp_path, server)
        buyer.ask()
        server.line = lambda prompt: (400, {"message": "too long"})
        for _ in range(2):
            assert texts(buyer.ask(caps=(2 * MAX_TOKENS,))) == WANTED
            assert len(server.jobs) == 4, "it is not asked again"

    def test_the_next_cap_is_asked_after_one_that_is_refused(self, tmp_path: Path, server: BatchServer) -> None:
        server.finish = lambda prompt: "length" if len(server.jobs) < 5 and prompt == "prompt 1" else "stop"
        server.line = lambda prompt: (400, {"message": "odd"}) if len(server.jobs) == 4 else None
        answers = Buyer(tmp_path, server).ask(caps=(2 * MAX_TOKENS, 4 * MAX_TOKENS))
        assert answers[1].finish_reason == "stop" and len(server.jobs) == 5


class TestTwoNamesOfOneModel:
    def test_share_their_jobs_folder_in_turn(self, tmp_path: Path, server: BatchServer) -> None:
        stage = Stage(tmp_path, numbered(10))
        with BatchServer() as other:
            servers: Any = {"a": server, "b": other}
            route = {"kind": "weights", "weights": {"a": 1, "b": 1}}
            how = {"mode": "batch", "batch": {"poll_s": 0.02}, "accept": {"rows": 8, "max_candidates": 10}}
            stage.run_with_providers(servers, {"a": "p", "b": "p"}, checks={"min_chars": 1}, route=route, **how)
            billed = server.billed + other.billed
        assert len(stage.rows) == 8 and set(billed.values()) == {1} and server.billed and other.billed

    def test_open_jobs_of_one_at_another_url_do_not_stop_the_other(self, tmp_path: Path, server: BatchServer) -> None:
        server.fate = lambda number: Fate(polls=None)
        leave_jobs_open(Buyer(tmp_path, server))
        with BatchServer() as other:
            buyer = Buyer(tmp_path, other)
            buyer.name = "other"
            assert texts(buyer.ask(["x"])) == ["X"]
        assert Buyer(tmp_path, server).open_jobs() == 3


def test_a_key_in_the_complaint_about_a_job_is_blotted_out(
    tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_KEY", "sk-CANARY-batch")
    server.fate = lambda number: Fate(ends="failed", error=("invalid_api_key", "Incorrect key sk-CANARY-batch"))
    error = Buyer(tmp_path, server, api_key="${env:OUR_KEY}").stopped(UsageError)
    assert "Incorrect key ***" in error.what
