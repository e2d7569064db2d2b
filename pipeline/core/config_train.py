"""What the student is and how it is trained, as frozen models: the sections `student` and `train`."""

import difflib
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.core.config_base import (
    OPERATIONAL,
    ConfigModel,
    CountedBy,
    FilePath,
    LocalModel,
    Name,
    Share,
    identity,
    section_that_counts,
)
from pipeline.core.stage import Json

# ---------------------------------------------------------------------------------------------------------- student


class TeacherLayers(ConfigModel):
    """Start from some of the layers of a larger model, as DistilBERT did (Sanh et al. 2019, arXiv:1910.01108)."""

    from_teacher_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Layers of `student.model` that stay, from 0, in this order; its embeddings, last norm and output layer stay
    too."""

    @model_validator(mode="after")
    def _layers_rise(self) -> "TeacherLayers":
        layers = self.from_teacher_layers
        if any(later <= earlier for earlier, later in pairwise(layers)):
            raise ValueError(f"from_teacher_layers {list(layers)} must rise: a model's layers build on each other")
        return self


class StudentModel(LocalModel):
    """The base model that becomes the student."""

    license: Annotated[str, OPERATIONAL] = "unknown"
    """SPDX expression of the model's licence, the hub's id of it, or the name of its terms; recorded with the
    training."""
    base_models: Annotated[dict[str, str] | None, OPERATIONAL] = None
    """As a teacher's."""
    family: Annotated[Name | None, OPERATIONAL] = None
    """Of models: some terms let outputs train models of their own family only. None: the one of its licence."""
    init: Annotated[TeacherLayers | None, CountedBy(section_that_counts)] = None
    """How the student begins, if not as `model` itself."""


# ----------------------------------------------------------------------------------------------------------- tuning


class FullTuning(ConfigModel):
    """All weights are trained."""

    kind: Literal["full"]
    """Full fine-tuning."""


class AdapterTuning(ConfigModel):
    """Low-rank adapters are trained (Hu et al. 2021, arXiv:2106.09685) through PEFT and merged at the end."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """Scale: updates are multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter; "lm_head" is refused (TRL's loss reads its weight directly)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapters. With `embed_tokens` here, `train_tokens` has nothing to do."""
    train_tokens: Literal["auto"] | tuple[str, ...] = "auto"
    """Tokens whose embeddings are trained beside the adapters. "auto": those that the chat template writes and the base
    never learned, without which adapters stall; a list of texts: these; an empty list: none."""
    dora: bool = False
    """Magnitudes and directions are trained apart (DoRA: Liu et al. 2024, arXiv:2402.09353)."""
    rslora: bool = False
    """The scale is alpha / sqrt(r) (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732)."""


class LoraTuning(AdapterTuning):
    """Adapters on a model in its own number format."""

    kind: Literal["lora"]
    """LoRA."""


class QloraTuning(AdapterTuning):
    """Adapters on a model whose frozen weights are held in 4 bits (Dettmers et al. 2023, arXiv:2305.14314) through
    bitsandbytes; they are merged into the model's own weights, not into the 4-bit ones."""

    kind: Literal["qlora"]
    """QLoRA."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Four-bit number format."""
    double_quant: bool = True
    """The quantisation's own scales are quantised too: 0.4 bits a weight less."""


# ------------------------------------------------------------------------------------------------------- the course


class CheckpointConfig(ConfigModel):
    """When `train` writes a checkpoint; a stop by a signal writes one too. They lie in the step's work folder and go
    with it when the step is done."""

    minutes: Annotated[float, Field(gt=0)] | None = 10
    """Minutes of training between two checkpoints; null: none by the clock."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two checkpoints, whatever the clock says; null: none by the count."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest stay. While one is written the disk holds one more."""


class GeneratedAnswers(ConfigModel):
    """Validation prompts that the student answers, greedily, in the midst of its training."""

    prompts: Annotated[int, Field(ge=1)] = 64
    """At most so many prompts of the validation split, by hash of their id; those without a reference are left out."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Cap on answer tokens."""
    metric: Literal["exact", "numeric"] = "exact"
    """How an answer is compared with its reference; as `evaluate.metric`."""


class CourseEvaluation(ConfigModel):
    """How the student is measured on the validation split while it is trained, and what follows from it."""

    rows: Annotated[int, Field(ge=0)] = 512
    """Validation rows whose loss is taken; 0: none."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two measurements; None: at the end of each epoch. The last step is always measured."""
    generate: GeneratedAnswers | None = None
    """Also the share of right answers; None: only the loss."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the student: the last ones, or those of the best measurement (the first of equal ones)."""
    by: Literal["eval_loss", "accuracy"] = "eval_loss"
    """What the best measurement is: the lowest loss, or the highest share of right answers."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop early after so many measurements in a row without a better one; None: never."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A measurement is better if it is by more than this."""

    @property
    def decides(self) -> bool:
        """Whether a measurement can change the student."""
        return self.keep == "best" or self.patience is not None

    @model_validator(mode="after")
    def _measures_what_decides(self) -> "CourseEvaluation":
        # Not `model_fields_set`: a job's file gives all fields.
        chosen = {"by": self.by != "eval_loss", "min_delta": self.min_delta > 0}
        given = [name for name, is_given in chosen.items() if is_given]
        if given and not self.decides:
            todo = "give `keep: best` or `patience` too, or leave it out"
            raise ValueError(f"{' and '.join(given)} would do nothing, since no measurement decides anything: {todo}")
        if self.decides and self.by == "accuracy" and self.generate is None:
            raise ValueError("by: accuracy needs answers: give `generate`")
        if self.decides and self.by == "eval_loss" and self.rows == 0:
            raise ValueError("by: eval_loss needs validation rows: raise `rows`")
        return self


def evaluation_that_counts(evaluation: CourseEvaluation) -> Json:
    """What counts of it: nothing where it only watches."""
    return identity(evaluation) if evaluation.decides else None


CHECK_IDS: Final = tuple(f"PF{number:02d}" for number in range(1, 24))
"""Ids of the pre-flight checks (`pipeline/student/preflight/findings.py`)."""


def _known_check(id_: str) -> str:
    if id_ not in CHECK_IDS:
        near = difflib.get_close_matches(re.sub(r"(?<!\d)(\d)$", r"0\1", id_.upper()), CHECK_IDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no pre-flight check has this id; {hint}they are {CHECK_IDS[0]} to {CHECK_IDS[-1]}")
    return id_


CheckId = Annotated[str, AfterValidator(_known_check)]

END_TOKENS: Final = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "</s>",
    "<｜end▁of▁sentence｜>",
)
"""End tokens of the chat formats in use, as servers leave them in a text when `skip_special_tokens` is off."""


class TrainConfig(ConfigModel):
    """Stage `train`: supervised fine-tuning of the student on the data set's training rows, completion-only loss."""

    tuning: Annotated[FullTuning | LoraTuning | QloraTuning, Field(discriminator="kind")] = FullTuning(kind="full")
    """What is trained."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest row in the student's tokens, at most the student's positions; longer rows are rejected and counted,
    never cut."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the rows; `max_steps` ends earlier."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps at most."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Rows per optimizer step over all processes; gradient accumulation fills it up."""
    micro_batch_size: Annotated[int, Field(ge=1), OPERATIONAL] = 8
    """Rows per process and forward pass, at most: a process takes its share of `batch_size` in equal parts of no more
    than this."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_share: Share = 0.03
    """Share of the steps that warm up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW beta2."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """float32, or bfloat16 autocast over float32 weights."""
    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format in which the weights are held. "auto": float32 for what is trained; frozen weights under adapters
    in the format they are stored in where `precision` is bfloat16, else float32. Small updates are lost in bfloat16."""
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], OPERATIONAL] = "sdpa"
    """What computes attention; flash_attention_2 needs a GPU and the package flash-attn."""
    liger: Annotated[bool, OPERATIONAL] = False
    """Liger's kernels for norms, rotary embeddings and MLPs, where the model has them; needs a GPU and the extra
    `liger`."""
    gradient_checkpointing: Annotated[bool, OPERATIONAL] = False
    """Saves memory for about a third more time."""
    group_by_length: bool = True
    """Batches hold rows of similar length: less padding."""
    packing: Annotated[bool, OPERATIONAL] = False
    """The rows of a forward pass share sequences, each seeing only itself: less padding where rows differ in length, as
    they do with `group_by_length: false`. The same rows make a step, so that the loss stays the same up to rounding."""
    reasoning: Literal["template", "inline", "drop"] = "template"
    """The teacher's thinking in the student's text. "template": as the student's chat template writes it; rows whose
    template leaves it out are rejected. "inline": before the answer, between `<think>` tags. "drop": left out, and
    counted."""
    end_tokens: Literal["auto"] | tuple[str, ...] = "auto"
    """Texts of the teacher's end tokens: cut off where a completion ends with one, since the student's template ends
    the turn with its own. "auto": those of the chat formats in use with which at least half of a teacher's training
    rows end, for that teacher's rows; a list: cut wherever a completion ends with one."""
    seed: int = 0
    """Order of the rows and initial values of new weights."""
    processes: Annotated[int, Field(ge=1), OPERATIONAL] = 1
    """Processes that `python -m pipeline train` launches, one per GPU; `batch_size` must be a multiple of them."""
    accelerate: FilePath = Path("configs/accelerate/cpu.yaml")
    """Accelerate's config file for the launch."""
    threads: Annotated[int | None, Field(ge=1), OPERATIONAL] = None
    """CPU threads per process; None: Accelerate's choice."""
    log_steps: Annotated[int, Field(ge=1), OPERATIONAL] = 10
    """Optimizer steps between two points of the loss curve."""
    evaluation: Annotated[CourseEvaluation, CountedBy(evaluation_that_counts)] = CourseEvaluation()
    """How the student is measured while it is trained. Counts only where a measurement decides something."""
    trackers: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], OPERATIONAL] = ()
    """Where the points of the curve are sent beside `metrics.jsonl`: none, unless named here. TensorBoard's files and
    trackio's database stay on this machine; W&B sends them to its service."""
    accept_findings: Annotated[tuple[CheckId, ...], OPERATIONAL] = ()
    """Ids of pre-flight checks (`PF08`; PF01 to PF23) that warn instead of refusing."""
    checkpoint: Annotated[CheckpointConfig, OPERATIONAL] = CheckpointConfig()
    """When a checkpoint is written, from which an interrupted training goes on."""

    @model_validator(mode="after")
    def _batch_can_be_divided(self) -> "TrainConfig":
        if self.batch_size % self.processes != 0:
            raise ValueError(f"batch_size {self.batch_size} cannot be shared by {self.processes} processes")
        return self
