"""Config of the teachers that are asked over the network, at a URL that others run."""

import ipaddress
import os
from collections.abc import Iterable
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator, model_validator

from pipeline.core.config_base import OPERATIONAL, ConfigModel, CountedBy, Name, SecretRef
from pipeline.core.config_budget import TokenPrice
from pipeline.core.config_limits import Limits
from pipeline.core.stage import Json

BaseUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^\s?#]+$")]


def if_given(value: Json) -> Json:
    """What counts of an optional field: its value; None counts like a field that is not there."""
    return value


def names_if_any(names: tuple[str, ...]) -> Json:
    """The same for names: none count like a field that is not there."""
    return [*names]


def tags_if_given(tags: tuple[str, str] | None) -> Json:
    """The same for a pair of tags, in the form that JSON gives it."""
    return None if tags is None else [*tags]


StructuredOutputs = Literal["openai", "vllm"]

ReasoningTags = Annotated[tuple[str, str], Field(min_length=2, max_length=2)]
"""Opening and closing tag of thinking that a model writes into its text."""


class ApiTeacher(ConfigModel):
    """What the teachers behind a URL have in common.

    They are asked directly: proxies in the environment (HTTPS_PROXY) are not used, so that keys go to their host only.
    """

    kind: str
    """Format of requests and answers."""
    base_url: Annotated[BaseUrl, OPERATIONAL]
    """URL before the route. Plain http is accepted for this machine only."""
    provider: Name
    """Who answers: with `model` the teacher's identity."""
    model: Annotated[str, StringConstraints(min_length=1)]
    """The model's name as the API knows it."""
    api_key: Annotated[SecretRef | None, OPERATIONAL] = None
    """Reference to an environment variable, `${env:NAME}`; never the key itself."""
    license: str = "unknown"
    """Name of the terms that its answers come under, such as the licence of an open model."""
    terms: Annotated[tuple[str, ...], CountedBy(names_if_any)] = ()
    """Names of further terms that hold as well. Those of its provider's API need no mention where the registry knows
    the provider."""
    limits: Annotated[Limits, OPERATIONAL] = Limits()
    """Most requests and tokens per minute."""
    concurrency: Annotated[int, Field(ge=1), OPERATIONAL] = 64
    """Most requests in flight."""
    reasoning_effort: Annotated[str | None, CountedBy(if_given)] = None
    """How much the model thinks before it answers, in the API's words. None: the model's own default."""
    price: Annotated[TokenPrice | None, OPERATIONAL] = None
    """What its tokens cost, in USD per million. None: as in pipeline/teacher/prices.yaml, or else unknown."""
    on_model_change: Annotated[Literal["stop", "warn"], OPERATIONAL] = "stop"
    """When answers come under another model name than the first answers of this teacher that the data folder keeps:
    stop, or go on and warn. A name and its dated snapshot (`m`, `m-2026-01-31`) are one. The answers are kept either
    way, with the name on each row."""
    on_fingerprint_change: Annotated[Literal["stop", "warn", "ignore"], OPERATIONAL] = "warn"
    """The same for the backend's fingerprint (`system_fingerprint`). OpenAI's alternate between backends all the time,
    so that `stop` suits a server of one's own."""

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs that requests may go to."""
        return (self.base_url,)

    @property
    def key_variable(self) -> str | None:
        """The environment variable that holds the key; None: no key is sent."""
        return None if self.api_key is None else self.api_key.removeprefix("${env:").removesuffix("}")

    @field_validator("base_url")
    @classmethod
    def _key_and_prompts_travel_encrypted(cls, base_url: str) -> str:
        return safe_url(base_url)


class OpenAITeacher(ApiTeacher):
    """A teacher behind any URL that speaks the OpenAI chat-completions format.

    It is asked directly: proxies in the environment (HTTPS_PROXY) are not used, so that keys go to its host only.
    """

    kind: Literal["openai"]
    """An OpenAI-compatible API."""
    base_url: Annotated[BaseUrl, OPERATIONAL]
    """URL up to and including `/v1`. Plain http is accepted for this machine only."""
    provider: Name
    """Who answers ("openai", "together", "our-vllm"): with `model` the teacher's identity, so that moving to
    another URL of the same provider keeps the answers already paid for."""
    model: str
    """The model's name as the API knows it."""
    replicas: Annotated[tuple[BaseUrl, ...], OPERATIONAL] = ()
    """More URLs that serve the same model (their lists of models are compared) with the same key. Each request goes to
    the least loaded one that works; one that fails gets none until it answers again. `limits` and `concurrency` hold
    for each URL."""
    max_tokens_field: Annotated[Literal["max_tokens", "max_completion_tokens"], OPERATIONAL] = "max_tokens"
    """Name under which the API takes the cap; OpenAI's reasoning models want `max_completion_tokens`."""
    reasoning_effort: Annotated[
        Annotated[str, StringConstraints(pattern=r"^[a-z_-]{1,30}$")] | None, CountedBy(if_given)
    ] = None
    """Sent as `reasoning_effort` ("low", "medium", "high"; more where the model knows more). None: not sent."""
    reasoning_tags: Annotated[ReasoningTags | None, CountedBy(tags_if_given)] = None
    """Opening and closing tag of thinking that comes inside the text, such as ["<think>", "</think>"]: it is split off
    when an answer is read, so that another rule re-reads the stored answers without a request. None: no rule."""
    structured_outputs: Annotated[StructuredOutputs, OPERATIONAL] = "openai"
    """How a form of answers (`generate.response`) is asked for: as OpenAI's `response_format`, which knows JSON schemas
    only, or as vLLM's `structured_outputs`."""

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs that requests may go to."""
        return (self.base_url, *self.replicas)

    @field_validator("replicas")
    @classmethod
    def _replicas_too(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(safe_url, replicas))

    @model_validator(mode="after")
    def _each_url_is_given_once(self) -> "OpenAITeacher":
        if len({self.base_url, *self.replicas}) <= len(self.replicas):
            raise ValueError("a URL stands twice among `base_url` and `replicas`")
        return self


class AnthropicTeacher(ApiTeacher):
    """A teacher behind Anthropic's Messages API."""

    kind: Literal["anthropic"]
    """Anthropic's Messages API."""
    base_url: Annotated[BaseUrl, OPERATIONAL] = "https://api.anthropic.com/v1"
    """URL up to and including `/v1`. Plain http is accepted for this machine only."""
    provider: Name = "anthropic"
    """Who answers: with `model` the teacher's identity."""
    api_key: Annotated[SecretRef | None, OPERATIONAL] = "${env:ANTHROPIC_API_KEY}"
    """Reference to an environment variable, `${env:NAME}`; never the key itself."""
    thinking_tokens: Annotated[int, Field(ge=1024)] | None = None
    """Budget of extended thinking, inside `max_tokens`; for models up to the 4.5 generation. None: not sent."""
    reasoning_effort: Annotated[Literal["low", "medium", "high", "xhigh", "max"] | None, CountedBy(if_given)] = None
    """Adaptive thinking with this effort; for models from the 4.6 generation on. None: not sent."""

    @property
    def thinks(self) -> bool:
        """Whether thinking is asked for, under which the API takes no other temperature than its own."""
        return self.thinking_tokens is not None or self.reasoning_effort is not None

    @model_validator(mode="after")
    def _thinking_is_asked_for_in_one_way(self) -> "AnthropicTeacher":
        if self.thinking_tokens is not None and self.reasoning_effort is not None:
            raise ValueError("give `thinking_tokens` (older models) or `reasoning_effort` (newer ones), not both")
        return self


class GeminiTeacher(ApiTeacher):
    """A teacher behind Google's Gemini API (`generateContent`)."""

    kind: Literal["gemini"]
    """The Gemini API."""
    base_url: Annotated[BaseUrl, OPERATIONAL] = "https://generativelanguage.googleapis.com/v1beta"
    """URL up to and including the version. Plain http is accepted for this machine only."""
    provider: Name = "gemini"
    """Who answers: with `model` the teacher's identity."""
    model: Annotated[str, StringConstraints(pattern=r"^(tunedModels/)?[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The model's name without `models/` before it."""
    api_key: Annotated[SecretRef | None, OPERATIONAL] = "${env:GEMINI_API_KEY}"
    """Reference to an environment variable, `${env:NAME}`; never the key itself."""
    thinking_tokens: Annotated[int, Field(ge=0)] | None = None
    """Budget of thinking, inside `max_tokens`; 0: none; for the 2.5 generation. None: not sent."""
    reasoning_effort: Annotated[Literal["minimal", "low", "medium", "high"] | None, CountedBy(if_given)] = None
    """Thinking level; for models from the third generation on. None: not sent."""

    @model_validator(mode="after")
    def _thinking_is_asked_for_in_one_way(self) -> "GeminiTeacher":
        if self.thinking_tokens is not None and self.reasoning_effort is not None:
            raise ValueError("give `thinking_tokens` (2.5 models) or `reasoning_effort` (newer ones), not both")
        return self


def safe_url(base_url: str) -> str:
    """A base URL without a slash at its end.

    Raises:
        ValueError: it holds a password, or would carry key and prompts over the network in the clear.
    """
    url = urlsplit(base_url)
    if url.username is not None or url.password is not None:
        raise ValueError("a URL must not hold a user or password; use `api_key: ${env:NAME}`")
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        raise ValueError("plain http is accepted for this machine only (localhost, 127.0.0.1, ::1); use https")
    return base_url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a URL's host names this machine; other names are not resolved, so they are not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def secret_values(teachers: Iterable[object]) -> tuple[str, ...]:
    """Values of the keys that teachers refer to, as far as they are set, so that no message can hold them."""
    names = [teacher.key_variable for teacher in teachers if isinstance(teacher, ApiTeacher)]
    return tuple(os.environ[name] for name in names if name is not None and name in os.environ)
