"""The gates' refusal: one screen, word for word; and that neither names nor documents can steer a terminal."""

import pickle
import shlex
from typing import Any

import pytest

from pipeline.core.errors import ExitCode, PolicyRefused
from pipeline.terms.gate import enforce
from pipeline.terms.statement import RowSet, Source, Statement
from pipeline.terms.verdict import Gate
from tests.terms_cases import FREE, TODAY, a_policy, a_record, a_registry, judge, prompts, student, teacher

OPENAI = a_record(
    "terms:openai/services-agreement/2026-01-01",
    title="OpenAI Services Agreement",
    effective="2026-01-01",
    kind="api_terms",
    provider="openai",
    source_url="https://openai.com/policies/services-agreement/",
    restrictions=[
        {
            "atom": "no_train.competing",
            "value": "openai",
            "clause": "3.3(e)",
            "quote": "use Output to develop artificial intelligence models "
            "that compete with OpenAI's products and services",
        }
    ],
)
GPT = Source("teacher", "gpt", "openai:gpt-4o", (OPENAI.id,))


def refused(
    *sources: Source,
    records: tuple[Any, ...] = (),
    rows: tuple[RowSet, ...] = (),
    gate: Gate = "plan",
    where: str = "configs/own.yaml",
    command: str = "",
    **policy: Any,
) -> PolicyRefused:
    statement, chosen = Statement((*sources, student()), rows), a_policy(**policy)
    verdict = judge(statement, chosen, a_registry(FREE, *records), gate=gate, today=TODAY)
    with pytest.raises(PolicyRefused) as caught:
        enforce(verdict, statement, chosen, gate, where, command)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 110
    return caught.value


class TestScreen:
    def test_at_the_data_set_the_rows_can_be_dropped(self) -> None:
        rows = (RowSet(18240, "gpt", ("set",), ("free",)), RowSet(43060, "own", ("set",), ("free",)))
        sources = (GPT, teacher("free", name="own"), prompts("free"))
        error = refused(*sources, records=(OPENAI,), rows=rows, gate="dataset")
        assert (
            str(error)
            == """\
LICENCE GATE: UNDETERMINED at dataset   [policy: commercial, dataset: public, model: public]
  Rule LG-012 no_train.competing(openai)
  18,240 of 61,300 rows (29.8%) come from teacher `gpt` (openai:gpt-4o); 43,060 remain without them.
  Terms: OpenAI Services Agreement, 2026-01-01, section 3.3(e): "use Output to develop artificial intelligence
         models that compete with OpenAI's products and services" (verified, read 2026-11-01)
  Why now: policy.competes_with.openai = undetermined.
  What you can do, the cheapest first:
    1. drop these rows        python -m pipeline run configs/own.yaml \\
                              --set 'dataset.exclude_teachers=["gpt"]'
    2. say so, if it is so    policy: {competes_with: {openai: no}} (or --set policy.competes_with.openai=no)
    3. record a permission    python -m pipeline licenses override LG-012 configs/own.yaml --evidence FILE \\
                              --reason "…" --expires DATE --person "…"
  Full text: https://openai.com/policies/services-agreement/
  This is an automated reading of public documents, perhaps wrong or out of date, and not legal advice."""
        )
        assert error.exit_code == ExitCode.POLICY == 4

    def test_at_the_plan_another_teacher_is_the_cheapest(self) -> None:
        assert (
            str(refused(GPT, records=(OPENAI,), competes_with={"openai": "yes"}, model="internal"))
            == """\
LICENCE GATE: DENIED at plan   [policy: commercial, dataset: public, model: internal]
  Rule LG-012 no_train.competing(openai)
  It is about teacher `gpt` (openai:gpt-4o).
  Terms: OpenAI Services Agreement, 2026-01-01, section 3.3(e): "use Output to develop artificial intelligence
         models that compete with OpenAI's products and services" (verified, read 2026-11-01)
  Why now: policy.competes_with.openai = yes.
  What you can do, the cheapest first:
    1. use another source     another teacher in the config
    2. say so, if it is so    policy: {competes_with: {openai: no}} (or --set policy.competes_with.openai=no)
    3. record a permission    python -m pipeline licenses override LG-012 configs/own.yaml --evidence FILE \\
                              --reason "…" --expires DATE --person "…"
  Full text: https://openai.com/policies/services-agreement/
  This is an automated reading of public documents, perhaps wrong or out of date, and not legal advice."""
        )

    def test_an_unknown_licence_is_to_be_named_and_other_refusals_follow_in_a_line_each(self) -> None:
        nc = a_record("CC-BY-NC-4.0", "noncommercial", kind="data_license", title="CC Attribution NonCommercial 4.0")
        own = a_record("own", "no_train.any", ("needs_permission", "maker"), "no_automated_extraction")
        sources = (teacher("secret sauce", name="x"), prompts("CC-BY-NC-4.0"), teacher("own", name="y"))
        assert (
            str(refused(*sources, records=(nc, own), gate="train"))
            == """\
LICENCE GATE: DENIED at train   [policy: commercial, dataset: public, model: public]
  Rule LG-002 noncommercial
  It is about prompt set `set` (hub/prompts).
  Terms: CC Attribution NonCommercial 4.0, 2025-01-01, section 1: "words of noncommercial" (verified, read
         2026-11-01)
  Why now: policy.intended_use = commercial.
  What you can do, the cheapest first:
    1. use another source     another prompt set in the config
    2. change what is meant   policy: {intended_use: research} (or --set policy.intended_use=research)
    3. record a permission    python -m pipeline licenses override LG-002 configs/own.yaml --evidence FILE \\
                              --reason "…" --expires DATE --person "…"
  Refused as well:
    LG-010 no_train.any: teacher `y` (maker:model)
    LG-014 needs_permission(maker): teacher `y` (maker:model)
    and 2 more: python -m pipeline licenses check configs/own.yaml
  Full text: https://terms.example/x
  This is an automated reading of public documents, perhaps wrong or out of date, and not legal advice."""
        )

    def test_of_terms_that_nobody_knows_there_is_no_text(self) -> None:
        assert (
            str(refused(teacher("secret sauce"), where="dataset of run own"))
            == """\
LICENCE GATE: UNDETERMINED at plan   [policy: commercial, dataset: public, model: public]
  Rule LG-001 unknown(secret sauce)
  It is about teacher `main` (maker:model).
  Terms: secret sauce has no term record
  Why now: nobody knows the terms of secret sauce, and policy.allow_unknown = false.
  What you can do, the cheapest first:
    1. use another source     another teacher in the config
    2. name the licence       `license` with a licence that the registry knows, or a record of it in the
                              folder policy.registry
    3. record a permission    python -m pipeline licenses override LG-001 CONFIG --evidence FILE \\
                              --reason "…" --expires DATE --person "…"
  This is an automated reading of public documents, perhaps wrong or out of date, and not legal advice."""
        )


class TestFixes:
    ROWS = (RowSet(1, "a", ("set",), ()), RowSet(2, "b", ("other",), ()))

    def test_rows_of_a_prompt_set_are_dropped_by_its_name(self) -> None:
        sources = (teacher("free", name="a"), teacher("free", name="b"), prompts("it"), prompts("free", name="other"))
        error = refused(*sources, records=(a_record("it", "noncommercial"),), rows=self.ROWS, gate="dataset")
        assert """'dataset.exclude_prompt_sets=["set"]'""" in str(error)

    def test_where_no_row_would_remain_nothing_is_dropped(self) -> None:
        sources = (teacher("it", name="a"), teacher("it", name="b"), prompts("free"), prompts("free", name="other"))
        error = refused(*sources, records=(a_record("it", "no_train.any"),), rows=self.ROWS, gate="dataset")
        assert "exclude" not in str(error)
        assert "1. use another source     another teacher in the config" in str(error)

    def test_a_students_base_is_exchanged(self) -> None:
        base = Source("student_base", "second", "Maker/Base", ("it",), "qwen")
        error = refused(base, records=(a_record("it", "noncommercial"),), rows=self.ROWS[:1], gate="train")
        assert "1. use another source     another student's base in the config" in str(error)

    @pytest.mark.parametrize(
        ("typed", "words"),
        [
            ("run configs/own.yaml --data data --until train", ["configs/own.yaml"]),
            ("dataset c.yaml --data /tmp/d --force", ["c.yaml", "--data", "/tmp/d"]),
            ("train 'a b.yaml' --data data --set 'x=[1, 2]'", ["a b.yaml", "--set", "x=[1, 2]"]),
            (f"run c.yaml --data data --set x={'y' * 200}", ["c.yaml"]),
        ],
    )
    def test_where_rows_are_refused_the_commands_are_about_the_config_that_was_typed(
        self, typed: str, words: list[str]
    ) -> None:
        sources = (teacher("free", name="a"), teacher("free", name="b"), prompts("it"), prompts("free", name="other"))
        text = str(
            refused(*sources, records=(a_record("it", "noncommercial"),), rows=self.ROWS, gate="dataset",
                    where="data/store/dedup/rows", command=f"python -m pipeline {typed}")
        )  # fmt: skip
        begin = text.index("python -m pipeline run")
        command = shlex.split(text[begin : text.index("    2. ")].replace("\\\n", " "))
        expected = ["run", *words, "--set", 'dataset.exclude_prompt_sets=["set"]']
        assert command == ["python", "-m", "pipeline", *expected]
        assert "CONFIG" not in text

    def test_rows_that_carry_a_duplicates_licence_are_said_to(self) -> None:
        rows = (RowSet(9, "a", ("set",), ("free",)), RowSet(1, "a", ("set",), ("free", "CC-BY-NC-4.0")))
        nc = a_record("CC-BY-NC-4.0", "noncommercial")
        text = str(refused(teacher("free", name="a"), prompts("free"), records=(nc,), rows=rows, gate="dataset"))
        assert "1 of 10 rows (10.0%) carry CC-BY-NC-4.0 from a merged duplicate; 9 remain without them." in text
        assert "dataset: {exclude_teachers: [the teacher that a duplicate came from]}" in text
        assert "exclude_teachers=" not in text

    @pytest.mark.parametrize("where", ["configs/my own.yaml", "a'b.yaml"])
    def test_a_path_is_quoted_so_that_the_command_can_be_copied(self, where: str) -> None:
        text = str(refused(GPT, records=(OPENAI,), where=where))
        start = text.index("python -m pipeline licenses override")
        words = shlex.split(text[start : text.index("Full text")].replace("\\\n", " "))
        assert words[:6] == ["python", "-m", "pipeline", "licenses", "override", "LG-012"]
        assert words[6:8] == [where, "--evidence"]

    @pytest.mark.parametrize(
        "restriction",
        ["no_train.any", "research_only", "no_derivatives", "no_redistribute_dataset", "internal_only",
         ("territory_exclude", ["DE"]), ("mau_cap", 1), ("revenue_cap", 1), ("no_train.other_family", "llama-2"),
         "no_train.general_purpose", ("needs_permission", "x"), "no_automated_extraction"],
        ids=str,
    )  # fmt: skip
    def test_every_atom_has_a_screen(self, restriction: Any) -> None:
        org = {"mau": 2, "annual_revenue_usd": 2}
        source = Source("prompt", "p", "p", ("it",))
        error = refused(source, records=(a_record("it", restriction),), org=org, territory=["DE"])
        assert "licenses override LG-0" in str(error)


class TestHostileText:
    EVIL = "\x1b[2J\x07\u202eevil\r\n  3. do this   rm -rf /\n" + "long " * 400

    def test_names_quotes_and_titles_cannot_steer_a_terminal_or_add_lines(self) -> None:
        record = a_record(
            "it",
            title=self.EVIL,
            restrictions=[{"atom": "needs_permission", "value": self.EVIL, "clause": self.EVIL, "quote": "\x1b[1A x"}],
        )
        text = str(refused(Source("teacher", "t", self.EVIL, ("it",)), records=(record,)))
        assert not any(ord(letter) < 32 and letter != "\n" for letter in text)
        assert "\u202e" not in text
        assert not any(line.startswith("  3. do") for line in text.splitlines())

    def test_a_very_long_first_finding_leaves_room_for_the_others(self) -> None:
        records = [a_record("it", *(("needs_permission", f"maker {number} " + "x " * 300) for number in range(9)))]
        assert "and 6 more" in str(refused(teacher("it"), records=tuple(records)))

    def test_commands_with_many_settings_leave_less_room_for_the_others(self) -> None:
        records = [a_record("it", *(("needs_permission", f"maker {number} " + "x " * 300) for number in range(9)))]
        sets = " ".join(f"--set a.b.c.{number}={number}{number}{number}" for number in range(5))
        typed = f"python -m pipeline run configs/own.yaml --data data {sets}"
        text = str(refused(teacher("it"), records=tuple(records), command=typed))
        assert "more: `licenses check` lists all" in text


def test_an_allowed_verdict_passes_silently() -> None:
    statement, policy = Statement((teacher("free"), student())), a_policy()
    verdict = judge(statement, policy, a_registry(FREE), gate="plan", today=TODAY)
    enforce(verdict, statement, policy, "plan", "configs/own.yaml")


def test_the_screen_survives_the_way_back_from_a_worker_process() -> None:
    error = refused(GPT, records=(OPENAI,))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
