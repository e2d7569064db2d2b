"""What is asked of a teacher, and the key under which its answer is kept for ever."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.core.config_api import AnthropicTeacher, ApiTeacher, GeminiTeacher
from pipeline.core.config_base import LocalModel
from pipeline.core.config_logprobs import LogprobsAsked
from pipeline.core.config_response import ResponseForm, form_that_counts, loaded_form
from pipeline.core.config_server import ServerTeacher, command_that_counts, name_that_counts, variables_that_count
from pipeline.core.config_teacher import (
    ReplayTeacher,
    Sampling,
    SeedPolicy,
    Teacher,
    VllmTeacher,
    flags_that_count,
)
from pipeline.core.errors import UsageError, boundary
from pipeline.core.lineage import (
    MODEL_FILES,
    OTHER_FORMATS,
    DigestCache,
    canonical_json,
    canonical_texts,
    digest_json,
    path_digest,
)
from pipeline.core.record import Message, message_dict
from pipeline.core.stage import Json


@dataclass(slots=True, unsafe_hash=True)  # made for every request: frozen ones cost three times as much
class Request:
    """One prompt to be answered once.

    Attributes:
        key: see `request_key`; two prompts with equal messages share it, and are asked once.
        prompt_set, prompt_id: where the prompt came from.
        sample: index of this answer among the samples of its prompt, from 0.
        messages: the conversation that ends with the user's turn, or with the part of an answer that is to be
            continued.
        tools: canonical JSON of the functions that the model may call; None: none.
        form: what form the answer must have, its schema read into it; None: free text.
    """

    key: str
    prompt_set: str
    prompt_id: str
    sample: int
    messages: tuple[Message, ...]
    tools: str | None = None
    form: ResponseForm | None = None

    @property
    def seed(self) -> int:
        """A number of 31 bits that the key decides, for engines that take a seed with a request."""
        return int(self.key[:8], 16) & 0x7FFF_FFFF


@dataclass(frozen=True, slots=True)
class Asked:
    """Whom we ask and how: the part of a request key that is one for a whole stage.

    Attributes:
        identity: 64 hex digits, see `teacher_identity`.
        flags: what else shapes the teacher's output; see `output_flags`.
        sampling: how tokens are drawn; its `max_tokens` is not part of any key.
        draw: another number draws all answers anew.
        room: most tokens of prompt and completion together, part of no key; None: the model's own limit, or unknown.
        reasoning_effort: how much the model thinks, in the API's words; None: not told.
        response_schema: what form the answer must have, as it counts in the key; None: free text.
        logprobs: what a stored answer must tell beside its text, part of no key; None: nothing.
        form: the form itself, its schema read into it; see `under`.
        seeds: whether sampled requests carry seeds, part of no key.
    """

    identity: str
    flags: dict[str, Json]
    sampling: Sampling
    draw: int
    room: int | None = None
    reasoning_effort: str | None = None
    response_schema: Json = None
    logprobs: LogprobsAsked | None = None
    form: ResponseForm | None = None
    seeds: SeedPolicy = "never"
    _parts: "KeyParts" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", KeyParts.of(self))  # the only way to set a field of a frozen dataclass

    @classmethod
    def of(cls, teacher: Teacher, sampling: Sampling, draw: int, cache: DigestCache) -> "Asked":
        """Bind a teacher and its sampling; digests the teacher's weights if the cache does not know them.

        Raises:
            UsageError: the teacher's files cannot be read.
        """
        return cls.known(teacher_identity(teacher, cache), teacher, sampling, draw)

    @classmethod
    def known(cls, identity: str, teacher: Teacher, sampling: Sampling, draw: int) -> "Asked":
        """The same for a teacher whose identity is known already."""
        room = teacher.max_model_len if isinstance(teacher, VllmTeacher) else None
        effort = teacher.reasoning_effort if isinstance(teacher, ApiTeacher) else None
        return cls(identity, output_flags(teacher), sampling, draw, room, effort)

    def under(self, form: ResponseForm | None, seeds: SeedPolicy) -> "Asked":
        """The same for answers of a form, and with seeds as the policy says.

        Raises:
            UsageError: the schema's file cannot be read, or holds none that is taken.
        """
        loaded = loaded_form(form)
        counted = self.response_schema if loaded is None else form_that_counts(loaded)
        return replace(self, form=loaded, response_schema=counted, seeds=seeds)

    def request(
        self, prompt_set: str, prompt_id: str, sample: int, messages: Sequence[Message], tools: str | None = None
    ) -> Request:
        """The request for one sample of a prompt."""
        key = request_key(self, messages, sample, tools)
        return Request(key, prompt_set, prompt_id, sample, tuple(messages), tools, self.form)

    def requests(
        self, prompt_set: str, prompt_id: str, samples: int, messages: tuple[Message, ...], tools: str | None = None
    ) -> Iterator[Request]:
        """The requests for the first samples of a prompt."""
        encoded = canonical_messages(messages)
        for sample in range(samples):
            key = self.key(encoded, sample, tools).hexdigest()
            yield Request(key, prompt_set, prompt_id, sample, messages, tools, self.form)

    def key(self, messages: bytes, sample: int, tools: str | None = None) -> "hashlib._Hash":
        """The hash that is a request's key.

        Args:
            messages: as `canonical_messages` gives them.
            tools: canonical JSON; None: none.
        """
        parts = self._parts
        hasher = parts.head.copy()
        hasher.update(messages + parts.to_sample + b"%d" % sample + parts.to_tools)
        hasher.update((b"null" if tools is None else tools.encode("utf-8", "surrogatepass")) + parts.tail)
        return hasher


@dataclass(frozen=True, slots=True)
class KeyParts:
    """The JSON object whose sha256 is a request key, in the four parts between which a request's own values stand.

    Attributes:
        head: what comes before the messages, hashed already.
        to_sample, to_tools, tail: what comes before the sample, before the tools, and after them.
    """

    head: "hashlib._Hash"
    to_sample: bytes
    to_tools: bytes
    tail: bytes

    @classmethod
    def of(cls, asked: Asked) -> "KeyParts":
        """The parts for all requests of a stage. Keys stand in the order of canonical JSON."""
        sampling = asked.sampling
        before_messages: dict[str, Json] = {
            "draw": asked.draw,
            "flags": asked.flags,
            "frequency_penalty": sampling.frequency_penalty,
        }
        before_sample: dict[str, Json] = {
            "presence_penalty": sampling.presence_penalty,
            "reasoning_effort": asked.reasoning_effort,
            "response_schema": asked.response_schema,
        }
        before_tools: dict[str, Json] = {
            "stop": list(sampling.stop),
            "teacher": asked.identity,
            "temperature": sampling.temperature,
        }
        after: dict[str, Json] = {"top_k": sampling.top_k, "top_p": sampling.top_p}
        return cls(
            hashlib.sha256(b"{" + _inner(before_messages) + b',"messages":'),
            b"," + _inner(before_sample) + b',"sample":',
            b"," + _inner(before_tools) + b',"tools":',
            b"," + _inner(after) + b"}",
        )


def _inner(fields: dict[str, Json]) -> bytes:
    """Canonical JSON of an object without its braces."""
    return canonical_json(fields)[1:-1]


def request_key(asked: Asked, messages: Sequence[Message], sample: int, tools: str | None = None) -> str:
    """sha256 (64 hex digits) over everything that decides which answer this is.

    Not in it: URL, port, engine version, the caps `max_tokens` and `max_model_len`, logprobs, transport, and the ids of
    the prompt.
    """
    return asked.key(canonical_messages(messages), sample, tools).hexdigest()


def canonical_messages(messages: Sequence[Message]) -> bytes:
    """Canonical JSON of a conversation."""
    return canonical_texts([message_dict(message) for message in messages])


def output_flags(teacher: Teacher) -> dict[str, Json]:
    """Settings of the engine, beside the weights, that change what it answers."""
    if isinstance(teacher, AnthropicTeacher | GeminiTeacher) and teacher.thinking_tokens is not None:
        return {"thinking_tokens": teacher.thinking_tokens}
    if isinstance(teacher, ServerTeacher):
        variables, name = variables_that_count(teacher.env), name_that_counts(teacher.served_name)
        counted: dict[str, Json] = {"command": command_that_counts(teacher.command)}
        return counted | ({"env": variables} if variables else {}) | ({} if name is None else {"served_name": name})
    if not isinstance(teacher, VllmTeacher):
        return {}
    flags: dict[str, Json] = {"dtype": teacher.dtype, "quantization": teacher.quantization}
    args, env = flags_that_count(teacher.args), variables_that_count(teacher.env)
    return flags | ({"args": args} if args else {}) | ({"env": env} if env else {})


def teacher_identity(teacher: Teacher, cache: DigestCache) -> str:
    """Who answers, as 64 hex digits: the bytes of weights we serve, else provider and model.

    A hub model is fetched (or found in the local hub cache), so that it has the identity of a local copy of the same
    files. Replayed completions are known by their origin and the bytes of their file.

    Raises:
        UsageError: the model's folder or the file is missing, or the hub cannot be reached.
    """
    if isinstance(teacher, ApiTeacher):
        return digest_json({"provider": teacher.provider, "model": teacher.model})
    if isinstance(teacher, ReplayTeacher):
        path = _existing(teacher.path, "teachers.*.path")
        if path.is_dir():
            todo = "name the JSONL or parquet file that holds the completions"
            raise UsageError(f"a folder, not a file: {path}", where="teachers.*.path", todo=todo)
        sha256 = cache.sha256(path)
        cache.save()
        return digest_json({"origin": teacher.origin, "file": sha256, "completion": teacher.completion})
    folder = model_folder(teacher)
    digest = path_digest(folder, cache)
    cache.save()
    return digest


def model_folder(model: LocalModel) -> Path:
    """The folder with the model's files; a hub model is fetched into the hub's cache when it is not there yet.

    Raises:
        UsageError: the folder does not exist, or the hub has no such model or cannot be reached.
    """
    if model.folder is not None:
        return _existing(model.folder, "teachers.*.model")
    from huggingface_hub import snapshot_download  # not needed for local folders

    what, todo = "the hub model cannot be fetched", "check the id, the revision and the network, or give a local folder"
    with boundary(UsageError, what, where=f"{model.model}@{model.revision}", todo=todo):
        return Path(
            snapshot_download(
                model.model,
                revision=model.revision,
                allow_patterns=list(MODEL_FILES),
                ignore_patterns=[f"{OTHER_FORMATS}/*"],
            )
        )


def _existing(path: Path, where: str) -> Path:
    if not path.exists():
        raise UsageError(f"no such file or folder: {path}", where=where, todo="correct the path in the config")
    return path
