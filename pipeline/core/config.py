"""Every knob of a run but the teachers' (config_teacher.py, config_api.py), as frozen models; load.py reads YAML."""

from operator import not_
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from pipeline.core.config_base import (
    BYTES_OR_NAME,
    OPERATIONAL,
    ConfigModel,
    CountedBy,
    Name,
    section_that_counts,
)
from pipeline.core.config_budget import Budget, Spending, undeclared
from pipeline.core.config_fanout import FanoutConfig, InProcess
from pipeline.core.config_outbound import OutboundConfig, outbound_that_counts
from pipeline.core.config_policy import PolicyConfig, Role
from pipeline.core.config_prompts import PromptsConfig
from pipeline.core.config_refusals import generate_refusals
from pipeline.core.config_route import unknown_sets
from pipeline.core.config_teacher import GenerateConfig, Retry, Teacher
from pipeline.core.config_train import StudentModel, TrainConfig

# ------------------------------------------------------------------------------------- filter, dedup, dataset


class Repetition(ConfigModel):
    """When a completion counts as repeating itself."""

    ngram: Annotated[int, Field(ge=1)] = 4
    """Word n-gram size."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Largest share of n-grams that may be repeats of earlier ones; completions under 4 × ngram words pass."""


class FilterConfig(ConfigModel):
    """Stage `filter`: a completion leaves with the first reason that applies, in the order of these fields."""

    finish_reasons: tuple[str, ...] = ("stop",)
    """Finish reasons that are kept; others leave as `finish_reason:<reason>`."""
    min_chars: Annotated[int, Field(ge=1)] = 1
    """Shorter completions leave as `empty` (blank) or `too_short`."""
    max_chars: Annotated[int, Field(ge=1)] = 1_000_000
    """Longer ones leave as `too_long`."""
    refusal_phrases: tuple[str, ...] | None = None
    """Phrases that mark a refusal when the first 200 characters hold one. None: the built-in list; []: none."""
    repetition: Repetition = Repetition()
    """Repetition rule; reason `repetition`."""
    verifier: Literal["none", "exact", "numeric"] = "none"
    """Compares the completion with the reference answer: `wrong_answer`; rows without a reference pass unverified."""


class DedupConfig(ConfigModel):
    """Stage `dedup`: of rows with equal prompt and completion the first stays."""

    normalise: bool = True
    """Compare after Unicode NFC, case folding and whitespace squeezing; False compares the exact text."""


class DatasetConfig(ConfigModel):
    """Stage `dataset`: the shards that ship, with their card."""

    title: str
    """Title of the data set card."""
    shard_rows: Annotated[int, Field(ge=1), OPERATIONAL] = 8192
    """Rows per parquet file."""
    seed: int = 0
    """Order of the rows: they are sorted by the sha256 of seed and row id."""
    exclude_teachers: Annotated[tuple[Name, ...], CountedBy(list)] = ()
    """Teachers whose rows do not ship; they leave as `excluded:teacher:<name>`."""
    exclude_prompt_sets: Annotated[tuple[Name, ...], CountedBy(list)] = ()
    """Prompt sets whose rows do not ship; they leave as `excluded:prompt_set:<name>`, and so do rows of other sets that
    a duplicate out of one was merged into."""


# --------------------------------------------------------------------------------------------- evaluate, report


class EvaluateConfig(ConfigModel):
    """Stage `evaluate`: teacher, base and student answer the same test prompts through the same code, greedily."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the local models: in-process transformers or in-process vLLM. Transformers takes one GPU, and knows no
    `quantization` of the teacher's."""
    metric: Literal["exact", "numeric"] = "exact"
    """How an answer is compared with the reference; see pipeline/text/verifiers.py."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Cap on answer tokens; a cut answer is scored as it is."""
    max_prompts: Annotated[int, Field(ge=1)] | None = None
    """At most so many test prompts (by hash of their id); None: all."""
    base_prompts: Annotated[int, Field(ge=1)] = 500
    """Validation prompts on which the base's best way of asking (strict, first line, 3-shot) is chosen."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples behind each 95 % interval (percentile bootstrap over prompts)."""
    seed: int = 0
    """Seed of the bootstrap and of the choice of 3-shot examples."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format the local models answer in."""
    batch_size: Annotated[int, Field(ge=1), OPERATIONAL] = 64
    """Prompts per batch of the in-process engine."""
    speed_prompts: Annotated[int, Field(ge=1), OPERATIONAL] = 512
    """Test prompts in each of the speed passes."""
    speed_passes: Annotated[int, Field(ge=1), OPERATIONAL] = 3
    """Warm passes per model, alternating between the models where a GPU holds them all; the median counts."""
    threads: Annotated[int | None, Field(ge=1), OPERATIONAL] = None
    """CPU threads; None: the engine's choice."""


class ReportConfig(ConfigModel):
    """Stage `report`: one HTML file about the run."""

    sample_rows: Annotated[int, Field(ge=0)] = 40
    """Rows shown with their story; half of them kept, half rejected."""


class RunConfig(ConfigModel):
    """One YAML file: one run."""

    name: Name
    """Name of the run: its folder under `data/runs/`."""
    policy: PolicyConfig
    """What the data set and the student are meant for."""
    teachers: Annotated[dict[Name, Teacher], Field(min_length=1)]
    """Teachers by name."""
    student: StudentModel
    """The base model that becomes the student."""
    prompts: PromptsConfig
    generate: GenerateConfig
    filter: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    dataset: DatasetConfig
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    fanout: Annotated[FanoutConfig, OPERATIONAL] = InProcess(kind="in_process")
    """How the stages that work on text use this machine's CPUs. Changes no row."""
    budget: Annotated[Budget, OPERATIONAL] = Budget()
    """What all requests of the run may cost, however often it is resumed. Changes no row."""

    @model_validator(mode="after")
    def _teacher_is_declared(self) -> "RunConfig":
        for name in dict.fromkeys((self.generate.teacher, *self.generate.teachers)):
            if name not in self.teachers:
                raise ValueError(f"generate: teacher {name!r} is not one of teachers: {[*self.teachers]}")
        for name in undeclared(self.budget, self.teachers):
            raise ValueError(f"budget.teachers {name!r} is not one of teachers: {[*self.teachers]}")
        return self

    @model_validator(mode="after")
    def _excluded_is_declared(self) -> "RunConfig":
        for field, given, known in (
            ("exclude_teachers", self.dataset.exclude_teachers, self.teachers),
            ("exclude_prompt_sets", self.dataset.exclude_prompt_sets, self.prompts.sets),
        ):
            strange = next((name for name in given if name not in known), None)
            if strange is not None:
                raise ValueError(f"dataset.{field}: {strange!r} is not one of {[*known]}")
        return self

    @model_validator(mode="after")
    def _teacher_takes_its_settings(self) -> "RunConfig":
        asked = [self.teachers[name] for name in self.generate.teachers if name in self.teachers]
        refusals = [reason for teacher in asked for reason in generate_refusals(teacher, self.generate)]
        refusals += unknown_sets(self.generate.route, self.prompts.sets)
        if refusals:
            raise ValueError("; ".join(dict.fromkeys(refusals)))
        return self


# ------------------------------------------------------------------------------------ what each stage is given


class PromptsStep(ConfigModel):
    prompts: PromptsConfig


class GenerateStep(ConfigModel):
    generate: GenerateConfig
    teachers: dict[Name, Teacher]
    checks: Annotated[FilterConfig | None, CountedBy(section_that_counts)] = None
    """What a good row is, where so many of them are wanted; None: nobody asks."""
    spending: Annotated[Spending, OPERATIONAL] = Spending()


class FilterStep(ConfigModel):
    filter: FilterConfig


class DedupStep(ConfigModel):
    dedup: DedupConfig


class DeclaredSource(ConfigModel):
    """A teacher or the student's base as the config declares it; terms/declared.py makes a `Source` of it."""

    role: Role
    name: str
    what: Annotated[str, BYTES_OR_NAME]
    licenses: tuple[str, ...]
    family: str | None = None
    facts: dict[str, JsonValue] = Field(default_factory=dict)


class DatasetStep(ConfigModel):
    dataset: DatasetConfig
    policy: PolicyConfig
    declared: tuple[DeclaredSource, ...]


class TrainStep(ConfigModel):
    train: TrainConfig
    student: StudentModel
    policy: Annotated[PolicyConfig, OPERATIONAL]
    """What the training rows' terms are judged by, each time before a row is read."""


class EvaluateStep(ConfigModel):
    evaluate: EvaluateConfig
    teacher: Teacher
    student: StudentModel
    retry: Annotated[Retry, OPERATIONAL]
    greedy_teacher: Annotated[bool, CountedBy(not_)] = True
    """False: the teacher takes no temperature, so that it answers at its own."""
    outbound: Annotated[OutboundConfig | None, CountedBy(outbound_that_counts)] = OutboundConfig()
    """What test prompts are scanned for; None: they do not leave this machine."""
    spending: Annotated[Spending, OPERATIONAL] = Spending()


class ReportStep(ConfigModel):
    report: ReportConfig
    name: Name
