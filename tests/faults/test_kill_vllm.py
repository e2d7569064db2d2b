"""Whoever is killed, the pipeline, the watchdog or both: soon no part of a real vLLM server lives, and the same command
completes."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.core.record import iter_records
from pipeline.teacher import watchdog
from pipeline.teacher.segment import read_answers, segment_paths
from tests.faults.processes import Running, running
from tests.faults.shim.project import attempts
from tests.support import wait_for, write_project
from tests.tiny_models import make_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.soak, pytest.mark.timeout(1800)]

RUN = ("run", "run.yaml", "--until", "generate")
ROWS = 60
GONE_S = 10.0
"""Seconds after a kill in which everything has to be gone."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    teacher = {
        "kind": "vllm",
        "model": "./model",
        "license": "MIT",
        "dtype": "float32",
        "args": ["--enforce-eager", "--max-num-seqs", "4"],
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        "concurrency": 2,
        "start_timeout_s": 500,
    }
    sets = {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}}}
    write_project(
        tmp_path,
        rows=ROWS,
        teachers={"tiny": teacher},
        generate={"teacher": "tiny", "sampling": {"max_tokens": 48}},
        prompts={"sets": sets, "validation": 0.2, "test": 0},
    )
    make_tiny_model(tmp_path / "model")
    return tmp_path


def answered(project: Path) -> int:
    """How many answers are in the segments, of living and dead writers."""
    return sum(len([*read_answers(path)]) for path in segment_paths(project / "data/responses/segments"))


def records(project: Path) -> list[Path]:
    return [*(project / "data" / watchdog.RECORDS).iterdir()]


def engines(run: Running) -> list[str]:
    """Its processes that compute: those that outlive a killed API server."""
    return [line for line in run.family() if "VLLM::" in line]


def watchdog_of(run: Running) -> int:
    (line,) = [line for line in run.family() if watchdog.__file__ in line]
    return int(line.split()[0])


def await_answers(run: Running, project: Path, more: int = 3) -> None:
    """Wait until so many more answers are stored, and the server's whole family is there."""
    before = answered(project)
    assert run.await_(lambda: answered(project) >= before + more, "answers"), run.said
    assert len(engines(run)) >= 1 and len(run.family()) >= 5, run.family()


def check_gone(run: Running) -> None:
    wait_for(lambda: run.family() == [], "everything of the killed run is gone", GONE_S)


def check_complete(run: Running, project: Path) -> None:
    """It ends well, with each answer paid for once, and leaves nothing running."""
    assert run.end() == 0, run.said
    assert run.family() == []
    assert records(project) == []
    rows = [*iter_records(project / "data/runs/small/generate/rows")]
    assert len({row.prompt_id for row in rows}) == len(rows) == ROWS
    answers = Counter(row["key"] for row in attempts(project) if row["outcome"] == "answer")
    assert len(answers) == answers.total() == ROWS


def test_a_killed_pipeline_leaves_nothing_alive_and_its_command_completes(project: Path) -> None:
    with running(*RUN, cwd=project) as run:
        assert run.await_(lambda: len(run.family()) > 1, "a watchdog")
        time.sleep(random.Random(1).uniform(0, 0.3))
        run.kill()
        check_gone(run)
    with running(*RUN, cwd=project) as run:
        assert run.await_(lambda: engines(run), "the server starts its engine")
        assert answered(project) == 0
        run.kill()
        check_gone(run)
    with running(*RUN, cwd=project) as run:
        await_answers(run, project)
        run.kill()
        check_gone(run)
        assert records(project) == []
    with running(*RUN, cwd=project) as run:
        check_complete(run, project)


@pytest.mark.soak
def test_a_killed_watchdog_is_noticed_and_one_killed_with_the_pipeline_is_cleared_up_after(project: Path) -> None:
    with running(*RUN, cwd=project) as run:
        await_answers(run, project)
        old = engines(run)
        os.kill(watchdog_of(run), signal.SIGKILL)
        wait_for(lambda: not set(old) & set(run.family()), "the engine that the watchdog left is gone", GONE_S)
        await_answers(run, project)
        assert run.has("server_restarted")
        both = (run.process.pid, watchdog_of(run))
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that neither sees the other die
            for pid in both:
                os.kill(pid, number)
        run.process.wait()
        assert engines(run), "this is what has to be cleared up"
        with running("run", "run.yaml", "--until", "prompts", cwd=project) as other:
            assert other.end() == 0, other.said
            assert any("an earlier run left behind" in line for line in other.said)
        check_gone(run)
    with running(*RUN, cwd=project) as run:
        check_complete(run, project)
