"""The pipeline is killed again and again, at random moments inside its stages: in the end nothing shows it.

The server's answer is a function of the request, so that an uninterrupted run says what has to come out.
"""

import hashlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.core.lineage import Manifest, file_sha256
from pipeline.core.record import iter_records
from tests.faults.processes import Running, running
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.faults.shim.project import Made, attempts, leftovers, unsound
from tests.support import wait_for, write_project
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
RUN = ("run", "run.yaml", "--until", "train")
STEPS = ("prompts", "generate", "filter", "dedup", "dataset", "train")
PROMPTS = 2000
SAMPLES = 2
REQUESTS = PROMPTS * SAMPLES
TRAIN_STEPS = 12
TRIES = 20
ORPHAN_S = 60.0
"""Seconds after which nothing lives that a killed run started. A launcher of a worker is no danger, but it has to
import torch before it starts the worker that sees that it is not wanted."""


def answer_of(prompt: str) -> tuple[str, str]:
    """(text, finish reason): short and to be trained, long (work for the stages), refused, or cut."""
    number = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
    words = random.Random(number)
    match number % 20:
        case 0:
            return "I'm sorry, but I cannot help with that.", "stop"
        case 1:
            return f"It is {number % 1000} and", "length"
        case kind if kind < 8:
            return " ".join(f"word{words.randrange(10_000)}" for _ in range(150)), "stop"
        case _:
            return f"It is {number % 1000}.", "stop"


def answer(seen: Seen, _: int) -> Act:
    text, finish = answer_of(seen.prompt)
    return completion(text, finish=finish)


def write_full_project(folder: Path, server: ScriptedServer) -> None:
    """A run from prompts to a trained student."""
    api = {"kind": "openai", "base_url": server.url, "provider": "scripted", "model": "m", "license": "MIT"}
    training = {
        "accelerate": str(ROOT / "configs" / "accelerate" / "cpu.yaml"),
        "precision": "float32",
        "threads": 1,
        "batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 1e-3,
        "max_length": 64,
        "max_steps": TRAIN_STEPS,
        "log_steps": 1,
        "evaluation": {"rows": 0},
        "checkpoint": {"steps": 3},
    }
    write_project(
        folder,
        rows=PROMPTS,
        teachers={"api": api},
        prompts={"sets": {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}}}, "validation": 0.3, "test": 0},
        generate={"teacher": "api", "samples": SAMPLES, "sampling": {"temperature": 1.0}},
        train=training,
    )
    make_tiny_model(folder / "student")


# ------------------------------------------------------------------------------------------------ when to kill


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill.

    Attributes:
        step: the step to be in.
        name: for the table.
        has_come: whether it is time; looked at again and again.
        wait_s: seconds to wait then.
        all_of_it: kill everything that the run has started, as a lack of memory or of power does; else only the
            pipeline's own process.
    """

    step: str
    name: str
    has_come: Callable[[Running], object]
    wait_s: float = 0.0
    all_of_it: bool = False


@dataclass(frozen=True, slots=True)
class Bench:
    """The server, and an uninterrupted run with the seconds that each of its steps took."""

    server: ScriptedServer
    folder: Path
    seconds: dict[str, float]

    @property
    def whole(self) -> Path:
        """The uninterrupted run's project."""
        return self.folder / "whole"


def moments(bench: Bench, project: Path, before: int, dice: random.Random) -> list[Moment]:
    """Twenty moments, three to five in each step, in the order in which a run comes to them.

    Args:
        project: what will be killed.
        before: requests that the server saw before.
    """
    return [
        *_in_generate(bench.server, project, before, dice),
        *_among_rows("filter", "rows", 2, bench, project, dice),
        *_among_rows("dedup", "rows", 2, bench, project, dice),
        *_among_rows("dataset", "data", 1, bench, project, dice),
        *_in_train(project, dice),
    ]


def _begun(step: str) -> Callable[[Running], object]:
    return lambda run: run.has("step_started", step)


def _exists(project: Path, step: str, pattern: str) -> Callable[[Running], object]:
    """Once this run is in the step: an earlier run that was killed may have left such a file behind."""
    return lambda run: next(project.glob(pattern), None) is not None and run.has("step_started", step)


def _in_generate(server: ScriptedServer, project: Path, before: int, dice: random.Random) -> Iterator[Moment]:
    def answered(count: int) -> Callable[[Running], object]:
        return lambda _: len(server.seen) - before >= count

    folding = _exists(project, "generate", "data/responses/answers/.*.tmp")
    writing = _exists(project, "generate", "data/store/.staging/generate-*/rows/*")
    yield Moment("generate", "before the first request", _begun("generate"))
    for count in sorted(dice.sample(range(1, REQUESTS * 9 // 10), 2)):
        yield Moment("generate", f"after {count} requests", answered(count))
    yield Moment("generate", "while answers are folded", folding)
    yield Moment("generate", "while rows are written", writing, dice.uniform(0, 0.05))


def _among_rows(
    step: str, rows: str, sometimes: int, bench: Bench, project: Path, dice: random.Random
) -> Iterator[Moment]:
    """In a step that reads and writes rows: some times at random, once while it writes, once while it commits."""
    for _ in range(sometimes):
        yield Moment(step, "at some time", _begun(step), dice.uniform(0, 0.7) * bench.seconds[step])
    yield Moment(step, "while it writes", _exists(project, step, f"data/store/.staging/{step}-*/{rows}/*"))
    yield Moment(step, "while it commits", _exists(project, step, f"data/store/.staging/{step}-*/manifest.json"))


def _in_train(project: Path, dice: random.Random) -> Iterator[Moment]:
    checkpointing = _exists(project, "train", "data/work/train/*/checkpoints/.step-*/*")
    saving = _exists(project, "train", "data/store/.staging/train-*/model*")
    worker = Moment("train", "before the first step", lambda run: run.has("worker_started"), dice.uniform(0, 4))
    points = dice.randrange(1, 5)
    yield worker
    yield Moment("train", "during a checkpoint", checkpointing, all_of_it=True)
    yield Moment("train", f"after {points} more steps", lambda run: run.has("train_point", count=points))
    yield Moment("train", "after the last step", saving, all_of_it=dice.random() < 0.5)


# --------------------------------------------------------------------------------------------------- the loop


@dataclass(slots=True)
class Loop:
    """Runs the command until a moment comes, kills it, and remembers where that was.

    Attributes:
        killed: (when it was to be killed, the step that it was in), for each kill.
        redone: steps whose artefact was taken away, since they were over before the kill.
        families: the killed runs with the time of their death.
    """

    project: Path
    killed: list[tuple[Moment, str | None]]
    redone: Counter[str]
    families: list[tuple[float, Running]]
    stack: ExitStack

    def kill_at(self, moment: Moment) -> None:
        """Kill one run at a moment. A step that was over too soon loses its artefact and is done again."""
        for _ in range(TRIES):
            run = self.stack.enter_context(running(*RUN, cwd=self.project))
            if run.await_(lambda run=run: moment.has_come(run), f"{moment.step}: {moment.name}"):
                time.sleep(moment.wait_s)
            assert run.process.poll() in (None, 0), run.said
            self._kill(run, moment)
            assert unsound(self.project) == []
            if run.inside == moment.step:
                self.killed.append((moment, run.inside))
                return
            for artefact in self.project.glob(f"data/store/{moment.step}/*"):
                shutil.rmtree(artefact)
                self.redone[moment.step] += 1
        raise AssertionError(f"{TRIES} runs were killed outside of {moment.step}, instead of {moment.name}")

    def _kill(self, run: Running, moment: Moment) -> None:
        if moment.all_of_it:
            run.kill_family()
        run.kill()
        self.families.append((time.monotonic(), run))
        self.check_orphans()

    def check_orphans(self) -> None:
        """Nothing of a killed run lives for long, whatever other runs are doing."""
        for died, run in self.families:
            assert time.monotonic() - died < ORPHAN_S or run.family() == []


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("kill-loop")
    with ScriptedServer(answer) as server:
        write_full_project(folder / "whole", server)
        with running(*RUN, cwd=folder / "whole") as run:
            assert run.end() == 0, run.said
            yield Bench(server, folder, _seconds(run))


def _seconds(run: Running) -> dict[str, float]:
    def at(event: str, step: str) -> float:
        (one,) = [each for each in run.look() if (each["event"], each.get("step")) == (event, step)]
        return datetime.fromisoformat(one["time"]).timestamp()

    return {step: at("step_committed", step) - at("step_started", step) for step in STEPS}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 8))])
def test_twenty_kills_leave_no_trace(
    bench: Bench, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    project, before = tmp_path / "killed", len(bench.server.seen)
    write_full_project(project, bench.server)
    with ExitStack() as stack:
        loop = Loop(project, [], Counter(), [], stack)
        for moment in moments(bench, project, before, random.Random(seed)):
            loop.kill_at(moment)
        last = stack.enter_context(running(*RUN, cwd=project))
        assert last.end() == 0, last.said
        asked = Counter(bench.server.prompts[before:])
        with capsys.disabled():
            print(table(seed, loop, asked, project))
        wait_for(lambda: not any(run.family() for _, run in loop.families), "nothing lives", ORPHAN_S)
    kills = Counter(step for _, step in loop.killed)
    assert kills.total() == 20 and min(kills[step] for step in STEPS[1:]) >= 3
    assert Made.by(project) == Made.by(bench.whole), "rows, bytes and weights are those of the uninterrupted run"
    assert weights(project) == weights(bench.whole)
    assert leftovers(project, could_clean=False) == []
    check_requests(project, asked)
    check_rows(project)


def weights(project: Path) -> str:
    return file_sha256(project / "data/runs/small/train/model/model.safetensors")


def check_requests(project: Path, asked: Counter[str]) -> None:
    """What was asked twice is on record as an attempt whose outcome is unknown, and every answer is stored once."""
    outcomes: dict[bytes, Counter[str | None]] = {}
    for row in attempts(project):
        outcomes.setdefault(row["key"], Counter())[row["outcome"]] += 1
    unknown = sum(each[None] for each in outcomes.values())
    assert len(outcomes) == REQUESTS
    assert {each["answer"] for each in outcomes.values()} == {1}
    assert REQUESTS <= asked.total() <= REQUESTS + unknown
    assert len(asked) == PROMPTS and min(asked.values()) >= SAMPLES


def check_rows(project: Path) -> None:
    """Each row holds the server's answer, none is there twice, and each step accounts for all of its rows."""
    run = project / "data/runs/small"
    records = [*iter_records(run / "generate/rows")]
    assert len({record.row_id for record in records}) == len(records) == REQUESTS
    for record in records:
        (question,), (reply,) = record.prompt, record.completion
        assert (reply.content, record.finish_reason) == answer_of(question.content)
    shipped = pq.read_table(run / "dataset/data", columns=["row_id", "prompt", "completion"]).to_pylist()
    assert len({row["row_id"] for row in shipped}) == len(shipped) > 0
    for row in shipped:
        assert row["completion"][0]["content"] == answer_of(row["prompt"][0]["content"])[0]
    before = PROMPTS
    for step in STEPS:
        manifest = Manifest.read(run / step / "manifest.json")
        assert manifest.rows_in == manifest.rows_out + sum(manifest.rejected.values())
        assert step in ("generate", "train") or manifest.rows_in == before
        before = manifest.rows_out


def table(seed: int, loop: Loop, asked: Counter[str], project: Path) -> str:
    """Kills by step, and what was asked."""
    unknown = sum(row["outcome"] is None for row in attempts(project))
    kills = Counter(step for _, step in loop.killed)
    lines = [f"\nseed {seed}: {sum(kills.values())} kills"]
    for step in STEPS[1:]:
        names = ", ".join(moment.name for moment, inside in loop.killed if inside == step)
        lines.append(f"  {step:9} {kills[step]:>3}  ({names}; {loop.redone[step]} missed)")
    told = f"{asked.total():,} requests, {REQUESTS:,} of them unique, {unknown:,} attempts of unknown outcome"
    return "\n".join([*lines, f"  {told}"])
