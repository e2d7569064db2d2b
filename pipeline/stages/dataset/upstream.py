"""What the stages before tell of themselves: counts, teachers and reports out of the manifests of the inputs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import Manifest
from pipeline.core.stage import Json
from pipeline.core.store import MANIFEST

ORDER: Final = ("prompts", "generate", "filter", "dedup")
"""The stages before, in the order in which data flows."""
NEAR_TEST: Final = "near_test"


@dataclass(frozen=True, slots=True)
class Passed:
    """A line of the conservation table: `rows_in == rows_out + sum(rejected.values())`.

    Attributes:
        stage: its name.
        rows_in, rows_out: rows that came and went on.
        rejected: reason -> rows.
    """

    stage: str
    rows_in: int
    rows_out: int
    rejected: Mapping[str, int]

    def to_json(self) -> dict[str, Json]:
        """As plain JSON."""
        rejected: dict[str, Json] = {**dict(sorted(self.rejected.items()))}
        return {"stage": self.stage, "rows_in": self.rows_in, "rows_out": self.rows_out, "rejected": rejected}


@dataclass(frozen=True, slots=True)
class Upstream:
    """The stages before.

    Attributes:
        manifests: stage -> its manifest, of those inputs that have one; folders that a notebook made need not.
        prompt_sources: `sources.json` of the stage `prompts`.
    """

    manifests: Mapping[str, Manifest]
    prompt_sources: Mapping[str, dict[str, Json]]

    @classmethod
    def read(cls, inputs: Mapping[str, Path]) -> "Upstream":
        """Read the manifests of the inputs.

        Raises:
            CorruptArtefact: a manifest or `sources.json` is not readable.
        """
        paths = {stage: inputs[stage] / MANIFEST for stage in ORDER if stage in inputs}
        found = {stage: Manifest.read(path) for stage, path in paths.items() if path.is_file()}
        return cls(found, read_sources(inputs["prompts"]))

    @property
    def passed(self) -> tuple[Passed, ...]:
        """What each stage took in, let through and rejected."""
        return tuple(
            Passed(stage, each.rows_in, each.rows_out, each.rejected) for stage, each in self.manifests.items()
        )

    @property
    def teachers(self) -> Mapping[str, dict[str, Json]]:
        """What `generate` knows of its teachers, by name: digest of weights, file or name; kind; origin."""
        found = self._metric("generate", "teachers")
        return cast(dict[str, dict[str, Json]], found) if isinstance(found, dict) else {}

    def runs(self) -> dict[str, Json]:
        """Key, content, stage version and library versions of what was made; no host."""
        return {
            stage: {
                "key": each.key,
                "content": each.content,
                "version": each.parts.get("version"),
                "versions": {name: version for name, version in each.versions.items() if name != "host"},
            }
            for stage, each in self.manifests.items()
        }

    def decontamination(self) -> dict[str, Json]:
        """How far training prompts were kept from test prompts: the rule, and rows that left for it by prompt set."""
        prompts = self.manifests.get("prompts")
        config = {} if prompts is None else prompts.parts.get("config")
        section = config.get("prompts") if isinstance(config, dict) else None
        rule = section.get(NEAR_TEST) if isinstance(section, dict) else None
        removed = {name: _count(facts.get("rejected"), NEAR_TEST) for name, facts in self.prompt_sources.items()}
        return {"rule": rule, "removed": dict(sorted(removed.items()))}

    @property
    def near_test(self) -> int:
        """Prompts that left because they were near a test prompt."""
        return self.manifests["prompts"].rejected.get(NEAR_TEST, 0) if "prompts" in self.manifests else 0

    def scans(self) -> dict[str, Json]:
        """What was looked for in texts: `outbound` is what was found in prompts before they left for a teacher's
        machine; None: none did. Completions are scanned before they are published, by whoever publishes them."""
        return {"outbound": self._metric("generate", "outbound")}

    def _metric(self, stage: str, name: str) -> Json:
        return self.manifests[stage].metrics.get(name) if stage in self.manifests else None


def _count(counts: Json, reason: str) -> Json:
    return counts.get(reason, 0) if isinstance(counts, dict) else 0


def read_sources(prompts: Path) -> dict[str, dict[str, Json]]:
    """`sources.json` of the stage `prompts`.

    Raises:
        CorruptArtefact: it is missing or no JSON object.
    """
    path = prompts / "sources.json"
    try:
        return cast(dict[str, dict[str, Json]], dict(json.loads(path.read_text("utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        todo = "run the pipeline again: it will be rebuilt"
        raise CorruptArtefact(f"unreadable: {error}", where=str(path), todo=todo) from error
