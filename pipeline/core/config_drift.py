"""Config of the canaries: fixed prompts that show whether a teacher still answers alike."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.config_base import ConfigModel


class Canaries(ConfigModel):
    """The first prompts of the run, asked anew, greedily and briefly, each time that a run begins to ask; the answers
    are compared with those of the first time. They count in the budget and change no row. Thinking has its budget
    beside the brief answer; where only an effort is set, a canary may be as long as any answer."""

    count: Annotated[int, Field(ge=1, le=1000)] = 4
    """Number of prompts."""
    on_drift: Literal["stop", "warn"] = "stop"
    """What follows when the answers have changed; those that are there are kept either way."""
    min_similarity: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of words that the answers and those of the first time have in common, over all canaries; below it they have
    changed. 1: not a word may differ, which few APIs keep even at temperature 0."""
