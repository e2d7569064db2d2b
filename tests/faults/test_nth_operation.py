"""The n-th file operation of a small run fails, for every n: no wrong result, and the same command resumes."""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.student.checkpoints import staging
from tests.faults.scripted_server import ScriptedServer, echo
from tests.faults.shim.acts import STEPS, weights
from tests.faults.shim.preload import KILLS, KINDS, Ended, Fault, Host, Kind, hosting, lines
from tests.faults.shim.project import RUN, Made, leftovers, overcharged, unsound, write_api_project


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
            problems.append(f"does not resume: {again.code}\n{again.stderr}")
            return ended, problems
        if Made.by(project) != self.clean:
            problems.append("resumed to another result")
        could_clean = fault.kind not in (*KILLS, Kind.DEAD_DISK) and not ended.what.startswith("unlink")
        problems += [f"left behind: {name}" for name in leftovers(project, could_clean=could_clean)]
        return ended, problems + overcharged(project, self.server.prompts)


def _wrong_end(fault: Fault, ended: Ended) -> list[str]:
    lines = ended.stderr.splitlines()
    problems = [f"says {word}" for word in ("Traceback", "Exception ignored", "was never") if word in ended.stderr]
    if ended.fired == 0 or fault.kind in KILLS:
        wanted = 0 if ended.fired == 0 else -9
        return problems + ([f"ended with {ended.code}"] if ended.code != wanted else [])
    # What cannot be read may also be called a wrong path (the config) or damaged (SQLite tells no difference).
    if ended.code not in ((0, 2, 3, 5) if fault.reads else (0, 3)):
        problems.append(f"ended with {ended.code}")
    if ended.code != 0 and [line[:7] for line in lines[-3:]] != ["error: ", "   at: ", "   do: "]:
        problems.append("does not end in three lines")
    return problems + ([ended.stderr] if problems else [])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("nth")
    (folder / "host").mkdir()
    with ScriptedServer(echo) as server, hosting(folder / "host") as host:
        write_api_project(folder / "clean", server)
        done = host.run(folder / "clean", *RUN)
        assert done.code == 0, done.stderr
        assert leftovers(folder / "clean") == []
        yield Bench(host, server, folder, Made.by(folder / "clean"))


def campaign(bench: Bench, fault_of: Callable[[int], Fault], step: int = 1) -> None:
    """Strike operation 1, 1 + step, … until a run has none left to strike; all problems are told together."""
    failures = []
    ends: Counter[str] = Counter()
    for number in itertools.count(1, step):
        fault = fault_of(number)
        ended, problems = bench.strike(fault)
        failures += [f"{number} {fault.kind.name} at {ended.what}: {problem}" for problem in problems]
        if ended.fired == 0:
            break
        ends["killed" if ended.code < 0 else f"exit {ended.code}"] += 1
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"{number - 1} file operations, one in {step} failed once: {told}; {len(failures)} problems")
    assert number > 100, "a run has hundreds of operations"
    assert not failures, "\n".join(failures[:40])


@pytest.mark.timeout(3600)  # a minute of computing, which a busy machine may stretch
def test_every_seventh_operation_fails_in_one_of_six_ways(bench: Bench) -> None:
    campaign(bench, lambda number: Fault(KINDS[number // 7 % len(KINDS)], number, coarse=True), step=7)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_operation_fails_in_one_of_six_ways(bench: Bench) -> None:
    campaign(bench, lambda number: Fault(KINDS[number % len(KINDS)], number, coarse=True))


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
def test_every_single_operation_fails_in_every_way(bench: Bench, kind: Kind) -> None:
    """Also each of the hundreds of writes that make one parquet file."""
    campaign(bench, lambda number: Fault(kind, number))


@pytest.mark.soak
@pytest.mark.parametrize("kind", [Kind.IO_ERROR, Kind.DEAD_DISK], ids=lambda kind: kind.name.lower())
def test_every_single_read_fails(bench: Bench, kind: Kind) -> None:
    campaign(bench, lambda number: Fault(kind, number, reads=True))


def test_every_operation_of_a_training_s_checkpoints_fails_in_one_of_six_ways(bench: Bench, tmp_path: Path) -> None:
    strike_checkpoints(bench, tmp_path, lambda number: Fault(KINDS[number % len(KINDS)], number))


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
def test_every_operation_of_a_training_s_checkpoints_fails_in_every_way(
    bench: Bench, tmp_path: Path, kind: Kind
) -> None:
    strike_checkpoints(bench, tmp_path, lambda number: Fault(kind, number))


def strike_checkpoints(bench: Bench, place: Path, fault_of: Callable[[int], Fault]) -> None:
    """Through the functions that commit, find and remove them; what is trained here is a chain of digests."""
    folder, trace = place / "checkpoints", place / "trace"
    possible = {f"step-{step}" for step in range(1, STEPS + 1)}
    for number in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        trace.unlink(missing_ok=True)
        fault = fault_of(number)
        ended = bench.host.run(place, str(folder), act="train", fault=fault)
        told = f"{number} {fault.kind.name} at {ended.what}: {ended.stderr}"
        assert ended.code in ((0,) if ended.fired == 0 else (-9,) if fault.kind in KILLS else (0, 3)), told
        saved = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
        for step, checkpoint in saved.items():
            assert (checkpoint / "weights").read_bytes() == weights(step), f"{told}: visible and not whole"
        again = bench.host.run(place, str(folder), act="train", trace=trace)
        assert again.code == 0, f"{told}: {again.stderr}"
        assert (folder / "final").read_bytes() == weights(STEPS), told
        made = {path for name, path, _ in lines(trace) if name == "mkdir" and path != str(folder)}
        missing = range(max(saved, default=0) + 1, STEPS + 1)
        assert made == {str(staging(folder, step)) for step in missing}, f"{told}: trained what was saved"
        names = {path.name for path in folder.iterdir()}
        assert names <= {"final", *possible} and len(names) <= 4, f"{told}: left {names}"
        if ended.fired == 0:
            break
    print(f"{number - 1} file operations, each failed once: 0 problems")
    assert number > 50


# ------------------------------------------------------------------------------------------- what a power cut finds


@dataclass(slots=True)
class Unsynced:
    """What is not on the disk for certain, by the operations so far.

    Attributes:
        files: files with bytes that were not synced.
        folders: folders with entries (made, renamed, removed) that were not synced, and the entries.
    """

    files: set[str] = field(default_factory=set)
    folders: dict[str, set[str]] = field(default_factory=dict)

    def see(self, name: str, path: str, other: str) -> None:
        match name:
            case "write" | "open_truncating" | "truncate":
                self.files.add(path)
                if name == "open_truncating":
                    self.folders.setdefault(str(Path(path).parent), set()).add(path)
            case "open" | "mkdir" | "symlink":
                self.folders.setdefault(str(Path(path).parent), set()).add(path)
            case "fsync":
                self.files.discard(path)
                self.folders.pop(path, None)
            case "rename":
                self.files = {moved(file, path, other) for file in self.files}
                self.folders = {
                    moved(folder, path, other): {moved(entry, path, other) for entry in entries - {path}}
                    for folder, entries in self.folders.items()
                }
                self.folders.setdefault(str(Path(other).parent), set()).add(other)

    def under(self, path: str) -> list[str]:
        """What of a file or a folder's tree is not certain."""
        within = [file for file in (*self.files, *self.folders) if file == path or file.startswith(f"{path}/")]
        return sorted(within)


def moved(path: str, source: str, target: str) -> str:
    inside = path == source or path.startswith(f"{source}/")
    return target + path.removeprefix(source) if inside else path


def test_nothing_is_published_or_removed_before_its_bytes_are_on_the_disk(bench: Bench, tmp_path: Path) -> None:
    """By the order of the operations: a kill does not show what a power cut would, since the system lives on."""
    write_api_project(tmp_path, bench.server)
    assert bench.host.run(tmp_path, *RUN, trace=tmp_path / "trace").code == 0
    data, unsynced = tmp_path / "data", Unsynced()
    folded = [str(data / "responses" / kind) for kind in ("answers", "attempts")]
    published: list[str] = []
    for name, path, other in lines(tmp_path / "trace"):
        if name == "rename" and not is_scratch(other, data):
            assert unsynced.under(path) == [], f"{other} is visible before its bytes are on the disk"
            published.append(other)
        if name == "unlink" and path.endswith(".sqlite"):
            left = [place for folder in folded for place in unsynced.under(folder)]
            assert left == [], "a segment is removed before what was folded from it is on the disk"
        unsynced.see(name, path, other)
    places = [Path(path).relative_to(tmp_path).parts for path in published]
    steps = ["prompts", "generate", "filter", "dedup", "dataset"]
    assert [place[2] for place in places if place[:2] == ("data", "store")] == steps
    kept = sorted(place[2] for place in places if place[:2] == ("data", "responses"))
    assert [name.partition("-from-")[0] for name in kept] == ["answers", "answers", "attempts"]
    assert kept[1].endswith(".json"), "what the answers said of their model, once"
    assert [place for place in places if len(place) == 1] == [("run.lock.json",)] * 5
    entries = {Path(entry) for made in unsynced.folders.values() for entry in made}
    lasting = [data, data / "store", *(data / "store" / step for step in steps), data / "responses", *map(Path, folded)]
    uncertain = sorted(entries.intersection([*lasting, *map(Path, published)]))
    assert uncertain == [], "neither an entry nor the folders above it can go"


def is_scratch(path: str, data: Path) -> bool:
    """Whether a rename leads to what nobody reads after a power cut: staged, a cache, a link to be made again."""
    return path.startswith((f"{data}/store/.staging", f"{data}/cache", f"{data}/runs"))
