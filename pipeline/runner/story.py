"""What `why` tells of a row or a prompt: plain facts, which the command shows as text or JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core.record import Prompt, Record
from pipeline.runner.models import Model
from pipeline.runner.provenance import Judgement, Term
from pipeline.runner.rows import Place
from pipeline.teacher.history import Received, Sent


@dataclass(frozen=True, slots=True)
class Passage:
    """What a step did with a row.

    Attributes:
        step: its name.
        outcome: "kept"; "rejected" (it left here, see `reason`); "not concerned" (a row of another split); "missing"
            (the run has no result of the step); "outdated" (the result it has was made of other rows); "lost" (the
            result holds no trace of the row, which `verify` may explain).
        reason: why it was rejected.
        place: where the row lies in the step's result; None where it only passed through.
    """

    step: str
    outcome: Literal["kept", "rejected", "not concerned", "missing", "outdated", "lost"]
    reason: str | None = None
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class RequestStory:
    """What was asked of the teacher for a row.

    Attributes:
        key: request key, 64 hex digits.
        attempts: when it was sent and how that ended; none for completions that existed already.
        answers: what is stored under the key.
    """

    key: str
    attempts: tuple[Sent, ...]
    answers: tuple[Received, ...]


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """A model that was trained on the data set that holds the row.

    Attributes:
        model: the model.
        left_out: why the row itself was not trained on; None: it was.
    """

    model: Model
    left_out: str | None


@dataclass(frozen=True, slots=True)
class RowStory:
    """One answer of the teacher.

    Attributes:
        row: the row as the last step that held it in full wrote it.
        passages: what each step did, from `generate` to where the row left or the run ends.
        duplicates: ids of the rows that left as duplicates of this one, a hundred at most.
        cluster: of a row that left as a duplicate: the row that stayed, then all that left for it, a hundred at most.
        terms: what its licences are, each once, by the records that the data set was judged by.
        models: of all runs in the data folder.
        request: None where it cannot be told: the settings that made the row are not the config's any more.
    """

    row: Record
    passages: tuple[Passage, ...]
    duplicates: tuple[str, ...]
    cluster: tuple[str, ...]
    terms: tuple[Term, ...]
    models: tuple[TrainedOn, ...]
    request: RequestStory | None


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What a model answered to a test prompt: "teacher", "base" or "student"."""

    model: str
    answer: str
    correct: bool
    finish_reason: str


@dataclass(frozen=True, slots=True)
class PromptStory:
    """The prompt behind the rows.

    Attributes:
        prompt: the prompt.
        passages: what `prompts` did with it, and for the test split `evaluate`.
        source, revision, license, description: what the card of its prompt set says; "unknown" where it says nothing.
        answers: of the models, for a test prompt that was evaluated.
    """

    prompt: Prompt
    passages: tuple[Passage, ...]
    source: str
    revision: str
    license: str
    description: str
    answers: tuple[ModelAnswer, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """What `why` tells.

    Attributes:
        run: the run's name.
        prompt: None if the run has no result of `prompts` any more.
        teachers: facts about who answers, by name, as `generate` recorded them; empty before it ran.
        rows: one row, or all answers to a prompt.
        judgement: how the run's data set was judged; None: it has none, or its manifest does not say.
        next_command: makes the steps that are missing or outdated; None: there are none.
    """

    run: str
    prompt: PromptStory | None
    teachers: Mapping[str, Mapping[str, Any]]
    rows: tuple[RowStory, ...]
    judgement: Judgement | None
    next_command: str | None
