"""What all config models share, and `identity`: which knobs change rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from pipeline.core.stage import Json

OPERATIONAL: Final = "operational"
"""Marks a field that cannot change a row: `x: Annotated[int, OPERATIONAL]`. Such fields stay out of the key."""

BYTES_OR_NAME: Final = "bytes-or-name"
"""Marks a field that holds a local path (counts by its bytes, through `input_files`) or a hub id (counts as text)."""


@dataclass(frozen=True, slots=True)
class CountedBy:
    """Marks a field of which only a part can change a row: `x: Annotated[T, CountedBy(part)]`.

    Attributes:
        part: gives what counts of the field's value; an empty part counts like a field that is not there.
    """

    part: Callable[[Any], Json]


Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
SecretRef = Annotated[str, StringConstraints(pattern=r"^\$\{env:[A-Z][A-Z0-9_]*\}$")]
FilePath = Annotated[Path, OPERATIONAL]
"""A path never counts; the bytes behind it do, through the stage's `input_files`."""


class ConfigModel(BaseModel):
    """Base of all config models: unknown keys are errors, nothing can be changed after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )


def identity(model: BaseModel) -> dict[str, Json]:
    """The fields of a config that can change a row, as JSON values: the part of the config a key is made of.

    Raises:
        TypeError: a field's value has no canonical JSON form (a path that is not marked, say).
    """
    counted: dict[str, Json] = {}
    for name, field in type(model).model_fields.items():
        if OPERATIONAL in field.metadata:
            continue
        value = getattr(model, name)
        partly = next((mark for mark in field.metadata if isinstance(mark, CountedBy)), None)
        if partly is not None:
            part = partly.part(value)
            counted |= {name: part} if part else {}
            continue
        if BYTES_OR_NAME in field.metadata and local_folder(value) is not None:
            value = "local"
        counted[name] = _identity_value(value)
    return counted


def _identity_value(value: Any) -> Json:
    if isinstance(value, BaseModel):
        return identity(value)
    if isinstance(value, dict):
        return {str(key): _identity_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity_value(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical JSON form: mark the field OPERATIONAL or give it one")


def section_that_counts(section: BaseModel | None) -> Json:
    """What counts of an optional section: all that counts in it; none counts like a field that is not there."""
    return None if section is None else identity(section)


def local_folder(model: str) -> Path | None:
    """The local folder that a model's name means, or None for a hub id."""
    return Path(model).expanduser() if model.startswith((".", "/", "~")) else None


def _if_any(models: dict[str, str] | None) -> Json:
    return None if models is None else {**models}


class LocalModel(ConfigModel):
    """A model whose weights we read: a local folder, or a hub id with its revision."""

    model: Annotated[str, BYTES_OR_NAME]
    """Local folder (starts with `.`, `/` or `~`) or Hugging Face hub id."""
    revision: str | None = None
    """Commit or tag on the hub. Required for a hub id (a branch can move, so prefer a commit), refused for a folder."""
    license: str = "unknown"
    """SPDX expression of the model's licence, the hub's id of it, or the name of its terms; recorded with every row it
    writes."""
    base_models: Annotated[dict[str, str] | None, CountedBy(_if_any)] = None
    """Models that it was made from, by name -> their licence, which holds as well. None: those that its folder's card
    names, under licences that nobody knows."""

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        return local_folder(self.model)

    @model_validator(mode="after")
    def _revision_belongs_to_hub_ids(self) -> "LocalModel":
        if self.folder is None and self.revision is None:
            raise ValueError(f"{self.model!r} is a hub id: give its `revision` (or start a folder's path with ./)")
        if self.folder is not None and self.revision is not None:
            raise ValueError("`revision` belongs to hub ids; a local folder counts by its bytes")
        return self
