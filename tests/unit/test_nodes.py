"""The processes of a launch find out whether they share their data folder, and agree on a name of this very start."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.core.errors import ExitCode, Interrupted, UsageError
from pipeline.student.jobs import launch_id
from pipeline.student.nodes import join_launch, meet
from tests.support import wait_for

SOON_S = 2.0


def machine(rank: int, machines: int = 2) -> Mapping[str, str]:
    """What torch's launcher tells the only process of a machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(machines),
        "GROUP_RANK": str(rank),
        "GROUP_WORLD_SIZE": str(machines),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }


def meet_all(folders: list[Path], stop: threading.Event | None = None, wait_s: float = 30) -> list[Future[str | None]]:
    """Each machine with its data folder, at the same time."""
    event = stop or threading.Event()
    with ThreadPoolExecutor(len(folders)) as pool:
        environs = [machine(rank, len(folders)) for rank in range(len(folders))]
        return [
            pool.submit(meet, folder, event, environ, wait_s) for folder, environ in zip(folders, environs, strict=True)
        ]


def test_machines_that_share_it_go_on_and_leave_nothing(tmp_path: Path) -> None:
    assert [one.exception() for one in meet_all([tmp_path] * 3)] == [None] * 3
    assert list((tmp_path / "nodes").iterdir()) == []


def test_each_start_has_a_name_of_its_own_that_all_its_processes_know(tmp_path: Path) -> None:
    """A Slurm job that is put back into its queue is launched with the same run id, address and port."""
    first, second = ({one.result() for one in meet_all([tmp_path] * 3)} for _ in range(2))
    assert len(first) == len(second) == 1
    assert first != second
    assert None not in first | second


def test_the_name_is_that_of_the_launch_from_then_on(tmp_path: Path) -> None:
    environs = [dict(machine(rank)) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda environ: join_launch(tmp_path, threading.Event(), environ), environs))
    names = {launch_id(environ) for environ in environs}
    assert len(names) == 1
    assert names != {launch_id(machine(0))}


def test_processes_of_one_machine_meet_too(tmp_path: Path) -> None:
    """Containers start them under one parent's number again and again."""
    environs = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"} for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        names = set(pool.map(lambda environ: meet(tmp_path, threading.Event(), environ, 30), environs))
    assert len(names) == 1 and None not in names


@pytest.mark.parametrize("first", [0, 1])
def test_it_does_not_matter_who_comes_first(tmp_path: Path, first: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(meet, tmp_path, threading.Event(), machine(first), 30)
        wait_for(lambda: [*(tmp_path / "nodes").glob("*")], "the early one")
        late = pool.submit(meet, tmp_path, threading.Event(), machine(1 - first), 30)
        assert early.result() == late.result() is not None


def test_machines_with_folders_of_their_own_stop_with_exit_code_two(tmp_path: Path) -> None:
    errors = [one.exception() for one in meet_all([tmp_path / "a", tmp_path / "b"], wait_s=SOON_S)]
    for error, told in zip(errors, ("process 1 of this launch does not show up", "does not answer"), strict=True):
        assert isinstance(error, UsageError) and error.exit_code is ExitCode.USAGE
        assert told in str(error) and "--data" in error.todo


def test_one_of_three_that_does_not_share_it_is_named(tmp_path: Path) -> None:
    errors = [one.exception() for one in meet_all([tmp_path / "a", tmp_path / "a", tmp_path / "b"], wait_s=SOON_S)]
    assert isinstance(errors[0], UsageError) and "process 2" in str(errors[0])


def test_questions_and_answers_of_an_earlier_launch_are_not_believed(tmp_path: Path) -> None:
    """One with the same name, whose processes were killed: its files lie there."""
    assert meet_all([tmp_path] * 2)[0].exception() is None
    folder = _folder_of_the_launch(tmp_path)
    for name in ("rank-1.json", "rank-1.answer.json"):
        (folder / name).write_text(json.dumps({"nonce": "of an earlier launch"}))
    with pytest.raises(UsageError, match="does not show up"):
        meet(tmp_path, threading.Event(), machine(0), SOON_S)  # nobody else is there
    (folder / "rank-1.answer.json").write_text(json.dumps({"nonce": "of an earlier launch"}))
    with pytest.raises(UsageError, match="does not answer"):
        meet(tmp_path, threading.Event(), machine(1), SOON_S)
    assert [one.exception() for one in meet_all([tmp_path] * 2)] == [None] * 2


def _folder_of_the_launch(data: Path) -> Path:
    """Where the machines of `machine` look, found by letting one of them ask."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(meet, data, stop, machine(1), 30)
        wait_for(lambda: [*(data / "nodes").glob("*/rank-1.json")], "a question")
        stop.set()
        assert isinstance(asking.exception(), Interrupted)
    (folder,) = (data / "nodes").iterdir()
    return folder


@pytest.mark.parametrize("environ", [{}, machine(0, machines=1)])
def test_nobody_asks_where_there_is_one_process(tmp_path: Path, environ: Mapping[str, str]) -> None:
    assert meet(tmp_path, threading.Event(), environ, SOON_S) is None
    assert not (tmp_path / "nodes").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_waits_can_be_stopped(tmp_path: Path, rank: int) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        meet(tmp_path, stop, machine(rank))
