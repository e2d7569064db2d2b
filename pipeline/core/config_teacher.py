"""Config of the teachers that run here or exist as files, and of the stage that asks a teacher."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.config_accept import Accept, AllowMissing
from pipeline.core.config_api import AnthropicTeacher, GeminiTeacher, OpenAITeacher
from pipeline.core.config_base import OPERATIONAL, ConfigModel, CountedBy, FilePath, Name, section_that_counts
from pipeline.core.config_batch import BatchConfig
from pipeline.core.config_drift import Canaries
from pipeline.core.config_length import Keep, LengthPolicy, Raise, policy_that_counts
from pipeline.core.config_logprobs import LogprobsConfig, logprobs_that_count
from pipeline.core.config_outbound import OutboundConfig, outbound_that_counts
from pipeline.core.config_response import ResponseForm, form_that_counts
from pipeline.core.config_route import Route, routed_teachers
from pipeline.core.config_server import LocalServer, ServerTeacher, without_secrets
from pipeline.core.stage import Json

SWITCHES_WITHOUT_EFFECT: Final = frozenset(
    {
        "--enforce-eager",
        "--enable-prefix-caching",
        "--no-enable-prefix-caching",
        "--disable-log-stats",
        "--disable-log-requests",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
    }
)
SETTINGS_WITHOUT_EFFECT: Final = frozenset(
    {
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--gpu-memory-utilization",
        "--kv-cache-memory",
        "--kv-cache-memory-bytes",
        "--swap-space",
        "--cpu-offload-gb",
        "--block-size",
        "--uvicorn-log-level",
        "--master-port",
    }
)
"""Flags of vLLM's server that decide how fast and where it computes, not what: these and the switches, which take no
value, are in no key. All others count."""
REFUSED_FLAGS: Final = {
    "--model": "it is `model`",
    "--revision": "it is `revision`",
    "--dtype": "it is `dtype`",
    "--max-model-len": "it is `max_model_len`",
    "--quantization": "it is `quantization`",
    "-q": "it is `quantization`",
    "--tensor-parallel-size": "it is `tensor_parallel_size`",
    "-tp": "it is `tensor_parallel_size`",
    "--tokenizer": "the model's folder holds its tokenizer",
    "--served-model-name": "the pipeline gives the name",
    "--host": "the pipeline chooses the address",
    "--port": "the pipeline chooses the address",
    "--uds": "the pipeline chooses the address",
    "--api-key": "the server listens on this machine only, and a config holds no secrets",
    "--config": "a file's content would not count in any key; write its settings here",
    "--hf-config-path": "a file's content would not count in any key; the model's folder holds its config",
}


def refused_flag(flag: str) -> str | None:
    """The flag in `REFUSED_FLAGS` that another one is, or that vLLM would take it for: `--mod` for `--model`, `-qfp8`
    for `-q fp8`. None: it may be given."""
    return next((refused for refused in REFUSED_FLAGS if _may_mean(flag, refused)), None)


def _may_mean(flag: str, name: str) -> bool:
    if name == "-q" and flag.startswith("-q"):
        return True
    return len(flag.lstrip("-")) > 0 and flag.startswith("-") and name.startswith(flag)


def flags_that_count(args: Sequence[str]) -> list[Json]:
    """Of a server's arguments those that may change answers: `[[flag, value, …], …]` sorted by flag; a flag that is
    given twice keeps its order, since the last one wins."""
    counted: list[list[str]] = []
    for flag, *values in _flags(args):
        if flag in SWITCHES_WITHOUT_EFFECT and not values:
            continue
        if flag in SETTINGS_WITHOUT_EFFECT and len(values) == 1:
            continue
        counted.append([flag, *values])
    return [[*flag] for flag in sorted(counted, key=lambda flag: flag[0])]


def _flags(args: Sequence[str]) -> Iterator[list[str]]:
    """Arguments as `[flag, value, …]`, in vLLM's own reading: `--a=b` is `--a b`, and `--a_b` is `--a-b`."""
    group: list[str] = []
    for arg in args:
        if not arg.startswith("-"):
            group.append(arg)
            continue
        if group:
            yield group
        flag, equals, value = arg.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        group = [flag, value] if equals else [flag]
    if group:
        yield group


class VllmTeacher(LocalServer):
    """A teacher served by vLLM servers that we start and stop on this machine."""

    kind: Literal["vllm"]
    """A local vLLM server."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number format the weights are computed in."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt plus completion in tokens; None: the model's own limit. When it is raised, only what was cut or
    refused for it is asked again."""
    quantization: str | None = None
    """vLLM's `--quantization`."""
    servers: Annotated[int, Field(ge=1), OPERATIONAL] = 1
    """Number of servers; requests are spread over them. Of several, each gets GPUs of its own: as many as
    `tensor_parallel_size` says, in the order of CUDA_VISIBLE_DEVICES."""
    tensor_parallel_size: Annotated[int, Field(ge=1), OPERATIONAL] = 1
    """GPUs that share one server's model."""
    args: Annotated[tuple[str, ...], CountedBy(flags_that_count)] = ()
    """More arguments for `vllm.entrypoints.openai.api_server`. They count in every key, except those known to change
    no answer (memory, batching, logs). Refused: what has a field of its own, or is the pipeline's to decide."""

    @property
    def gpus_each(self) -> int:
        """GPUs that one server needs where there are GPUs."""
        return self.tensor_parallel_size

    @field_validator("args")
    @classmethod
    def _args_are_not_fields(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        for flag, *values in _flags(args):
            refused = refused_flag(flag)
            if refused is not None:
                raise ValueError(f"{flag} cannot be given here: {REFUSED_FLAGS[refused]}")
            if _may_mean(flag, "--chat-template") and not any("{" in value for value in values):
                why = "a file's content would not count in any key; use the model folder's chat_template.jinja"
                raise ValueError(f"{flag} takes the template itself here: {why}")
        return without_secrets(args)


class ReplayTeacher(ConfigModel):
    """Completions that exist already: imported, never asked for."""

    kind: Literal["replay"]
    """Existing completions."""
    path: FilePath
    """JSONL or parquet file; it may be the prompt set's own source file."""
    origin: str
    """Who wrote the completions, in words a reader of the data set can check ("human annotators of GSM8K")."""
    license: str = "unknown"
    """SPDX expression or terms of the completions."""
    prompt_id: str = "id"
    """Column that names the prompt by its id; not read when `prompt` is given."""
    prompt: str | None = None
    """Column with the text of the user's message (or a list of messages that holds one), to join rows that have no id.
    It joins prompts that are one user message, whatever their system message; a prompt of several turns is joined by
    id only. Several rows for one prompt are its samples, in the order of the file."""
    completion: str = "completion"
    """Column with the completion: text, or a list of {role, content} messages whose last assistant turn counts."""
    finish_reason: str | None = None
    """Column with the finish reason. None: all rows are taken as complete ("stop")."""


Teacher = Annotated[
    VllmTeacher | ServerTeacher | OpenAITeacher | AnthropicTeacher | GeminiTeacher | ReplayTeacher,
    Field(discriminator="kind"),
]


SeedPolicy = Literal["auto", "always", "never"]


class Sampling(ConfigModel):
    """How the teacher draws tokens; part of the request key except `max_tokens`."""

    temperature: Annotated[float | None, Field(ge=0, le=2)] = 0.0
    """0 is greedy. None: not sent, for models that refuse to be told; the provider's default holds."""
    top_p: Annotated[float | None, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. None: not sent, as for `temperature`."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Top-k sampling; sent only when given, since some APIs refuse it."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Presence penalty."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Frequency penalty."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Cap on completion tokens."""


class Retry(ConfigModel):
    """How long a request is tried again when the failure may pass."""

    budget_s: Annotated[float, Field(gt=0), OPERATIONAL] = 600
    """Seconds from the first failure until the row is given up for this run (it stays pending)."""
    first_wait_s: Annotated[float, Field(gt=0), OPERATIONAL] = 0.5
    """Upper bound of the first wait; doubles each time, full jitter."""
    max_wait_s: Annotated[float, Field(gt=0), OPERATIONAL] = 60
    """Upper bound of any wait that the server did not ask for."""
    timeout_s: Annotated[float, Field(gt=0), OPERATIONAL] = 300
    """Seconds until a request without an answer counts as failed."""


class GenerateConfig(ConfigModel):
    """Stage `generate`: every training and validation prompt is answered by the teacher."""

    teacher: Name
    """Which of `teachers` answers, and which the student is measured against."""
    route: Annotated[Route | None, CountedBy(section_that_counts)] = None
    """Several teachers in one run: who answers which prompt. They are asked one after the other. None: `teacher`
    answers all."""
    sampling: Sampling = Sampling()
    """Sampling parameters."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Completions per prompt."""
    draw: int = 0
    """Counts in every request key: another number draws all answers anew."""
    seeds: Annotated[SeedPolicy, OPERATIONAL] = "auto"
    """Whether each sampled request carries a seed of its own, made from its key, so that an engine which honours seeds
    draws the same answer again. `auto`: to servers of our own, after a trial that says whether they do. `always`: to
    the `openai` and `gemini` kinds too, which promise nothing; some OpenAI-compatible APIs refuse the field. A stored
    answer stands with or without one."""
    response: Annotated[ResponseForm | None, CountedBy(form_that_counts)] = None
    """Form that answers must have. The teacher is held to it where its API can, and each answer is checked: one of
    another form leaves as `bad_structure`. None: free text."""
    logprobs: Annotated[LogprobsConfig | None, CountedBy(logprobs_that_count)] = None
    """Soft targets beside the rows. A stored answer that does not hold them is asked again. None: none."""
    on_length: Annotated[LengthPolicy, CountedBy(policy_that_counts)] = Keep(kind="keep")
    """What becomes of answers that end at their cap."""
    accept: Annotated[Accept | None, CountedBy(section_that_counts)] = None
    """Until how many good rows to ask. None: every prompt is answered."""
    allow_missing: Annotated[AllowMissing | None, CountedBy(section_that_counts)] = None
    """How many rows may stay without an answer. None: not one; the step waits for a resume."""
    mode: Annotated[Literal["online", "batch"], OPERATIONAL] = "online"
    """How it is asked: `online`, request by request, or by `batch` jobs that take hours and cost less. Answers are the
    same to all that follows: changing the mode asks only for what is missing, and ends the jobs that are open."""
    batch: Annotated[BatchConfig, OPERATIONAL] = BatchConfig()
    """How jobs are made in batch mode."""
    retry: Retry = Retry()
    """Retry policy."""
    canaries: Annotated[Canaries | None, OPERATIONAL] = None
    """Fixed prompts that show whether the teacher still answers alike, asked online only. None: none."""
    outbound: Annotated[OutboundConfig | None, CountedBy(outbound_that_counts)] = OutboundConfig()
    """What is looked for in prompts before they leave this machine for an API."""

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers that are asked, each once, in the order in which they are."""
        return routed_teachers(self.teacher, self.route)

    @model_validator(mode="after")
    def _a_ladder_goes_up(self) -> "GenerateConfig":
        if isinstance(self.on_length, Raise) and self.on_length.caps[0] <= self.sampling.max_tokens:
            first, cap = self.on_length.caps[0], self.sampling.max_tokens
            raise ValueError(f"on_length.caps: the first, {first}, must be higher than sampling.max_tokens, {cap}")
        return self
