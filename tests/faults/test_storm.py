"""A quarter of all requests fails, in every way, and the client is killed again and again: all rows come, each once,
and the bill is what our records say."""

import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.core.config_budget import TokenPrice
from pipeline.teacher.prices import Price
from tests.faults.processes import running
from tests.faults.shim.project import leftovers, unsound
from tests.faults.storm_server import FAULTS, StormServer, storming, text_of
from tests.faults.table_run import PRICE, Project

RUN = ("run", "run.yaml", "--until", "generate")
SEED = 20261123
RETRY = {"budget_s": 300, "first_wait_s": 0.01, "max_wait_s": 0.1, "timeout_s": 0.7}


@dataclass(frozen=True, slots=True)
class Size:
    """Rows to be answered, and how often the client is killed meanwhile."""

    rows: int
    kills: int


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "size", [Size(1_500, 4), pytest.param(Size(20_000, 30), marks=pytest.mark.soak)], ids=lambda size: f"{size.rows}"
)
def test_every_row_comes_once_and_the_bill_is_what_the_records_say(
    tmp_path: Path, size: Size, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"number {number}" for number in range(size.rows)]
    with storming(SEED) as server:
        project = Project.write(tmp_path, server.url, prompts, retry=RETRY, teacher={"concurrency": 64})
        kill_again_and_again(project, server, size, random.Random(SEED))
        with running(*RUN, cwd=tmp_path) as run:
            assert run.end() == 0, run.said
        bill = server.bill()
    with capsys.disabled():
        print(f"\n{size.rows:,} rows, {size.kills} kills: {bill}; attempts {Counter(project.outcomes())}")
    assert bill["fates"].keys() == {"answer", *FAULTS}, "all of it happened"
    check_rows(project, prompts)
    check_requests(project, size.rows, bill["requests"])
    check_money(project, bill["input_tokens"], bill["output_tokens"])
    assert (leftovers(tmp_path, could_clean=False), unsound(tmp_path)) == ([], [])


def kill_again_and_again(project: Project, server: StormServer, size: Size, dice: random.Random) -> None:
    """Kill a run some time after each of so many counts of requests, of which some have passed before it starts."""
    for count in sorted(dice.sample(range(size.rows), size.kills)):
        with running(*RUN, cwd=project.folder) as run:
            has_passed = server.bill()["requests"] >= count
            while server.bill()["requests"] < count:
                assert run.process.poll() is None, run.said
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 1.5 if has_passed else 0.1))
            assert run.process.poll() is None, run.said
            run.kill()
        assert unsound(project.folder) == []


def check_rows(project: Project, prompts: list[str]) -> None:
    """Each row is there once, with the answer to its own prompt."""
    records = project.records()
    assert len({record.row_id for record in records}) == len(records) == len(prompts)
    assert project.texts() == {prompt: text_of(prompt) for prompt in prompts}


def check_requests(project: Project, rows: int, seen: int) -> None:
    """No request was seen that is not on record, and none had to be repeated but for a failure or a kill."""
    outcomes = Counter(project.outcomes())
    answered = Counter(row["key"] for row in project.attempts() if row["outcome"] == "answer")
    assert len(answered) == answered.total() == rows
    assert {None if outcome is None else outcome.partition(":")[0] for outcome in outcomes} <= {"answer", "retry", None}
    failures = sum(count for outcome, count in outcomes.items() if outcome not in ("answer", None))
    assert rows + failures - outcomes["retry:connection"] <= seen <= rows + failures + outcomes[None]


def check_money(project: Project, input_tokens: int, output_tokens: int) -> None:
    """The server's bill is at least what we know that we owe, and at most that with all unknown at its worst case."""
    attempts = project.attempts()
    known = sum(row["cost"] for row in attempts if row["cost"] is not None)
    perhaps = sum(row["reserved"] for row in attempts if row["cost"] is None)
    assert known <= Price.of(TokenPrice(**PRICE)).cost(input_tokens, output_tokens) <= known + perhaps
    tokens = sum(row["input_tokens"] + row["output_tokens"] for row in attempts if row["input_tokens"] is not None)
    unknown = sum(row["reserved_tokens"] for row in attempts if row["input_tokens"] is None)
    assert tokens <= input_tokens + output_tokens <= tokens + unknown
