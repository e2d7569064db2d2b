"""What is known about a prompt source: its card, with "unknown" where nobody said."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from pipeline.core.config_base import ConfigModel
from pipeline.core.config_prompts import HubSource, PromptSet
from pipeline.core.errors import UsageError
from pipeline.core.load import read_yaml, refusal
from pipeline.core.mistakes import mistakes_in
from pipeline.terms.licenses import UNKNOWN, License, parse_license
from pipeline.text.normalise import replace_surrogates


class Card(ConfigModel):
    """The card's YAML; every field may be left out."""

    source: str | None = Field(default=None, max_length=2000)
    """Where the rows come from: a name or an address."""
    revision: str | None = Field(default=None, max_length=200)
    """Commit, version or date of the source, quoted."""
    license: str | None = None
    """SPDX expression of the licence, or the name of its terms."""
    description: str | None = Field(default=None, max_length=10_000)
    """What the rows are."""
    columns: dict[str, str] | None = None
    """What the columns hold, for readers of the card."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What `sources.json` says about a set; "unknown" where the card says nothing."""

    source: str
    revision: str
    license: str
    license_is_spdx: bool
    description: str


def source_facts(prompt_set: PromptSet) -> SourceFacts:
    """Read the card of a set.

    Raises:
        UsageError: the card is missing, has unknown keys, or contradicts the config.
    """
    card = Card() if prompt_set.card is None else _read_card(prompt_set.card)
    source, revision = card.source, card.revision
    if isinstance(prompt_set.source, HubSource):
        source = prompt_set.source.dataset if source is None else source
        if revision is not None and revision != prompt_set.source.revision:
            what = f"the card says revision {revision!r}, the config reads {prompt_set.source.revision!r}"
            raise UsageError(what, where=str(prompt_set.card), todo="leave `revision` out of the card")
        revision = prompt_set.source.revision
    found = _license(card, prompt_set.card)
    return SourceFacts(
        source=_said(source),
        revision=_said(revision),
        license=found.name,
        license_is_spdx=found.spdx,
        description=_said(card.description),
    )


def _said(text: str | None) -> str:
    return UNKNOWN if text is None or text.strip() == "" else replace_surrogates(text.strip())


def _license(card: Card, path: Path | None) -> License:
    if card.license is None:
        return License(UNKNOWN, spdx=False)
    try:
        return parse_license(card.license)
    except ValueError as error:
        todo = "write an SPDX expression such as MIT or CC-BY-4.0, or the name of the terms"
        raise UsageError(f"license: {error}", where=str(path), todo=todo) from error


def _read_card(path: Path) -> Card:
    data = read_yaml(path)
    try:
        return Card.model_validate({} if data is None else data)
    except ValidationError as error:
        todo = f"correct it; a card has the keys {', '.join(Card.model_fields)}"
        raise refusal(path, mistakes_in(Card, data, error), todo) from error
