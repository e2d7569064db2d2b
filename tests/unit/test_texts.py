"""Full texts of licences: whose goes first, what is refused, and that none is ever invented."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.terms.records import load_registry
from pipeline.terms.texts import BUILT_IN, PACKAGE, Text, file_name, find_text, text_hash

LLAMA = "LicenseRef-scancode-llama-3.3-license-2024"


def find(name: str, folder: Path | None = None) -> Text | None:
    return find_text(name, load_registry(), folder)


class TestOrder:
    @pytest.fixture
    def database(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An installed `licensedcode` that fails if anyone imports it."""
        licenses = tmp_path / "site" / PACKAGE / "data/licenses"
        licenses.mkdir(parents=True)
        (tmp_path / "site" / PACKAGE / "__init__.py").write_text("raise RuntimeError('it was imported')")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        importlib.invalidate_caches()
        return licenses

    def test_ones_own_text_goes_first(self, tmp_path: Path, database: Path) -> None:
        (database / "mit.LICENSE").write_text("---\nspdx_license_key: MIT\n---\n\nTheirs.\n")
        (tmp_path / "MIT.txt").write_text("Mine.\n")
        found = find("mit", tmp_path)
        assert found == Text("Mine.\n", text_hash("Mine."), "folder policy.texts")

    def test_then_the_installed_database_which_is_not_imported(self, tmp_path: Path, database: Path) -> None:
        (database / "mit.LICENSE").write_text("---\nspdx_license_key: MIT\n---\n\nTheirs.\n")
        found = find("mit", tmp_path)
        assert found == Text("Theirs.", text_hash("Theirs."), "ScanCode LicenseDB, mit.LICENSE")
        assert PACKAGE not in sys.modules

    def test_then_what_comes_along(self, tmp_path: Path) -> None:
        found = find("mit", tmp_path)
        assert found is not None
        assert found.text == (BUILT_IN / "MIT.txt").read_text("utf-8")
        assert "comes along" in found.origin

    def test_otherwise_there_is_none(self, tmp_path: Path) -> None:
        assert find("terms:openai/services-agreement/2026-01-01", tmp_path) is None
        assert find("GPL-3.0-only", tmp_path) is None
        assert find("unknown") is None

    def test_the_database_has_texts_that_no_record_is_of(self, database: Path) -> None:
        front = "---\nkey: x\nspdx_license_key: GPL-3.0-only\nother_spdx_license_keys:\n  - GPL-3.0\n---\n"
        (database / "gpl-3.0-only.LICENSE").write_text(front + "\nFree.")
        found = find("GPL-3.0-only")
        assert found is not None and found.text == "Free."

    @pytest.mark.parametrize(
        "content",
        ["---\nspdx_license_key: MIT-0\n---\nAnother.", "No front matter.", "---\nspdx_license_key: MIT\n---\n\n"],
    )
    def test_a_file_of_that_name_that_is_not_that_licence_does_not_count(self, database: Path, content: str) -> None:
        (database / "mit.LICENSE").write_text(content)
        found = find("mit")
        assert found is not None and "comes along" in found.origin


class TestOwnFolder:
    @pytest.mark.parametrize("name", ["llama3.3", LLAMA, "LLAMA3.3"])
    def test_the_file_is_named_by_the_records_id_however_it_was_asked_for(self, tmp_path: Path, name: str) -> None:
        (tmp_path / f"{LLAMA}.txt").write_text("Signed.")
        found = find(name, tmp_path)
        assert found is not None and found.text == "Signed."

    def test_terms_of_an_api(self, tmp_path: Path) -> None:
        (tmp_path / "terms_openai_services-agreement_2026-01-01.txt").write_text("As agreed.")
        found = find("terms:openai/services-agreement/2026-01-01", tmp_path)
        assert found is not None and found.text == "As agreed."

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (b"", "empty"),
            (b" \n\t", "empty"),
            (b"\xff\xfe", "not UTF-8"),
            (b"a" * 1_048_577, "larger than 1 MB"),
        ],
    )
    def test_what_is_no_text_is_refused_and_named(self, tmp_path: Path, content: bytes, what: str) -> None:
        (tmp_path / "MIT.txt").write_bytes(content)
        with pytest.raises(UsageError) as caught:
            find("MIT", tmp_path)
        assert what in caught.value.what
        assert caught.value.where == str(tmp_path / "MIT.txt")

    def test_a_folder_that_is_not_there_is_a_mistake(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no such folder"):
            find("MIT", tmp_path / "nowhere")

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "a/../../b", "x\0y", "a" * 5000, ""])
    def test_no_name_leads_out_of_the_folder(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "secret.txt").write_text("secret")
        (tmp_path / "texts").mkdir()
        assert find(name, tmp_path / "texts") is None
        assert Path(file_name(name)).name == file_name(name)
        assert len(file_name(name)) <= 255


class TestHash:
    def test_white_space_does_not_count(self) -> None:
        assert text_hash(" one\r\n  two\n\nthree ") == text_hash("one two three")

    @pytest.mark.parametrize("other", ["one Two", "one tw o", "one two.", ""])
    def test_everything_else_does(self, other: str) -> None:
        assert text_hash(other) != text_hash("one two")
