"""Stage `dataset` and terms: what the gate judges, what leaves, and what the manifest and the folder say of it."""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.errors import CorruptArtefact, PolicyRefused, UsageError
from pipeline.core.lineage import canonical_json
from pipeline.core.record import Record
from pipeline.core.stage import Result
from pipeline.stages import dataset as stage
from pipeline.terms.overrides import Decision, Evidence, append_override
from pipeline.terms.statement import Source, Statement
from pipeline.text.markdown import split_front_matter
from tests.dataset_stage import (
    SOURCES,
    a_manifest,
    a_model,
    a_step,
    a_student,
    people,
    read_rows,
    run_stage,
    write_inputs,
)
from tests.support import a_record, make_context

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs" / "dataset-manifest.schema.json").read_text("utf-8"))
PUBLIC = {"intended_use": "commercial", "release": {"dataset": "public", "model": "public"}}
RESEARCH = {**PUBLIC, "intended_use": "research"}
NC = "CC-BY-NC-4.0"
KNOWN = {**SOURCES, "other": {**SOURCES["set"], "license": NC}}
MANIFESTS = {
    "prompts": a_manifest("prompts", 100, 90, {"near_test": 7, "duplicate_of": 3}),
    "generate": a_manifest(
        "generate", 90, 80, {"gave_up:timeout": 10}, teachers={"big": {"kind": "vllm", "identity": "ab" * 32}}
    ),
    "filter": a_manifest("filter", 80, 40, {"too_long": 40}),
    "dedup": a_manifest("dedup", 40, 30, {"duplicate_of": 10}),
}


def rows_of(**counts: int) -> list[Record]:
    """Rows by their prompt set, all under that set's licence and the teacher's."""
    licenses = {"set": ("Apache-2.0", "MIT"), "other": ("Apache-2.0", NC)}
    sets = [name for name, count in counts.items() for _ in range(count)]
    return [
        a_record(row_id=f"{at:032x}", prompt_id=f"p{at}", prompt_set=name, teacher="big", license_set=licenses[name])
        for at, name in enumerate(sets)
    ]


def made(folder: Path, rows: list[Record], policy: Mapping[str, Any] = PUBLIC, **config: Any) -> tuple[Path, Result]:
    cfg = a_step(a_model("big", "Apache-2.0"), a_student(), policy=policy, **config)
    return run_stage(folder, rows, cfg, sources=KNOWN, manifests=MANIFESTS)


def provenance(result: Result) -> dict[str, Any]:
    found = result.metrics["provenance"]
    assert isinstance(found, dict)
    return found


class TestTheGate:
    def test_rows_whose_terms_forbid_the_use_are_refused_before_a_shard_is_written(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyRefused) as refused:
            made(tmp_path, rows_of(set=3, other=1))
        assert "LG-002 noncommercial" in str(refused.value) and "1 of 4 rows" in str(refused.value)
        assert not (tmp_path / "out" / "data").exists()

    def test_the_same_rows_pass_for_another_use(self, tmp_path: Path) -> None:
        _, result = made(tmp_path, rows_of(set=3, other=1), RESEARCH)
        assert result.rows_out == 4

    def test_a_set_without_rows_here_binds_nobody(self, tmp_path: Path) -> None:
        _, result = made(tmp_path, rows_of(set=3))
        assert provenance(result)["verdict"]["outcome"] == "allow_with_obligations"
        assert NC not in provenance(result)["records"]

    def test_a_duplicate_merged_into_a_row_binds(self, tmp_path: Path) -> None:
        merged = a_record(teacher="big", also_in=("other",), license_set=("Apache-2.0", NC, "MIT"))
        with pytest.raises(PolicyRefused, match="LG-002 noncommercial"):
            made(tmp_path, [merged])

    def test_a_teacher_that_nobody_declared_is_unknown(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyRefused, match="stranger"):
            made(tmp_path, [*rows_of(set=1), a_record(row_id="9" * 32, teacher="stranger")])


class TestExcluding:
    def test_rows_leave_with_their_reason_and_the_rest_ships(self, tmp_path: Path) -> None:
        out, result = made(tmp_path, rows_of(set=3, other=1), exclude_prompt_sets=["other"])
        assert (result.rows_in, result.rows_out, result.rejected) == (4, 3, {"excluded:prompt_set:other": 1})
        left = read_rows(out / "rejects")
        assert [(row["prompt_set"], row["reason"]) for row in left] == [("other", "excluded:prompt_set:other")]
        assert {row["prompt_set"] for row in read_rows(out / "data")} == {"set"}

    def test_a_teacher_is_named_first(self, tmp_path: Path) -> None:
        rows = [*rows_of(set=2), a_record(row_id="9" * 32, teacher="small", prompt_set="other", license_set=(NC,))]
        cfg = {"exclude_teachers": ["small"], "exclude_prompt_sets": ["other"]}
        _, result = made(tmp_path, rows, **cfg)
        assert result.rejected == {"excluded:teacher:small": 1}

    def test_a_row_leaves_for_a_duplicate_too(self, tmp_path: Path) -> None:
        merged = a_record(row_id="9" * 32, teacher="big", also_in=("other",), license_set=("Apache-2.0", NC, "MIT"))
        _, result = made(tmp_path, [*rows_of(set=2), merged], exclude_prompt_sets=["other"])
        assert result.rejected == {"excluded:prompt_set:other": 1}

    def test_a_row_leaves_for_a_licence_that_an_excluded_teachers_duplicate_brought(self, tmp_path: Path) -> None:
        cfg = a_step(a_model("big", "Apache-2.0"), a_model("small", NC), policy=PUBLIC, exclude_teachers=["small"])
        merged = a_record(row_id="9" * 32, teacher="big", license_set=("Apache-2.0", NC, "MIT"))
        _, result = run_stage(tmp_path, [*rows_of(set=2), merged], cfg, sources=KNOWN, manifests=MANIFESTS)
        assert (result.rows_out, result.rejected) == (2, {"excluded:teacher:small": 1})

    def test_a_row_stays_whose_own_sources_are_under_the_excluded_teachers_licence(self, tmp_path: Path) -> None:
        cfg = a_step(a_model("big", "Apache-2.0"), a_model("small", "MIT"), policy=PUBLIC, exclude_teachers=["small"])
        _, result = run_stage(tmp_path, rows_of(set=2), cfg, sources=KNOWN, manifests=MANIFESTS)
        assert (result.rows_out, result.rejected) == (2, {})

    def test_a_merged_duplicate_is_a_source_with_a_name_of_its_own(self, tmp_path: Path) -> None:
        cfg = a_step(a_model("big", "Apache-2.0"), policy=RESEARCH)
        merged = a_record(row_id="9" * 32, teacher="big", license_set=("Apache-2.0", NC, "MIT"))
        out, _ = run_stage(tmp_path, [*rows_of(set=2), merged], cfg, sources=KNOWN, manifests=MANIFESTS)
        croissant = json.loads((out / "croissant.json").read_text("utf-8"))
        used = [each["@id"] for each in croissant["prov:wasDerivedFrom"]]
        agents = [each["@id"] for each in croissant["prov:wasGeneratedBy"]["prov:wasAssociatedWith"]]
        assert len({*used, *agents}) == len(used) + len(agents) >= 3
        assert (out / "NOTICE").read_text("utf-8").count("- teacher big: ") == 1
        assert f"- teacher duplicates merged into big: {NC}: " in (out / "NOTICE").read_text("utf-8")
        assert "| 1 |" in next(
            line for line in (out / "README.md").read_text("utf-8").splitlines() if "| duplicates merged" in line
        )

    def test_what_left_does_not_change_what_ships(self, tmp_path: Path) -> None:
        (tmp_path / "less").mkdir()
        (tmp_path / "more").mkdir()
        _, less = made(tmp_path / "less", rows_of(set=3))
        _, more = made(tmp_path / "more", rows_of(set=3, other=2), exclude_prompt_sets=["other"])
        assert less.content == more.content

    def test_nothing_is_written_where_nothing_is_excluded(self, tmp_path: Path) -> None:
        out, _ = made(tmp_path, rows_of(set=1))
        assert not (out / "rejects").exists()

    def test_no_row_left_names_the_setting(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"dataset\.exclude_teachers"):
            made(tmp_path, rows_of(set=1), exclude_teachers=["big"])


class TestNotices:
    def test_no_row_is_made_of_the_students_base(self, tmp_path: Path) -> None:
        out, result = made(tmp_path, rows_of(set=2))
        assert "student_base" in {each["role"] for each in provenance(result)["statement"]["sources"]}
        assert "student_base" not in (out / "NOTICE").read_text("utf-8")


class TestTheManifest:
    def test_it_is_valid_by_its_published_schema(self, tmp_path: Path) -> None:
        _, result = made(tmp_path, rows_of(set=3, other=1), RESEARCH)
        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        jsonschema.validate(provenance(result), SCHEMA)
        canonical_json(provenance(result))  # plain JSON throughout

    @pytest.mark.parametrize("name", sorted(SCHEMA["required"]))
    def test_the_schema_wants_each_part(self, tmp_path: Path, name: str) -> None:
        _, result = made(tmp_path, rows_of(set=1))
        rest = {key: value for key, value in provenance(result).items() if key != name}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(rest, SCHEMA)

    def test_the_statement_is_the_plans_with_the_rows(self, tmp_path: Path) -> None:
        """What people signed for is bound to the sources: these must not depend on which rows are left."""
        hashes = set()
        for name, rows in (("one", rows_of(set=3)), ("two", rows_of(set=1, other=2))):
            (tmp_path / name).mkdir()
            _, result = made(tmp_path / name, rows, RESEARCH)
            statement = Statement.from_json(provenance(result)["statement"])
            assert statement.rows == 3
            hashes.add(statement.sha256)
        assert len(hashes) == 1 and hashes == {provenance(result)["statement_sha256"]}

    def test_every_stage_conserves_its_rows(self, tmp_path: Path) -> None:
        _, result = made(tmp_path, rows_of(set=3, other=1), exclude_prompt_sets=["other"])
        lines = provenance(result)["conservation"]
        assert [line["stage"] for line in lines] == ["prompts", "generate", "filter", "dedup", "dataset"]
        assert all(line["rows_in"] == line["rows_out"] + sum(line["rejected"].values()) for line in lines)

    def test_it_names_the_weights_the_runs_and_the_decontamination(self, tmp_path: Path) -> None:
        _, result = made(tmp_path, rows_of(set=1))
        found = provenance(result)
        assert found["teachers"]["big"]["identity"] == "ab" * 32
        assert found["runs"]["dedup"]["key"] == "k" * 64
        assert found["decontamination"]["rule"] == {"ngram": 8, "threshold": 0.5}

    def test_what_the_provider_says_answered_is_told_apart(self, tmp_path: Path) -> None:
        rows = [
            a_record(row_id=f"{at:032x}", teacher="big", returned_model=model, fingerprint=None, license_set=("MIT",))
            for at, model in enumerate(["m-1", "m-2", "m-1", None])
        ]
        _, result = made(tmp_path, rows)
        returned = provenance(result)["teachers"]["big"]["returned"]
        assert returned == [{"model": "m-1", "fingerprint": None}, {"model": "m-2", "fingerprint": None}]

    def test_no_path_and_no_host_of_this_machine_is_in_anything(self, tmp_path: Path) -> None:
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "MIT.txt").write_text("A text.", "utf-8")
        policy = {**PUBLIC, "texts": str(tmp_path / "texts"), "overrides": str(tmp_path / "none.jsonl")}
        out, result = made(tmp_path, rows_of(set=3), policy)
        told = [canonical_json(dict(result.metrics)), *(path.read_bytes() for path in out.rglob("*") if path.is_file())]
        assert (out / "LICENSES" / "MIT.txt").read_text("utf-8") == "A text.\n"
        for text in told:
            assert str(tmp_path).encode() not in text and b"somebodys-laptop" not in text

    def test_an_upstream_manifest_that_was_changed_is_damage(self, tmp_path: Path) -> None:
        inputs = write_inputs(tmp_path, rows_of(set=1), manifests=MANIFESTS)
        path = inputs["filter"] / "manifest.json"
        path.write_text(path.read_text("utf-8").replace('"rows_out": 40', '"rows_out": 41'), "utf-8")
        (tmp_path / "out").mkdir()
        with pytest.raises(CorruptArtefact, match="changed"):
            stage.run(a_step(), inputs, tmp_path / "out", make_context(tmp_path))


class TestWhatPeopleSignedFor:
    DECISION = Decision(
        rule="LG-002",
        atom="noncommercial",
        value="null",
        sources=("prompt:other",),
        kind="permission",
        person="Ada Example, ada@example.org",
        reason="the authors wrote to us that we may",
        evidence=Evidence(name="letter.txt", sha256="e" * 64),
        expires=date(2027, 1, 1),
    )

    def signed(self, folder: Path, statement: Statement) -> dict[str, Any]:
        path = folder / "overrides.jsonl"
        policy = PolicyConfig.model_validate(PUBLIC)
        append_override(path, self.DECISION, statement, policy, today=date(2026, 11, 23))
        return {**PUBLIC, "overrides": str(path)}

    def test_it_opens_the_gate_for_these_sources_and_stays_in_sight(self, tmp_path: Path) -> None:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
        _, first = made(tmp_path / "first", rows_of(set=3, other=1), RESEARCH)
        policy = self.signed(tmp_path, Statement.from_json(provenance(first)["statement"]))
        out, second = made(tmp_path / "second", rows_of(set=3, other=1), policy)
        (finding,) = (each for each in provenance(second)["verdict"]["findings"] if each["rule"] == "LG-002")
        assert finding["effect"] == "overridden"
        card = (out / "README.md").read_text("utf-8")
        assert "Licence override" in card and "LG\\-002" in card and "expires 2027\\-01\\-01" in card
        jsonschema.validate(provenance(second), SCHEMA)

    def test_what_was_signed_for_others_neither_helps_nor_ships(self, tmp_path: Path) -> None:
        policy = self.signed(tmp_path, Statement((Source("prompt", "other", "elsewhere", (NC,)),)))
        (tmp_path / "denied").mkdir()
        with pytest.raises(PolicyRefused):
            made(tmp_path / "denied", rows_of(other=1), policy)
        _, result = made(tmp_path, rows_of(set=1), policy)
        assert provenance(result)["overrides"] == []

    def test_the_policys_files_count(self, tmp_path: Path) -> None:
        for name in ("overrides.jsonl", "texts/MIT.txt", "registry/own.yaml"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("", "utf-8")
        named = {"overrides": "overrides.jsonl", "texts": "texts", "registry": "registry"}
        policy = {**PUBLIC, **{field: str(tmp_path / name) for field, name in named.items()}}
        assert stage.input_files(a_step(policy=policy)) == {
            "policy.overrides": tmp_path / "overrides.jsonl",
            "policy.texts.MIT.txt": tmp_path / "texts" / "MIT.txt",
            "policy.registry.own.yaml": tmp_path / "registry" / "own.yaml",
        }


class TestAnswersOfPeople:
    """As in configs/gsm8k-replay.yaml."""

    @pytest.mark.parametrize("policy", [PUBLIC, RESEARCH])
    def test_prompts_and_answers_under_mit_ship_for_both_uses(self, tmp_path: Path, policy: dict[str, Any]) -> None:
        sources = {"set": {**SOURCES["set"], "source": "https://huggingface.co/datasets/openai/gsm8k"}}
        humans = people("tiny", "MIT", "human-written solutions of GSM8K")
        out, result = run_stage(tmp_path, [a_record()], a_step(humans, a_student(), policy=policy), sources=sources)
        meta, _ = split_front_matter((out / "README.md").read_text("utf-8"))
        assert (meta["license"], meta["source_datasets"]) == ("mit", ["extended|openai/gsm8k"])
        assert meta["annotations_creators"] == ["found"] and "tags" not in meta
        assert "human\\-written solutions of GSM8K" in (out / "README.md").read_text("utf-8")
        assert provenance(result)["verdict"]["outcome"] == "allow_with_obligations"


class TestPromiseFour:
    @pytest.mark.parametrize("upstream_rows", [8192, 2])
    def test_equal_inputs_give_equal_files(self, tmp_path: Path, upstream_rows: int) -> None:
        written = []
        for name, size in (("one", 8192), ("two", upstream_rows)):
            cfg = a_step(a_model("big", "Apache-2.0"), people("x", "MIT"), a_student(), policy=RESEARCH)
            rows = rows_of(set=7, other=3)
            out, _ = run_stage(tmp_path / name, rows, cfg, sources=KNOWN, manifests=MANIFESTS, upstream_rows=size)
            files = sorted(path for path in out.rglob("*") if path.is_file())
            written.append({path.relative_to(out).as_posix(): path.read_bytes() for path in files})
        assert written[0] == written[1]
        assert {"README.md", "croissant.json", "LICENSES.md", "NOTICE", "LICENSES/MIT.txt"} <= written[0].keys()

    def test_what_is_said_of_rows_is_no_part_of_their_content(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        _, one = made(tmp_path / "a", rows_of(set=3), title="One")
        _, other = made(tmp_path / "b", rows_of(set=3), RESEARCH, title="Other")
        assert one.content == other.content
