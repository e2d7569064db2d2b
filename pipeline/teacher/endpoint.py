"""Where requests go: a URL, the name its model has there, and the reference to its key."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from pipeline.core.config_api import AnthropicTeacher, ApiTeacher, GeminiTeacher, OpenAITeacher, StructuredOutputs
from pipeline.core.config_limits import Limits
from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.config_response import ResponseForm
from pipeline.core.config_teacher import Sampling
from pipeline.core.errors import UsageError
from pipeline.core.record import Message
from pipeline.teacher.breaker import CircuitBreaker
from pipeline.teacher.gate import Gate
from pipeline.teacher.limits import AdaptiveLimit
from pipeline.teacher.rates import RateLimiter
from pipeline.teacher.request import Request
from pipeline.teacher.wire import DEFAULT_THINKING, Ask, Thinking, Wire
from pipeline.teacher.wires.anthropic import ANTHROPIC
from pipeline.teacher.wires.gemini import GEMINI
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

WIRE_OF_KIND: Final = {"openai": OPENAI_CHAT, "anthropic": ANTHROPIC, "gemini": GEMINI}
"""The format of each kind of API teacher."""


@dataclass(slots=True)
class Endpoint:
    """One server that answers.

    Attributes:
        url: where requests are posted.
        wire: their format.
        model: name of the model there.
        engine: server and version, where known; recorded with each answer, part of no key.
        key_variable: environment variable with the API key; None: no key is sent.
        gate: what a request must pass before it may leave.
        max_tokens_field: name under which it takes the cap.
        thinking: how much its model is asked to think.
        models_url: its list of models; None: it is never asked for that.
        proven: whether it has answered anything in this run.
        structured_outputs: how it is told of the form that answers must have.
        takes_seeds: False where a seed would end the engine, or a trial has shown that it refuses seeds.
        sends_seeds: whether sampled requests carry seeds; see seeds.py.
        logprobs: what is asked of them here; None: none.
    """

    url: str
    wire: Wire
    model: str
    engine: str
    key_variable: str | None
    gate: Gate
    max_tokens_field: str = "max_tokens"
    thinking: Thinking = DEFAULT_THINKING
    models_url: str | None = None
    proven: bool = False
    structured_outputs: StructuredOutputs = "openai"
    takes_seeds: bool = True
    sends_seeds: bool = False
    logprobs: LogprobsAsked | None = None

    @property
    def host(self) -> str:
        """Host and port, for messages: a URL's path may hold account names."""
        return urlsplit(self.url).netloc

    def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        tools: str | None = None,
        form: ResponseForm | None = None,
        seed: int | None = None,
    ) -> Ask:
        """One conversation, to be asked here."""
        return Ask(
            self.model,
            messages,
            sampling,
            self.max_tokens_field,
            self.thinking,
            logprobs=self.logprobs,
            tools=tools,
            form=form,
            structured_outputs=self.structured_outputs,
            seed=seed,
        )

    def body(self, request: Request, sampling: Sampling) -> bytes:
        """The JSON of a request, with a seed of its own where the endpoint takes seeds and tokens are sampled."""
        seed = request.seed if self.sends_seeds and sampling.temperature != 0 else None
        return self.wire.body(self.ask(request.messages, sampling, request.tools, request.form, seed))

    def read_key(self) -> str | None:
        """The API key, read now from the environment and kept nowhere.

        Raises:
            UsageError: the variable is not set, or no header can hold its value.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            what = f"the environment variable {self.key_variable} is not set"
            raise UsageError(what, where=f"teachers.*.api_key (for {self.host})", todo=f"export {self.key_variable}=…")
        if not key.isprintable():
            what = f"the environment variable {self.key_variable} holds a line break or another control character"
            raise UsageError(
                what, where=f"teachers.*.api_key (for {self.host})", todo="export the key alone, in one line"
            )
        return key


def open_gate(concurrency: int, limits: Limits) -> Gate:
    """The gate of one endpoint that gets at most so many requests at a time."""
    return Gate(AdaptiveLimit(concurrency), RateLimiter(limits), CircuitBreaker())


def api_endpoints(teacher: ApiTeacher) -> list[Endpoint]:
    """The endpoints of an API teacher: one for each of its URLs, with limits of their own."""
    return [_api_endpoint(teacher, url) for url in teacher.urls]


def _api_endpoint(teacher: ApiTeacher, base_url: str) -> Endpoint:
    wire = WIRE_OF_KIND[teacher.kind]
    budget = teacher.thinking_tokens if isinstance(teacher, AnthropicTeacher | GeminiTeacher) else None
    return Endpoint(
        url=wire.url(base_url, teacher.model),
        wire=wire,
        model=teacher.model,
        engine="",
        key_variable=teacher.key_variable,
        gate=open_gate(teacher.concurrency, teacher.limits),
        max_tokens_field=teacher.max_tokens_field if isinstance(teacher, OpenAITeacher) else "max_tokens",
        thinking=Thinking(budget, teacher.reasoning_effort),
        models_url=f"{base_url}/models" if isinstance(teacher, OpenAITeacher) else None,
        structured_outputs=teacher.structured_outputs if isinstance(teacher, OpenAITeacher) else "openai",
    )
