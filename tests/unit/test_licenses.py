"""Names of licences, and what a hub card may say about them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.terms.licenses import HUB_IDS, OTHER_HUB_IDS, License, hub_license, parse_license
from pipeline.terms.records import load_registry, resolve


@pytest.mark.parametrize(
    ("text", "name", "spdx"),
    [
        ("mit", "MIT", True),
        ("apache-2.0 or mit", "Apache-2.0 OR MIT", True),
        (" CC-BY-4.0\n", "CC-BY-4.0", True),
        ("Llama 3 Community", "Llama 3 Community", False),
        ("Unknown", "unknown", False),
        ("((", "((", False),
        ("() GPL-2.0", "() GPL-2.0", False),  # license-expression raises IndexError, not its own error
        ("( and or-later", "( and or-later", False),
        ("MIT () and", "MIT () and", False),
    ],
)
def test_spdx_where_it_is_spdx_and_a_name_elsewhere(text: str, name: str, spdx: bool) -> None:
    assert parse_license(text) == License(name, spdx)


@pytest.mark.parametrize("text", ["", "  ", "a\x00b", "x" * 201])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match="SPDX"):
        parse_license(text)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.sampled_from(["(", ")", "and", "OR", "with", "MIT", "or-later", "+", "-", ":"]), min_size=1))
def test_whatever_is_written_with_an_expressions_words_is_a_name(words: list[str]) -> None:
    text = " ".join(words)[:200]
    found = parse_license(text)
    assert found.spdx or found.name == " ".join(text.split())
    assert len(resolve(text, load_registry(), {})) >= 1


def test_hub_ids_are_spdx_ids() -> None:
    assert all(parse_license(name).spdx for name in HUB_IDS)


def test_other_hub_ids_are_those_of_term_records() -> None:
    registry = load_registry()
    for name, hub_id in OTHER_HUB_IDS.items():
        named, found = registry.find(name), registry.find(hub_id)
        assert named is not None and found is not None
        assert named.title == found.title  # two versions of Gemma's terms have one hub id


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ({"MIT"}, {"license": "mit"}),
        ({"MIT", "Apache-2.0"}, {"license": "other", "license_name": "apache-2.0-and-mit"}),
        ({"GPL-3.0-only"}, {"license": "other", "license_name": "gpl-3.0-only"}),
        ({"unknown"}, {"license": "other", "license_name": "unknown"}),
        ({"LicenseRef-scancode-llama-3.3-license-2024"}, {"license": "llama3.3"}),
        ({"ODC-By-1.0", "odc-by"}, {"license": "odc-by"}),
        ({"llama3.3", "MIT"}, {"license": "other", "license_name": "llama3.3-and-mit"}),
        ({"x\n---\nlicense: mit"}, {"license": "other", "license_name": "x-license-mit"}),
        (set(), {"license": "other", "license_name": "unknown"}),
    ],
)
def test_hub_fields(names: set[str], fields: dict[str, str]) -> None:
    assert hub_license(names) == fields
