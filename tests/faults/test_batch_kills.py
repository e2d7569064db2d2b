"""`kill -9` at every step of a batch job, from its intent to its last stored line: no line is billed twice."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.teacher.batch.tracker import Tracker, all_open_jobs
from tests.faults.batch_server import BatchServer, Fate
from tests.faults.processes import running
from tests.faults.shim.preload import Fault, Host, Kind, hosting, lines
from tests.faults.shim.project import RUN, attempts
from tests.support import run_cli, write_project

ROWS = 6
PROMPTS = Counter(f"Name number {row}." for row in range(ROWS))
MOMENTS = {
    "openai": ("POST /files", "POST /batches", "GET /batches/*", "GET /files/*/content"),
    "anthropic": ("POST /messages/batches", "GET /messages/batches/*", "GET /messages/batches/*/results"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


def write_batch_project(folder: Path, server: BatchServer, kind: str = "openai", mode: str = "batch") -> None:
    """A project whose teacher is asked by jobs of four rows at most."""
    teacher = {"kind": kind, "base_url": server.url, "provider": "scripted", "model": "m", "license": "MIT"}
    sampling = {"max_tokens": 32}
    write_project(
        folder,
        rows=ROWS,
        teachers={"api": teacher | ({"api_key": None} if kind == "anthropic" else {})},
        generate={
            "teacher": "api",
            "mode": mode,
            "sampling": sampling,
            "batch": {"poll_s": 0.05, "job_requests": 4},
            "retry": {"budget_s": 20, "first_wait_s": 0.01},
        },
        prompts={"sets": {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}}}, "validation": 0, "test": 0},
    )


def reset(server: BatchServer) -> None:
    """A server that has seen nothing."""
    server.jobs.clear()
    server.files.clear()
    server.calls.clear()
    server.online.clear()
    server.billed.clear()
    server.fate, server.before, server.after = lambda number: Fate(), lambda call: None, lambda call: False


@pytest.mark.parametrize(("kind", "call"), [(kind, call) for kind, calls in MOMENTS.items() for call in calls])
def test_killed_when_a_call_took_effect_and_its_reply_never_came(
    tmp_path: Path, server: BatchServer, kind: str, call: str
) -> None:
    reset(server)
    write_batch_project(tmp_path, server, kind)
    with running(*RUN, cwd=tmp_path) as run:

        def kill(seen: str) -> bool:
            if seen == call and run.process.poll() is None:
                run.process.kill()
                return True
            return False

        server.after = kill
        assert run.end() == -9
    server.after = lambda seen: False
    again = run_cli(*RUN, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert server.billed == PROMPTS
    assert len(server.jobs) == 2, "what was made is found again, not made twice"
    assert all_open_jobs(tmp_path / "data" / "responses") == []


def test_online_mode_after_a_kill_pays_for_nothing_twice(tmp_path: Path, server: BatchServer) -> None:
    reset(server)
    server.fate = lambda number: Fate(answers=1, polls=None)
    write_batch_project(tmp_path, server)
    with running(*RUN, cwd=tmp_path) as run:
        run.await_(lambda: len(server.jobs) == 2, "two jobs")
        run.kill()
    write_batch_project(tmp_path, server, mode="online")
    again = run_cli(*RUN, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert server.billed == PROMPTS and len(server.online) == ROWS - 2


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


def strike(host: Host, server: BatchServer, project: Path, fault: Fault) -> list[str]:
    """Kill a run at a file operation, run again, and say what is wrong."""
    shutil.rmtree(project, ignore_errors=True)
    reset(server)
    write_batch_project(project, server)
    ended = host.run(project, *RUN, fault=fault)
    again = host.run(project, *RUN)
    problems = [] if again.code == 0 else [f"does not resume: {again.code} {again.stderr}"]
    if server.billed != PROMPTS:
        problems.append(f"billed {dict(server.billed - PROMPTS)} too often")
    answered = Counter(row["key"] for row in attempts(project) if row["outcome"] == "answer")
    if sorted(answered.values()) != [1] * ROWS:
        problems.append(f"answers on record: {sorted(answered.values())}")
    for folder in (project / "data" / "responses" / "batches").glob("*"):
        Tracker(folder.parent.parent, folder.name).sweep()  # as the next run in batch mode does
    left = [path.name for path in (project / "data" / "responses" / "batches").glob("*/*")]
    problems += [f"left behind: {name}" for name in left if not name.endswith((".json", ".lock"))]
    problems += ["an open job is left"] * len(all_open_jobs(project / "data" / "responses"))
    return [f"{fault.at} at {ended.what}: {problem}" for problem in problems]


def operations(host: Host, server: BatchServer, place: Path) -> list[int]:
    """Numbers of the file operations of a run that have to do with jobs or answers."""
    reset(server)
    write_batch_project(place / "traced", server)
    done = host.run(place / "traced", *RUN, trace=place / "trace")
    assert done.code == 0, done.stderr
    seen = lines(place / "trace")
    return [at for at, (_, path, _) in enumerate(seen, start=1) if "/responses/" in path]


def test_killed_at_file_operations_of_jobs_and_answers(tmp_path: Path, host: Host, server: BatchServer) -> None:
    numbers = operations(host, server, tmp_path)
    assert len(numbers) > 60
    problems = [
        problem for at in numbers[::7] for problem in strike(host, server, tmp_path / "project", Fault(Kind.KILL, at))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.soak
@pytest.mark.parametrize("kind", [Kind.KILL, Kind.KILL_HALFWAY], ids=lambda kind: kind.name.lower())
def test_killed_at_every_file_operation(tmp_path: Path, host: Host, server: BatchServer, kind: Kind) -> None:
    numbers = operations(host, server, tmp_path)
    problems = [problem for at in numbers for problem in strike(host, server, tmp_path / "project", Fault(kind, at))]
    assert not problems, "\n".join(problems)
