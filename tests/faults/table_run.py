"""A run against a scripted server, through the command line, and everything that it leaves behind."""

import contextlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import cli
from pipeline.core.record import Record, iter_records, read_shards
from pipeline.teacher.segment import read_attempts
from tests.faults.scripted_server import ScriptedServer
from tests.faults.shim.project import attempts
from tests.support import logger_is_restored, write_project

QUICK = {"budget_s": 20, "first_wait_s": 0.005, "max_wait_s": 0.02, "timeout_s": 5}
SHORT = {**QUICK, "budget_s": 0.5}
PRICE = {"input": 2.5, "output": 10}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: the exit code.
        said: everything on stderr.
        printed: everything on stdout.
    """

    code: int
    said: str
    printed: str

    @property
    def last(self) -> list[str]:
        """The three lines of an error: what, where, what to do."""
        return self.said.splitlines()[-3:]


@dataclass(frozen=True, slots=True)
class Project:
    """A folder with a config whose teacher is a scripted server; each prompt's text is its id too."""

    folder: Path

    @classmethod
    def write(
        cls,
        folder: Path,
        server: ScriptedServer | str,
        prompts: Iterable[str],
        *,
        retry: Mapping[str, float] = QUICK,
        teacher: Mapping[str, Any] | None = None,
        generate: Mapping[str, Any] | None = None,
        **sections: Any,
    ) -> "Project":
        """Write it.

        Args:
            server: it, or a base URL.
            teacher, generate: added to these parts of the config.
        """
        url = server if isinstance(server, str) else server.url
        api = {"kind": "openai", "base_url": url, "provider": "scripted", "model": "m", "license": "MIT"}
        sampling = {"max_tokens": 32}
        write_project(
            folder,
            teachers={"api": {**api, "concurrency": 8, "price": PRICE, **(teacher or {})}},
            generate={"teacher": "api", "retry": {**retry}, "sampling": sampling, **(generate or {})},
            **sections,
        )
        lines = [json.dumps({"id": prompt, "prompt": prompt}) for prompt in prompts]
        (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return cls(folder)

    def change(self, **sections: Any) -> None:
        """Replace whole sections of the config."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text("utf-8")), **sections}), "utf-8")

    def run(self, *arguments: str, until: str = "generate") -> Ended:
        """`python -m pipeline run run.yaml --until …` inside this process."""
        return self.call("run", "run.yaml", "--until", until, *arguments)

    def call(self, *arguments: str) -> Ended:
        """Any command inside this process."""
        said, printed = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(printed),
            logger_is_restored(),
        ):
            code = cli.main([*arguments])
        return Ended(code, said.getvalue(), printed.getvalue())

    def texts(self) -> dict[str, str]:
        """Prompt -> completion, or the reason for which it was rejected."""
        kept = {record.prompt_id: record.completion[0].content for record in self.records()}
        return kept | self.rejects()

    def records(self, step: str = "generate") -> list[Record]:
        """The rows of a step."""
        return [*iter_records(self.folder / "data/runs/small" / step / "rows")]

    def rejects(self, step: str = "generate") -> dict[str, str]:
        """Prompt -> reason."""
        folder = self.folder / "data/runs/small" / step / "rejects"
        rows = [row for table in read_shards(folder) for row in table.to_pylist()] if folder.exists() else []
        return {row["prompt_id"]: row["reason"] for row in rows}

    def manifest(self, step: str = "generate") -> dict[str, Any]:
        """The manifest of a step."""
        path = self.folder / "data/runs/small" / step / "manifest.json"
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found

    def has(self, step: str) -> bool:
        """Whether a step was committed."""
        return (self.folder / "data/runs/small" / step).exists()

    @property
    def segments(self) -> list[Path]:
        """The SQLite files of answers and attempts that no complete run has folded yet."""
        return sorted((self.folder / "data/responses/segments").glob("*.sqlite"))

    def attempts(self) -> list[dict[str, Any]]:
        """The attempts on record, in their order, of runs that were complete and of those that were not."""
        found: list[dict[str, Any]] = attempts(self.folder)
        found += [asdict(attempt) for path in self.segments for attempt in read_attempts(path)]
        return sorted(found, key=lambda row: (row["sent_ms"], row["id"]))

    def outcomes(self) -> list[Any]:
        """How the attempts ended, in their order."""
        return [row["outcome"] for row in self.attempts()]

    def billed(self) -> list[Any]:
        """What the attempts came to in nano-dollars, in their order; None: unknown, so that the worst case counts."""
        return [row["cost"] for row in self.attempts()]
