"""Config of the stage `prompts`: sources of prompts, their columns, the split."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.config_api import if_given
from pipeline.core.config_base import OPERATIONAL, ConfigModel, CountedBy, FilePath, Name, Share


class Columns(ConfigModel):
    """Which column of the source holds what; a name that is None is not read."""

    id: str | None = "id"
    """Unique id of the prompt inside its set. None: the sha256 of the rendered prompt is the id."""
    prompt: str = "prompt"
    """Text of the user's message, or a list of {role, content} messages. Not read when `template` is given."""
    answer: str | None = None
    """Reference answer, for verification and evaluation; never shown to a teacher or student. Numbers and booleans are
    read as the texts that JSON writes for them (true, false)."""
    group_id: str | None = None
    """Prompts with one group id share a split. None: the normalised prompt is the group."""
    task: str | None = None
    """Kind of task, for the evaluation's breakdown."""
    tools: Annotated[str | None, CountedBy(if_given)] = None
    """Functions that the prompt offers to the teacher: a list of definitions in OpenAI's form, or JSON text of one."""


class FileSource(ConfigModel):
    """Prompts from a local file."""

    kind: Literal["jsonl", "csv", "parquet"]
    """File format."""
    path: FilePath
    """The file."""


class HubSource(ConfigModel):
    """Prompts from a data set on the Hugging Face hub, read with `datasets.load_dataset`."""

    kind: Literal["hub"]
    """A hub data set."""
    dataset: str
    """Id of the data set."""
    revision: str
    """Commit or tag; a branch can move, so prefer a commit."""
    config: str | None = None
    """Configuration name of the data set."""
    split: str = "train"
    """Split of the data set to read; all rows of it are assigned to our own splits."""

    @field_validator("dataset")
    @classmethod
    def _is_no_local_folder(cls, value: str) -> str:
        if value.startswith((".", "/", "~")):  # its bytes would not count, so a change of them would go unseen
            raise ValueError("a local data set is read with kind jsonl, csv or parquet")
        return value


class PromptSet(ConfigModel):
    """One source of prompts with the facts about it."""

    source: Annotated[FileSource | HubSource, Field(discriminator="kind")]
    """Where the rows come from."""
    card: Annotated[Path | None, OPERATIONAL] = None
    """YAML file with source, revision and license of the rows. Without it the licence is "unknown"."""
    columns: Columns = Columns()
    """Column names."""
    template: Annotated[Path | None, OPERATIONAL] = None
    """Jinja file that renders the user's message from the row's columns; an undefined column is an error."""
    system: str | None = None
    """System message put before every prompt of this set."""


class NearTest(ConfigModel):
    """When a training prompt counts as near a test prompt and leaves with the reason `near_test`."""

    ngram: Annotated[int, Field(ge=1)] = 5
    """Word n-gram size. Prompts shorter than this are compared as a whole."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of the n-gram sets from which on a prompt is near."""


class PromptsConfig(ConfigModel):
    """Stage `prompts`: read, render, check, split."""

    sets: Annotated[dict[Name, PromptSet], Field(min_length=1)]
    """Prompt sets by name."""
    validation: Share = 0.02
    """Share of the groups in the validation split."""
    test: Share = 0.05
    """Share of the groups in the test split; their prompts never reach a teacher's training answers."""
    near_test: NearTest = NearTest()
    """Distance that training and validation prompts keep from test prompts."""

    @model_validator(mode="after")
    def _shares_leave_training_rows(self) -> "PromptsConfig":
        if self.validation + self.test >= 1:
            raise ValueError("validation + test leave no share for training")
        return self
