"""What an API is known to refuse of a config, so that it is said when that is read and not once for each row."""

from collections.abc import Iterator

from pipeline.core.config_api import AnthropicTeacher, GeminiTeacher
from pipeline.core.config_teacher import Sampling, Teacher

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


def thinking_refusals(teacher: Teacher, max_tokens: int, field: str) -> Iterator[str]:
    """Whether a cap leaves no room for an answer behind the teacher's thinking, which counts in it."""
    thinking = teacher.thinking_tokens if isinstance(teacher, AnthropicTeacher | GeminiTeacher) else None
    if thinking is not None and thinking >= max_tokens:
        yield f"{field}: {max_tokens} leaves no room for an answer behind {thinking} thinking_tokens"


def takes_temperature(teacher: Teacher, sampling: Sampling) -> bool:
    """Whether an API teacher may be told a temperature: not where the config says that it refuses one (`null`), nor
    while it thinks on Anthropic's API. Local models always take one."""
    if teacher.kind in ("vllm", "replay"):
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
