"""The distance that training and validation prompts keep from the test split, shard by shard."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.core.config_prompts import NearTest
from pipeline.core.record import PROMPT_SCHEMA, Prompt, to_table
from pipeline.core.sink import counted_reason
from pipeline.stages.prompts.order import read_prompts
from pipeline.stages.prompts.settlement import Settled
from pipeline.text.near import NearIndex


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of the prompts of a shard; both tables are in its order.

    Attributes:
        kept, rejected: tables of `PROMPT_SCHEMA`.
        reasons: one for each rejected prompt.
        kept_in: kept prompts by (prompt set, split).
        rejected_for: rejected prompts by (prompt set, reason as it is counted).
    """

    kept: pa.Table
    rejected: pa.Table
    reasons: list[str]
    kept_in: Counter[tuple[str, str]]
    rejected_for: Counter[tuple[str, str]]

    @property
    def rows(self) -> int:
        """All prompts of the shard."""
        return self.kept_in.total() + len(self.reasons)


def index_tests(settled: Iterable[Settled], near: NearTest) -> NearIndex:
    """Index the test prompts that stay."""
    tests = (
        near_text(prompt)
        for part in settled
        for prompt, reason in zip(read_prompts(part.path), part.reasons, strict=True)
        if reason is None and prompt.split == "test"
    )
    return NearIndex(tests, ngram=near.ngram, threshold=near.threshold)


def near_text(prompt: Prompt) -> str:
    """What is compared with the test split: the messages without the system's, which all prompts of a set share."""
    return "\n".join(message.content for message in prompt.prompt if message.role != "system")


def keep_distance(index: NearIndex, licenses: Mapping[str, str], part: Settled) -> Judged:
    """Keep the shard's prompts or reject them, training and validation prompts near a test prompt too.

    Args:
        index: the test prompts.
        licenses: of the prompt sets, by name.
        part: the shard.
    """
    kept, rejected, reasons = [], [], []
    for row, (prompt, reason) in enumerate(zip(read_prompts(part.path), part.reasons, strict=True)):
        if row in part.also_in:
            prompt = _join(prompt, part.also_in[row], licenses)
        if reason is None and prompt.split != "test" and index.is_near(near_text(prompt)):
            reason = "near_test"
        if reason is None:
            kept.append(prompt)
        else:
            rejected.append(prompt)
            reasons.append(reason)
    return Judged(
        kept=to_table(PROMPT_SCHEMA, kept),
        rejected=to_table(PROMPT_SCHEMA, rejected),
        reasons=reasons,
        kept_in=Counter((prompt.prompt_set, prompt.split) for prompt in kept),
        rejected_for=Counter(
            (prompt.prompt_set, counted_reason(reason)) for prompt, reason in zip(rejected, reasons, strict=True)
        ),
    )


def _join(prompt: Prompt, also_in: tuple[str, ...], licenses: Mapping[str, str]) -> Prompt:
    """The prompt under the terms of all sets that hold it."""
    joined = {*prompt.license_set, *(licenses[name] for name in also_in)}
    return replace(prompt, also_in=also_in, license_set=tuple(sorted(joined)))
