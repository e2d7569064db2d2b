"""The Hugging Face card of a data set. Names in it come from data: none of them can act as Markdown, HTML or YAML."""

import re
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined

from pipeline.stages.dataset.census import Census
from pipeline.stages.dataset.facts import Facts, meaning_of
from pipeline.terms.notices import DISCLAIMER, DUTIES, TRIGGERS, license_fields, rows_of, text_of
from pipeline.text.markdown import escape_markdown, with_front_matter

TEMPLATE: Final = Path(__file__).with_name("card.md.jinja")
SIZES: Final = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
)
HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def write_card(path: Path, facts: Facts) -> None:
    """Write the card.

    Raises:
        ValueError: its front matter, read back, is not what was meant: a bug in the escaping.
    """
    path.write_text(with_front_matter(front_matter(facts), f"\n{_body(facts)}"), "utf-8", newline="\n")


def front_matter(facts: Facts) -> dict[str, Any]:
    """The card's metadata, as the hub reads it. Only what is known is said: no licence stands in for an unknown one."""
    census = facts.census
    splits = [split for split in ("train", "validation") if census.splits[split] > 0]
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    sources = sorted({facts.hub_ids[name] for name in census.prompt_sets if name in facts.hub_ids})
    written = _written_by(facts)
    return {
        "pretty_name": " ".join(facts.title.split()),
        **license_fields(census.licenses),
        **_given("source_datasets", [f"extended|{name}" for name in sources if HUB_ID.fullmatch(name)]),
        "annotations_creators": written,
        "language_creators": sorted({"found", *written}),
        "task_categories": ["text-generation"],
        "size_categories": [size_category(census)],
        **_given("tags", ["synthetic", "distillation"] if facts.models else []),
        "configs": [{"config_name": "default", "data_files": files}],
    }


def size_category(census: Census) -> str:
    """The hub's word for so many rows."""
    return next((name for limit, name in SIZES if census.rows < limit), "100M<n<1B")


def _written_by(facts: Facts) -> list[str]:
    """Who wrote the completions, in the hub's words: a model that was asked, or whoever it was before (`found`: they
    existed; the sources' table says by whom)."""
    made = ["machine-generated"] if facts.models else []
    found = ["found"] if any(name in facts.replayed for name in facts.census.teachers) else []
    return [*found, *made] or ["other"]


def _given(name: str, values: list[str]) -> dict[str, list[str]]:
    return {name: values} if values else {}


def _body(facts: Facts) -> str:
    # No HTML escaping: this is Markdown, and every value from outside goes through the filter `md`.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters["md"] = lambda value: escape_markdown(str(value))
    environment.filters["n"] = lambda value: f"{value:,}"
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(
        facts=facts,
        census=facts.census,
        rows_of=rows_of,
        text_of=text_of,
        meaning_of=meaning_of,
        duties=DUTIES,
        triggers=TRIGGERS,
        disclaimer=DISCLAIMER,
        licenses=sorted(facts.census.licenses),
    )
