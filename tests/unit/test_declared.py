"""What a config declares of its models: all licences that hold, lineage included, and no path of this machine."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import StudentModel
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_teacher import VllmTeacher
from pipeline.terms.declared import (
    base_models_of,
    declared_student,
    declared_teacher,
    source_of,
    with_ancestors,
    with_family,
    with_terms,
)
from pipeline.terms.policy import judge
from pipeline.terms.records import load_registry
from pipeline.terms.statement import Source, Statement
from pipeline.terms.verdict import Verdict

POLICY = PolicyConfig.model_validate({"intended_use": "commercial", "release": {"dataset": "none", "model": "public"}})


def teacher(**changes: Any) -> VllmTeacher:
    given = {"kind": "vllm", "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "revision": "r", "license": "MIT"}
    return VllmTeacher.model_validate({**given, **changes})


def verdict(asked: VllmTeacher) -> Verdict:
    named = with_terms(asked, POLICY)
    base = Source("student_base", "student", "base", ("Apache-2.0",))
    sources = (source_of(declared_teacher("main", named)), base)
    return judge(Statement(sources), POLICY, load_registry(), gate="plan", today=date(2026, 11, 23))


class TestLineage:
    """DeepSeek-R1-Distill-Llama: MIT over Llama 3.3."""

    def test_both_licences_hold(self) -> None:
        made = verdict(teacher(base_models={"meta-llama/Llama-3.3-70B-Instruct": "llama3.3"}))
        assert made.passes
        assert {due.atom for due in made.obligations} >= {"name_prefix", "license_copy"}
        assert any("llama-3.3" in record for record in made.records) and "MIT" in made.records

    def test_without_it_the_licence_alone_would_say_nothing_of_llama(self) -> None:
        assert "name_prefix" not in {due.atom for due in verdict(teacher()).obligations}

    def test_an_ancestor_that_only_the_folders_card_names_is_unknown(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("---\nbase_model: meta-llama/Llama-3.3-70B\nlicense: mit\n---\n", "utf-8")
        made = verdict(teacher(model=str(tmp_path), revision=None))
        assert made.outcome == "undetermined"
        told = teacher(model=str(tmp_path), revision=None, base_models={"meta-llama/Llama-3.3-70B": "llama3.3"})
        assert verdict(told).passes

    @pytest.mark.parametrize(
        ("card", "named"),
        [
            ("---\nbase_model:\n- a/b\n- c/d\n---\n# x", ("a/b", "c/d")),
            ("---\nbase_model: a/b\n---\n", ("a/b",)),
            ("---\nlicense: mit\n---\n", ()),
            ("# no front matter", ()),
            ("---\nbase_model: [a\n---\n", ("unreadable card",)),
            ("---\n- a list\n---\n", ()),
        ],
    )
    def test_cards(self, tmp_path: Path, card: str, named: tuple[str, ...]) -> None:
        (tmp_path / "README.md").write_text(card, "utf-8")
        assert base_models_of(tmp_path) == named
        assert base_models_of(tmp_path / "nothing") == base_models_of(None) == ()


class TestNames:
    def test_no_path_is_told(self, tmp_path: Path) -> None:
        folder = tmp_path / "someone" / "model"
        folder.mkdir(parents=True)
        source = source_of(declared_teacher("main", teacher(model=str(folder), revision=None)))
        assert source.what == "model" and str(tmp_path) not in str(source.to_json())

    def test_of_a_hub_id_name_and_revision_are(self) -> None:
        source = source_of(declared_teacher("main", teacher()))
        assert (source.what, source.facts["revision"]) == ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "r")


class TestFamily:
    @pytest.mark.parametrize(("license_name", "family"), [("llama2", "llama-2"), ("MIT", None), ("unknown", None)])
    def test_is_the_one_of_the_licence_unless_it_is_told(self, license_name: str, family: str | None) -> None:
        student = StudentModel(model="org/base", revision="r", license=license_name)
        assert declared_student(with_family(student, POLICY)).family == family
        told = student.model_copy(update={"family": "qwen"})
        assert declared_student(with_family(told, POLICY)).family == "qwen"

    def test_a_card_without_ancestors_changes_nothing(self) -> None:
        student = StudentModel(model="org/base", revision="r")
        assert with_ancestors(student) is student
