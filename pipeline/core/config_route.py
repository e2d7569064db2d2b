"""Config of a run with several teachers: who of them answers which prompt."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.core.config_base import ConfigModel, Name


class BySet(ConfigModel):
    """Each prompt set has its teacher."""

    kind: Literal["sets"]
    """By prompt set."""
    sets: Annotated[dict[Name, Name], Field(min_length=1)]
    """Prompt set -> teacher; sets that are not named go to `generate.teacher`."""


class ByWeight(ConfigModel):
    """Each prompt goes to one teacher, drawn by a hash of its set and id: more prompts, or more samples, move none."""

    kind: Literal["weights"]
    """By weight."""
    weights: Annotated[dict[Name, Annotated[float, Field(gt=0, le=1e9)]], Field(min_length=1)]
    """Teacher -> its part of the prompts, as a ratio to the others."""


class ToAll(ConfigModel):
    """Every prompt goes to each of several teachers, each of which gives all its samples."""

    kind: Literal["all"]
    """All for each prompt."""
    teachers: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Who answers; the rows of a prompt stand in this order."""

    @field_validator("teachers")
    @classmethod
    def _is_named_once(cls, teachers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(teachers)) < len(teachers):
            raise ValueError(f"a teacher is named twice: {[*teachers]}")
        return teachers


Route = Annotated[BySet | ByWeight | ToAll, Field(discriminator="kind")]


def routed_teachers(teacher: str, route: Route | None) -> tuple[str, ...]:
    """Names of the teachers that are asked, each once, in the order in which they are."""
    match route:
        case None:
            return (teacher,)
        case BySet(sets=sets):
            return tuple(dict.fromkeys((teacher, *sets.values())))
        case ByWeight(weights=weights):
            return tuple(weights)
        case ToAll(teachers=teachers):
            return teachers


def unknown_sets(route: Route | None, sets: Collection[str]) -> list[str]:
    """What of a route names prompt sets that the config does not have, as sentences."""
    unknown = [name for name in route.sets if name not in sets] if isinstance(route, BySet) else []
    return [f"generate.route.sets: {name!r} is not one of prompts.sets: {[*sets]}" for name in unknown]
