"""Config of soft targets: how many of the teacher's token probabilities are kept beside each row."""

from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from pipeline.core.config_base import OPERATIONAL, ConfigModel
from pipeline.core.stage import Json

API_LIMIT: Final = 20
"""Most `top_logprobs` that OpenAI's and Google's APIs take."""
LOCAL_KINDS: Final = ("vllm", "server")
KINDS: Final = (*LOCAL_KINDS, "openai", "gemini")
"""Kinds of teachers that can be asked for logprobs."""
MODE_FLAG: Final = "--logprobs-mode"
RAW: Final = "raw_logprobs"


class LogprobsConfig(ConfigModel):
    """Soft targets: the log-probabilities of the best tokens at each position of an answer, before temperature and
    other settings of the sampling, written to `targets/` beside the rows."""

    top_k: Annotated[int, Field(ge=1, le=64)]
    """Tokens that are kept at each position, the best first; the sampled token is kept whatever its rank."""
    token_ids: bool | None = None
    """Whether vLLM's own request fields are used, which give token ids in place of texts. None: for teachers of kind
    `vllm`, and for those with `structured_outputs: vllm`, since vLLM serves them."""
    api_limit: Annotated[int, Field(ge=1, le=64), OPERATIONAL] = API_LIMIT
    """Most logprobs that an API takes. OpenAI and Google take 20; raise it for one that takes more."""
    accept_scaled: Annotated[bool, OPERATIONAL] = False
    """Go on although the provider scales its logprobs by the temperature, or although that cannot be told. Where the
    temperature is 1 it makes no difference."""


@dataclass(frozen=True, slots=True)
class LogprobsAsked:
    """What is asked of one teacher.

    Attributes:
        top_k: as in the config.
        sent: how many are asked for. vLLM names the sampled token first, and if it is not among the best the last of
            these makes room for it: one more is asked for, so that all of the best come.
        ids: whether token ids are asked for, so that an answer without them is of no use.
        accept_scaled: as in the config.
    """

    top_k: int
    sent: int
    ids: bool
    accept_scaled: bool = False


def logprobs_asked(config: LogprobsConfig | None, kind: str, *, is_vllm: bool) -> LogprobsAsked | None:
    """What a config asks of a teacher of some kind; None: no logprobs.

    Args:
        is_vllm: whether vLLM is known to serve it; the config may know better.
    """
    if config is None:
        return None
    ids = is_vllm if config.token_ids is None else config.token_ids
    sent = config.top_k + 1 if kind in LOCAL_KINDS or ids else max(2, config.top_k)  # of one it is unclear whose it is
    return LogprobsAsked(config.top_k, sent, ids, config.accept_scaled)


def logprobs_that_count(config: LogprobsConfig | None) -> Json:
    """What counts of soft targets: how many and in which form; none count like a field that is not there."""
    if config is None:
        return None
    ids: dict[str, Json] = {} if config.token_ids is None else {"token_ids": config.token_ids}
    return {"top_k": config.top_k, **ids}


def logprobs_flags(asked: LogprobsAsked) -> tuple[str, ...]:
    """Arguments of a vLLM server that gives these logprobs. The last of several wins, so they stand behind others."""
    return ("--max-logprobs", str(max(asked.sent, API_LIMIT)), MODE_FLAG, RAW)


def names_other_mode(args: tuple[str, ...]) -> bool:
    """Whether a command line asks vLLM for other logprobs than raw ones."""
    flat = [part for arg in args for part in arg.replace("_mode=", "-mode=").split("=", 1)]
    modes = [flat[at + 1 : at + 2] for at, part in enumerate(flat) if part.replace("_", "-") == MODE_FLAG]
    return any(mode != [RAW] for mode in modes)
