"""The sources of a data set or a model: who gave what, under which terms; what gates judge and manifests carry."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, cast

from pipeline.core.config_policy import Role
from pipeline.core.lineage import digest_json
from pipeline.core.stage import Json

PROVENANCE: Final = "provenance"
"""Where a data set's manifest says its statement, and how it was judged, among its metrics."""


@dataclass(frozen=True, slots=True)
class Source:
    """One thing whose terms count.

    Attributes:
        role: what it does for the student.
        name: its name in the config: a teacher's, a prompt set's, "student".
        what: what it is, as a person would say it: `openai:gpt-4o`, a hub id, a file's origin.
        licenses: licence expressions, hub ids or ids of term records, as declared or found, its own and those of all
            models it was made from; "unknown" where nobody said. All of them hold together.
        family: of models, as `same_family` compares them ("llama", "qwen"); None: unknown.
        facts: what is known of it besides, for the manifest: hashes of weights, tokenizer and chat template, revision,
            origin, returned models.
    """

    role: Role
    name: str
    what: str
    licenses: tuple[str, ...]
    family: str | None = None
    facts: Mapping[str, Json] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, str]:
        """Role and name."""
        return self.role, self.name

    @property
    def bearer(self) -> str:
        """`teacher:main`."""
        return f"{self.role}:{self.name}"

    def to_json(self) -> dict[str, Json]:
        """As plain JSON."""
        return cast(dict[str, Json], {**asdict(self), "licenses": [*self.licenses], "facts": {**self.facts}})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Source":
        """From plain JSON.

        Raises:
            TypeError, KeyError: it is none.
        """
        return cls(**{**value, "licenses": tuple(value["licenses"]), "facts": {**value["facts"]}})


def prompt_source(name: str, source: str, revision: str, license: str) -> Source:
    """A set of prompts by what its card, or what `prompts` wrote down of it, says; "unknown" where that says nothing.

    Args:
        source, revision: where its rows come from, and which version of that.
    """
    return Source("prompt", name, source, (license,), facts={"source": source, "revision": revision})


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows that come from the same sources under the same licences.

    Attributes:
        rows: how many.
        teacher: name of their teacher.
        prompt_sets: names of the sets that their prompts are in.
        licenses: their column `license_set`.
    """

    rows: int
    teacher: str
    prompt_sets: tuple[str, ...]
    licenses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """All sources of a data set, and of the model that is trained on it.

    Attributes:
        sources: each once.
        row_sets: the rows that are there; none before there are rows.
    """

    sources: tuple[Source, ...]
    row_sets: tuple[RowSet, ...] = ()

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(rows.rows for rows in self.row_sets)

    @property
    def sha256(self) -> str:
        """64 hex digits over the sources, without counts of rows."""
        return digest_json([source.to_json() for source in sorted(self.sources, key=lambda source: source.place)])

    def to_json(self) -> dict[str, Json]:
        """As plain JSON, in one order."""
        rows = sorted(self.row_sets, key=lambda each: (each.teacher, each.prompt_sets, each.licenses))
        return {
            "sources": [source.to_json() for source in sorted(self.sources, key=lambda source: source.place)],
            "row_sets": [
                {
                    "rows": each.rows,
                    "teacher": each.teacher,
                    "prompt_sets": [*each.prompt_sets],
                    "licenses": [*each.licenses],
                }
                for each in rows
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Statement":
        """From plain JSON.

        Raises:
            TypeError, KeyError: it is none.
        """
        rows = [
            RowSet(each["rows"], each["teacher"], tuple(each["prompt_sets"]), tuple(each["licenses"]))
            for each in value["row_sets"]
        ]
        return cls(tuple(Source.from_json(each) for each in value["sources"]), tuple(rows))
