"""What a config declares of its models: all licences that hold, lineage included, and no path of this machine."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import GenerateStep
from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_base import identity
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.config_train import StudentModel
from pipeline.core.errors import UsageError
from pipeline.stages.generate.rows import licenses_of
from pipeline.terms.declared import (
    UNREADABLE,
    declared_student,
    declared_teacher,
    read_card,
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
            ("---\n- a list\n---\n", ()),
            ("", ()),
            ("---\nbase_model:\nlicense: mit\n---\n", ()),
            ("\ufeff\n \n---\nbase_model: a/b\n---\n", ("a/b",)),
            ("---\r\nbase_model: a/b\r\n---\r\n", ("a/b",)),
            ("--- \nbase_model: [a/b, a/b]\n--- \n", ("a/b",)),
        ],
    )
    def test_cards(self, tmp_path: Path, card: str, named: tuple[str, ...]) -> None:
        (tmp_path / "README.md").write_text(card, "utf-8")
        assert read_card(tmp_path).base_models == named
        assert read_card(tmp_path / "nothing").base_models == ()

    @pytest.mark.parametrize(
        "card",
        [
            "---\nbase_model: [a\n---\n",
            "---\nbase_model: a/b\n",
            "---\nbase_model: {a: b}\n---\n",
            "---\nbase_model: [a/b, 7]\n---\n",
            "---\nbase_model: true\n---\n",
            "---\nbase_model: a/b\nbase_model: []\n---\n",
            "---\na: &a [1, 1]\nb: &b [*a, *a]\nbase_model: [*b, *b]\n---\n",
            "---\nbase_model: " + "[" * 2000 + "\n---\n",
            "---\nbase_model: " + "{a: " * 2000 + "\n---\n",
            "---\ndate: 2024-13-45\n---\n",
            "---\ndate: !!timestamp x\n---\n",
            "---\nyes: !!bool x\n---\n",
            "---\nbase_model: a\x00b\n---\n",
            "---\nbase_model: a/b\n---\n" + "x" * (1 << 20),
        ],
        ids=lambda card: card[4:30],
    )
    def test_a_card_that_cannot_be_read_may_name_any_model(self, tmp_path: Path, card: str) -> None:
        (tmp_path / "README.md").write_text(card, "utf-8")
        assert read_card(tmp_path).base_models == (UNREADABLE,)
        made = verdict(teacher(model=str(tmp_path), revision=None, base_models={}))
        assert made.outcome == "undetermined"

    def test_bytes_that_are_no_text_are_no_traceback(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_bytes(b"---\nbase_model: a/\xff\n---\n")
        assert len(read_card(tmp_path).base_models) == 1

    @pytest.mark.parametrize(
        ("given", "joined"),
        [
            (None, {"a/b": "unknown", "c/d": "unknown"}),
            ({}, {"a/b": "unknown", "c/d": "unknown"}),
            ({"A/B": "MIT"}, {"A/B": "MIT", "c/d": "unknown"}),
            ({"x/y": "MIT"}, {"x/y": "MIT", "a/b": "unknown", "c/d": "unknown"}),
            ({"a/b": "MIT", "c/d": "MIT"}, {"a/b": "MIT", "c/d": "MIT"}),
        ],
    )
    def test_what_the_card_names_and_the_config_does_not_is_unknown(
        self, tmp_path: Path, given: dict[str, str] | None, joined: dict[str, str]
    ) -> None:
        (tmp_path / "README.md").write_text("---\nbase_model: [a/b, c/d]\n---\n", "utf-8")
        student = StudentModel(model=str(tmp_path), base_models=given)
        assert with_ancestors(student, POLICY).base_models == joined


class TestWarnings:
    @pytest.mark.parametrize(
        ("card", "declared", "warned"),
        [
            ("license: mit", "MIT", False),
            ("license: llama3.3", "LicenseRef-scancode-llama-3.3-license-2024", False),
            ("license: other\nlicense_name: qwen-research", "qwen-research", False),
            ("base_model: a/b", "MIT", False),
            ("license: llama3.3", "MIT", True),
            ("license: mit", "unknown", True),
            ("license: '" + " AND ".join(f"(a{n} OR b{n})" for n in range(8)) + "'", "MIT", True),
        ],
    )
    def test_a_card_with_another_licence_than_the_configs(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, card: str, declared: str, warned: bool
    ) -> None:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n", "utf-8")
        with_ancestors(StudentModel(model=str(tmp_path), license=declared), POLICY)
        assert ("its card says" in caplog.text) == warned

    def test_cards_of_hub_ids_are_not_read_which_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(2):
            with_terms(teacher(model="org/Tuned-of-something"), POLICY)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "cards of hub ids are not read" in caplog.text and "org/Tuned-of-something" in caplog.text

    def test_nothing_is_said_where_the_ancestors_are_named(self, caplog: pytest.LogCaptureFixture) -> None:
        with_terms(teacher(model="org/named", base_models={}), POLICY)
        assert caplog.text == ""


class TestApiTerms:
    """Of a provider that the registry knows: openrouter's hold beside the model's own licence."""

    OPENROUTER, OPENAI = "terms:openrouter/api", "terms:openai/services-agreement/2026-01-01"

    @staticmethod
    def licenses(**changes: Any) -> tuple[str, ...]:
        given = {"kind": "openai", "base_url": "https://api.example/v1", "provider": "openrouter", "model": "m"}
        asked = OpenAITeacher.model_validate({**given, **changes})
        step = {"teachers": {"api": with_terms(asked, POLICY)}, "generate": {"teacher": "api"}}
        rows = licenses_of(GenerateStep.model_validate(step))["api"]
        assert rows == source_of(declared_teacher("api", with_terms(asked, POLICY))).licenses
        return rows

    def test_they_hold_beside_a_models_licence_each_as_one_name_on_the_rows(self) -> None:
        assert self.licenses(license="MIT") == ("MIT", self.OPENROUTER)
        assert self.licenses(license="MIT", terms=["llama3.3"]) == ("MIT", "llama3.3", self.OPENROUTER)

    def test_alone_where_no_licence_is_named(self) -> None:
        assert self.licenses() == (self.OPENROUTER,)

    @pytest.mark.parametrize("name", [OPENAI, OPENROUTER, f"MIT AND {OPENAI}", f"{OPENAI} OR {OPENROUTER}"])
    def test_not_where_the_config_names_api_terms_itself(self, name: str) -> None:
        assert self.licenses(license=name) == (name,)

    def test_terms_that_are_one_of_several_to_choose_from_do_not_replace_them(self) -> None:
        assert self.licenses(license=f"MIT OR {self.OPENAI}")[1:] == (self.OPENROUTER,)

    def test_api_terms_may_stand_among_the_further_terms(self) -> None:
        assert self.licenses(license="MIT", terms=[self.OPENAI]) == ("MIT", self.OPENAI)

    def test_of_a_provider_that_nobody_knows_there_are_none(self) -> None:
        assert self.licenses(provider="scripted", license="MIT") == ("MIT",)

    def test_the_further_terms_count_in_keys_and_none_like_no_such_field(self) -> None:
        given = {"kind": "openai", "base_url": "https://api.example/v1", "provider": "p", "model": "m"}
        plain = OpenAITeacher.model_validate(given)
        assert "terms" not in identity(plain)
        assert identity(plain.model_copy(update={"terms": ("MIT",)}))["terms"] == ["MIT"]


class TestBadNames:
    @pytest.mark.parametrize("name", ["", "  ", "a\x00b", "a\u202eb", "x" * 201])
    @pytest.mark.parametrize("key", ["license", "base_models"])
    def test_the_place_is_named(self, name: str, key: str) -> None:
        given = {"license": name} if key == "license" else {"base_models": {"a/b": name}}
        asked = declared_teacher("main", teacher(**given))
        base = declared_student(StudentModel.model_validate({"model": "org/base", "revision": "r", **given}))
        for declared, place in ((asked, "teachers.main"), (base, "student")):
            with pytest.raises(UsageError) as caught:
                source_of(declared)
            assert caught.value.where == f"{place}.{key}"

    def test_of_an_api_too(self) -> None:
        given = {"kind": "openai", "base_url": "https://a.example", "provider": "p", "model": "m", "terms": [" "]}
        with pytest.raises(UsageError) as caught:
            source_of(declared_teacher("api", OpenAITeacher.model_validate(given)))
        assert caught.value.where == "teachers.api.terms"


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
        assert with_ancestors(student, POLICY) is student
