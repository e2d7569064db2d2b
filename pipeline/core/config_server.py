"""Config of the teachers whose servers we start and stop on this machine; vLLM's own settings: config_teacher.py."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, field_validator

from pipeline.core.config_api import ReasoningTags, StructuredOutputs, tags_if_given
from pipeline.core.config_base import OPERATIONAL, CountedBy, LocalModel
from pipeline.core.config_budget import TokenPrice
from pipeline.core.stage import Json

VARIABLES_WITHOUT_EFFECT: Final = frozenset(
    {
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_LOGGING_LEVEL",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "HF_HOME",
        "HF_HUB_OFFLINE",
    }
)
"""Environment variables that change no answer: they are in no key, nor are those that begin with `NCCL_`. All others
count."""
SECRET_WORDS: Final = frozenset({"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD"})
SECRET_FLAGS: Final = frozenset({"--api-key", "--api_key", "--token", "--hf-token"})
PYTHON: Final = re.compile(r"python[0-9.]*")
PORT: Final = "{port}"
HOST: Final = "{host}"
MODEL: Final = "{model}"
"""Placeholders of a command line."""

UrlPath = Annotated[str, StringConstraints(pattern=r"^/[^\s?#]*$")]


def variables_that_count(env: Mapping[str, str]) -> dict[str, Json]:
    """Of a server's environment variables those that may change answers."""
    return {
        name: value
        for name, value in env.items()
        if name not in VARIABLES_WITHOUT_EFFECT and not name.startswith("NCCL_")
    }


def command_that_counts(command: Sequence[str]) -> list[Json]:
    """Of a command line what may change answers: the program by its name, since where it lies does not count, and its
    arguments in their order, without those that say where the server listens (with the flag before them)."""
    counted: list[str] = []
    for arg in command[1:]:
        if PORT not in arg and HOST not in arg:
            counted.append(arg)
        elif counted and counted[-1].startswith("-") and not arg.startswith("-"):
            counted.pop()
    return [program_name(command), *counted]


def program_name(command: Sequence[str]) -> str:
    """Name of a command's program, without its folder, and of Python without its version."""
    name = command[0].rpartition("/")[2]
    return "python" if PYTHON.fullmatch(name) else name


class LocalServer(LocalModel):
    """What the teachers on servers of our own have in common."""

    kind: str
    """What serves it."""
    servers: Annotated[int, Field(ge=1), OPERATIONAL] = 1
    """Number of servers; requests are spread over them. Of several, each gets GPUs of its own."""
    env: Annotated[dict[str, str], CountedBy(variables_that_count)] = Field(default={})
    """More environment variables of the server, beside those it inherits. They count in every key, except those known
    to change no answer. Secrets are refused: export them, and the server inherits them."""
    start_timeout_s: Annotated[float, Field(gt=0), OPERATIONAL] = 600
    """Seconds a server may take until it is healthy."""
    restarts: Annotated[int, Field(ge=0), OPERATIONAL] = 2
    """How often a server that ended by itself is started again. A prompt that was found to end it does not count."""
    concurrency: Annotated[int, Field(ge=1), OPERATIONAL] = 256
    """Most requests in flight per server."""
    reasoning_tags: Annotated[ReasoningTags | None, CountedBy(tags_if_given)] = None
    """Opening and closing tag of thinking that comes inside the text, such as ["<think>", "</think>"]: it is split off
    when an answer is read, so that another rule re-reads the stored answers without a request. None: no rule."""
    price: Annotated[TokenPrice | None, OPERATIONAL] = None
    """What its tokens count as in a budget, in USD per million. None: nothing."""

    @property
    def gpus_each(self) -> int:
        """GPUs that one server needs where there are GPUs."""
        raise NotImplementedError

    @field_validator("env")
    @classmethod
    def _env_holds_no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if SECRET_WORDS.intersection(name.upper().split("_")):
                raise ValueError(f"{name} looks like a secret: export it in the shell, the server inherits it")
        return env


class ServerTeacher(LocalServer):
    """A teacher served by any program with an OpenAI-compatible chat route: SGLang, llama.cpp, `transformers serve`.

    Its weights count as a vLLM teacher's do: by their bytes, or the hub id and revision.
    """

    kind: Literal["server"]
    """A server that a command line starts."""
    command: Annotated[tuple[str, ...], Field(min_length=1), CountedBy(command_that_counts)]
    """The program and its arguments, without a shell. `{port}` and `{host}` stand for the address that the pipeline
    chooses, `{model}` for the file or folder of `model`. It counts in every key, the program by its name, since what
    changes answers differs from one engine to another; the address never counts."""
    operational_args: Annotated[tuple[str, ...], OPERATIONAL] = ()
    """More arguments, put at the end of `command`, that decide how fast or where it computes and not what: threads,
    batches, memory, logs. They count in no key."""
    served_name: Annotated[str, StringConstraints(min_length=1), OPERATIONAL] = "teacher"
    """Name of the model in requests, as the server knows it; `{model}` stands for the file or folder."""
    health: Annotated[UrlPath, OPERATIONAL] = "/health"
    """Route that answers with status 200 once the server is ready."""
    base_path: Annotated[UrlPath, OPERATIONAL] = "/v1"
    """Path before `/chat/completions` and `/models`."""
    version_path: Annotated[UrlPath | None, OPERATIONAL] = None
    """Route that answers with JSON whose `version` is the engine's, recorded with each answer. None: the program's name
    is recorded alone."""
    structured_outputs: Annotated[StructuredOutputs, OPERATIONAL] = "openai"
    """How a form of answers (`generate.response`) is asked for: as OpenAI's `response_format`, which knows JSON schemas
    only, or as vLLM's `structured_outputs`."""
    gpus_per_server: Annotated[int, Field(ge=1), OPERATIONAL] = 1
    """GPUs that each of several servers gets."""

    @property
    def gpus_each(self) -> int:
        """GPUs that one server needs where there are GPUs."""
        return self.gpus_per_server

    @field_validator("command")
    @classmethod
    def _command_can_be_placed(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if not any(PORT in arg for arg in command):
            raise ValueError(f"no argument holds {PORT}: the pipeline chooses the port")
        return command

    @field_validator("command", "operational_args")
    @classmethod
    def _args_hold_no_secrets(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        for arg in args:
            if arg.partition("=")[0] in SECRET_FLAGS:
                raise ValueError(f"{arg.partition('=')[0]} takes a secret, and a config holds none: leave it out")
        return args
