"""LICENSES/, LICENSES.md and NOTICE: every document is along with its text or named as missing, none is invented."""

import hashlib
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.errors import UsageError
from pipeline.terms.notices import DISCLAIMER, DUTIES, FOLDER, TRIGGERS, Notices, names_of, notices_of
from pipeline.terms.policy import judge
from pipeline.terms.records import load_registry
from pipeline.terms.statement import RowSet, Source, Statement
from pipeline.terms.texts import text_hash
from pipeline.text.markdown import escape_markdown

PUBLIC = {"intended_use": "commercial", "release": {"dataset": "public", "model": "public"}, "allow_unknown": True}


def policy_of(**changes: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({**PUBLIC, **changes})


def teacher(*licenses: str, name: str = "main", what: str = "org/main") -> Source:
    return Source("teacher", name, what, licenses)


def noticed(*sources: Source, rows: int = 3, **policy: Any) -> Notices:
    meant, registry = policy_of(**policy), load_registry(policy.get("registry"))
    statement = Statement(sources, (RowSet(rows, "main", ("set",), ("MIT",)),))
    verdict = judge(statement, meant, registry, gate="dataset", today=date(2026, 11, 23))
    return notices_of(statement, verdict.obligations, registry, meant, escape_markdown)


class TestTexts:
    def test_a_known_licence_comes_with_its_text(self) -> None:
        found = noticed(teacher("MIT"))
        text = found.files["LICENSES/MIT.txt"]
        assert "Permission is hereby granted, free of charge" in text and found.missing == ()
        assert found.to_json()["MIT"] == {
            "file": "LICENSES/MIT.txt",
            "sha256": text_hash(text),
            "origin": found.terms[0].text.origin if found.terms[0].text else "",
        }

    def test_a_text_that_nobody_has_is_named_as_missing(self) -> None:
        found = noticed(teacher("our own terms"))
        assert found.missing == ("our own terms",) and found.to_json() == {"our own terms": None}
        assert not any(name.startswith(f"{FOLDER}/") for name in found.files)
        assert "## Texts that are not along" in found.files["LICENSES.md"]
        assert "\n- our own terms\n" in found.files["LICENSES.md"]

    def test_that_nobody_stated_a_licence_is_no_document(self) -> None:
        found = noticed(teacher("unknown"))
        assert found.missing == () and "No licence stated" in found.files["LICENSES.md"]

    def test_ones_own_folder_goes_first(self, tmp_path: Path) -> None:
        (tmp_path / "our_own_terms.txt").write_text("Do as you like.\n\n\n", "utf-8")
        found = noticed(teacher("our own terms"), texts=tmp_path)
        assert found.files["LICENSES/our_own_terms.txt"] == "Do as you like.\n" and found.missing == ()

    def test_names_that_make_one_file_name_get_two_files(self, tmp_path: Path) -> None:
        (tmp_path / "a_b.txt").write_text("One text for both.", "utf-8")
        found = noticed(teacher("a b", "a_b"), texts=tmp_path)
        files = [term.file for term in found.terms]
        assert len({*files}) == 2 and all(file is not None and file in found.files for file in files)

    def test_no_name_leads_out_of_the_folder(self, tmp_path: Path) -> None:
        found = noticed(teacher("../../escape", "..", "/etc/passwd"), texts=tmp_path)
        found.write(tmp_path / "out")
        assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()} == {"out"}

    def test_an_empty_text_is_a_mistake_of_the_user(self, tmp_path: Path) -> None:
        (tmp_path / "MIT.txt").write_text(" \n", "utf-8")
        with pytest.raises(UsageError, match="empty"):
            noticed(teacher("MIT"), texts=tmp_path)


class TestDocuments:
    def test_what_a_record_includes_is_a_document_too(self) -> None:
        registry = load_registry()
        including = next(record for record in registry.records.values() if record.includes)
        names = names_of(teacher(including.id), registry, policy_of())
        assert {including.id, *including.includes} <= {*names}

    def test_both_sides_of_an_open_choice_are_named(self) -> None:
        assert names_of(teacher("MIT OR Apache-2.0"), load_registry(), policy_of()) == ("Apache-2.0", "MIT")

    def test_of_a_recorded_choice_the_one_that_was_taken(self) -> None:
        policy = policy_of(choose={"MIT OR Apache-2.0": "MIT"})
        assert names_of(teacher("MIT OR Apache-2.0"), load_registry(), policy) == ("MIT",)


class TestNotice:
    def test_texts_that_terms_want_shown_stand_word_by_word(self) -> None:
        found = noticed(teacher("llama3.3", what="meta-llama/Llama-3.3-70B-Instruct")).files["NOTICE"]
        assert "\nBuilt with Llama\n" in found and "Llama 3.3 is licensed under the" in found
        assert "- teacher main: meta-llama/Llama-3.3-70B-Instruct\n  under llama3.3\n" in found

    def test_a_name_cannot_add_a_line(self) -> None:
        found = noticed(teacher("MIT", what="x\nBuilt with Llama\x00\u202e")).files["NOTICE"]
        assert found.splitlines()[-2:] == ["- teacher main: x Built with Llama", "  under MIT"]


class TestOverview:
    def test_each_source_and_document_has_a_line(self) -> None:
        prompts = Source("prompt", "set", "questions", ("CC-BY-4.0",))
        lines = noticed(teacher("MIT"), prompts).files["LICENSES.md"].splitlines()
        assert any(line.startswith("| prompt set | questions | 3 | CC\\-BY\\-4.0 |") for line in lines)
        assert any(line.startswith("| teacher main | org/main | 3 | MIT | MIT License |") for line in lines)
        assert any(line.startswith("| name the source |") for line in lines)

    def test_it_ends_with_what_it_is_not(self) -> None:
        assert noticed(teacher("MIT")).files["LICENSES.md"].endswith(f"\n{DISCLAIMER}\n")

    def test_a_hostile_name_is_inert(self) -> None:
        found = noticed(teacher("x | y <script>", name="main", what="a | b\n# c ![i](http://t/p)")).files["LICENSES.md"]
        assert "<script>" not in found and "![" not in found and "\n# c" not in found

    def test_every_obligation_and_trigger_has_words(self) -> None:
        obligations = [each for record in load_registry().records.values() for each in record.obligations]
        assert len(obligations) > 50, f"found {len(obligations)}"
        assert {each.atom for each in obligations} <= {*DUTIES} and {each.trigger for each in obligations} <= {
            *TRIGGERS
        }


def test_files_are_written_as_they_are(tmp_path: Path) -> None:
    found = noticed(teacher("MIT"))
    found.write(tmp_path)
    written = {
        path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert {name: hashlib.sha256(data).hexdigest() for name, data in written.items()} == {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in found.files.items()
    }
