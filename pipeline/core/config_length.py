"""Config of what becomes of answers that end at their cap."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.core.config_base import ConfigModel
from pipeline.core.stage import Json


class Keep(ConfigModel):
    """They are kept with their finish reason `length`; the filter drops them unless `filter.finish_reasons` has it."""

    kind: Literal["keep"]
    """Kept."""


class Drop(ConfigModel):
    """They are rejected as `length` before any filter sees them."""

    kind: Literal["drop"]
    """Dropped."""


class Raise(ConfigModel):
    """They alone are asked again under higher caps, one after the other, until they end by themselves."""

    kind: Literal["raise"]
    """Asked again."""
    caps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, max_length=10)]
    """Caps on completion tokens, each higher than the one before and than `sampling.max_tokens`. What is still cut
    under the last is kept."""

    @field_validator("caps")
    @classmethod
    def _is_a_ladder(cls, caps: tuple[int, ...]) -> tuple[int, ...]:
        if any(higher <= lower for lower, higher in pairwise(caps)):
            raise ValueError(f"each cap must be higher than the one before: {[*caps]}")
        return caps


class Continue(ConfigModel):
    """The model goes on where it was cut, with `sampling.max_tokens` more tokens each time. It is asked with its own
    text as the last message, so the words around the seam are the chat template's to keep: templates that strip an
    assistant's text lose white space there."""

    kind: Literal["continue"]
    """Continued; for teachers that vLLM serves here."""
    times: Annotated[int, Field(ge=1, le=100)] = 1
    """How often at most; what is still cut then is kept."""


LengthPolicy = Annotated[Keep | Drop | Raise | Continue, Field(discriminator="kind")]


def policy_that_counts(policy: LengthPolicy) -> Json:
    """What counts of a policy: nothing of the one that does nothing."""
    match policy:
        case Keep():
            return None
        case Raise(caps=caps):
            return {"kind": policy.kind, "caps": [*caps]}
        case Continue(times=times):
            return {"kind": policy.kind, "times": times}
        case _:
            return {"kind": policy.kind}
