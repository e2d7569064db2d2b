"""The base, asked in the way that serves it best: a model that was never taught the chat format deserves another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pipeline.stages.evaluate.answers import Answered, ModelAnswers
from pipeline.stages.evaluate.questions import Questions, judge
from pipeline.text.scoring import accuracy

WAYS: Final = ("strict", "first_line", "three_shot", "three_shot_first_line")
"""The whole answer through the chat template; its first line; what follows three solved examples as raw text, up to
where the model goes on with a question of its own; the first line of that. Of equally good ways the first wins."""


@dataclass(frozen=True, slots=True)
class BestWay:
    """How the base is asked.

    Attributes:
        name: one of `WAYS`.
        accuracies: way -> accuracy on the validation prompts; empty where none has a reference (then: strict).
        answered: the answers to the test prompts; None where they have to be asked for yet (3-shot), see `read_shown`.
        strict_accuracy: on the test prompts, asked as the student is.
    """

    name: str
    accuracies: dict[str, float]
    answered: Answered | None
    strict_accuracy: float


def choose_way(base: ModelAnswers, questions: Questions) -> BestWay:
    """Choose by accuracy on the validation prompts; the test prompts have no say."""
    strict = base.of("test")
    shown = base.of("validation_three_shot")
    ways = {
        "strict": base.of("validation"),
        "first_line": base.of("validation").first_lines(),
        **{way: read_shown(way, shown) for way in ("three_shot", "three_shot_first_line")},
    }
    accuracies = {name: _accuracy(questions, ways[name].texts) for name in WAYS} if questions.validation else {}
    name = max(WAYS, key=lambda way: accuracies.get(way, 0.0))
    answered = {"strict": strict, "first_line": strict.first_lines()}.get(name)
    return BestWay(name, accuracies, answered, accuracy(questions.judge(strict.texts)))


def read_shown(way: str, shown: Answered) -> Answered:
    """What of the whole answers behind the examples is compared with the references, in either of the 3-shot ways."""
    answers = shown.before_next_question()
    return answers.first_lines() if way == "three_shot_first_line" else answers


def _accuracy(questions: Questions, texts: Sequence[str]) -> float:
    return accuracy(judge(questions.verifier, questions.validation, texts))
