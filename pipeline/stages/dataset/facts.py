"""What the card and `croissant.json` tell of a data set: one set of facts, told twice."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.core.config_policy import PolicyConfig, Role
from pipeline.stages.dataset.census import Census
from pipeline.stages.dataset.upstream import Passed
from pipeline.terms.bind import MERGED, unjudged
from pipeline.terms.notices import Notices, text_of
from pipeline.terms.rules import CONFLICTS, of_atom
from pipeline.terms.statement import Source, Statement
from pipeline.terms.verdict import Finding, Verdict


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a data set; none of them depends on a clock, a host or a path.

    Attributes:
        title: of the card.
        content: content digest of the shards, 64 hex digits.
        census: what was counted in the rows.
        statement: the sources and the rows.
        there: the sources that some row comes from, and those that have a part in all.
        descriptions: prompt set -> what its card says of it.
        hub_ids: prompt set -> id on the hub, of those that come from there.
        replayed: names of the teachers whose completions existed before; the others are models that were asked.
        policy: what it is meant for.
        verdict: of the gate.
        notices: what goes along.
        passed: what each stage let through and rejected, this one last.
        near_test: rows that left because they were near a test prompt.
    """

    title: str
    content: str
    census: Census
    statement: Statement
    there: tuple[Source, ...]
    descriptions: tuple[tuple[str, str], ...]
    hub_ids: dict[str, str]
    replayed: frozenset[str]
    policy: PolicyConfig
    verdict: Verdict
    notices: Notices
    passed: tuple[Passed, ...]
    near_test: int

    def sources(self, role: Role) -> tuple[Source, ...]:
        """The sources of one role, by name."""
        found = (source for source in self.there if source.role == role)
        return tuple(sorted(found, key=lambda source: source.name))

    @property
    def listed(self) -> tuple[Source, ...]:
        """All sources: prompts, teachers, then the rest, by name."""
        first: tuple[Role, ...] = ("prompt", "teacher")
        rest = sorted({source.role for source in self.there} - {*first})
        return tuple(source for role in (*first, *rest) for source in self.sources(role))

    @property
    def models(self) -> tuple[Source, ...]:
        """The teachers that were asked."""
        named = (source for source in self.sources("teacher") if not source.name.startswith(MERGED))
        return tuple(source for source in named if source.name not in self.replayed)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """What the policy leaves out of the verdict."""
        return unjudged(self.statement, self.policy)

    @property
    def description(self) -> str:
        """One sentence."""
        if self.models:
            how = "Prompts answered by a teacher model, filtered and deduplicated"
        else:
            how = "Prompts with completions that existed before, filtered and deduplicated"
        return f"{how}, for training a smaller model on its answers (sequence-level distillation)."

    @property
    def overridden(self) -> tuple[str, ...]:
        """A line for each override in force; what it accepts stays among the restrictions."""
        return tuple(
            f"Licence override {each.id} is active: {each.rule} ({each.atom}), {each.kind}, for which {each.person} "
            f"answers, expires {each.expires.isoformat()}: {each.reason}"
            for each in self.verdict.overrides
        )

    @property
    def displayed(self) -> tuple[str, ...]:
        """Texts that some terms want to be shown, each once."""
        asked = (due for due in self.verdict.obligations if due.atom in ("display", "product_display_if"))
        return tuple(dict.fromkeys(text for due in asked if (text := text_of(due)) is not None))

    @property
    def funnel(self) -> tuple[str, ...]:
        """The conservation table, a line a stage."""
        return tuple(_told(each) for each in self.passed)

    @property
    def limits(self) -> tuple[str, ...]:
        """What nobody should take for granted."""
        return tuple(_limits(self))


def meaning_of(finding: Finding) -> str:
    """What a restriction or a conflict says, in words."""
    return CONFLICTS[finding.atom][1] if finding.atom in CONFLICTS else of_atom(finding.atom).meaning


def _told(each: Passed) -> str:
    left = ", ".join(f"{rows} {reason}" for reason, rows in sorted(each.rejected.items()))
    return f"{each.stage}: {each.rows_in} in, {each.rows_out} out" + (f"; left: {left}" if left else "")


def _limits(facts: Facts) -> Iterator[str]:
    if facts.models:
        yield "Completions are a model's: they may be wrong, biased or invented."
    compared, rows = facts.census.verified, facts.census.rows
    if compared == 0:
        yield "No completion was compared with a reference answer."
    elif compared < rows:
        yield f"{rows - compared} of {rows} completions were not compared with a reference answer."
    if any(each.stage == "prompts" for each in facts.passed):
        yield f"{facts.near_test} prompts left because they were near a prompt of this run's own test split."
    yield "Overlap with public benchmarks was not measured."
    yield "Biases of the prompts and of the completions were not measured."
    yield "Texts were not scanned for secrets or personal data when this file was written."
