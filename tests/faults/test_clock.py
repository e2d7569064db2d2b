"""The time of day jumps by up to an hour, to and fro, all through a run: only stamps in logs show it."""

import json
import shutil
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, echo, failure
from tests.faults.shim.preload import Fault, Host, Kind, hosting, lines
from tests.faults.shim.project import ROWS, RUN, Made, leftovers, overcharged, write_api_project
from tests.support import read_events


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture(scope="module")
def steady(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What a run makes by a clock that goes as it should."""
    folder = tmp_path_factory.mktemp("steady")
    with ScriptedServer(echo) as server:
        write_api_project(folder, server)
        assert host.run(folder, *RUN).code == 0
    return Made.by(folder)


def durations(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in events or metrics whose name says that it is a time that passed, or a rate."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from durations(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from durations(item, name)
    elif isinstance(value, int | float) and any(word in name for word in ("second", "duration", "_s", "per_")):
        yield name, value


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_run_makes_the_same_by_a_jumping_clock(host: Host, steady: Made, tmp_path: Path, seed: int) -> None:
    with ScriptedServer(echo) as server:
        write_api_project(tmp_path, server)
        done = host.run(tmp_path, *RUN, seed=seed)
    assert done.code == 0, done.stderr
    assert done.jumps > 3
    assert Made.by(tmp_path) == steady
    assert len(server.seen) == ROWS
    assert leftovers(tmp_path) == []
    events = read_events(tmp_path / "data" / "runs" / "small")
    assert [event["retries"] for event in events if event["event"] == "teacher_asked"] == [{}]
    manifests = [path.read_text("utf-8") for path in (tmp_path / "data" / "store").rglob("manifest.json")]
    facts = [*events, *map(json.loads, manifests)]
    assert [(name, number) for fact in facts for name, number in durations(fact) if number < 0] == []
    stamps = [event["time"] for event in events]
    assert stamps != sorted(stamps), "events lie in the order in which they happened, whatever the clock said"
    assert [event["event"] for event in events][:2] == ["run_started", "step_started"]
    assert events[-1]["event"] == "run_ended"


def test_errors_that_pass_are_waited_for_as_long_as_by_a_true_clock(host: Host, steady: Made, tmp_path: Path) -> None:
    """Also where the server names the moment of the next try: what counts is how far that is from its own `Date`."""

    def busy_at_first(seen: Seen, number: int) -> Act:
        if number < 3:
            now = formatdate(time.time(), usegmt=True)  # the server's clock goes as it should
            return failure(429, "busy", headers={"Retry-After": now, "Date": now})
        return failure(500) if number < 6 else completion(seen.prompt.upper())

    for seed in range(1, 4):
        shutil.rmtree(tmp_path / "project", ignore_errors=True)
        with ScriptedServer(busy_at_first) as server:
            write_api_project(tmp_path / "project", server)
            done = host.run(tmp_path / "project", *RUN, seed=seed)
        assert done.code == 0, done.stderr
        assert Made.by(tmp_path / "project") == steady
        assert len(server.seen) == ROWS + 6


def is_answer(name: str, path: str) -> bool:
    return name == "write" and path.endswith(".sqlite-wal")


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_after_a_kill_the_answers_of_either_process_are_used(
    host: Host, steady: Made, tmp_path: Path, seed: int
) -> None:
    """Though the later process may have stored its answers "before" those of the earlier one."""
    with ScriptedServer(echo) as server:
        write_api_project(tmp_path, server)
        assert host.run(tmp_path, *RUN, trace=tmp_path / "trace").code == 0
        answers = [at for at, (name, path, _) in enumerate(lines(tmp_path / "trace")) if is_answer(name, path)]
        for tenth in (5, 4, 6, 3, 7):  # how many writes there are before the first request and after it varies
            shutil.rmtree(tmp_path / "data")
            (tmp_path / "run.lock.json").unlink(missing_ok=True)
            server.seen.clear()
            midway = Fault(Kind.KILL, answers[len(answers) * tenth // 10])
            assert host.run(tmp_path, *RUN, fault=midway, seed=seed).code == -9
            if 0 < len(server.seen) < ROWS:
                break
        assert 0 < len(server.seen) < ROWS, "killed while it asked"
        done = host.run(tmp_path, *RUN, seed=seed + 100)
        assert done.code == 0, done.stderr
        assert Made.by(tmp_path) == steady
        assert overcharged(tmp_path, server.prompts) == []


def test_an_answer_stays_the_one_that_is_used_whatever_the_clock_said(host: Host, tmp_path: Path) -> None:
    """The same rows are drawn from the stored answers by the next run, and nothing is asked."""

    def different_each_time(seen: Seen, number: int) -> Act:
        return completion(f"{seen.prompt} Answer {number}.")

    with ScriptedServer(different_each_time) as server:
        write_api_project(tmp_path, server)
        assert host.run(tmp_path, *RUN, seed=1).code == 0
        first = Made.by(tmp_path)
        shutil.rmtree(tmp_path / "data" / "store")
        assert host.run(tmp_path, *RUN, seed=2).code == 0
    assert Made.by(tmp_path) == first
    assert len(server.seen) == ROWS
