"""The small run that faults are put into: a scripted API as teacher, up to the data set, and what it must come to."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.core.errors import CorruptArtefact
from pipeline.core.store import Store
from tests.faults.scripted_server import ScriptedServer
from tests.support import write_project

RUN = ("run", "run.yaml", "--until", "dataset")
ROWS = 8
HALF_WRITTEN = re.compile(r"^\..*\.json\.\d+$")


def write_api_project(folder: Path, server: ScriptedServer, rows: int = ROWS) -> None:
    """A project whose teacher is the server; run it with `RUN`."""
    teacher = {
        "kind": "openai",
        "base_url": server.url,
        "provider": "scripted",
        "model": "m",
        "license": "MIT",
        "concurrency": 2,
    }
    sets = {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}}}
    retry = {"budget_s": 30, "first_wait_s": 0.01}
    write_project(
        folder,
        rows=rows,
        teachers={"api": teacher},
        generate={"teacher": "api", "sampling": {"max_tokens": 32, "temperature": 1.0}, "retry": retry},
        prompts={"sets": sets, "validation": 0.25, "test": 0},
    )


@dataclass(frozen=True, slots=True)
class Made:
    """What a complete run made, in a form that equal runs have in common.

    Attributes:
        contents: step -> (key, content digest), from the manifests behind the run's links.
        shards: file name -> bytes of the data set's parquet files.
        lock: bytes of the lock file.
    """

    contents: dict[str, tuple[str, str]]
    shards: dict[str, bytes]
    lock: bytes

    @classmethod
    def by(cls, project: Path) -> "Made":
        run = project / "data" / "runs" / "small"
        steps = [link for link in sorted(run.iterdir()) if link.is_symlink()]
        manifests = {link.name: json.loads((link / "manifest.json").read_bytes()) for link in steps}
        return cls(
            contents={name: (manifest["key"], manifest["content"]) for name, manifest in manifests.items()},
            shards={path.name: path.read_bytes() for path in sorted((run / "dataset" / "data").iterdir())},
            lock=(project / "run.lock.json").read_bytes(),
        )


def unsound(project: Path) -> list[str]:
    """What a reader of the project would stumble on: artefacts that are not whole, a lock file that is no JSON."""
    store = Store(project / "data" / "store")
    problems = []
    for stage, key in store.artefacts():
        try:
            store.find(stage, key)
        except CorruptArtefact as error:
            problems.append(f"visible but corrupt: {error}")
    lock = project / "run.lock.json"
    if lock.exists():
        try:
            json.loads(lock.read_bytes())
        except ValueError:
            problems.append("half a lock file")
    return problems


def leftovers(project: Path, *, could_clean: bool = True) -> list[str]:
    """Files that no complete run leaves behind: staged, half-written, locks, scratch, unfolded segments, quarantine.

    Args:
        could_clean: False where a process was killed or could not remove a file: then a lock that nobody holds and a
            half-written text beside its own place are left out, since both are without effect.
    """
    data = project / "data"
    patterns = (
        "store/.*/*",
        "responses/*/.*",
        "responses/segments/*",
        "responses/damaged/*",
        "runs/*/.*",
        "runs/*/*.lock",
    )
    found = [path for pattern in patterns for path in data.glob(pattern)]
    found += [*data.glob("work/**/*"), *project.glob(".*"), *data.glob("cache/.*")]
    found = [path for path in found if path.is_symlink() or path.is_file()]
    if not could_clean:
        found = [path for path in found if path.parent.parent != data / "work" and not HALF_WRITTEN.search(path.name)]
    return sorted(str(path.relative_to(project)) for path in found)


def overcharged(project: Path, prompts: Sequence[str]) -> list[str]:
    """What was asked more often than the attempts on record with an unknown outcome allow.

    Args:
        prompts: the prompts that arrived at the server.
    """
    unknown: Counter[bytes] = Counter()
    answered: Counter[bytes] = Counter()
    for row in attempts(project):
        unknown[row["key"]] += row["outcome"] is None
        answered[row["key"]] += row["outcome"] == "answer"
    problems = [f"{count} answers to one key" for count in answered.values() if count > 1]
    asked = Counter(prompts)
    if len(asked) != len(answered):
        problems.append(f"{len(asked)} prompts asked, {len(answered)} answered")
    if not len(asked) <= len(prompts) <= len(asked) + unknown.total():
        problems.append(f"{len(prompts)} requests for {len(asked)} prompts, {unknown.total()} of unknown outcome")
    return problems


def attempts(project: Path) -> list[dict[str, object]]:
    """The folded attempts, each once: a fold that was cut off may have written some before."""
    rows: dict[tuple[str, int], dict[str, object]] = {}
    for path in sorted((project / "data" / "responses" / "attempts").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            rows[row["segment"], row["id"]] = row
    return [*rows.values()]
