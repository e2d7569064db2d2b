"""Which prompts are asked: the test rows, validation rows for the base, and three solved training rows as examples."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config import EvaluateConfig
from pipeline.core.record import Prompt, prompts_of, read_shard, shard_paths
from pipeline.text.verifiers import VERIFIERS, Verifier

EXAMPLES: Final = 3


@dataclass(frozen=True, slots=True)
class Questions:
    """What the models are asked.

    Attributes:
        test: the scored prompts; all have a reference that an answer can be compared with.
        validation: prompts with such a reference, on which the base's way of being asked is chosen.
        examples: solved training prompts for the 3-shot way; fewer where the training split has fewer.
        rejected: test rows that are not scored, each with its reason.
        verifier: compares an answer with a reference.
    """

    test: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    examples: tuple[Prompt, ...]
    rejected: tuple[tuple[Prompt, str], ...]
    verifier: Verifier

    def judge(self, texts: Sequence[str]) -> list[bool]:
        """Whether each test prompt's answer is right."""
        return judge(self.verifier, self.test, texts)

    def three_shot_text(self, prompt: Prompt) -> str:
        """Raw text that shows the examples with their answers and asks for the prompt's."""
        shown = [f"Question: {_asked(example)}\nAnswer: {example.answer}\n\n" for example in self.examples]
        return "".join(shown) + f"Question: {_asked(prompt)}\nAnswer:"

    def without(self, refused: Mapping[tuple[str, str], str]) -> "Questions":
        """Leave out test prompts: (set, id) -> reason."""
        gone = tuple((row, refused[_id(row)]) for row in self.test if _id(row) in refused)
        kept = tuple(row for row in self.test if _id(row) not in refused)
        return replace(self, test=kept, rejected=self.rejected + gone)

    def counts(self) -> dict[str, int]:
        """Reason -> test rows that left with it."""
        return dict(sorted(Counter(reason for _, reason in self.rejected).items()))


def judge(verifier: Verifier, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[bool]:
    """Whether each prompt's answer is right."""
    pairs = zip(prompts, texts, strict=True)
    return [verifier(text, prompt.answer) is True for prompt, text in pairs]


def read_questions(rows: Path, config: EvaluateConfig) -> Questions:
    """Read and choose the prompts; the choices depend on ids and the seed alone."""
    asked = read_test_questions(rows, config)
    verifier = asked.verifier
    usable = (row for row in _split(rows, "validation") if _has_reference(verifier, row))
    solved = (row for row in _split(rows, "train") if _has_reference(verifier, row))
    return replace(
        asked,
        validation=tuple(_drawn(usable, config.base_prompts, 0)),
        examples=tuple(_drawn(solved, EXAMPLES, config.seed)),
    )


def read_test_questions(rows: Path, config: EvaluateConfig) -> Questions:
    """The test prompts alone, which are all that the teacher is asked; the others are left empty."""
    verifier = VERIFIERS[config.metric]
    test, rejected = [], []
    for row in _split(rows, "test"):
        if _has_reference(verifier, row):
            test.append(row)
        else:
            rejected.append((row, "no_reference"))
    if config.max_prompts is not None:
        chosen = {_id(row) for row in _drawn(test, config.max_prompts, 0)}
        rejected += [(row, "over_max_prompts") for row in test if _id(row) not in chosen]
        test = [row for row in test if _id(row) in chosen]
    return Questions(tuple(test), (), (), tuple(rejected), verifier)


def _split(rows: Path, split: str) -> Iterator[Prompt]:
    for path in shard_paths(rows):
        if pc.any(pc.equal(read_shard(path, ["split"])["split"], pa.scalar(split))).as_py():
            table = read_shard(path)
            yield from prompts_of(table.filter(pc.equal(table["split"], pa.scalar(split))))


def _has_reference(verifier: Verifier, prompt: Prompt) -> bool:
    return verifier("", prompt.answer) is not None


def _drawn(rows: Sequence[Prompt] | Iterator[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` rows by the hash of seed and id: adding rows never reshuffles the others."""
    return heapq.nsmallest(count, rows, key=lambda row: hashlib.sha256(f"{seed}\0{_id(row)!r}".encode()).digest())


def _id(row: Prompt) -> tuple[str, str]:
    return row.prompt_set, row.prompt_id


def _asked(prompt: Prompt) -> str:
    """The text of all turns but the model's own."""
    return "\n".join(message.content for message in prompt.prompt if message.role != "assistant")
