"""Stage `generate` run on a handful of prompts against scripted servers."""

from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.core.config import GenerateStep
from pipeline.core.record import (
    PROMPT_SCHEMA,
    Message,
    Prompt,
    Record,
    ShardWriter,
    iter_records,
    read_shards,
    to_table,
)
from pipeline.core.stage import Context, Result
from pipeline.stages import generate
from tests.faults.scripted_server import ScriptedServer, Seen
from tests.support import a_prompt, make_context

QUICK = {"budget_s": 0.6, "first_wait_s": 0.01, "max_wait_s": 0.05, "timeout_s": 5}


class Stage:
    """A folder with prompts, in which the stage runs as often as wanted; answers stay between the runs."""

    def __init__(self, folder: Path, prompts: list[Prompt]) -> None:
        self.folder, self._runs = folder, 0
        with ShardWriter(folder / "prompts" / "rows", PROMPT_SCHEMA) as writer:
            writer.write(to_table(PROMPT_SCHEMA, prompts))
        self.ctx: Context = make_context(folder, "generate")

    def run(self, servers: dict[str, ScriptedServer], checks: dict[str, Any] | None = None, **config: Any) -> Result:
        """Run with one API teacher a server, each of a provider of its own; `config` is the section `generate`."""
        return self.run_with_providers(servers, {name: name for name in servers}, checks, **config)

    def run_with_providers(
        self,
        servers: dict[str, ScriptedServer],
        providers: dict[str, str],
        checks: dict[str, Any] | None = None,
        spending: dict[str, Any] | None = None,
        **config: Any,
    ) -> Result:
        """The same, where providers have names that are not the teachers'."""
        teachers = {
            name: {
                "kind": "openai",
                "base_url": server.url,
                "provider": providers[name],
                "model": "m",
                "license": "MIT",
            }
            for name, server in servers.items()
        }
        settings = {"teacher": next(iter(servers)), "retry": QUICK, **config}
        given = {"teachers": teachers, "generate": settings, "checks": checks, "spending": spending or {}}
        self._runs += 1
        cfg = GenerateStep.model_validate(given)
        return generate.run(cfg, {"prompts": self.folder / "prompts"}, self.out, self.ctx)

    @property
    def out(self) -> Path:
        """What the last run wrote."""
        return self.folder / f"out-{self._runs}"

    @property
    def rows(self) -> list[Record]:
        """The rows that the last run kept."""
        return list(iter_records(self.out / "rows"))

    @property
    def reasons(self) -> Counter[str]:
        """Why rows left in the last run."""
        return Counter(why for table in read_shards(self.out / "rejects") for why in table["reason"].to_pylist())


def numbered(count: int, prompt_set: str = "set") -> list[Prompt]:
    """So many prompts: "p000", "p001", …"""
    names = [f"p{number:03d}" for number in range(count)]
    return [a_prompt(prompt_set=prompt_set, prompt_id=name, prompt=(Message("user", name),)) for name in names]


def cap_of(seen: Seen) -> int:
    """The cap of a request."""
    cap: int = seen.json["max_tokens"]
    return cap
