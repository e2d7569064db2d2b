"""Lineage queries on a million rows: `why`, `trace` and `drop-source`, each as a process of its own.

`python -m benchmarks.lineage [FOLDER]` makes FOLDER (default: a temporary one) by the stages prompts … dataset on
replayed completions: of a million rows some leave in `filter`, some as duplicates, some prompts are in both sets. In
place of a training there is a folder of random weights, committed as `train` commits its model. With a FOLDER that it
made before, it measures only. The page cache is warm; a figure is the median of several calls, Python's start included.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

import pyarrow.parquet as pq

from pipeline.core.lineage import DigestCache, Manifest, path_digest, step_key
from pipeline.core.record import ShardWriter
from pipeline.core.runs import link_artefact
from pipeline.core.stage import Result
from pipeline.core.store import MANIFEST, Store
from pipeline.student.shards import REJECTS

ROOT: Final = Path(__file__).resolve().parents[1]
WEIGHTS_MB: Final = 256
"""Of the made-up model. `trace` hashes them, once: it remembers digests by inode, size and time."""

CONFIG: Final = """\
name: million
policy:
  intended_use: research
  release: {dataset: none, model: none}
  allow_unknown: true
teachers:
  first: {kind: replay, path: first.jsonl, origin: made up, license: MIT}
  second: {kind: replay, path: second.jsonl, origin: made up again, license: Apache-2.0}
student: {model: ./student, license: Apache-2.0}
prompts:
  sets:
    even: {source: {kind: jsonl, path: even.jsonl}}
    odd: {source: {kind: jsonl, path: odd.jsonl}}
  validation: 0.01
  test: 0
generate:
  teacher: first
  samples: 2
  route: {kind: sets, sets: {odd: second}}
filter: {min_chars: 8}
dataset: {title: A million rows}
train: {accelerate: accelerate.yaml}
"""


@dataclass(frozen=True, slots=True)
class Question:
    """A command to time.

    Attributes:
        name: for the table.
        arguments: after `python -m pipeline`.
    """

    name: str
    arguments: tuple[str, ...]


def make_project(folder: Path, rows: int) -> None:
    """Write config, prompts and completions, and run the stages up to `dataset`."""
    (folder / "student").mkdir(parents=True, exist_ok=True)
    (folder / "student" / "config.json").write_text("{}", "utf-8")
    (folder / "accelerate.yaml").write_text("{}\n", "utf-8")
    (folder / "run.yaml").write_text(CONFIG, "utf-8")
    for at, (prompts, teacher) in enumerate((("even", "first"), ("odd", "second"))):
        numbers = range(at, rows // 2, 2)
        _write_lines(folder / f"{prompts}.jsonl", map(_prompt, numbers))
        _write_lines(folder / f"{teacher}.jsonl", (_answer(number, sample) for number in numbers for sample in (0, 1)))
    done = subprocess.run(command("run", "run.yaml", "--until", "dataset"), cwd=folder, check=False)
    if done.returncode != 0:
        raise SystemExit("the stages failed; see above")


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _prompt(number: int) -> dict[str, str]:
    """Every thousandth is in both sets."""
    asked = number - number % 2 if number % 1000 < 2 else number
    return {"id": f"p{number:07d}", "prompt": f"What comes after {asked}?"}


def _answer(number: int, sample: int) -> dict[str, str]:
    """Every fiftieth is too short; of every fiftieth pair one is the other in capitals."""
    text = f"Number {number + 1} comes next." if sample == 0 else f"After {number} comes {number + 1}."
    if number % 50 in (2, 3):
        text = "No."
    if number % 50 in (4, 5):
        text = "Number one more." if sample == 0 else "NUMBER ONE MORE."
    return {"id": f"p{number:07d}", "completion": text}


def add_model(folder: Path) -> Path:
    """Commit random weights as the model that was trained on the run's data set; the folder a reader is given."""
    run = folder / "data" / "runs" / "million"
    if not (run / "train").exists():
        dataset = Manifest.read(run / "dataset" / MANIFEST)
        parts = {"stage": "train", "version": 1, "config": {}, "files": {}, "inputs": {"dataset": dataset.content}}
        store = Store(folder / "data" / "store")
        with store.staging("train") as staged:
            (staged / "model").mkdir()
            (staged / "model" / "config.json").write_text("{}", "utf-8")
            chance = random.Random(0)
            with (staged / "model" / "model.safetensors").open("wb") as file:
                file.writelines(chance.randbytes(2**20) for _ in range(WEIGHTS_MB))
            with ShardWriter(staged / "rejects", REJECTS):
                pass
            content = path_digest(staged / "model", DigestCache(folder / "none.json"))
            result = Result(dataset.rows_out, dataset.rows_out, {}, content)
            artefact = store.commit(staged, Manifest.of("train", step_key(parts), parts, result, {}))
            link_artefact(run, "train", artefact)
    return run / "train" / "model"


def questions(folder: Path) -> list[Question]:
    """A row of the middle of the data set, one that left, one with a duplicate, a prompt; a model; two sources."""
    run = folder / "data" / "runs" / "million"
    shards = sorted((run / "dataset" / "data").glob("train-*.parquet"))
    kept = pq.read_table(shards[len(shards) // 2], columns=["row_id"])["row_id"][17].as_py()
    short = _some_reject(run / "filter" / "rejects")["row_id"]
    model = str(add_model(folder).relative_to(folder))
    found = [
        Question("Python and the package alone (--help)", ("--help",)),
        Question("why, a row of the data set", ("why", "run.yaml", kept)),
        Question("why, by its first 8 digits", ("why", "run.yaml", kept[:8])),
        Question("why, a row that the filter rejected", ("why", "run.yaml", short)),
    ]
    if pq.read_metadata(next((run / "dedup" / "rejects").glob("*.parquet"))).num_rows:
        twice = _some_reject(run / "dedup" / "rejects")
        kept_id = str(twice["reason"]).partition(":")[2]
        found += [
            Question("why, a row that left as a duplicate", ("why", "run.yaml", str(twice["row_id"]))),
            Question("why, a row with duplicates", ("why", "run.yaml", kept_id)),
        ]
    return [
        *found,
        Question("why, a prompt", ("why", "run.yaml", "even/p0250012")),
        Question("trace", ("trace", model)),
        Question("drop-source, a teacher", ("drop-source", "second")),
        Question("drop-source, a prompt set", ("drop-source", "even")),
        Question("drop-source, a licence", ("drop-source", "MIT")),
    ]


def _some_reject(folder: Path) -> dict[str, str]:
    path = sorted(folder.glob("*.parquet"))[0]
    row: dict[str, str] = pq.read_table(path, columns=["row_id", "reason"]).slice(3, 1).to_pylist()[0]
    return row


def command(*arguments: str) -> list[str]:
    """A command of the package, whatever the current folder is."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, *arguments]


def seconds(question: Question, folder: Path, repeat: int) -> list[tuple[float, float]]:
    """Wall time and processor time of each call.

    Raises:
        SystemExit: one fails.
    """
    times = []
    for _ in range(repeat):
        start, before = time.monotonic(), _children_cpu()
        done = subprocess.run(command(*question.arguments), cwd=folder, capture_output=True, text=True, check=False)
        times.append((time.monotonic() - start, _children_cpu() - before))
        if done.returncode != 0:
            raise SystemExit(f"{question.name}: {done.stderr}")
    return times


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder if needed, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args(arguments)
    folder = (given.folder or Path(mkdtemp(prefix="lineage-"))).resolve()
    if not (folder / "data" / "runs" / "million" / "dataset").exists():
        make_project(folder, given.rows)
    print(f"{'query':44} {'median s':>9} {'most s':>8} {'CPU s':>8}")
    for question in questions(folder):
        times = seconds(question, folder, given.repeat)
        wall, cpu = zip(*times, strict=True)
        told = f"{statistics.median(wall):>9.2f} {max(wall):>8.2f} {statistics.median(cpu):>8.2f}"
        print(f"{question.name:44} {told}", flush=True)


if __name__ == "__main__":
    main()
