"""Verdicts: what each atom does in each role, what is owed, what contradicts, and what only warns."""

import os
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from pipeline.core.config_policy import COUNTRIES, files_of_policy
from pipeline.core.errors import UsageError
from pipeline.terms.atoms import RestrictionAtom
from pipeline.terms.grants import grant_of
from pipeline.terms.rules import CONFLICTS, EU, RULES, UNLISTED
from pipeline.terms.statement import RowSet, Source
from pipeline.terms.verdict import Finding, Verdict
from tests.terms_cases import a_policy, a_record, a_registry, prompts, student, teacher, verdict_on


def outcome(source: Source, *restrictions: Any, policy: Any = None, **more: Any) -> str:
    return verdict_on((source,), a_record("it", *restrictions, **more), policy=policy).outcome


def finding(verdict: Verdict, rule: str) -> Finding:
    (found,) = [each for each in verdict.findings if each.rule == rule]
    return found


class TestRules:
    def test_every_restriction_has_a_rule_of_its_own_and_ids_are_stable(self) -> None:
        assert set(RULES) == set(get_args(RestrictionAtom))
        ids = [rule.id for rule in RULES.values()] + [name for name, _ in CONFLICTS.values()] + [UNLISTED.id]
        assert ids == [f"LG-{number:03}" for number in range(1, 23)]
        assert RULES["no_train.competing"].id == "LG-012"

    def test_nothing_forbidden_and_nothing_asked_is_allowed(self) -> None:
        assert outcome(teacher("it")) == "allow"


class TestTraining:
    @pytest.mark.parametrize(
        "atom", ["no_train.any", "no_train.general_purpose", ("needs_permission", "maker"), "no_automated_extraction"]
    )
    @pytest.mark.parametrize("role", ["teacher", "judge", "reward_model", "prompt"])
    def test_it_is_denied_where_outputs_train(self, atom: Any, role: Any) -> None:
        assert outcome(Source(role, "x", "x", ("it",)), atom) == "deny"

    @pytest.mark.parametrize(
        "atom",
        ["no_train.any", "no_train.general_purpose", ("needs_permission", "maker"), ("no_train.competing", "maker")],
    )
    def test_terms_about_outputs_do_not_concern_the_weights_a_student_starts_from(self, atom: Any) -> None:
        assert outcome(student("it"), atom) == "allow"

    @pytest.mark.parametrize(("said", "expected"), [("no", "allow"), ("yes", "deny"), (None, "undetermined")])
    def test_competing_is_what_the_policy_says_and_open_where_it_says_nothing(self, said: Any, expected: str) -> None:
        policy = a_policy(competes_with={} if said is None else {"maker": said})
        verdict = verdict_on((teacher("it"),), a_record("it", ("no_train.competing", "maker")), policy=policy)
        assert verdict.outcome == expected
        assert finding(verdict, "LG-012").name == "no_train.competing(maker)"  # recorded, where it passes too

    @pytest.mark.parametrize(
        ("families", "expected"),
        [
            (("llama-2",), "allow"),
            (("LLAMA-2",), "allow"),
            (("qwen",), "deny"),
            ((None,), "undetermined"),
            (("llama-2", None), "undetermined"),
            (("llama-2", "qwen"), "deny"),
        ],
    )
    def test_one_family_only_asks_for_the_family_of_every_base(self, families: Any, expected: str) -> None:
        bases = tuple(Source("student_base", f"b{n}", "x", ("free",), each) for n, each in enumerate(families))
        verdict = verdict_on((teacher("it"), *bases), a_record("it", ("no_train.other_family", "llama-2")))
        assert verdict.outcome == expected


class TestUse:
    @pytest.mark.parametrize("atom", ["noncommercial", "research_only"])
    @pytest.mark.parametrize("source", [teacher("it"), prompts("it"), student("it")], ids=lambda each: each.role)
    def test_non_commercial_terms_forbid_commercial_use_only(self, atom: str, source: Source) -> None:
        assert outcome(source, atom) == "deny"
        assert outcome(source, atom, policy=a_policy("research")) == "allow"

    def test_for_inside_one_organisation_means_neither_may_be_public(self) -> None:
        assert outcome(teacher("it"), "internal_only", policy=a_policy(dataset="internal", model="internal")) == "allow"
        assert outcome(teacher("it"), "internal_only", policy=a_policy(dataset="none")) == "deny"
        assert outcome(teacher("it"), "internal_only", policy=a_policy(model="none")) == "deny"

    def test_of_weights_only_the_models_release_counts(self) -> None:
        assert outcome(student("it"), "internal_only", policy=a_policy(model="internal")) == "allow"
        assert outcome(student("it"), "internal_only", policy=a_policy(dataset="none")) == "deny"

    @pytest.mark.parametrize("scope", ["internal", "public"])
    def test_data_that_may_not_be_passed_on_forbids_every_release_of_the_data_set(self, scope: str) -> None:
        assert outcome(prompts("it"), "no_redistribute_dataset", policy=a_policy(dataset=scope)) == "deny"
        assert outcome(prompts("it"), "no_redistribute_dataset", policy=a_policy(dataset="none")) == "allow"

    def test_no_derivatives_of_prompts_is_about_the_data_set_of_weights_about_the_model(self) -> None:
        assert outcome(prompts("it"), "no_derivatives") == "deny"
        assert outcome(prompts("it"), "no_derivatives", policy=a_policy(dataset="none")) == "allow"
        assert outcome(student("it"), "no_derivatives", policy=a_policy(dataset="none")) == "deny"
        assert outcome(student("it"), "no_derivatives", policy=a_policy(model="none")) == "allow"

    def test_whether_outputs_are_derivatives_of_a_teacher_is_unsettled(self) -> None:
        assert outcome(teacher("it"), "no_derivatives") == "undetermined"
        assert outcome(teacher("it"), "no_derivatives", policy=a_policy(dataset="none", model="none")) == "allow"
        assert outcome(teacher("it"), "no_derivatives", kind="data_license") == "deny"  # replayed: they are the data

    @pytest.mark.parametrize(("atom", "key"), [("mau_cap", "mau"), ("revenue_cap", "annual_revenue_usd")])
    def test_a_cap_binds_above_its_limit(self, atom: str, key: str) -> None:
        assert outcome(teacher("it"), (atom, 100), policy=a_policy(org={key: 100})) == "allow"
        assert outcome(teacher("it"), (atom, 100), policy=a_policy(org={key: 101})) == "deny"

    @pytest.mark.parametrize(
        ("excluded", "territory", "expected"),
        [
            (["EU"], ["DE"], "deny"),
            (["FR"], ["EU"], "deny"),
            (["EU", "KR"], ["US"], "allow"),
            (["KR"], ["US", "KR"], "deny"),
        ],
    )
    def test_excluded_countries_are_met_through_the_eu_as_well(
        self, excluded: list[str], territory: list[str], expected: str
    ) -> None:
        policy = a_policy(territory=territory)
        assert outcome(teacher("it"), ("territory_exclude", excluded), policy=policy) == expected

    @pytest.mark.parametrize("scopes", [("internal", "none"), ("none", "internal"), ("internal", "internal")])
    def test_an_exclusion_without_a_territory_warns_where_nothing_is_public(self, scopes: tuple[str, str]) -> None:
        policy = a_policy(dataset=scopes[0], model=scopes[1])
        verdict = verdict_on((teacher("it"),), a_record("it", ("territory_exclude", ["EU"])), policy=policy)
        assert verdict.outcome == "allow"
        assert verdict.warnings == ("teacher main: it excludes EU, and policy.territory names no country",)

    @pytest.mark.parametrize("scopes", [("public", "none"), ("none", "public"), ("public", "internal")])
    def test_what_is_public_reaches_every_country_so_that_an_exclusion_asks_for_a_territory(
        self, scopes: tuple[str, str]
    ) -> None:
        policy = a_policy(dataset=scopes[0], model=scopes[1])
        verdict = verdict_on((teacher("it"),), a_record("it", ("territory_exclude", ["EU"])), policy=policy)
        assert verdict.outcome == "undetermined"
        assert finding(verdict, "LG-007").why == "it excludes EU, and policy.territory names no country"

    @pytest.mark.parametrize(
        ("written", "read"), [("DE", "DE"), ("EU", "EU"), ("UK", "GB"), ("GB", "GB"), (False, "NO")]
    )
    def test_countries_are_codes_of_iso_3166(self, written: object, read: str) -> None:
        assert a_policy(territory=[written]).territory == (read,)

    @pytest.mark.parametrize("written", ["XX", "EN", "ZZ", "de", "DEU", "Germany", "", 49, True])
    def test_what_is_no_country_is_refused(self, written: object) -> None:
        with pytest.raises(ValidationError):
            a_policy(territory=[written])

    def test_records_name_countries_alike(self) -> None:
        excluded = a_record("it", ("territory_exclude", ["UK"]))
        assert verdict_on((teacher("it"),), excluded, policy=a_policy(territory=["GB"])).outcome == "deny"
        with pytest.raises(ValidationError):
            a_record("it", ("territory_exclude", ["XX"]))

    def test_the_codes_are_those_of_the_standard(self) -> None:
        assert len(COUNTRIES) == 250 and "EU" in COUNTRIES
        assert EU <= COUNTRIES and not {"UK", "XK", "AN", "SU", "YU"} & COUNTRIES

    @pytest.mark.parametrize("atom", [("use_policy", "https://x"), ("gated", "a/b"), "terminate_on_guardrail_bypass"])
    def test_what_holds_for_use_is_recorded_and_stops_nothing(self, atom: Any) -> None:
        verdict = verdict_on((teacher("it"),), a_record("it", atom))
        assert (verdict.outcome, [each.effect for each in verdict.findings]) == ("allow", ["noted"])

    def test_a_conservative_restriction_warns_and_stops_nothing(self) -> None:
        record = a_record("it", restrictions=[{"atom": "no_train.any", "conservative": True}])
        verdict = verdict_on((teacher("it"),), record)
        assert verdict.outcome == "allow"
        assert "unsettled" in verdict.warnings[0]


class TestUnknown:
    def test_a_name_without_a_record_is_undetermined_which_does_not_pass(self) -> None:
        verdict = verdict_on((teacher("never heard of"),))
        assert (verdict.outcome, verdict.passes) == ("undetermined", False)

    def test_a_source_without_any_licence_is_unknown(self) -> None:
        assert verdict_on((Source("teacher", "x", "x", ()),)).outcome == "undetermined"

    def test_a_missing_ancestor_is_unknown_however_free_the_model_is(self) -> None:
        assert verdict_on((teacher("free", "unknown"),)).outcome == "undetermined"

    def test_allowed_out_loud_it_passes_with_a_warning(self) -> None:
        verdict = verdict_on((teacher("what"),), policy=a_policy(allow_unknown=True))
        assert verdict.outcome == "allow"
        assert verdict.warnings == (
            "teacher main: nobody knows the terms of what, and policy.allow_unknown lets it through",
        )

    def test_allowing_the_unknown_never_allows_what_is_known_to_be_forbidden(self) -> None:
        sources = (teacher("what", "it"),)
        assert (
            verdict_on(sources, a_record("it", "no_train.any"), policy=a_policy(allow_unknown=True)).outcome == "deny"
        )

    @pytest.mark.parametrize(
        ("confidence", "least", "expected"),
        [
            ("mirrored", "mirrored", "allow"),
            ("inferred", "mirrored", "undetermined"),
            ("user_asserted", "mirrored", "undetermined"),
            ("user_asserted", "user_asserted", "allow"),
            ("inferred", "user_asserted", "undetermined"),
            ("unverified", "unverified", "allow"),
            ("mirrored", "verified", "undetermined"),
        ],
    )
    def test_a_record_below_the_least_confidence_counts_as_unknown(
        self, confidence: str, least: str, expected: str
    ) -> None:
        record = a_record("it", confidence=confidence, text_sha256=None)
        assert verdict_on((teacher("it"),), record, policy=a_policy(min_confidence=least)).outcome == expected

    def test_what_such_a_record_is_known_to_forbid_still_binds(self) -> None:
        record = a_record("it", "noncommercial", confidence="unverified", text_sha256=None)
        assert verdict_on((teacher("it"),), record, policy=a_policy(allow_unknown=True)).outcome == "deny"


class TestAlternatives:
    def test_the_one_that_does_not_refuse_is_taken_and_said(self) -> None:
        records = (a_record("A", "noncommercial"), a_record("B", owes=(("license_copy", None, "train_on_outputs"),)))
        verdict = verdict_on((teacher("A OR B"),), *records)
        assert verdict.outcome == "allow_with_obligations"
        (choice,) = verdict.choices
        assert (choice.source, choice.expression, choice.taken) == ("teacher:main", "A OR B", ("B",))

    def test_of_those_that_do_not_the_one_that_asks_least(self) -> None:
        records = (a_record("A", owes=(("license_copy", None, "train_on_outputs"),)), a_record("B"))
        assert verdict_on((teacher("A OR B"),), *records).choices[0].taken == ("B",)

    def test_a_known_licence_goes_before_an_unknown_one_that_is_allowed(self) -> None:
        record = a_record("A", owes=(("license_copy", None, "train_on_outputs"),))
        verdict = verdict_on((teacher("A OR what"),), record, policy=a_policy(allow_unknown=True))
        assert verdict.choices[0].taken == ("A",)

    def test_the_policy_chooses_where_it_says_so(self) -> None:
        records = (a_record("A", owes=(("license_copy", None, "train_on_outputs"),)), a_record("B"))
        verdict = verdict_on((teacher("A OR B"),), *records, policy=a_policy(choose={"A OR B": "A"}))
        assert (verdict.choices[0].taken, verdict.choices[0].by) == (("A",), "policy.choose")
        assert verdict.outcome == "allow_with_obligations"

    def test_all_names_of_a_lineage_hold_together(self) -> None:
        records = (
            a_record("A"),
            a_record("B", owes=(("name_prefix", "Llama", "distribute_model_trained_on_outputs"),)),
        )
        verdict = verdict_on((teacher("A", "B"),), *records)
        assert (verdict.records, [due.value for due in verdict.obligations]) == (("A", "B", "free"), ["Llama"])

    def test_what_a_record_includes_holds_too(self) -> None:
        records = (a_record("A", includes=("B",)), a_record("B", "no_train.any"))
        assert verdict_on((teacher("A"),), *records).outcome == "deny"

    def test_the_student_changes_no_choice_so_that_a_base_more_never_loosens(self) -> None:
        records = (
            a_record("A", ("no_train.other_family", "llama-2")),
            a_record("B", owes=(("license_copy", None, "train_on_outputs"),)),
        )
        for family in ("llama-2", "qwen", None):
            verdict = verdict_on((teacher("A OR B"), student(family=family)), *records)
            assert verdict.choices[0].taken == ("B",)


class TestRoles:
    def test_terms_of_roles_that_do_not_train_are_named_and_do_not_bind(self) -> None:
        verdict = verdict_on((Source("embedder", "e", "e", ("it",)),), a_record("it", "no_train.any"))
        assert verdict.outcome == "allow"
        assert verdict.warnings == (
            "the terms of embedder e (it) were not judged: policy.roles_that_train has no embedder",
        )

    @pytest.mark.parametrize("role", ["prompt", "teacher", "system_prompt"])
    def test_what_is_handed_out_is_judged_although_it_does_not_train(self, role: Any) -> None:
        source, student_only = Source(role, "x", "x", ("it",)), {"roles_that_train": ["student_base"]}
        for atom in ("no_redistribute_dataset", "noncommercial", "research_only", "unknown", "internal_only"):
            policy = a_policy(**student_only)
            verdict = verdict_on((source,), a_record("it", atom), policy=policy)
            assert not verdict.passes, atom
            assert verdict.warnings[0] == (
                f"the terms of {role} x (it) were judged for handing the data set out only: policy.roles_that_train "
                f"has no {role}"
            )
            inside = a_policy(dataset="none", **student_only)
            verdict = verdict_on((source,), a_record("it", atom), policy=inside)
            assert verdict.passes and "were not judged: " in verdict.warnings[0]

    @pytest.mark.parametrize("atom", ["no_train.any", ("needs_permission", "x"), "no_automated_extraction"])
    def test_what_only_training_meets_is_left_out_with_the_role(self, atom: Any) -> None:
        owes = (
            ("notice_file", "n", "distribute_model_trained_on_outputs"),
            ("license_copy", None, "distribute_dataset"),
        )
        policy = a_policy(roles_that_train=["student_base"])
        verdict = verdict_on((prompts("it"),), a_record("it", atom, owes=owes), policy=policy)
        assert verdict.findings == ()
        assert [due.atom for due in verdict.obligations] == ["license_copy"]

    def test_a_student_for_everybody_is_no_matter_of_prompts_that_do_not_train_it(self) -> None:
        policy = a_policy(dataset="internal", roles_that_train=["student_base"])
        assert verdict_on((prompts("it"),), a_record("it", "internal_only"), policy=policy).passes

    def test_the_policy_says_which_roles_train(self) -> None:
        policy = a_policy(roles_that_train=["embedder"])
        verdict = verdict_on((Source("embedder", "e", "e", ("it",)),), a_record("it", "no_train.any"), policy=policy)
        assert verdict.outcome == "deny"


class TestRows:
    SOURCES = (teacher("bad", name="a"), teacher("free", name="b"), prompts("free"))
    BAD = a_record("bad", "no_train.any")

    def rows(self, a: int, b: int) -> tuple[RowSet, ...]:
        return tuple(
            RowSet(count, name, ("set",), ("free", licence))
            for name, count, licence in (("a", a, "bad"), ("b", b, "free"))
            if count
        )

    def test_a_finding_says_how_many_rows_it_takes_and_how_many_remain(self) -> None:
        verdict = verdict_on(self.SOURCES, self.BAD, rows=self.rows(3, 7), gate="dataset")
        found = finding(verdict, "LG-010")
        assert (found.rows, found.rows_left, found.sources) == (3, 7, ("teacher:a",))

    def test_a_teacher_without_rows_does_not_bind(self) -> None:
        assert verdict_on(self.SOURCES, self.BAD, rows=self.rows(0, 7), gate="dataset").outcome == "allow"

    def test_the_student_and_a_judge_bind_without_rows_and_take_all_of_them(self) -> None:
        for role in ("student_base", "judge"):
            sources = (*self.SOURCES, Source(role, "x", "x", ("own",), "qwen"))  # type: ignore[arg-type]
            verdict = verdict_on(sources, a_record("own", "noncommercial"), rows=self.rows(0, 7), gate="train")
            assert (verdict.outcome, verdict.findings[0].rows, verdict.findings[0].rows_left) == ("deny", 7, 0)

    def test_a_teacher_or_prompt_set_that_no_source_declares_is_unknown(self) -> None:
        for rows in (RowSet(1, "stranger", ("set",), ("free",)), RowSet(1, "b", ("strange",), ("free",))):
            assert verdict_on(self.SOURCES, rows=(rows,), gate="train").outcome == "undetermined"

    def test_a_licence_of_rows_that_no_source_declares_binds(self) -> None:
        rows = (RowSet(1, "b", ("set",), ("free", "bad")),)
        assert verdict_on(self.SOURCES, self.BAD, rows=rows, gate="train").outcome == "deny"
        rows = (RowSet(1, "b", ("set",), ("free", "unknown")),)
        assert verdict_on(self.SOURCES, self.BAD, rows=rows, gate="train").outcome == "undetermined"

    def test_of_a_merged_duplicate_only_the_rows_that_carry_its_licence_count(self) -> None:
        rows = (RowSet(9, "b", ("set",), ("free",)), RowSet(1, "b", ("set",), ("free", "bad")),
                RowSet(4, "b", ("set",), ("free", "unknown")))  # fmt: skip
        found = finding(verdict_on(self.SOURCES, self.BAD, rows=rows, gate="dataset"), "LG-010")
        assert (found.rows, found.rows_left) == (1, 13)
        assert found.sources == ("teacher:duplicates merged into b: bad",)

    def test_a_row_whose_own_prompts_are_under_that_licence_is_none_of_them(self) -> None:
        rows = (RowSet(1, "b", ("set",), ("free", "nc")), RowSet(5, "b", ("other",), ("free", "nc")))
        sources = (*self.SOURCES, prompts("nc", name="other"))
        found = finding(verdict_on(sources, a_record("nc", "noncommercial"), rows=rows, gate="dataset"), "LG-002")
        assert found.rows == 6
        alone = finding(verdict_on(sources, a_record("nc", "noncommercial"), rows=rows[:1], gate="dataset"), "LG-002")
        assert (alone.rows, alone.sources) == (1, ("teacher:duplicates merged into b: nc",))

    def test_a_finding_of_prompts_counts_the_rows_that_a_duplicate_was_merged_into(self) -> None:
        rows = (RowSet(2, "b", ("set", "other"), ("free", "bad")), RowSet(5, "b", ("set",), ("free",)))
        sources = (*self.SOURCES, prompts("bad", name="other"))
        assert finding(verdict_on(sources, self.BAD, rows=rows, gate="dataset"), "LG-010").rows == 2


class TestObligations:
    @pytest.mark.parametrize(
        ("source", "trigger", "policy", "expected"),
        [
            (teacher("it"), "train_on_outputs", a_policy(dataset="none", model="none"), True),
            (student("it"), "train_on_outputs", a_policy(), False),
            (prompts("it"), "distribute_dataset", a_policy(), True),
            (prompts("it"), "distribute_dataset", a_policy(dataset="none"), False),
            (teacher("it"), "distribute_dataset", a_policy(), False),
            (teacher("it"), "distribute_model_trained_on_outputs", a_policy(), True),
            (teacher("it"), "distribute_model_trained_on_outputs", a_policy(model="none"), False),
            (teacher("it"), "distribute_weights_copies", a_policy(), False),
            (student("it"), "distribute_weights_copies", a_policy(), True),
            (student("it"), "distribute_weights_copies", a_policy(model="none"), False),
            (student("it"), "distribute_licensed_material_or_derivative", a_policy(), True),
            (teacher("it"), "distribute_licensed_material_or_derivative", a_policy("research", "none", "none"), False),
            (teacher("it"), "serve_product", a_policy(), True),
            (teacher("it"), "serve_product", a_policy("research"), False),
        ],
    )
    def test_one_is_due_when_its_trigger_is_met_in_its_role(
        self, source: Source, trigger: str, policy: Any, expected: bool
    ) -> None:
        verdict = verdict_on((source,), a_record("it", owes=(("license_copy", None, trigger),)), policy=policy)
        assert [due.conservative for due in verdict.obligations] == ([False] if expected else [])
        assert verdict.outcome == ("allow_with_obligations" if expected else "allow")

    def test_whether_a_student_of_outputs_is_a_derivative_is_unsettled_so_that_is_marked(self) -> None:
        record = a_record("it", owes=(("license_copy", None, "distribute_licensed_material_or_derivative"),))
        assert [due.conservative for due in verdict_on((teacher("it"),), record).obligations] == [True]

    def test_inside_one_organisation_nothing_may_count_as_distributed_so_that_is_marked(self) -> None:
        record = a_record("it", owes=(("name_prefix", "Llama", "distribute_model_trained_on_outputs"),))
        verdict = verdict_on((teacher("it"),), record, policy=a_policy(model="internal"))
        assert [due.conservative for due in verdict.obligations] == [True]

    @pytest.mark.parametrize(("mau", "revenue", "expected"), [(10, 120, 0), (11, 0, 1), (0, 121, 1)])
    def test_a_text_for_large_products_is_due_above_either_limit_a_month(
        self, mau: int, revenue: int, expected: int
    ) -> None:
        value = {"text": "Kimi", "mau": 10, "revenue_usd": 10}
        record = a_record("it", owes=(("product_display_if", value, "serve_product"),))
        policy = a_policy(org={"mau": mau, "annual_revenue_usd": revenue})
        assert len(verdict_on((teacher("it"),), record, policy=policy).obligations) == expected

    def test_one_that_two_sources_owe_is_said_once_and_names_both(self) -> None:
        record = a_record("it", owes=(("display", "Built", "distribute_model_trained_on_outputs"),))
        (due,) = verdict_on((teacher("it", name="a"), teacher("it", name="b")), record).obligations
        assert due.sources == ("teacher:a", "teacher:b")
        assert (due.record_id, due.title, due.clause, due.quote) == ("it", "Terms it", "2", "words of display")


def share_alike(family: str, record: str, *restrictions: str) -> Any:
    owes = (("share_alike", family, "distribute_dataset"),)
    return a_record(record, *restrictions, owes=owes, kind="data_license")


class TestConflicts:
    def test_two_share_alike_families_in_a_data_set_that_is_handed_out_are_denied(self) -> None:
        records = (share_alike("CC-BY-SA", "CC-BY-SA-4.0"), share_alike("CDLA-Sharing", "CDLA-Sharing-1.0"))
        sources = (prompts("CC-BY-SA-4.0", name="a"), prompts("CDLA-Sharing-1.0", name="b"))
        verdict = verdict_on(sources, *records)
        assert verdict.outcome == "deny"
        found = finding(verdict, "LG-019")
        assert found.name == "conflict.share_alike(CC-BY-SA, CDLA-Sharing)"
        assert found.sources == ("prompt:a", "prompt:b")
        assert verdict_on(sources, *records, policy=a_policy(dataset="none")).outcome == "allow"

    def test_one_family_twice_is_none(self) -> None:
        sources = (prompts("CC-BY-SA-4.0", name="a"), prompts("CC-BY-SA-4.0", name="b"))
        assert verdict_on(sources, share_alike("CC-BY-SA-4.0", "CC-BY-SA-4.0")).passes

    def test_two_versions_of_one_share_alike_licence_are_denied(self) -> None:
        records = (share_alike("CC-BY-SA-3.0", "CC-BY-SA-3.0"), share_alike("CC-BY-SA-4.0", "CC-BY-SA-4.0"))
        verdict = verdict_on((prompts("CC-BY-SA-3.0", name="a"), prompts("CC-BY-SA-4.0", name="b")), *records)
        assert [each.rule for each in verdict.refusals] == ["LG-021"]

    def test_share_alike_that_allows_commercial_use_does_not_fit_non_commercial_material(self) -> None:
        records = (
            share_alike("CC-BY-SA-4.0", "CC-BY-SA-4.0"),
            a_record("CC-BY-NC-4.0", "noncommercial", kind="data_license"),
        )
        sources = (prompts("CC-BY-SA-4.0", name="a"), prompts("CC-BY-NC-4.0", name="b"))
        verdict = verdict_on(sources, *records, policy=a_policy("research"))
        assert [each.rule for each in verdict.refusals] == ["LG-021"]

    def test_non_commercial_share_alike_takes_non_commercial_material_of_its_version(self) -> None:
        records = (
            share_alike("CC-BY-NC-SA-4.0", "CC-BY-NC-SA-4.0", "noncommercial"),
            a_record("CC-BY-NC-4.0", "noncommercial", kind="data_license"),
        )
        sources = (prompts("CC-BY-NC-SA-4.0", name="a"), prompts("CC-BY-NC-4.0", name="b"))
        assert verdict_on(sources, *records, policy=a_policy("research")).passes

    @pytest.mark.parametrize(
        ("one", "other", "passes"),
        [("Llama", "Llama 3", True), ("llama 3", "Llama", True), ("Llama", "Qwen", False)],
    )
    def test_two_prefixes_fit_where_one_begins_with_the_other(self, one: str, other: str, passes: bool) -> None:
        records = tuple(
            a_record(name, owes=(("name_prefix", text, "distribute_model_trained_on_outputs"),))
            for name, text in (("A", one), ("B", other))
        )
        sources = (teacher("A", name="a"), teacher("B", name="b"))
        verdict = verdict_on(sources, *records)
        assert verdict.passes is passes
        assert [each.rule for each in verdict.refusals] == ([] if passes else ["LG-020"])
        assert verdict_on(sources, *records, policy=a_policy(model="none")).outcome == "allow"

    def test_a_share_alike_data_set_warns_of_what_is_unsettled_for_the_student(self) -> None:
        verdict = verdict_on((prompts("CC-BY-SA-4.0"),), share_alike("CC-BY-SA-4.0", "CC-BY-SA-4.0"))
        assert verdict.warnings == (
            "prompt set: CC-BY-SA-4.0 is share-alike; whether that reaches the student is unsettled",
        )


class TestAge:
    @pytest.mark.parametrize(("day", "count"), [(date(2026, 11, 1), 0), (date(2027, 6, 1), 1)])
    def test_api_terms_that_were_read_long_ago_are_warned_of(self, day: date, count: int) -> None:
        record = a_record("terms:x/y/2025", kind="api_terms", provider="x")
        verdict = verdict_on((teacher("terms:x/y/2025"),), record, today=day)
        assert (verdict.outcome, len(verdict.warnings)) == ("allow", count)

    def test_licences_do_not_age(self) -> None:
        assert verdict_on((teacher("it"),), a_record("it"), today=date(2036, 1, 1)).warnings == ()


class TestScalars:
    def test_limits_are_the_strictest_of_all(self) -> None:
        registry = a_registry(
            a_record("A", ("mau_cap", 700), ("revenue_cap", 5), ("territory_exclude", ["EU"]), "noncommercial"),
            a_record("B", ("mau_cap", 100), ("territory_exclude", ["KR"]), "research_only"),
        )
        found = grant_of(["A", "B"], registry, a_policy(), role="teacher", source="main").scalars
        assert (found.mau_cap, found.revenue_cap, found.scope) == (100, 5, "research_only")
        assert found.territory_exclude == {"EU", "KR"}


class TestOutcome:
    def test_of_one_atom_in_two_roles_the_stricter_effect_counts_and_names_its_sources_only(self) -> None:
        verdict = verdict_on((teacher("it"), prompts("it")), a_record("it", "no_derivatives"))
        assert [(each.effect, each.sources) for each in verdict.findings] == [("deny", ("prompt:set",))]

    @pytest.mark.parametrize(
        ("licenses", "expected"),
        [
            (("free",), "allow"),
            (("free", "owes"), "allow_with_obligations"),
            (("owes", "what"), "undetermined"),
            (("owes", "what", "bad"), "deny"),
        ],
    )
    def test_the_strictest_of_all_findings_decides(self, licenses: tuple[str, ...], expected: str) -> None:
        records = (a_record("owes", owes=(("display", "x", "train_on_outputs"),)), a_record("bad", "no_train.any"))
        verdict = verdict_on((teacher(*licenses),), *records)
        assert (verdict.outcome, verdict.passes) == (expected, expected.startswith("allow"))

    def test_it_is_plain_json_with_everything_in_one_order(self) -> None:
        record = a_record("bad", "no_train.any", owes=(("display", "x", "train_on_outputs"),))
        plain = verdict_on((teacher("bad", "what OR free"),), record).to_json()
        assert list(plain) == [
            "gate", "outcome", "findings", "obligations", "warnings", "overrides", "records", "choices",
        ]  # fmt: skip
        assert plain["records"] == ["bad", "free"]
        assert plain["findings"][0]["cited"][0] == {
            "record": "bad",
            "title": "Terms bad",
            "effective": "2025-01-01",
            "retrieved": "2026-11-01",
            "confidence": "verified",
            "source_url": "https://terms.example/x",
            "clause": "1",
            "quote": "words of no_train.any",
        }


class TestFiles:
    def test_of_a_folder_each_counts_by_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "é").mkdir()
        (tmp_path / "é" / "a.yaml").write_text("")
        assert files_of_policy(a_policy(registry=tmp_path)) == {"policy.registry.é/a.yaml": tmp_path / "é" / "a.yaml"}

    @pytest.mark.parametrize("setting", ["registry", "texts"])
    def test_a_name_that_is_not_utf_8_is_refused_with_its_folder(self, tmp_path: Path, setting: str) -> None:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/note-\xff.txt"))).write_text("")
        with pytest.raises(UsageError) as caught:
            files_of_policy(a_policy(**{setting: tmp_path}))
        assert caught.value.where == f"policy.{setting}: {tmp_path}"
        assert "not UTF-8" in caught.value.what
