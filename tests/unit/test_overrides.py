"""What people sign for: a chain that shows every change, and that accepts exactly what was signed."""

import dataclasses
import hashlib
import json
import os
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.errors import CorruptArtefact, UsageError
from pipeline.core.lineage import canonical_json, digest_json
from pipeline.terms.overrides import Decision, Evidence, Override, append_override, evidence_of, read_overrides
from pipeline.terms.statement import Source, Statement
from tests.terms_cases import TODAY, a_policy, a_record, prompts, student, teacher, verdict_on

DECISION = Decision(
    rule="LG-012",
    atom="no_train.competing",
    value='"maker"',
    sources=("teacher:main",),
    kind="permission",
    person="Ada Lovelace <ada@example.org>",
    reason="Our order form of 2026-10-01 allows it.",
    evidence=Evidence(name="order.pdf", sha256="a" * 64),
    expires=TODAY + timedelta(days=200),
)
RECORD = a_record("it", ("no_train.competing", "maker"))
SOURCES = (teacher("it"), student())
STATEMENT = Statement(SOURCES)
MEANT = a_policy()


def write(
    path: Path, *changes: dict[str, Any], statement: Statement = STATEMENT, policy: PolicyConfig = MEANT
) -> tuple[Override, ...]:
    for change in changes or ({},):
        append_override(path, dataclasses.replace(DECISION, **change), statement, policy, today=TODAY)
    return read_overrides(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "overrides.jsonl"


class TestFile:
    def test_no_file_is_no_override(self, path: Path) -> None:
        assert read_overrides(path) == ()

    def test_what_is_appended_is_read_back_in_order(self, path: Path) -> None:
        reasons = [f"This is reason number {number}." for number in range(3)]
        read = write(path, *({"reason": reason} for reason in reasons))
        assert [each.reason for each in read] == reasons
        assert read[0].prev_line_sha256 == "0" * 64
        lines = path.read_bytes().splitlines()
        assert [each.prev_line_sha256 for each in read[1:]] == [hashlib.sha256(line).hexdigest() for line in lines[:2]]

    def test_appending_changes_no_byte_before(self, path: Path) -> None:
        write(path)
        before = path.read_bytes()
        write(path)
        assert path.read_bytes().startswith(before)

    def test_it_says_who_why_until_when_on_what_evidence_and_for_which_sources(self, path: Path) -> None:
        (made,) = write(path)
        assert made.person == DECISION.person
        assert (made.created, made.expires) == (TODAY, DECISION.expires)
        assert made.evidence.sha256 == "a" * 64
        assert list(made.sources) == ["teacher:main"]
        assert Override.model_validate(made.to_json()) == made

    def test_evidence_is_named_without_its_folder(self, tmp_path: Path) -> None:
        (tmp_path / "contract.pdf").write_bytes(b"signed")
        evidence = evidence_of(tmp_path / "contract.pdf")
        assert evidence == Evidence(name="contract.pdf", sha256=hashlib.sha256(b"signed").hexdigest())

    def test_evidence_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot be read"):
            evidence_of(tmp_path / "nothing.pdf")

    @pytest.mark.parametrize("name", ["a" * 201, os.fsdecode(b"letter-\xff.txt"), "  "], ids=ascii)
    def test_evidence_whose_name_cannot_be_written_down_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"signed")
        with pytest.raises(UsageError, match="the name of the evidence") as caught:
            evidence_of(tmp_path / name)
        str(caught.value).encode()

    def test_empty_evidence_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").touch()
        with pytest.raises(UsageError, match="is empty"):
            evidence_of(tmp_path / "letter.txt")

    def test_a_folder_is_no_file_of_overrides(self, path: Path) -> None:
        path.mkdir()
        with pytest.raises(UsageError, match="is a folder"):
            read_overrides(path)
        with pytest.raises(UsageError, match="is a folder"):
            write(path)


class TestDecision:
    @pytest.mark.parametrize(
        "change",
        [
            {"reason": "too short"},
            {"reason": " " * 40},
            {"person": " "},
            {"expires": TODAY + timedelta(days=366)},
            {"expires": TODAY - timedelta(days=1)},
            {"rule": "no rule"},
            {"sources": ("teacher:other",)},
            {"kind": "assertion"},
            {"kind": "assertion", "source": "prompt:set", "license": "MIT"},
            {"license": "MIT"},
            {"kind": "assertion", "source": "teacher:main", "license": "MIT"},  # LG-012: no terms that nobody knows
        ],
        ids=str,
    )
    def test_one_that_is_not_whole_is_refused_and_nothing_is_written(self, path: Path, change: dict[str, Any]) -> None:
        write(path)
        before = path.read_bytes()
        with pytest.raises(UsageError, match="cannot be recorded"):
            write(path, change)
        assert path.read_bytes() == before

    def test_a_year_is_the_longest(self, path: Path) -> None:
        (made,) = write(path, {"expires": date(2027, 11, 23)})
        assert made.expires == date(2027, 11, 23)


class TestChain:
    @pytest.fixture
    def three(self, path: Path) -> Path:
        write(path, *({"reason": f"This is reason number {number}."} for number in range(3)))
        return path

    def refused(self, path: Path, line: int) -> None:
        with pytest.raises(CorruptArtefact) as caught:
            read_overrides(path)
        assert caught.value.where == f"{path}:{line}"
        before = path.read_bytes()
        with pytest.raises(CorruptArtefact):
            write(path)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_an_edited_line_is_named(self, three: Path, number: int) -> None:
        lines = three.read_bytes().splitlines(keepends=True)
        lines[number - 1] = lines[number - 1].replace(b"LG-012", b"LG-010")
        three.write_bytes(b"".join(lines))
        self.refused(three, number)

    @pytest.mark.parametrize("number", [1, 2])
    def test_a_line_that_was_edited_and_sealed_again_breaks_the_next(self, three: Path, number: int) -> None:
        lines = three.read_bytes().splitlines(keepends=True)
        fields = {**json.loads(lines[number - 1]), "rule": "LG-010"}
        fields["sha256"] = digest_json({name: value for name, value in fields.items() if name != "sha256"})
        lines[number - 1] = canonical_json(fields) + b"\n"
        three.write_bytes(b"".join(lines))
        self.refused(three, number + 1)

    def test_a_line_that_says_the_same_in_other_bytes_is_named(self, three: Path) -> None:
        lines = three.read_bytes().splitlines(keepends=True)
        lines[2] = json.dumps(json.loads(lines[2])).encode() + b"\n"
        three.write_bytes(b"".join(lines))
        self.refused(three, 3)

    def test_lines_that_changed_places_are_named(self, three: Path) -> None:
        one, two, last = three.read_bytes().splitlines(keepends=True)
        three.write_bytes(one + last + two)
        self.refused(three, 2)

    @pytest.mark.parametrize("number", [1, 2])
    def test_a_dropped_line_is_named(self, three: Path, number: int) -> None:
        lines = three.read_bytes().splitlines(keepends=True)
        del lines[number - 1]
        three.write_bytes(b"".join(lines))
        self.refused(three, number)

    @pytest.mark.parametrize("cut", [1, 2, 100])
    def test_a_torn_last_line_is_named(self, three: Path, cut: int) -> None:
        three.write_bytes(three.read_bytes()[:-cut])
        self.refused(three, 3)

    @pytest.mark.parametrize("junk", [b"\n", b"{}\n", b"[1]\n", b"\xff\n", b"null\n", b"[" * 9999 + b"\n"])
    def test_a_line_that_is_no_override_is_named(self, three: Path, junk: bytes) -> None:
        three.write_bytes(three.read_bytes() + junk)
        self.refused(three, 4)

    def test_every_flipped_bit_is_found(self, path: Path) -> None:
        write(path, {}, {})
        good = path.read_bytes()
        for place in range(0, len(good), 7):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
            with pytest.raises(CorruptArtefact):
                read_overrides(path)


class TestHolding:
    def test_what_it_accepts_passes_and_stays_visible(self, path: Path) -> None:
        overrides = write(path)
        verdict = verdict_on(SOURCES, RECORD, overrides=overrides)
        assert verdict.outcome == "allow"
        (found,) = verdict.findings
        assert (found.rule, found.effect, found.overrides) == ("LG-012", "overridden", (overrides[0].id,))
        assert verdict.warnings == (f"1 licence override active: LG-012, expires {DECISION.expires}",)
        assert verdict.overrides == overrides

    def test_it_never_accepts_another_atom_value_or_rule(self, path: Path) -> None:
        for change in ({"value": '"other"'}, {"atom": "needs_permission"}, {"rule": "LG-014"}):
            overrides = write(path, change)
            assert verdict_on(SOURCES, RECORD, overrides=overrides).outcome == "undetermined"

    def test_it_ends_with_its_last_day(self, path: Path) -> None:
        overrides = write(path)
        assert verdict_on(SOURCES, RECORD, overrides=overrides, today=DECISION.expires).passes
        after = verdict_on(SOURCES, RECORD, overrides=overrides, today=DECISION.expires + timedelta(days=1))
        assert after.outcome == "undetermined"
        assert after.warnings == (
            f"override {overrides[0].id} of LG-012 held until {DECISION.expires} and has expired",
        )

    @pytest.mark.parametrize(
        "other", [teacher("it", what="maker:next"), teacher("it", "free"), Source("teacher", "main", "maker:model", ())]
    )
    def test_it_is_for_the_source_as_it_was(self, path: Path, other: Source) -> None:
        overrides = write(path)
        verdict = verdict_on((other, student()), RECORD, overrides=overrides)
        assert not verdict.passes
        assert "is for other sources" in verdict.warnings[0]

    def test_it_is_for_the_revision_that_was_there(self, path: Path) -> None:
        at = {name: Source("teacher", "main", "maker:model", ("it",), None, {"revision": name}) for name in "ab"}
        overrides = write(path, statement=Statement((at["a"], student())))
        assert verdict_on((at["a"], student()), RECORD, overrides=overrides).passes
        later = dataclasses.replace(at["a"], facts={"revision": "a", "identity": "known after the first request"})
        assert verdict_on((later, student()), RECORD, overrides=overrides).passes
        assert not verdict_on((at["b"], student()), RECORD, overrides=overrides).passes

    @pytest.mark.parametrize("other", [("commercial", "internal", "public"), ("commercial", "public", "internal"),
                                       ("research", "public", "public")])  # fmt: skip
    def test_it_is_for_the_use_and_the_release_that_were_meant(self, path: Path, other: tuple[str, str, str]) -> None:
        overrides = write(path, policy=a_policy(*other))
        assert verdict_on(SOURCES, RECORD, overrides=overrides, policy=a_policy(*other)).passes
        assert not verdict_on(SOURCES, RECORD, overrides=overrides).passes

    def test_another_source_under_the_same_terms_is_refused(self, path: Path) -> None:
        overrides = write(path)
        verdict = verdict_on((*SOURCES, teacher("it", name="second")), RECORD, overrides=overrides)
        assert verdict.outcome == "undetermined"
        assert [(each.effect, each.sources) for each in verdict.findings] == [
            ("undetermined", ("teacher:second",)),
            ("overridden", ("teacher:main",)),
        ]

    def test_it_holds_on_when_other_sources_come_or_go(self, path: Path) -> None:
        overrides = write(path)
        assert verdict_on((*SOURCES, prompts("free")), RECORD, overrides=overrides).passes

    def test_of_two_sources_it_holds_for_the_one_that_did_not_change(self, path: Path) -> None:
        sources = (teacher("it"), teacher("it", name="second"), student())
        overrides = write(path, {"sources": ("teacher:main", "teacher:second")}, statement=Statement(sources))
        assert verdict_on(sources, RECORD, overrides=overrides).passes
        changed = (teacher("it"), teacher("it", name="second", what="maker:next"), student())
        verdict = verdict_on(changed, RECORD, overrides=overrides)
        assert [each.sources for each in verdict.refusals] == [("teacher:second",)]

    def test_a_conflict_can_be_signed_for_as_well(self, path: Path) -> None:
        records = [
            a_record(name, owes=(("name_prefix", name, "distribute_model_trained_on_outputs"),)) for name in "AB"
        ]
        sources = (teacher("A", name="a"), teacher("B", name="b"), student())
        (found,) = verdict_on(sources, *records).refusals
        change = {"rule": found.rule, "atom": found.atom, "value": found.value, "sources": found.sources}
        overrides = write(path, change, statement=Statement(sources))
        assert verdict_on(sources, *records, overrides=overrides).outcome == "allow_with_obligations"
        third = teacher("A", name="c")  # the same conflict, with a source that nobody signed for
        assert verdict_on((*sources, third), *records, overrides=overrides).outcome == "deny"


class TestAssertions:
    SOURCES = (prompts("unknown"), student())
    POLICY = a_policy(min_confidence="user_asserted")

    def asserted(self, path: Path, license: str, sources: tuple[Source, ...] = SOURCES) -> tuple[Override, ...]:
        change = {"rule": "LG-001", "atom": "unknown", "value": '"unknown"', "kind": "assertion"}
        named = {"sources": ("prompt:set",), "source": "prompt:set", "license": license}
        return write(path, change | named, statement=Statement(sources))

    def test_one_answers_what_nobody_knew_and_stays_visible(self, path: Path) -> None:
        overrides = self.asserted(path, "free")
        verdict = verdict_on(self.SOURCES, policy=self.POLICY, overrides=overrides)
        assert verdict.outcome == "allow"
        assert [each.effect for each in verdict.findings] == ["overridden"]
        assert "Ada Lovelace <ada@example.org> asserts free until" in verdict.findings[0].why
        assert verdict.warnings[0].startswith("1 licence override active: LG-001")

    def test_what_the_asserted_licence_forbids_binds(self, path: Path) -> None:
        overrides = self.asserted(path, "it")
        record = a_record("it", "noncommercial")
        assert verdict_on(self.SOURCES, record, policy=self.POLICY, overrides=overrides).outcome == "deny"

    def test_one_of_a_licence_that_nobody_knows_answers_nothing(self, path: Path) -> None:
        overrides = self.asserted(path, "never heard of")
        assert verdict_on(self.SOURCES, policy=self.POLICY, overrides=overrides).outcome == "undetermined"

    def test_it_ranks_below_what_the_policy_asks_for_by_default(self, path: Path) -> None:
        overrides = self.asserted(path, "free")
        verdict = verdict_on(self.SOURCES, overrides=overrides)
        assert verdict.outcome == "undetermined"
        assert any(
            "ranks as user_asserted, below policy.min_confidence = mirrored" in each for each in verdict.warnings
        )

    def test_it_never_lifts_what_is_known(self, path: Path) -> None:
        sources = (prompts("it"), student())
        overrides = self.asserted(path, "free", sources)
        record = a_record("it", "noncommercial")
        assert verdict_on(sources, record, policy=self.POLICY, overrides=overrides).outcome == "deny"

    def test_it_never_lifts_that_a_named_licence_is_not_known_surely_enough(self, path: Path) -> None:
        sources = (prompts("it"), student())
        overrides = self.asserted(path, "free", sources)
        record = a_record("it", confidence="unverified", text_sha256=None)
        assert verdict_on(sources, record, policy=self.POLICY, overrides=overrides).outcome == "undetermined"

    def test_it_is_for_one_source_only(self, path: Path) -> None:
        overrides = self.asserted(path, "free")
        sources = (*self.SOURCES, prompts("unknown", name="other"))
        assert verdict_on(sources, policy=self.POLICY, overrides=overrides).outcome == "undetermined"
