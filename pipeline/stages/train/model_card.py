"""The card of a trained student: the README.md of its folder, made from plain facts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined

from pipeline.core.config_train import TrainConfig
from pipeline.terms.notices import text_of
from pipeline.terms.statement import Source
from pipeline.terms.verdict import Due, Verdict
from pipeline.text.markdown import escape_markdown, with_front_matter

TEMPLATE: Final = Path(__file__).with_name("model_card.md.jinja")
HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")

TOLD: Final = (
    ("rows_seen", "rows seen"),
    ("steps", "optimizer steps"),
    ("tokens_seen", "tokens seen"),
    ("epochs", "epochs"),
    ("final_loss", "last training loss"),
    ("eval_loss", "validation loss"),
    ("parameters", "parameters"),
    ("trainable_parameters", "trained parameters"),
)
"""Metrics of the training that the card tells, and how it calls them."""


def training_facts(train: TrainConfig, metrics: Mapping[str, Any], rows: int) -> dict[str, str | int | float]:
    """What the card tells of a training, in the order in which it is told.

    Args:
        metrics: of the stage `train`.
        rows: that were trained on.
    """
    told = {name: metrics[metric] for metric, name in TOLD if metrics.get(metric) is not None}
    return {
        "rows": rows,
        **told,
        "tuning": train.tuning.kind,
        "learning rate": train.learning_rate,
        "batch size": train.batch_size,
        "longest row (tokens)": train.max_length,
    }


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """The data set that the student was trained on.

    Attributes:
        title: its title.
        hub_ids: under which it is published; none where that is not known.
        manifest_sha256: 64 hex digits of its `manifest.json`.
        content: 64 hex digits over its rows.
        rows: its rows, of all splits.
    """

    title: str
    manifest_sha256: str
    content: str
    rows: int
    hub_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """All that the card says.

    Attributes:
        name: of the student, its heading.
        base: hub ids or names of the models that it was made from, the nearest first; a name that is no hub id is told
            in the text only.
        base_revision: of the first of them, where it has one.
        license: the card's licence fields, as `terms.notices.license_fields` gives them; never left to a default.
        sources: what it was distilled from.
        dataset: what it was trained on.
        command: the command that made it, as typed, without keys.
        training: name -> value, in the order in which they are shown: rows, steps, tokens, tuning, learning rate, …
        intended_use, release: for which policy it was judged.
        verdict: of the licence gate; None: nobody judged it.
        duties: what terms ask of whoever passes it on.
        adapter: whether the folder holds an adapter rather than a whole model.
    """

    name: str
    base: tuple[str, ...]
    license: Mapping[str, str]
    sources: tuple[Source, ...]
    dataset: DatasetFacts
    command: str
    training: Mapping[str, str | int | float]
    intended_use: str
    release: str
    base_revision: str | None = None
    verdict: Verdict | None = None
    duties: tuple[Due, ...] = ()
    adapter: bool = False


def render_card(card: ModelCard) -> str:
    """The text of README.md.

    Raises:
        ValueError: its front matter, read back, is not what was meant (a bug in the escaping), or no licence is named.
    """
    return with_front_matter(front_matter(card), f"\n{_body(card)}")


def front_matter(card: ModelCard) -> dict[str, Any]:
    """The card's metadata, as the hub reads it; names that are no hub ids are left out, since it refuses them.

    Raises:
        ValueError: no licence is named: a card without one would say nothing, and a default would say something false.
    """
    if not card.license.get("license"):
        raise ValueError("the model card has no licence")
    return {
        **{name: card.license[name] for name in ("license", "license_name", "license_link") if name in card.license},
        **_listed("base_model", card.base),
        "library_name": "peft" if card.adapter else "transformers",
        "pipeline_tag": "text-generation",
        **_listed("datasets", card.dataset.hub_ids),
        "tags": ["distillation", "synthetic", "trl", "sft"],
    }


def _listed(field: str, names: Sequence[str]) -> dict[str, list[str]]:
    ids = [name for name in names if is_hub_id(name)]
    return {field: ids} if ids else {}


def is_hub_id(name: str) -> bool:
    """Whether the hub takes a name for `owner/name`, or for one of its oldest models, which have no owner."""
    return HUB_ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def _body(card: ModelCard) -> str:
    # No HTML escaping: this is Markdown, and every value from outside goes through a filter.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters["md"] = lambda value: escape_markdown(str(value))
    environment.filters["fenced"] = _fenced
    environment.filters["number"] = lambda value: (
        f"{value:,}" if isinstance(value, int) else escape_markdown(str(value))
    )
    prefixes = [text_of(duty) for duty in card.duties if duty.atom == "name_prefix" and text_of(duty) is not None]
    displays = [duty for duty in card.duties if duty.atom == "display" and text_of(duty) is not None]
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(card=card, prefixes=list(dict.fromkeys(prefixes)), displays=displays, text_of=text_of)


_UNSEEN: Final = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")


def _fenced(text: str) -> str:
    """A code block whose fence is longer than every run of backticks in the text."""
    text = _UNSEEN.sub(" ", text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
