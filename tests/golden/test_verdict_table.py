"""The verdict on every term record is what docs/verdicts.md says, and the best known are what their documents say."""

import pytest

from pipeline.terms.records import load_registry
from tools import verdict_table

LLAMA_2, LLAMA_33 = "LicenseRef-scancode-llama-2-license-2023", "LicenseRef-scancode-llama-3.3-license-2024"
COLUMNS = 8


def test_the_page_says_what_the_code_says() -> None:
    page = verdict_table.PAGE.read_text(encoding="utf-8")
    assert page == verdict_table.page(), f"a verdict changed: look at why, then {verdict_table.COMMAND}"


def test_it_has_every_record_under_every_policy() -> None:
    records = load_registry().records
    assert len(records) >= 49
    lines = verdict_table.PAGE.read_text(encoding="utf-8").splitlines()
    for name in records:
        rows = [line.split("|")[3:-1] for line in lines if line.startswith(f"| `{name}` |")]
        assert len(rows[0]) == COLUMNS, name
        assert all(cell.strip() for cell in rows[0]), name


# By hand, from research on the documents: {commercial, research} × {private, public} × {same, other}.
@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("MIT", ["allow"] * 8),
        ("Apache-2.0", ["allow"] * 8),
        ("deepseek-open-platform", ["allow"] * 8),
        ("openai-services", ["open LG-012"] * 8),
        ("anthropic-usage", ["deny LG-014"] * 8),
        ("xai-enterprise", ["deny LG-010"] * 8),
        (LLAMA_2, ["owed", "deny LG-011"] * 4),
        (LLAMA_33, ["owed"] * 8),
        ("CC0-1.0", ["allow"] * 8),
        ("CC-BY-4.0", ["allow", "allow", "owed", "owed"] * 2),
        ("CC-BY-NC-4.0", ["deny LG-002"] * 4 + ["allow", "allow", "owed", "owed"]),
        ("CC-BY-ND-4.0", ["allow", "allow", "deny LG-004", "deny LG-004"] * 2),
        ("nvidia-model-training", ["allow", "allow", "deny LG-005", "deny LG-005"] * 2),
        ("NOASSERTION", ["open LG-001"] * 8),
    ],
)
def test_the_best_known_are_as_their_documents_say(name: str, cells: list[str]) -> None:
    registry = load_registry()
    ids = {
        "deepseek-open-platform": "terms:deepseek/open-platform/",
        "openai-services": "terms:openai/services-agreement/",
        "anthropic-usage": "terms:anthropic/usage-policy/",
        "xai-enterprise": "terms:xai/enterprise/",
        "nvidia-model-training": "LicenseRef-scancode-nvidia-model-training-",
    }
    prefix = ids.get(name, name)
    (record,) = [each for each in registry.records.values() if each.id.startswith(prefix)]
    found = verdict_table.cells_of(record, registry)
    assert [cell.strip("()").split(" ")[0] if "owed" in cell else cell for cell in found] == cells


def test_the_checking_mode_changes_nothing_and_says_whether_it_fits() -> None:
    before = verdict_table.PAGE.read_bytes()
    assert verdict_table.main(["--check"]) == 0
    assert verdict_table.PAGE.read_bytes() == before
