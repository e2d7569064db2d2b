"""The card says what was meant, whatever the names in the data are."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.record import RECORD_SCHEMA, to_table
from pipeline.stages.dataset.card import SIZES, front_matter, read_front_matter, write_card
from pipeline.stages.dataset.census import Census
from pipeline.text.markdown import escape_markdown
from tests.support import a_record

NASTY = "x | y\n---\nlicense: mit\n# <script>alert(1)</script> `code` [a](javascript:x) \u202egnp.exe"


def census_of(**changes: Any) -> Census:
    census = Census()
    census.add(to_table(RECORD_SCHEMA, [a_record(**changes)]))
    return census


def card(path: Path, text: str) -> tuple[Any, str]:
    """Front matter and body of a card in which every free text is `text`."""
    census = census_of(prompt_set=text, teacher=text, task=text, license_set=(text,))
    facts = {"source": text, "revision": text, "license": text, "description": text}
    write_card(path / "README.md", text, census, census.sources({text: facts}))
    written = (path / "README.md").read_text("utf-8")
    return read_front_matter(path / "README.md"), written.partition("\n---\n")[2]


def test_nothing_in_the_data_acts_as_markup(tmp_path: Path) -> None:
    meta, body = card(tmp_path, NASTY)
    assert (meta["license"], meta["license_name"]) == (
        "other",
        "x-y-license-mit-script-alert-1-script-code-a-javascript-x-gnp.exe",
    )
    assert "<script>" not in body and "\u202e" not in body and "](javascript" not in body
    assert not any(line.startswith(("---", "license")) for line in body.splitlines())
    rows = [line for line in body.splitlines() if "javascript" in line and line.startswith("|")]
    assert [line.replace("\\|", "").count("|") for line in rows] == [7, 4, 3]


@given(text=st.text(max_size=60))
def test_any_text_leaves_front_matter_and_tables_intact(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    meta, body = card(tmp_path_factory.mktemp("card"), text)
    assert meta["license"] in {"other"} | {"mit"} and set(meta) >= {"pretty_name", "configs", "size_categories", "tags"}
    assert meta["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert body.count("## Columns") == 1


@given(st.text())
def test_escaped_text_is_one_line_without_bare_specials(text: str) -> None:
    escaped = escape_markdown(text)
    assert len(escaped.splitlines()) <= 1
    bare = escaped.replace("\\\\", "").split("\\")
    assert not set("|<>`[]*_") & set(bare[0])
    assert not any(set("|<>`[]*_") & set(part[1:]) for part in bare[1:])


@pytest.mark.parametrize(
    ("licenses", "fields"),
    [
        (("MIT",), {"license": "mit"}),
        (("Apache-2.0", "MIT"), {"license": "other", "license_name": "apache-2.0-and-mit"}),
        (("unknown",), {"license": "other", "license_name": "unknown"}),
    ],
)
def test_licence_fields(licenses: tuple[str, ...], fields: dict[str, str]) -> None:
    meta = front_matter("Title", census_of(license_set=licenses))
    assert {name: meta[name] for name in meta if name.startswith("license")} == fields


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((None,), None),
        ((0,), "0 completion tokens by the teacher's count."),
        ((3, 1500), "1,503 completion tokens by the teacher's count."),
        ((2, None, 3), "5 completion tokens by the teacher's count, in the 2 rows that have one."),
    ],
)
def test_tokens_are_named_only_where_the_teacher_counted(
    tmp_path: Path, counts: tuple[int | None, ...], said: str | None
) -> None:
    census = Census()
    census.add(to_table(RECORD_SCHEMA, [a_record(completion_tokens=count) for count in counts]))
    write_card(tmp_path / "README.md", "Title", census, census.sources({}))
    body = (tmp_path / "README.md").read_text("utf-8")
    assert "completion tokens by" not in body if said is None else said in body
    assert "\n\n\n" not in body


def test_size_categories() -> None:
    census = census_of()
    found = []
    for rows in [limit - 1 for limit, _ in SIZES] + [SIZES[-1][0]]:
        census.splits["train"] = rows
        found += front_matter("Title", census)["size_categories"]
    assert found == [name for _, name in SIZES] + ["100M<n<1B"]


def test_the_hub_library_reads_the_card(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: the extra `train` installs it")
    census = census_of(license_set=("MIT",))
    write_card(tmp_path / "README.md", "Sums", census, census.sources({}))
    read = hub.DatasetCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == front_matter("Sums", census)
