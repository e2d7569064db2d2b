"""What an API is known to refuse of a config, so that it is said when that is read and not once for each row."""

from collections.abc import Iterator

from pipeline.core.config_api import AnthropicTeacher, ApiTeacher, GeminiTeacher, OpenAITeacher
from pipeline.core.config_batch import mode_refusals
from pipeline.core.config_length import Continue, Raise
from pipeline.core.config_logprobs import KINDS as LOGPROBS_KINDS
from pipeline.core.config_logprobs import MODE_FLAG, RAW, LogprobsConfig, names_other_mode
from pipeline.core.config_response import ResponseForm
from pipeline.core.config_server import LocalServer, ServerTeacher
from pipeline.core.config_teacher import GenerateConfig, Sampling, Teacher, VllmTeacher

GEMINI_STOPS = 5
"""Most stop sequences that `generateContent` takes."""


def sampling_refusals(teacher: Teacher, sampling: Sampling) -> Iterator[str]:
    """What of `generate.sampling` this teacher's API would answer with 400, one sentence each.

    Not covered: what single models refuse (penalties with some Gemini models; any temperature with newer models of
    Anthropic's and with OpenAI's reasoning models).
    """
    if isinstance(teacher, AnthropicTeacher):
        yield from _anthropic_refusals(teacher, sampling)
    if isinstance(teacher, GeminiTeacher) and len(sampling.stop) > GEMINI_STOPS:
        yield f"generate.sampling.stop: the Gemini API takes at most {GEMINI_STOPS} stop sequences"
    yield from thinking_refusals(teacher, sampling.max_tokens, "generate.sampling.max_tokens")


def generate_refusals(teacher: Teacher, config: GenerateConfig) -> Iterator[str]:
    """What of `generate` this teacher cannot do, one sentence each."""
    yield from sampling_refusals(teacher, config.sampling)
    yield from mode_refusals(config.mode, teacher.kind)
    if isinstance(config.on_length, Continue) and teacher.kind != "vllm":
        yield f"generate.on_length: a teacher of kind {teacher.kind} cannot continue its own text; use kind raise"
    if isinstance(config.on_length, Raise) and teacher.kind == "replay":
        yield "generate.on_length: a replayed file cannot be asked again; use kind keep or drop"
    if config.samples > 1 and config.sampling.temperature == 0 and teacher.kind != "replay":
        yield (
            f"generate.samples: at temperature 0 the {config.samples} samples of a prompt are the same answer; "
            "raise sampling.temperature, or ask for one sample"
        )
    if config.logprobs is not None:
        yield from logprobs_refusals(teacher, config, config.logprobs)
    if config.response is not None:
        yield from response_refusals(teacher, config.response)
        if isinstance(config.on_length, Continue):
            yield "generate.on_length: an answer that must have a form cannot be continued; use kind raise"


def logprobs_refusals(teacher: Teacher, config: GenerateConfig, logprobs: LogprobsConfig) -> Iterator[str]:
    """Why the teacher gives no soft targets, or none that are the model's own. Sources: the references of the APIs;
    of vLLM 0.32 what it does.

    Not covered: models that refuse (OpenAI's while they reason).
    """
    field = "generate.logprobs"
    if teacher.kind not in LOGPROBS_KINDS:
        yield f"{field}: a teacher of kind {teacher.kind} gives none; leave it out"
    if teacher.kind in ("openai", "gemini") and logprobs.top_k > logprobs.api_limit:
        todo = f"lower it, or raise {field}.api_limit where the API takes more"
        yield f"{field}.top_k: APIs take at most {logprobs.api_limit}, not {logprobs.top_k}; {todo}"
    args = teacher.args if isinstance(teacher, VllmTeacher) else ()
    if names_other_mode(teacher.command if isinstance(teacher, ServerTeacher) else args):
        yield f"{field}: {MODE_FLAG} of the teacher must be {RAW}; leave the flag out"
    if isinstance(config.on_length, Continue):
        yield f"{field}: an answer in parts has no soft targets at its seams; use on_length of kind raise"
    if config.response is not None and teacher.kind in ("vllm", "server"):
        yield f"{field}: under `response` vLLM gives those of the allowed tokens only; leave out one of the two"


def response_refusals(teacher: Teacher, form: ResponseForm) -> Iterator[str]:
    """Whether this teacher's API knows such a form. Sources: the references of the APIs and of vLLM 0.32.

    Not covered: the parts of JSON Schema that an API leaves out, about which it complains itself.
    """
    known = {"json_schema"} | ({"choice"} if isinstance(teacher, GeminiTeacher) else set())
    if isinstance(teacher, OpenAITeacher | ServerTeacher):
        todo = "give kind json_schema, or the teacher's `structured_outputs: vllm` where vLLM serves it"
        if teacher.structured_outputs == "openai" and form.kind not in known:
            yield f"generate.response: OpenAI's format knows no form of kind {form.kind}; {todo}"
    elif isinstance(teacher, AnthropicTeacher | GeminiTeacher) and form.kind not in known:
        todo = "give kind json_schema (with an `enum`, or a `pattern` if the API takes that)"
        yield f"generate.response: the API of kind {teacher.kind} knows no form of kind {form.kind}; {todo}"


def thinking_refusals(teacher: Teacher, max_tokens: int, field: str) -> Iterator[str]:
    """Whether a cap leaves no room for an answer behind the teacher's thinking, which counts in it."""
    thinking = teacher.thinking_tokens if isinstance(teacher, AnthropicTeacher | GeminiTeacher) else None
    if thinking is not None and thinking >= max_tokens:
        yield f"{field}: {max_tokens} leaves no room for an answer behind {thinking} thinking_tokens"


def takes_temperature(teacher: Teacher | LocalServer | ApiTeacher, sampling: Sampling) -> bool:
    """Whether an API teacher may be told a temperature: not where the config says that it refuses one (`null`), nor
    while it thinks on Anthropic's API. Local models always take one."""
    if teacher.kind in ("vllm", "server", "replay"):
        return True
    return sampling.temperature is not None and not (isinstance(teacher, AnthropicTeacher) and teacher.thinks)


def _anthropic_refusals(teacher: AnthropicTeacher, sampling: Sampling) -> Iterator[str]:
    """Source: the reference of the Messages API and its guide to extended thinking."""
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name) != 0:
            yield f"generate.sampling.{name}: Anthropic's API has no such setting; leave it out"
    if any(not text.strip() for text in sampling.stop):
        yield "generate.sampling.stop: Anthropic's API takes no stop sequence of white space alone"
    if teacher.thinks:
        yield from _thinking_sampling_refusals(sampling)
        return
    if sampling.temperature is not None and sampling.temperature > 1:
        yield "generate.sampling.temperature: Anthropic's API takes 0 to 1"
    if sampling.temperature is not None and sampling.top_p not in (None, 1):
        yield "generate.sampling.top_p: Anthropic's API takes temperature or top_p, not both; set one of them to null"


def _thinking_sampling_refusals(sampling: Sampling) -> Iterator[str]:
    if sampling.temperature not in (None, 1):
        yield "generate.sampling.temperature: Anthropic's models think at their own temperature only; set it to null"
    if sampling.top_p is not None and sampling.top_p < 0.95:
        yield "generate.sampling.top_p: Anthropic's models think with 0.95 to 1 only; set it to null"
    if sampling.top_k is not None:
        yield "generate.sampling.top_k: Anthropic's models take none while they think; leave it out"
