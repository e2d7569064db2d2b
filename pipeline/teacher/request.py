"""What is asked of a teacher, and the key under which its answer is kept for ever."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.config_api import AnthropicTeacher, ApiTeacher, GeminiTeacher
from pipeline.core.config_base import LocalModel
from pipeline.core.config_teacher import (
    ReplayTeacher,
    Sampling,
    Teacher,
    VllmTeacher,
    flags_that_count,
    variables_that_count,
)
from pipeline.core.errors import UsageError, boundary
from pipeline.core.lineage import MODEL_FILES, OTHER_FORMATS, DigestCache, digest_json, path_digest
from pipeline.core.record import Message, message_dict
from pipeline.core.stage import Json


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be answered once.

    Attributes:
        key: see `request_key`; two prompts with equal messages share it, and are asked once.
        prompt_set, prompt_id: where the prompt came from.
        sample: index of this answer among the samples of its prompt, from 0.
        messages: the conversation that ends with the user's turn.
    """

    key: str
    prompt_set: str
    prompt_id: str
    sample: int
    messages: tuple[Message, ...]


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
    """

    identity: str
    flags: dict[str, Json]
    sampling: Sampling
    draw: int
    room: int | None = None
    reasoning_effort: str | None = None

    @classmethod
    def of(cls, teacher: Teacher, sampling: Sampling, draw: int, cache: DigestCache) -> "Asked":
        """Bind a teacher and its sampling; digests the teacher's weights if the cache does not know them.

        Raises:
            UsageError: the teacher's files cannot be read.
        """
        room = teacher.max_model_len if isinstance(teacher, VllmTeacher) else None
        effort = teacher.reasoning_effort if isinstance(teacher, ApiTeacher) else None
        return cls(teacher_identity(teacher, cache), output_flags(teacher), sampling, draw, room, effort)

    def request(self, prompt_set: str, prompt_id: str, sample: int, messages: Sequence[Message]) -> Request:
        """The request for one sample of a prompt."""
        return Request(request_key(self, messages, sample), prompt_set, prompt_id, sample, tuple(messages))


def request_key(asked: Asked, messages: Sequence[Message], sample: int) -> str:
    """sha256 (64 hex digits) over everything that decides which answer this is.

    Not in it: URL, port, engine version, the caps `max_tokens` and `max_model_len`, logprobs, transport, and the ids of
    the prompt.
    """
    sampling = asked.sampling
    return digest_json(
        {
            "messages": [{**message_dict(message)} for message in messages],
            "tools": None,
            "response_schema": None,
            "teacher": asked.identity,
            "flags": asked.flags,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "stop": list(sampling.stop),
            "reasoning_effort": asked.reasoning_effort,
            "draw": asked.draw,
            "sample": sample,
        }
    )


def output_flags(teacher: Teacher) -> dict[str, Json]:
    """Settings of the engine, beside the weights, that change what it answers."""
    if isinstance(teacher, AnthropicTeacher | GeminiTeacher) and teacher.thinking_tokens is not None:
        return {"thinking_tokens": teacher.thinking_tokens}
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
