"""The Hugging Face card of a data set. Names in it come from data: none of them can act as Markdown, HTML or YAML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from jinja2 import Environment, StrictUndefined

from pipeline.core.stage import Json
from pipeline.stages.dataset.census import Census
from pipeline.terms.licenses import hub_license
from pipeline.text.markdown import escape_markdown

TEMPLATE: Final = Path(__file__).with_name("card.md.jinja")
SIZES: Final = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
)


def write_card(path: Path, title: str, census: Census, sources: Mapping[str, Json]) -> None:
    """Write the card and read its front matter back.

    Raises:
        ValueError: what was read back is not what was meant: a bug in the escaping.
    """
    meant = front_matter(title, census)
    # No folding (a folded value could hold a line `---`), and ASCII, so that control characters are written as escapes.
    head = yaml.safe_dump(meant, sort_keys=False, allow_unicode=False, width=10_000)
    path.write_text(f"---\n{head}---\n\n{_body(title, census, sources)}", "utf-8", newline="\n")
    if read_front_matter(path) != meant:
        raise ValueError(f"the front matter of {path.name} does not say what was meant")


def read_front_matter(path: Path) -> Any:
    """The metadata between the card's first two `---` lines."""
    head, _, _ = path.read_text("utf-8").removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head)


def front_matter(title: str, census: Census) -> dict[str, Any]:
    """The card's metadata, as the hub reads it."""
    splits = [split for split in ("train", "validation") if census.splits[split] > 0]
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    return {
        "pretty_name": " ".join(title.split()),
        **hub_license(census.licenses),
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES if census.rows < limit), "100M<n<1B")],
        "tags": ["synthetic", "distillation"],
        "configs": [{"config_name": "default", "data_files": files}],
    }


def _body(title: str, census: Census, sources: Mapping[str, Json]) -> str:
    # No HTML escaping: this is Markdown, and every value from outside goes through the filter `md`.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters["md"] = lambda value: escape_markdown(str(value))
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(title=title, census=census, sources=sources, licenses=sorted(census.licenses))
