"""What holds requests back, as a server sees it: the rates of the config, and the circuit breaker in an outage."""

import time

import pytest

from pipeline.core.config_teacher import Retry
from pipeline.core.errors import Incomplete
from pipeline.teacher.breaker import BreakerRules
from pipeline.teacher.limits import FIRST_LIMIT
from tests.faults.scripted_server import Act, ScriptedServer, Seen, echo
from tests.faults.shim.project import attempts
from tests.faults.test_client_faults import Asking


def test_requests_leave_no_faster_than_the_config_says(tmp_path):
    per_minute, burst, rows = 120, 10, 14
    arrived: list[float] = []

    def script(seen: Seen, number: int) -> Act:
        arrived.append(time.monotonic())
        return echo(seen, number)

    with ScriptedServer(script) as server:
        asking = Asking(tmp_path, server, limits={"requests_per_minute": per_minute})
        prompts = [f"p{i}" for i in range(rows)]
        start = time.monotonic()
        assert asking.texts(prompts) == [prompt.upper() for prompt in prompts]
    assert len(arrived) == rows
    # The bucket is full at first and then fills twice a second; a slow machine only makes them arrive later.
    earliest = [max(0.0, (number + 1 - burst) * 60 / per_minute) for number in range(rows)]
    assert earliest[-1] == 2.0
    early = [number for number in range(rows) if arrived[number] - start < earliest[number]]
    assert early == []


def test_a_server_that_refuses_connections_costs_few_attempts_and_no_row(tmp_path):
    prompts = [f"p{i}" for i in range(300)]
    short = Retry(budget_s=1, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5)
    with ScriptedServer(echo) as server:
        gone = Asking(tmp_path, server)
    with pytest.raises(Incomplete, match="connection"):
        gone.ask(prompts, short)
    with ScriptedServer(echo) as later:
        assert Asking(tmp_path, later).texts(prompts) == [prompt.upper() for prompt in prompts]
    assert len(later.seen) == len(prompts)
    refused = [row for row in attempts(tmp_path) if row["outcome"] == "retry:connection"]
    trials = 5  # at most one per time that the breaker is open, and these times double
    before_it_opens = BreakerRules().min_requests - 1 + FIRST_LIMIT
    assert BreakerRules().min_requests <= len(refused) <= before_it_opens + trials
    assert len(attempts(tmp_path)) == len(refused) + len(prompts)
