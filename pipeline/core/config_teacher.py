"""Config of the teachers and of the stage that asks them."""

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator

from pipeline.core.config_base import OPERATIONAL, ConfigModel, FilePath, LocalModel, Name, SecretRef


class VllmTeacher(LocalModel):
    """A teacher served by vLLM servers that we start and stop on this machine."""

    kind: Literal["vllm"]
    """A local vLLM server."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number format the weights are computed in."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt plus completion in tokens; None: the model's own limit."""
    quantization: str | None = None
    """vLLM's `--quantization`."""
    servers: Annotated[int, Field(ge=1), OPERATIONAL] = 1
    """Number of servers; requests are spread over them."""
    tensor_parallel_size: Annotated[int, Field(ge=1), OPERATIONAL] = 1
    """GPUs that share one server's model."""
    args: Annotated[tuple[str, ...], OPERATIONAL] = ()
    """More arguments for `vllm.entrypoints.openai.api_server`. For flags that do not change answers."""
    env: Annotated[dict[str, str], OPERATIONAL] = Field(default={})
    """Environment variables of the server. For settings that do not change answers."""
    start_timeout_s: Annotated[float, Field(gt=0), OPERATIONAL] = 600
    """Seconds a server may take until it is healthy."""
    concurrency: Annotated[int, Field(ge=1), OPERATIONAL] = 256
    """Most requests in flight per server."""


class OpenAITeacher(ConfigModel):
    """A teacher behind any URL that speaks the OpenAI chat-completions format."""

    kind: Literal["openai"]
    """An OpenAI-compatible API."""
    base_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s?#]+$"), OPERATIONAL]
    """URL up to and including `/v1`. Plain http is accepted for this machine only."""
    provider: Name
    """Who answers ("openai", "together", "our-vllm"): with `model` the teacher's identity, so that moving to
    another URL of the same provider keeps the answers already paid for."""
    model: str
    """The model's name as the API knows it."""
    api_key: Annotated[SecretRef | None, OPERATIONAL] = None
    """Reference to an environment variable, `${env:NAME}`; never the key itself."""
    license: str = "unknown"
    """Name of the terms that its answers come under."""
    concurrency: Annotated[int, Field(ge=1), OPERATIONAL] = 64
    """Most requests in flight."""

    @field_validator("base_url")
    @classmethod
    def _key_and_prompts_travel_encrypted(cls, base_url: str) -> str:
        url = urlsplit(base_url)
        if url.username is not None or url.password is not None:
            raise ValueError("a URL must not hold a user or password; use `api_key: ${env:NAME}`")
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            raise ValueError("plain http is accepted for this machine only (localhost, 127.0.0.1, ::1); use https")
        return base_url.rstrip("/")


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
    """Column with the text of the user's message, to join rows that have no id. Several rows for one prompt are its
    samples, in the order of the file."""
    completion: str = "completion"
    """Column with the completion: text, or a list of {role, content} messages whose last assistant turn counts."""
    finish_reason: str | None = None
    """Column with the finish reason. None: all rows are taken as complete ("stop")."""


def is_loopback(host: str) -> bool:
    """Whether a URL's host names this machine; other names are not resolved, so they are not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Teacher = Annotated[VllmTeacher | OpenAITeacher | ReplayTeacher, Field(discriminator="kind")]


class Sampling(ConfigModel):
    """How the teacher draws tokens; part of the request key except `max_tokens`."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling."""
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
    """Which of `teachers` answers."""
    sampling: Sampling = Sampling()
    """Sampling parameters."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Completions per prompt."""
    draw: int = 0
    """Counts in every request key: another number draws all answers anew."""
    retry: Retry = Retry()
    """Retry policy."""
