"""Names of licences, and what a hub card may say about them."""

import pytest

from pipeline.terms.licenses import HUB_IDS, License, hub_license, parse_license


@pytest.mark.parametrize(
    ("text", "name", "spdx"),
    [
        ("mit", "MIT", True),
        ("apache-2.0 or mit", "Apache-2.0 OR MIT", True),
        (" CC-BY-4.0\n", "CC-BY-4.0", True),
        ("Llama 3 Community", "Llama 3 Community", False),
        ("Unknown", "unknown", False),
        ("((", "((", False),
    ],
)
def test_spdx_where_it_is_spdx_and_a_name_elsewhere(text: str, name: str, spdx: bool) -> None:
    assert parse_license(text) == License(name, spdx)


@pytest.mark.parametrize("text", ["", "  ", "a\x00b", "x" * 201])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match="SPDX"):
        parse_license(text)


def test_hub_ids_are_spdx_ids() -> None:
    assert all(parse_license(name).spdx for name in HUB_IDS)


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ({"MIT"}, {"license": "mit"}),
        ({"MIT", "Apache-2.0"}, {"license": "other", "license_name": "apache-2.0-and-mit"}),
        ({"GPL-3.0-only"}, {"license": "other", "license_name": "gpl-3.0-only"}),
        ({"unknown"}, {"license": "other", "license_name": "unknown"}),
        ({"x\n---\nlicense: mit"}, {"license": "other", "license_name": "x-license-mit"}),
        (set(), {"license": "other", "license_name": "unknown"}),
    ],
)
def test_hub_fields(names: set[str], fields: dict[str, str]) -> None:
    assert hub_license(names) == fields
