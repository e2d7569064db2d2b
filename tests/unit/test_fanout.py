"""Fan-out: results in order, a bounded window, and what happens to workers and callers when either of them stops."""

import ast
import functools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.config_fanout import InProcess, Processes
from pipeline.core.errors import ExitCode, Incomplete, Interrupted, UsageError
from pipeline.core.fanout import map_in_process, open_fanout
from pipeline.core.workers import OUR_SIGNALS, QUEUED_BYTES, WINDOW, Workers
from tests.shard_functions import (
    after_the_next,
    cube,
    doubled,
    foreign,
    generator,
    held_signals,
    large_result,
    process_id,
    refuse,
    square,
    stuck,
    untransportable,
)
from tests.support import cli_env, probe_command, read_events, wait_for, write_project

pytestmark = pytest.mark.timeout(60)  # what hangs here hung for a reason

RESUME = "python -m pipeline run configs/x.yaml"


def workers(count: int = 2, cancel: threading.Event | None = None) -> Workers:
    return Workers(count, step="filter", cancel=cancel or threading.Event(), resume_command=RESUME)


# ------------------------------------------------------------------------------------------------------ results


class TestResults:
    def test_they_are_those_of_one_process(self) -> None:
        with workers(3) as fanout:
            assert list(fanout(square, range(50))) == list(map_in_process(square, range(50)))

    def test_they_come_in_the_order_of_the_shards_whichever_ends_first(self, tmp_path: Path) -> None:
        with workers() as fanout:
            assert list(fanout(functools.partial(after_the_next, tmp_path), range(6))) == list(range(6))

    def test_they_are_computed_in_at_most_so_many_other_processes(self) -> None:
        with workers(2) as fanout:
            seen = set(fanout(process_id, range(20)))
        assert 1 <= len(seen) <= 2 and os.getpid() not in seen

    def test_a_lone_shard_is_worth_no_process(self) -> None:
        with workers() as fanout:
            assert list(fanout(process_id, [0])) == [os.getpid()]
            assert list(fanout(process_id, [])) == []

    def test_workers_stay_for_the_next_function(self) -> None:
        with workers() as fanout:
            before = set(fanout(process_id, range(20)))
            assert list(fanout(square, range(20))) == [number**2 for number in range(20)]
            assert list(fanout(cube, range(20))) == [number**3 for number in range(20)]
            assert set(fanout(process_id, range(20))) <= before

    def test_shards_and_results_may_be_larger_than_a_pipe_holds(self) -> None:
        shards = [bytes([number]) * (20 * QUEUED_BYTES) for number in range(20)]
        with workers() as fanout:
            assert list(fanout(doubled, shards)) == [shard + shard for shard in shards]

    def test_shards_are_read_no_further_ahead_than_the_window(self) -> None:
        read: list[int] = []

        def source() -> Iterator[int]:
            for number in range(100):
                read.append(number)
                yield number

        with workers(2) as fanout:
            ahead = [len(read) - number for number, _ in enumerate(fanout(square, source()))]
        assert 2 <= max(ahead) <= 2 * WINDOW

    def test_one_mapping_at_a_time(self) -> None:
        with workers() as fanout:
            first = fanout(square, range(9))
            assert next(first) == 0
            with pytest.raises(RuntimeError, match="not finished"):
                next(fanout(square, range(9)))
            assert list(first) == [number**2 for number in range(1, 9)]

    def test_the_config_says_which_kind(self) -> None:
        common = {"step": "filter", "cancel": threading.Event(), "resume_command": RESUME}
        with open_fanout(InProcess(kind="in_process"), **common) as fanout:
            assert set(fanout(process_id, range(9))) == {os.getpid()}
        with open_fanout(Processes(kind="processes", workers=1), **common) as fanout:
            assert len(set(fanout(process_id, range(9)))) == 1
        with open_fanout(Processes(kind="processes"), **common) as fanout:
            assert len(set(fanout(process_id, range(200)))) <= len(os.sched_getaffinity(0))


class TestErrors:
    def test_ours_keep_what_where_and_todo_and_come_in_their_turn(self) -> None:
        seen = []
        with workers() as fanout, pytest.raises(UsageError) as caught:
            seen.extend(fanout(functools.partial(refuse, 5), range(50)))
        assert (caught.value.what, caught.value.where) == ("row 7 is odd", "rows.jsonl:7")
        assert str(caught.value).endswith("do: make it even")
        with workers() as fanout:
            results = fanout(functools.partial(refuse, 5), range(50))
            assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]

    def test_a_bug_keeps_its_type_and_says_where_in_the_worker(self) -> None:
        with workers() as fanout, pytest.raises(ZeroDivisionError) as caught:
            list(fanout(foreign, range(9)))
        assert "in foreign" in "".join(caught.value.__notes__)

    def test_an_exception_that_cannot_travel_is_described(self) -> None:
        with workers() as fanout, pytest.raises(RuntimeError, match="Untransportable: cannot travel"):
            list(fanout(untransportable, range(9)))

    def test_neither_can_a_result(self) -> None:
        with workers() as fanout, pytest.raises(TypeError, match="pickle"):
            list(fanout(generator, range(9)))

    def test_after_an_error_the_workers_are_there_again(self) -> None:
        with workers() as fanout:
            with pytest.raises(ZeroDivisionError):
                list(fanout(foreign, range(9)))
            assert list(fanout(square, range(9))) == [number**2 for number in range(9)]


# ------------------------------------------------------------------------------------------------------ deaths


def pids(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def state(pid: int) -> str:
    """One letter of ps ("S": sleeping); "" where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_gone(pid: int) -> bool:
    return state(pid) in ("", "Z")


class TestDeathOfAWorker:
    def test_within_a_shard(self, tmp_path: Path) -> None:
        with workers() as fanout:
            results = fanout(functools.partial(stuck, tmp_path), range(9))
            assert next(results) == 0
            wait_for(lambda: pids(tmp_path), "a worker at work")
            os.kill(pids(tmp_path)[0], signal.SIGKILL)
            with pytest.raises(Incomplete) as caught:
                next(results)
        message = str(caught.value).splitlines()
        assert message[0] == "error: a worker process died: Killed"
        assert message[1].startswith("   at: step filter, process ")
        assert message[2].endswith(f"set fanout.workers below 2; resume with: {RESUME}")
        assert len(message) == 3 and caught.value.exit_code == ExitCode.INCOMPLETE
        assert all(map(is_gone, pids(tmp_path)))

    def test_in_the_middle_of_its_answer(self, tmp_path: Path) -> None:
        """Half a message is in the pipe; waiting for the rest of it would take for ever."""
        with workers() as fanout:
            results = fanout(functools.partial(large_result, tmp_path), range(9))
            next(results)
            wait_for(lambda: len(pids(tmp_path)) == 2, "both workers at work")
            for pid in pids(tmp_path):  # nobody reads, so their writes stop when the pipes are full
                wait_for(lambda pid=pid: all(state(pid) == "S" for _ in range(200)), "a worker that waits")
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(Incomplete, match="a worker process died"):
                list(results)


class TestEndOfTheParent:
    def test_cancelled(self, tmp_path: Path) -> None:
        cancel = threading.Event()
        with workers(cancel=cancel) as fanout:
            results = fanout(functools.partial(stuck, tmp_path), range(9))
            next(results)
            wait_for(lambda: len(pids(tmp_path)) == 2, "both workers at work")
            cancel.set()
            with pytest.raises(Interrupted) as caught:
                next(results)
        assert (caught.value.where, caught.value.todo) == ("step filter", f"resume with: {RESUME}")
        assert all(map(is_gone, pids(tmp_path)))

    def test_a_consumer_that_stops_ends_what_nobody_wants(self, tmp_path: Path) -> None:
        with workers() as fanout:
            results = fanout(functools.partial(stuck, tmp_path), range(9))
            next(results)
            wait_for(lambda: len(pids(tmp_path)) == 2, "both workers at work")
            results.close()  # type: ignore[attr-defined]
            assert all(map(is_gone, pids(tmp_path)))
            assert list(fanout(square, range(9))) == [number**2 for number in range(9)]

    def test_the_end_of_the_block_ends_the_workers(self) -> None:
        with workers() as fanout:
            seen = set(fanout(process_id, range(9)))
            assert not any(map(is_gone, seen))
        assert all(map(is_gone, seen))

    def test_killed(self, tmp_path: Path) -> None:
        """Workers in the middle of a shard that takes ten minutes do not finish it."""
        with start_parent(tmp_path) as parent:
            parent.kill()
        wait_for(lambda: all(map(is_gone, pids(tmp_path))), "the end of the workers", 10)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_to_all_processes_of_the_group_is_the_parents_to_answer(
        self, tmp_path: Path, number: signal.Signals
    ) -> None:
        parent = start_parent(tmp_path)
        os.killpg(parent.pid, number)
        _, stderr = parent.communicate(timeout=60)
        assert stderr.splitlines()[0] == "error: stopped by a signal"
        assert "Traceback" not in stderr and parent.returncode == ExitCode.INTERRUPTED
        wait_for(lambda: all(map(is_gone, pids(tmp_path))), "the end of the workers", 10)

    def test_workers_are_deaf_to_these_signals_from_their_start(self) -> None:
        with workers() as fanout:
            assert all(set(OUR_SIGNALS) <= held for held in fanout(held_signals, range(9)))
        assert not set(OUR_SIGNALS) & held_signals(0)


PARENT = """
    import functools, signal, sys, threading
    from pathlib import Path
    from pipeline.core.errors import PipelineError
    from pipeline.core.workers import OUR_SIGNALS, Workers
    from tests.shard_functions import stuck

    if __name__ == "__main__":
        cancel = threading.Event()
        for number in OUR_SIGNALS:
            signal.signal(number, lambda *_: cancel.set())
        try:
            with Workers(2, step="filter", cancel=cancel, resume_command="") as fanout:
                list(fanout(functools.partial(stuck, Path(sys.argv[1])), range(9)))
        except PipelineError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
"""


def start_parent(folder: Path) -> subprocess.Popen[str]:
    """A process of its own group with two workers, each in the middle of a shard."""
    script = folder / "parent.py"
    script.write_text(textwrap.dedent(PARENT), "utf-8")
    command = [sys.executable, str(script), str(folder)]
    parent = subprocess.Popen(command, env=cli_env(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(pids(folder)) == 2 or parent.poll() is not None, "both workers at work")
    assert parent.poll() is None, parent.communicate()[1]
    return parent


class TestARun:
    """The whole program on a stage that fans out."""

    def start(self, folder: Path, function: str) -> subprocess.Popen[str]:
        write_project(folder)
        body = f"""
            import functools
            from tests.shard_functions import process_id, stuck
            found = list(ctx.fanout({function}, range(9)))
            ctx.events.emit("found", found=found, own=os.getpid())
            return result
        """
        fanout = ("--set", "fanout.kind=processes", "--set", "fanout.workers=2")
        command = probe_command(folder, body, "run", "run.yaml", *fanout)
        return subprocess.Popen(command, cwd=folder, env=cli_env(), stderr=subprocess.PIPE, text=True)

    def test_its_stages_are_given_what_the_config_says(self, tmp_path: Path) -> None:
        with self.start(tmp_path, "process_id") as run:
            _, stderr = run.communicate()
        assert run.returncode == 0, stderr
        events = [event for path in (tmp_path / "data" / "runs").iterdir() for event in read_events(path)]
        [found] = [event for event in events if event["event"] == "found"]
        assert 1 <= len(set(found["found"])) <= 2 and found["own"] not in found["found"]

    def test_a_killed_worker_ends_it_resumable_in_three_lines(self, tmp_path: Path) -> None:
        with self.start(tmp_path, "functools.partial(stuck, Path('.'))") as run:
            wait_for(lambda: len(pids(tmp_path)) == 2 or run.poll() is not None, "both workers at work")
            os.kill(pids(tmp_path)[0], signal.SIGKILL)
            _, stderr = run.communicate()
        assert run.returncode == ExitCode.INCOMPLETE
        assert re.search(
            r"\nerror: a worker .*\n   at: step probe, process \d+\n   do: .*--set fanout.workers=2\n$", stderr
        )
        assert all(map(is_gone, pids(tmp_path)))


def loaded_by(module: str, *asked: str) -> list[str]:
    """Which of the modules asked for are loaded after an import."""
    code = f"import sys, {module}; print([name for name in {asked} if name in sys.modules])"
    found = subprocess.check_output([sys.executable, "-c", code], env=cli_env(), text=True)
    return list(ast.literal_eval(found))


def test_without_processes_nothing_of_them_is_loaded() -> None:
    assert loaded_by("pipeline.core.fanout", "multiprocessing", "pipeline.core.workers", "pyarrow") == []


def test_a_worker_loads_only_what_its_function_needs() -> None:
    assert loaded_by("pipeline.core.workers", "pydantic", "pyarrow", "numpy") == []
