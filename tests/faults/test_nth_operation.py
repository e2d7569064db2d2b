"""The n-th file operation of a small run fails, for every n: no wrong result, and the same command resumes."""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.scripted_server import ScriptedServer, echo
from tests.faults.shim.preload import Ended, Fault, Host, Kind, hosting
from tests.faults.shim.project import RUN, Made, leftovers, overcharged, unsound, write_api_project

KILLS = (Kind.KILL, Kind.KILL_HALFWAY)
KINDS = tuple(kind for kind in Kind if kind is not Kind.NONE)


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything a fault needs: a host, a server, a folder, and what a run without faults makes."""

    host: Host
    server: ScriptedServer
    folder: Path
    clean: Made

    def strike(self, fault: Fault) -> tuple[Ended, list[str]]:
        """Run with a fault, look at what it left, run again, and say what is wrong with all of that."""
        project = self.folder / "project"
        shutil.rmtree(project, ignore_errors=True)
        write_api_project(project, self.server)
        self.server.seen.clear()
        ended = self.host.run(project, *RUN, fault=fault)
        problems = [*_wrong_end(fault, ended), *unsound(project)]
        if ended.code == 0 and Made.by(project) != self.clean:
            problems.append("complete with another result")
        again = self.host.run(project, *RUN)
        if again.code != 0:
            problems.append(f"does not resume: {again.code}\n{again.output}")
            return ended, problems
        if Made.by(project) != self.clean:
            problems.append("resumed to another result")
        could_clean = fault.kind not in (*KILLS, Kind.DEAD_DISK) and not ended.what.startswith("unlink")
        problems += [f"left behind: {name}" for name in leftovers(project, could_clean=could_clean)]
        return ended, problems + overcharged(project, self.server.prompts)


def _wrong_end(fault: Fault, ended: Ended) -> list[str]:
    lines = ended.output.splitlines()
    problems = [f"says {word}" for word in ("Traceback", "Exception ignored", "was never") if word in ended.output]
    if ended.fired == 0 or fault.kind in KILLS:
        wanted = 0 if ended.fired == 0 else -9
        return problems + ([f"ended with {ended.code}"] if ended.code != wanted else [])
    if ended.code not in (0, 3):
        problems.append(f"ended with {ended.code}")
    if ended.code == 3 and [line[:7] for line in lines[-3:]] != ["error: ", "   at: ", "   do: "]:
        problems.append("does not end in three lines")
    return problems + ([ended.output] if problems else [])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("nth")
    (folder / "host").mkdir()
    with ScriptedServer(echo) as server, hosting(folder / "host") as host:
        write_api_project(folder / "clean", server)
        done = host.run(folder / "clean", *RUN)
        assert done.code == 0, done.output
        assert leftovers(folder / "clean") == []
        yield Bench(host, server, folder, Made.by(folder / "clean"))


def campaign(bench: Bench, fault_of: Callable[[int], Fault]) -> None:
    """Strike operation 1, 2, … until a run has none left to strike; all problems are told together."""
    failures = []
    ends: Counter[str] = Counter()
    for number in itertools.count(1):
        fault = fault_of(number)
        ended, problems = bench.strike(fault)
        failures += [f"{number} {fault.kind.name} at {ended.what}: {problem}" for problem in problems]
        if ended.fired == 0:
            break
        ends["killed" if ended.code < 0 else f"exit {ended.code}"] += 1
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"{number - 1} file operations, each failed once: {told}; {len(failures)} problems")
    assert number > 100, "a run has hundreds of operations"
    assert not failures, "\n".join(failures[:40])


def test_every_operation_fails_in_one_of_six_ways(bench: Bench) -> None:
    campaign(bench, lambda number: Fault(KINDS[number % len(KINDS)], number, coarse=True))
