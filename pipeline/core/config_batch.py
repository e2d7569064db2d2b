"""Config of batch mode: how requests are cut into jobs, and what becomes of jobs that take too long."""

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from pipeline.core.config_base import OPERATIONAL, ConfigModel

KINDS: Final = ("openai", "anthropic")
"""Kinds of teachers whose APIs have batch jobs that we speak."""


class BatchConfig(ConfigModel):
    """How `generate.mode: batch` asks. None of it changes a row."""

    job_requests: Annotated[int, Field(ge=1, le=100_000), OPERATIONAL] = 10_000
    """Most requests of a job. OpenAI takes 50,000, Anthropic 100,000; smaller jobs bring answers sooner."""
    job_bytes: Annotated[int, Field(ge=1024, le=256_000_000), OPERATIONAL] = 100_000_000
    """Most bytes of a job. OpenAI takes 200 MB, Anthropic 256 MB."""
    open_jobs: Annotated[int, Field(ge=1, le=1000), OPERATIONAL] = 4
    """Most jobs at the provider at a time."""
    poll_s: Annotated[float, Field(gt=0), OPERATIONAL] = 30
    """Seconds between two looks at a job; the first looks come sooner."""
    rounds: Annotated[int, Field(ge=1), OPERATIONAL] = 3
    """How often a request is put into a job in one run before it stays pending, or is asked online."""
    stragglers: Annotated[Literal["wait", "online"], OPERATIONAL] = "wait"
    """What becomes of requests that jobs do not answer: `wait`: they stay pending (exit 3, the same command tries
    again); `online`: they are asked one by one at the online price."""
    online_after_s: Annotated[float | None, Field(gt=0), OPERATIONAL] = None
    """With `stragglers: online`: seconds after which a job is cancelled and the rest of it asked online. None: never;
    the provider itself ends a job after 24 hours."""

    @model_validator(mode="after")
    def _only_stragglers_have_a_time(self) -> "BatchConfig":
        if self.online_after_s is not None and self.stragglers != "online":
            raise ValueError("`online_after_s` needs `stragglers: online`")
        return self


def mode_refusals(mode: str, kind: str) -> Iterator[str]:
    """Why a teacher of some kind cannot be asked in a mode, one sentence each."""
    if mode == "batch" and kind not in KINDS:
        kinds = " and ".join(f"`{name}`" for name in KINDS)
        yield f"generate.mode: batch works with teachers of kind {kinds}, not `{kind}`; use `mode: online`"
