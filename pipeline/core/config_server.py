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
SECRET_WORD: Final = re.compile(r"\w*(KEYS?|SECRETS?|PASS|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?)|BEARER|HFT")
HARMLESS_WORDS: Final = frozenset({"MONKEY", "HOTKEY", "BYPASS", "COMPASS"})
TOKEN_WORD: Final = re.compile(r"\w*TOKEN")
"""A secret where it ends a name: HF_TOKEN, but not `--long-prefill-token-threshold`."""
TOKENS_OF_TEXT: Final = frozenset(
    {"BOS", "EOS", "PAD", "UNK", "SEP", "CLS", "MASK", "STOP", "START", "END", "SPECIAL", "IMAGE", "PER", "NEXT", "MAX"}
)
"""Words before "token" where it is no secret but a piece of text."""
SECRET_VALUE: Final = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AIza[A-Za-z0-9_-]{16,})"
    r"|://[^\s/:@]*:[^\s/@]+@"
)
"""Tokens of providers that are known by how they begin, and URLs with a password."""
NAMES_IN_ARGS: Final = re.compile(
    r"""(?:^|[\s"'(;&|])(-{1,2}[A-Za-z][\w.-]*)|(?:^|[\s"'(;&|])([A-Z_][A-Z0-9_]*)=.|"([\w.-]+)"\s*:\s*"[^"]"""
)
"""What names a value in an argument or a script: a flag, a variable that is set, a key of JSON with some text."""
PYTHON: Final = re.compile(r"python[0-9.]*")
SERVED_NAME: Final = "teacher"
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
    arguments as they are written, with the placeholders in them, so that the address does not count."""
    return [program_name(command), *command[1:]]


def name_that_counts(served_name: str) -> Json:
    """Of a model's name in requests what may choose who answers: another than the default or the model's own."""
    return None if served_name in (SERVED_NAME, MODEL) else served_name


def secret_in_args(args: Sequence[str]) -> str | None:
    """What of a command line's arguments looks like a secret: a flag or variable by its name, or `a value`; None:
    nothing does. What has neither a telling name nor a known beginning is not found."""
    for arg in args:
        names: list[str] = [name for found in NAMES_IN_ARGS.findall(arg) for name in found if name]
        secret = next(filter(names_secret, names), None)
        if secret is not None:
            return secret
        if SECRET_VALUE.search(arg) is not None:
            return "a value"
    return None


def names_secret(name: str) -> bool:
    """Whether the name of a flag or of a variable is one of a secret."""
    words = [word for word in re.split(r"[-_.]+", name.upper()) if word]
    if any(SECRET_WORD.fullmatch(word) and word not in HARMLESS_WORDS for word in words):
        return True
    return bool(words and TOKEN_WORD.fullmatch(words[-1])) and not TOKENS_OF_TEXT.intersection(words)


def without_secrets(args: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments themselves.

    Raises:
        ValueError: one looks like a secret. It says which, without its value.
    """
    secret = secret_in_args(args)
    if secret is not None:
        raise ValueError(f"{secret} looks like a secret: export it in the shell, the server inherits it")
    return args


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
    """How often a server that ended by itself is started again. Ends by a prompt that is searched and found do not
    count. One of several servers that may not be started again is left out; without the last one the run stops."""
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
        for name, value in env.items():
            if names_secret(name) or secret_in_args([value]) is not None:
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
    chooses, `{model}` for the file or folder of `model`. It counts in every key as it is written, the program by its
    name, since what changes answers differs from one engine to another; the address never counts. Files that it names
    (adapters, templates, scripts) count by their paths: give another name to what has other content. Secrets are
    refused: export them, and the server inherits them."""
    operational_args: Annotated[tuple[str, ...], OPERATIONAL] = ()
    """More arguments, put at the end of `command`, that decide how fast or where it computes and not what: threads,
    batches, memory, logs. They count in no key."""
    served_name: Annotated[str, StringConstraints(min_length=1), CountedBy(name_that_counts)] = SERVED_NAME
    """Name of the model in requests, as the server knows it; `{model}` stands for the file or folder. Another than
    these two counts in every key, since it may choose an adapter."""
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
        return without_secrets(args)
