"""What the tests of bad input share: a project to spoil, and the three lines that every refusal ends in."""

import ctypes
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support import write_project

UNTIL_DATASET = ("run", "run.yaml", "--until", "dataset")
ANSWERED = {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}, "columns": {"answer": "completion"}}}
WITH_TEST = {"sets": ANSWERED, "validation": 0, "test": 0.3}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The three lines of an error: what happened, where, and what to do."""

    what: str
    where: str
    todo: str


def refusal(done: subprocess.CompletedProcess[str], code: int) -> Refusal:
    """The error that a command ended with.

    Raises:
        AssertionError: it ended otherwise: another exit code, a traceback, more or fewer lines, something on stdout,
            or words that only a Python programmer knows.
    """
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()[-3:]
    assert [line[:7] for line in lines] == ["error: ", "   at: ", "   do: "], done.stderr
    assert not re.search(r"\w+(Error|Exception)\b|<class|Errno", "".join(lines)), done.stderr
    return Refusal(*(line[7:] for line in lines))


def change(project: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the project's config in place."""
    path = project / "run.yaml"
    config = yaml.safe_load(path.read_text("utf-8"))
    edit(config)
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")


def write_rows(project: Path, *prompts: str) -> None:
    """Replace the project's rows by one for each prompt, with ids p0, p1, …"""
    rows = [{"id": f"p{number}", "prompt": text, "completion": f"c{number}"} for number, text in enumerate(prompts)]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def api_project(folder: Path, url: str, *, rows: int = 12, key: str | None = None, **retry: float) -> Path:
    """A project whose teacher is an API at `url`, with a time budget of one second unless `retry` says another."""
    teacher = {"kind": "openai", "base_url": url, "provider": "scripted", "model": "m", "concurrency": 4}
    if key is not None:
        teacher["api_key"] = key
    patience = {"budget_s": 1, "first_wait_s": 0.05, "max_wait_s": 0.1, "timeout_s": 10, **retry}
    write_project(folder, rows=rows, teachers={"api": teacher}, generate={"teacher": "api", "retry": patience})
    return folder


def obey_permissions() -> None:
    """For `preexec_fn`: root, too, is refused what a file's permission bits forbid."""
    drop_from_bounding_set, override, read_search = 24, 1, 2  # prctl(2), capabilities(7)
    library = ctypes.CDLL(None)
    for capability in (override, read_search):
        library.prctl(drop_from_bounding_set, capability, 0, 0, 0)


def kept(project: Path, step: str) -> list[dict[str, Any]]:
    """The rows that a step kept."""
    import pyarrow.parquet as pq

    files = sorted((project / "data" / "runs" / "small" / step / "rows").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def rejected(project: Path, step: str) -> list[str]:
    """The reasons of the rows that a step rejected."""
    import pyarrow.parquet as pq

    files = sorted((project / "data" / "runs" / "small" / step / "rejects").glob("*.parquet"))
    return [reason for file in files for reason in pq.read_table(file, columns=["reason"])["reason"].to_pylist()]
