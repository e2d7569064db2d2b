"""What tests of publishing need: a project with a data set and a student in its store, whose sources they choose."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.lineage import Manifest, step_key
from pipeline.core.load import load_config
from pipeline.core.record import RECORD_SCHEMA, Record, to_table, write_parquet
from pipeline.core.stage import Json, Result
from pipeline.core.store import Artefact
from pipeline.runner.keys import step_parts
from pipeline.runner.run import committed_before, run_all
from pipeline.runner.session import Session, open_session
from pipeline.runner.steps import plan_steps
from pipeline.terms.records import load_registry
from pipeline.terms.statement import RowSet, Source, Statement
from pipeline.terms.texts import file_name, find_text
from tests.support import a_record, logger_is_restored, write_project

OPEN = {"intended_use": "research", "release": {"dataset": "public", "model": "public"}}
EXAONE = "LicenseRef-scancode-exaone-ai-model-1.1-nc"
LLAMA = "LicenseRef-scancode-llama-3.3-license-2024"
CARD = "---\nlicense: mit\nconfigs: []\n---\n\n# A data set\n"
HOST = "a-machine-of-ours"


@dataclass(frozen=True, slots=True)
class Made:
    """What is in the store.

    Attributes:
        folder: the project, which the test runs in.
        dataset, student: the artefacts.
    """

    folder: Path
    dataset: Artefact
    student: Artefact


def opened(*overrides: str) -> Session:
    """A session on the project in the current folder."""
    return open_session(load_config(Path("run.yaml"), overrides), Path("data"), quiet=True)


def make(
    folder: Path, *, teacher: str = "MIT", rows: Sequence[Record] = (), without: Sequence[str] = (), **files: str
) -> Made:
    """A project in `folder`, with a data set whose teacher is under a licence, and a student trained on it.

    Args:
        rows: of the data set; none given: two harmless ones.
        without: files that the data set lacks.
        files: name -> text of more files in the data set's artefact, with `__` for `/`.
    """
    model = {"model": "./student", "license": "MIT"}
    write_project(folder, policy=OPEN | {"allow_unknown": True}, student=model)
    (folder / "student" / "README.md").write_text("a card without front matter\n")
    with contextlib.chdir(folder), logger_is_restored():
        session = opened()
        run_all(session, "dedup")
        dataset = commit(session, "dataset", lambda out: write_dataset(out, teacher, rows, without, files))
        return Made(folder, dataset, commit(session, "train", write_student))


def commit(session: Session, step: str, write: Callable[[Path], dict[str, Json]]) -> Artefact:
    """Commit what `write` writes as the result of a step, with the metrics that it returns."""
    steps = {each.name: each for each in plan_steps()}
    parts = step_parts(session, steps[step], committed_before(session, step))
    with session.store.staging(step) as staged:
        metrics = write(staged)
        result = Result(2, 2, {}, "c" * 64, metrics)
        versions = {"python": "3.11", "host": HOST}
        return session.store.commit(staged, Manifest.of(step, step_key(parts), parts, result, versions))


def write_dataset(
    out: Path, teacher: str, rows: Sequence[Record], without: Sequence[str], files: dict[str, str]
) -> dict[str, Json]:
    """A data set of one shard; its metrics."""
    (out / "data").mkdir()
    table = to_table(RECORD_SCHEMA, [*rows] or [a_record(row_id="0" * 32), a_record(row_id="1" * 32)])
    write_parquet(table, out / "data" / "train-00000-of-00001.parquet")
    registry, statement = load_registry(), statement_of(teacher)
    texts = {}
    for name in {"MIT", teacher}:
        text = find_text(name, registry, None)
        texts |= {} if text is None else {f"LICENSES/{file_name(name)}": text.text}
    papers = {"README.md": CARD, "NOTICE": "n", "LICENSES.md": "l", "croissant.json": "{}", **texts}
    for name, text in (papers | {name.replace("__", "/"): text for name, text in files.items()}).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, "utf-8")
    for name in without:
        (out / name).unlink()
    return {"provenance": {"format": 1, "statement": statement.to_json(), "records": {}}}


def statement_of(teacher: str) -> Statement:
    """One teacher under a licence, and one prompt set under MIT."""
    sources = (
        Source("teacher", "main", "some/teacher", (teacher,)),
        Source("prompt", "facts", "facts", ("MIT",)),
    )
    return Statement(sources, (RowSet(2, "main", ("facts",), tuple(sorted({teacher, "MIT"}))),))


def write_student(out: Path) -> dict[str, Json]:
    """A student's folder, with files in it that nobody should get; its metrics."""
    (out / "model").mkdir()
    texts = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "weights"}
    strays = {"optimizer.pt": "x", "attempts.jsonl": "x", "README.md": "old", ".cache": "x", "log.txt": "x"}
    for name, text in (texts | strays).items():
        (out / "model" / name).write_text(text)
    (out / "loss.json").write_text("[]")
    return {"steps": 7, "tokens_seen": 1234, "final_loss": 0.5, "parameters": 42}


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> bytes of all files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def option(**values: Any) -> list[str]:
    """Options of a command: `what="model"` is `--what model`; True is a flag."""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words
