"""What the workers of this room are told, as plain values with a JSON form. Loads nothing heavy."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

from pipeline.core.config_train import StudentModel, TrainConfig
from pipeline.core.stage import Json
from pipeline.student.process import write_json

LAUNCH: Final = "PIPELINE_LAUNCH"
"""Environment variable that holds the name which the processes of a launch agreed on, see nodes.py."""

Judge: TypeAlias = Callable[[str, str | None], bool | None]
"""Whether an answer gives a reference; None where the reference cannot be compared with anything. Whoever starts a
training hands these in by their name in the config: this room knows nothing of texts (see text/verifiers.py)."""


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One training.

    Attributes:
        train: the stage's config.
        student: the model to start from.
        data: folder with `train-*.parquet` and perhaps `validation-*.parquet` (stage `dataset`).
        out: folder for `model/`, `loss.json` and `rejects/`.
        workdir: folder for scratch files.
        world_size: processes that take part.
        launch: names this start of the processes, see `launch_id`; tells fresh files in `workdir` from old ones.
        run: name of the run, for trackers.
    """

    train: TrainConfig
    student: StudentModel
    data: Path
    out: Path
    workdir: Path
    world_size: int
    launch: str
    run: str = "train"

    def write(self, path: Path) -> None:
        """Write the job as JSON, by rename."""
        value: dict[str, Json] = {
            "train": self.train.model_dump(mode="json"),
            "student": self.student.model_dump(mode="json"),
            "data": str(self.data.resolve()),
            "out": str(self.out.resolve()),
            "workdir": str(self.workdir.resolve()),
            "world_size": self.world_size,
            "launch": self.launch,
            "run": self.run,
        }
        write_json(path, value)

    @classmethod
    def read(cls, path: Path) -> "TrainJob":
        """Read what `write` wrote."""
        value = json.loads(path.read_text("utf-8"))
        return cls(
            train=TrainConfig.model_validate(value["train"]),
            student=StudentModel.model_validate(value["student"]),
            data=Path(value["data"]),
            out=Path(value["out"]),
            workdir=Path(value["workdir"]),
            world_size=value["world_size"],
            launch=value["launch"],
            run=value["run"],
        )


def launch_id(environ: Mapping[str, str] = os.environ) -> str:
    """A name that all processes of one launch share, and that another launch does not have, once they have met.

    Before that, and for processes that do not meet, it is what `launcher_name` says.
    """
    return environ.get(LAUNCH) or launcher_name(environ)


def launcher_name(environ: Mapping[str, str] = os.environ) -> str:
    """What the launcher tells all its processes. Another launch may have the same name.

    On one machine the launcher is the parent of all of them, with a process id that a container's next one has too.
    Across machines two launches with one run id and one address look alike.
    """
    told = [environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")]
    nodes = environ.get("GROUP_WORLD_SIZE", "1")
    return ":".join([*told, str(os.getppid()) if nodes == "1" else environ.get("MASTER_ADDR", "")])


# ------------------------------------------------------------------------------------------------------- answering


@dataclass(frozen=True, slots=True)
class Question:
    """Something to be answered: a conversation for the chat template, or raw text to be continued."""

    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    Attributes:
        text: the answer without special tokens.
        tokens: tokens generated, the stop token included.
        finish_reason: "stop"; "length" at the cap; "prompt_too_long" (no answer) where the model has no room left.
    """

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Exam:
    """One model and the lists of questions it answers, by name.

    Attributes:
        tensor_parallel_size: GPUs that share the model; for vLLM only.
        quantization: vLLM's, as where the model answers elsewhere; None: as its weights are stored.
        max_model_len: most tokens of prompt and answer together; None: the model's own limit.
    """

    name: str
    model: str
    revision: str | None
    questions: Mapping[str, tuple[Question, ...]]
    tensor_parallel_size: int = 1
    quantization: str | None = None
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """Which list of questions the models answer against the clock, and how many warm passes each makes."""

    questions: str
    limit: int
    passes: int


@dataclass(frozen=True, slots=True)
class AnswerJob:
    """Models that answer questions, greedily, one model after the other.

    Attributes:
        engine, precision, max_tokens, batch_size, threads: as in the config of stage `evaluate`.
        exams: the models with their questions.
        speed: None, or the measurement made with all models of `exams` loaded at once.
        answers: False measures speed alone.
    """

    engine: Literal["transformers", "vllm"]
    precision: str
    max_tokens: int
    batch_size: int
    threads: int | None
    exams: tuple[Exam, ...]
    speed: Speed | None
    answers: bool = True

    def write(self, path: Path) -> None:
        """Write the job as JSON, by rename."""
        write_json(path, cast(Json, asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "AnswerJob":
        """Read what `write` wrote."""
        value = json.loads(path.read_text("utf-8", "surrogatepass"))
        exams = tuple(_exam(exam) for exam in value.pop("exams"))
        speed = value.pop("speed")
        return cls(**value, exams=exams, speed=None if speed is None else Speed(**speed))


def _exam(value: dict[str, Any]) -> Exam:
    questions = {name: tuple(_question(item) for item in items) for name, items in value.pop("questions").items()}
    return Exam(**value, questions=questions)


def _question(value: dict[str, Any]) -> Question:
    messages = value["messages"]
    return Question(messages=None if messages is None else tuple(messages), text=value["text"])


@dataclass(frozen=True, slots=True)
class Examined:
    """What came of one model.

    Attributes:
        answers: list of questions -> answers, in order.
        parameters, bytes: of the stored weights; see weights.py.
        answers_per_second: one figure a warm pass; empty where speed was not measured.
    """

    answers: Mapping[str, tuple[Answer, ...]]
    parameters: int | None
    bytes: int | None
    answers_per_second: tuple[float, ...]


def write_examined(path: Path, examined: Mapping[str, Examined]) -> None:
    """Write the outcome of an `AnswerJob`, by rename."""
    write_json(path, cast(Json, {name: asdict(one) for name, one in examined.items()}))


def read_examined(path: Path) -> dict[str, Examined]:
    """Read what `write_examined` wrote."""
    return {name: _examined(one) for name, one in json.loads(path.read_text("utf-8", "surrogatepass")).items()}


def _examined(value: dict[str, Any]) -> Examined:
    answers = {name: tuple(Answer(**answer) for answer in items) for name, items in value["answers"].items()}
    return Examined(answers, value["parameters"], value["bytes"], tuple(value["answers_per_second"]))
