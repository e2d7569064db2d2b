"""Term records: what comes along is complete and true to its texts, and what is no record is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import cli
from pipeline.core.errors import UsageError
from pipeline.core.load import read_yaml
from pipeline.terms.atoms import ObligationAtom, RestrictionAtom, Trigger
from pipeline.terms.records import BUILT_IN, Kind, Registry, TermRecord, load_registry, resolve
from pipeline.terms.texts import BUILT_IN as TEXTS
from pipeline.terms.texts import PACKAGE, find_text

ROOT = Path(__file__).parents[2]
SCHEMA = BUILT_IN.parent / "record.schema.json"

# fmt: off
ROWS = {
    1: ["Apache-2.0"],
    2: ["MIT"],
    3: ["LicenseRef-scancode-moonshot-ai-modified-mit-2025"],
    4: ["LicenseRef-scancode-openmdw-1.0"],
    5: ["LicenseRef-scancode-llama-2-license-2023"],
    6: ["LicenseRef-llama-3-community"],
    7: ["LicenseRef-scancode-llama-3.1-license-2024"],
    8: ["LicenseRef-scancode-llama-3.2-license-2024"],
    9: ["LicenseRef-scancode-llama-3.3-license-2024"],
    10: ["LicenseRef-scancode-llama-4-cla-2025"],
    11: ["LicenseRef-scancode-gemma-tou-2025-03-24", "LicenseRef-scancode-gemma-tou-2024-04-01",
         "LicenseRef-scancode-gemma-pup-2024-02-21"],
    12: ["LicenseRef-scancode-deepseek-la-1.0"],
    13: ["LicenseRef-scancode-bigscience-open-rail-m"],
    14: ["LicenseRef-scancode-tongyi-qianwen-2023"],
    15: ["LicenseRef-scancode-qwen-2024"],
    16: ["LicenseRef-qwen-research"],
    17: ["LicenseRef-scancode-nvidia-open-model-2025-04-28", "LicenseRef-nvidia-open-model-cosmos"],
    18: ["LicenseRef-scancode-falcon-2-11b-1.0"],
    19: ["LicenseRef-mrl-0.1"],
    20: ["LicenseRef-mnpl-0.1"],
    21: ["LicenseRef-cohere-labs-cc-by-nc"],
    22: ["LicenseRef-scancode-exaone-ai-model-1.1-nc"],
    23: ["LicenseRef-xai-community"],
    24: ["LicenseRef-scancode-tencent-hunyuan-3d-2.0-cla", "LicenseRef-tencent-hunyuan-community"],
    25: ["LicenseRef-scancode-stability-ai-community-2024"],
    26: ["terms:openai/services-agreement/2026-01-01"],
    27: ["terms:openai/eu-terms-of-use/2026-01-16"],
    28: ["terms:anthropic/commercial/2025-06-17", "terms:anthropic/usage-policy/2026-11-12"],
    29: ["terms:anthropic/consumer/2025-10-08"],
    30: ["terms:google/gemini-api/2026-03-23"],
    31: ["terms:google/tos/2026-07-30"],
    32: ["terms:deepseek/open-platform/2026-04-29"],
    33: ["terms:mistral/commercial/2026-08-05"],
    34: ["terms:xai/enterprise/2026-08-14"],
    35: ["terms:meta/model-api/2026-08-21"],
    36: ["terms:qwen/studio/2026-05-19", "terms:alibaba/model-studio"],
    37: ["terms:perplexity/api/2026-01-23", "terms:perplexity/acceptable-use-policy/2025-07-08"],
    38: ["terms:aws/service-terms"],
    39: ["terms:microsoft/product-terms"],
    40: ["terms:cohere/api", "terms:ai21/api", "terms:together/api", "terms:groq/api", "terms:openrouter/api"],
    41: ["CC0-1.0", "PDDL-1.0", "Unlicense"],
    42: ["CC-BY-4.0", "ODC-By-1.0"],
    43: ["CC-BY-SA-4.0"],
    44: ["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"],
    45: ["CC-BY-ND-4.0", "CC-BY-NC-ND-4.0"],
    46: ["CDLA-Permissive-2.0"],
    47: ["CDLA-Sharing-1.0"],
    48: ["LicenseRef-scancode-nvidia-model-training-2025"],
    49: ["NOASSERTION"],
}
"""Row of the survey that the registry was made from -> its records."""

NOT_QUOTED = {
    ("LicenseRef-scancode-llama-3.2-license-2024", "territory_exclude"),
    ("LicenseRef-scancode-llama-4-cla-2025", "territory_exclude"),
    ("LicenseRef-cohere-labs-cc-by-nc", "use_policy"),
    ("LicenseRef-xai-community", "no_train.general_purpose"),
    ("terms:openai/eu-terms-of-use/2026-01-16", "no_train.competing"),
    ("terms:openai/eu-terms-of-use/2026-01-16", "no_automated_extraction"),
    ("terms:anthropic/consumer/2025-10-08", "no_train.any"),
    ("terms:google/gemini-api/2026-03-23", "no_train.competing"),
    ("terms:google/tos/2026-07-30", "no_train.any"),
    ("terms:xai/enterprise/2026-08-14", "no_train.any"),
    ("terms:meta/model-api/2026-08-21", "no_train.competing"),
    ("terms:qwen/studio/2026-05-19", "no_train.any"),
    ("terms:qwen/studio/2026-05-19", "no_train.competing"),
}
"""Atoms of records that were read, whose section or words were not written down: find them, and take them off here."""
# fmt: on


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def words(text: str) -> str:
    return " ".join(text.split())


def atoms_of(record: TermRecord) -> list:
    return [*record.restrictions, *record.obligations]


class TestWhatComesAlong:
    def test_every_row_of_the_survey_has_its_records_and_every_record_its_row(self, registry: Registry) -> None:
        assert list(ROWS) == list(range(1, 50))
        listed = [name for names in ROWS.values() for name in names]
        assert len(listed) == len(set(listed)) == 65
        assert set(listed) == set(registry.records)

    def test_one_record_a_file_that_the_strict_reader_reads_alike(self, registry: Registry) -> None:
        files = sorted(BUILT_IN.glob("*.yaml"))
        strict = [TermRecord.model_validate(read_yaml(path)) for path in files]
        assert {record.id: record for record in strict} == dict(registry.records)
        assert len(files) == len(strict)

    def test_the_schema_is_the_models_and_holds_for_every_record(self, registry: Registry) -> None:
        schema = json.loads(SCHEMA.read_text("utf-8"))
        refresh = "refresh it: python -m pipeline licenses schema > pipeline/terms/record.schema.json"
        assert schema == TermRecord.model_json_schema(), refresh
        validator = jsonschema.validators.validator_for(schema)(schema)
        for record in registry.records.values():
            validator.validate(record.to_json())

    def test_what_was_read_has_a_section_and_a_quote_for_every_atom(self, registry: Registry) -> None:
        read = [record for record in registry.records.values() if record.confidence in ("verified", "mirrored")]
        assert len(read) == 53
        lacking = {
            (record.id, atom.atom)
            for record in read
            for atom in atoms_of(record)
            if atom.clause is None or atom.quote is None
        }
        assert lacking == NOT_QUOTED

    def test_what_nobody_read_quotes_nothing(self, registry: Registry) -> None:
        unread = [record for record in registry.records.values() if record.confidence in ("unverified", "inferred")]
        assert len(unread) == 12
        assert all(atom.quote is None and atom.clause is None for record in unread for atom in atoms_of(record))
        assert all(record.restrictions for record in unread), "it would permit everything"

    def test_every_quote_stands_in_its_text(self, registry: Registry) -> None:
        checked = 0
        for record in registry.records.values():
            same = [each for each in registry.together(record) if each.source_url == record.source_url]
            found = [find_text(each.id, registry, None) for each in same]
            text = words(" ".join(each.text for each in found if each is not None))
            quotes = [words(atom.quote) for atom in atoms_of(record) if atom.quote is not None]
            for quote in quotes if text else ():
                assert quote in text, f"{record.id}: {quote}"
                checked += 1
        assert checked > 100

    def test_the_text_is_the_one_that_was_read(self, registry: Registry) -> None:
        hashed = {record.id: record.text_sha256 for record in registry.records.values() if record.text_sha256}
        found = {name: find_text(name, registry, None) for name in hashed}
        assert {name: text.sha256 for name, text in found.items() if text is not None} == hashed
        assert len(hashed) == len(list(TEXTS.glob("*.txt"))) == 34

    def test_quotes_and_texts_are_those_of_the_installed_database(self, registry: Registry) -> None:
        if importlib.util.find_spec(PACKAGE) is None:
            pytest.skip("needs the extra `licenses` (scancode-toolkit-mini); the texts that come along were compared")
        for record in registry.records.values():
            text = find_text(record.id, registry, None)
            if record.text_sha256 is not None:
                assert text is not None and PACKAGE not in text.origin and ".LICENSE" in text.origin
                assert text.sha256 == record.text_sha256, f"{record.id}: the database has another text"

    def test_the_texts_are_small(self) -> None:
        assert sum(path.stat().st_size for path in TEXTS.iterdir()) < 1_000_000

    @pytest.mark.parametrize(
        ("name", "dated"),
        [
            ("llama3.1", "2024-07-23"),
            ("llama3.3", "2024-12-06"),
            ("llama4", "2025-04-05"),
            ("gemma", "2025-03-24"),
            ("LicenseRef-scancode-deepseek-la-1.0", "2023-10-23"),
            ("LicenseRef-scancode-qwen-2024", "2024-09-19"),
            ("terms:openai/services-agreement/2026-01-01", "2026-01-01"),
            ("terms:deepseek/open-platform/2026-04-29", "2026-04-29"),
            ("MIT", None),
        ],
    )
    def test_dates_are_those_in_the_documents(self, registry: Registry, name: str, dated: str | None) -> None:
        record = registry.find(name)
        assert record is not None and record.effective == dated

    def test_a_date_in_an_id_is_the_records(self, registry: Registry) -> None:
        dated = [record for record in registry.records.values() if record.id.count("/") == 2]
        assert len(dated) == 14
        assert all(record.id.rpartition("/")[2] == record.effective for record in dated)

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("apache-2.0", "Apache-2.0"),
            ("mit", "MIT"),
            ("LLAMA3.3", "LicenseRef-scancode-llama-3.3-license-2024"),
            ("gemma", "LicenseRef-scancode-gemma-tou-2025-03-24"),
            ("bigscience-openrail-m", "LicenseRef-scancode-bigscience-open-rail-m"),
            ("cc-by-sa-4.0", "CC-BY-SA-4.0"),
            ("odc-by", "ODC-By-1.0"),
            (" other ", "NOASSERTION"),
            ("unknown", "NOASSERTION"),
        ],
    )
    def test_hub_ids_lead_to_records(self, registry: Registry, name: str, found: str) -> None:
        record = registry.find(name)
        assert record is not None and record.id == found

    def test_a_name_without_a_record_leads_nowhere(self, registry: Registry) -> None:
        assert registry.find("GPL-3.0-only") is None
        assert registry.of_provider("nobody-we-know") is None

    @pytest.mark.parametrize(
        ("provider", "terms"),
        [
            ("openai", "terms:openai/services-agreement/2026-01-01"),
            ("Anthropic", "terms:anthropic/commercial/2025-06-17"),
            ("google", "terms:google/gemini-api/2026-03-23"),
            ("gemini", "terms:google/gemini-api/2026-03-23"),
            ("deepseek", "terms:deepseek/open-platform/2026-04-29"),
            ("mistral", "terms:mistral/commercial/2026-08-05"),
            ("xai", "terms:xai/enterprise/2026-08-14"),
            ("meta", "terms:meta/model-api/2026-08-21"),
            ("perplexity", "terms:perplexity/api/2026-01-23"),
            ("qwen", "terms:alibaba/model-studio"),
            ("openrouter", "terms:openrouter/api"),
        ],
    )
    def test_an_apis_provider_leads_to_its_terms(self, registry: Registry, provider: str, terms: str) -> None:
        record = registry.of_provider(provider)
        assert record is not None and (record.id, record.kind) == (terms, "api_terms")

    def test_documents_that_come_together(self, registry: Registry) -> None:
        anthropic = registry.of_provider("anthropic")
        assert anthropic is not None
        assert [each.kind for each in registry.together(anthropic)] == ["api_terms", "policy"]

    def test_what_is_read_once_stays_read(self) -> None:
        assert load_registry().records["MIT"] is load_registry().records["MIT"]

    def test_the_hash_is_of_all_that_a_record_says(self, registry: Registry) -> None:
        record = registry.records["MIT"]
        assert TermRecord.model_validate(record.to_json()).sha256 == record.sha256
        assert record.model_copy(update={"note": "another"}).sha256 != record.sha256

    def test_reading_it_loads_nothing_heavy(self) -> None:
        code = "import sys, pipeline.terms.texts as texts, pipeline.terms.records as records\n"
        code += "texts.find_text('MIT', records.load_registry(), None); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {"torch", "pyarrow", "transformers", "datasets", "licensedcode"}.isdisjoint(done.stdout.split())

    def test_a_wheel_holds_records_texts_and_schema(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        (source / "pipeline/terms").mkdir(parents=True)
        for name in ("pyproject.toml", "README.md", "LICENSE", "pipeline/__init__.py", "pipeline/terms/__init__.py"):
            (source / name).write_bytes((ROOT / name).read_bytes())
        for folder in (BUILT_IN, TEXTS):
            (source / "pipeline/terms" / folder.name).symlink_to(folder)
        (source / "pipeline/terms" / SCHEMA.name).write_bytes(SCHEMA.read_bytes())
        code = f"import setuptools.build_meta as build; build.build_wheel({str(tmp_path)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
            held = {Path(name).name for name in wheel.namelist() if name.startswith("pipeline/terms/")}
        here = {path.name for folder in (BUILT_IN, TEXTS) for path in folder.iterdir()}
        assert here | {SCHEMA.name} <= held


class TestThePageAboutThem:
    def test_it_names_every_atom_trigger_and_kind(self) -> None:
        page = (ROOT / "docs/licenses.md").read_text("utf-8")
        names = [*get_args(RestrictionAtom), *get_args(ObligationAtom), *get_args(Trigger), *get_args(Kind)]
        assert len(names) == 18 + 11 + 6 + 5
        assert [name for name in names if f"`{name}`" not in page] == []

    def test_its_example_is_a_record(self, tmp_path: Path) -> None:
        page = (ROOT / "docs/licenses.md").read_text("utf-8")
        example = page.partition("```yaml\nid:")[2].partition("```")[0]
        (tmp_path / "example.yaml").write_text(f"id:{example}")
        registry = load_registry(tmp_path)
        assert registry.of_provider("example") is registry.find("acme-order-form") is not None


OWN = """\
id: LicenseRef-ours
aliases: [house-licence]
title: "House licence"
kind: model_license
retrieved: 2026-11-22
confidence: user_asserted
restrictions:
  - atom: no_train.competing
    value: us
    clause: "2"
    quote: "no rivals"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ours").mkdir()
    return tmp_path / "ours"


def refused(folder: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_registry(folder)
    return caught.value


class TestOwnRecords:
    def test_they_stand_beside_those_that_come_along(self, folder: Path, registry: Registry) -> None:
        (folder / "ours.yaml").write_text(OWN)
        own = load_registry(folder)
        found = own.find("House-Licence")
        assert found is not None and found.id == "LicenseRef-ours"
        assert set(own.records) == set(registry.records) | {"LicenseRef-ours"}
        assert registry.find("house-licence") is None

    @pytest.mark.parametrize(
        ("old", "new", "what", "line"),
        [
            ("kind: model_license", "knid: model_license", "unknown key; did you mean 'kind'", 4),
            ("no_train.competing", "no_train.competitors", "did you mean 'no_train.competing'", 8),
            ("clause:", "section:", "unknown key; valid here: atom, clause, conservative, quote, value", 10),
            ("    value: us\n", "", "the value of no_train.competing is a text", 8),
            ("value: us", "value: 7", "the value of no_train.competing is a text", 8),
            ("2026-11-22", "2026", "give a date", 5),
            ("user_asserted", "sure", "'sure' is not a valid value", 6),
            ("LicenseRef-ours", "has spaces", "signs .:/+_- without spaces", 1),
            ('"no rivals"', f'"{"word " * 41}"', "at most 40 words", 8),
            ("retrieved: 2026-11-22\n", "", "retrieved: is required", 1),
        ],
    )
    def test_a_mistake_is_named_with_its_line(self, folder: Path, old: str, new: str, what: str, line: int) -> None:
        (folder / "ours.yaml").write_text(OWN.replace(old, new))
        error = refused(folder)
        assert what in error.what
        assert error.where.startswith(f"{folder / 'ours.yaml'}") or f"ours.yaml:{line}" in error.what

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("a: [", "not valid YAML"),
            ("- one\n- two\n", "indented below"),
            ("", "indented below"),
            ("id: &a [x]\naliases: *a\n", "aliases are not used here"),
            ("a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n", "aliases are not used here"),
            ("id: A\nid: B\n", "duplicate key"),
            ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
            ("id: " + "[" * 5000, "nested too deeply"),
        ],
    )
    def test_what_is_no_document_is_refused_and_named(self, folder: Path, text: str, what: str) -> None:
        (folder / "bad.yaml").write_text(text)
        error = refused(folder)
        assert what in error.what
        assert "bad.yaml" in error.where

    @settings(max_examples=60, deadline=None)
    @given(noise=st.text(max_size=30), at=st.integers(0, len(OWN)), cut=st.integers(0, 20))
    def test_whatever_stands_in_the_file_is_a_record_or_a_users_mistake(
        self, tmp_path_factory: pytest.TempPathFactory, noise: str, at: int, cut: int
    ) -> None:
        folder = tmp_path_factory.mktemp("noise")
        (folder / "ours.yaml").write_bytes((OWN[:at] + noise + OWN[at + cut :]).encode("utf-8", "surrogatepass"))
        try:
            assert len(load_registry(folder).records) >= 65
        except UsageError as error:
            assert "ours.yaml" in f"{error.where}{error.what}"

    @pytest.mark.parametrize("name", ["nowhere", "empty"])
    def test_a_folder_without_records_is_a_mistake(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "empty").mkdir()
        assert str(tmp_path / name) in refused(tmp_path / name).where

    @pytest.mark.parametrize(
        "claim", ["id: mit", "aliases: [Apache-2.0]", "aliases: [LLAMA3.3]", "default_for: [OpenAI]"]
    )
    def test_a_name_that_is_taken_is_not_replaced_silently(self, folder: Path, claim: str) -> None:
        key = claim.partition(":")[0]
        rest = "\n".join(line for line in OWN.splitlines() if not line.startswith(f"{key}:"))
        (folder / "ours.yaml").write_text(f"{claim}\n{rest}\n")
        error = refused(folder)
        assert "two term records claim" in error.what and "registry" in error.what
        assert "replaces: true" in error.todo

    @pytest.mark.parametrize("name", ["unknown", "NOASSERTION", "Unknown", "noassertion"])
    @pytest.mark.parametrize("more", ["", "replaces: true\n"])
    def test_names_for_terms_that_nobody_knows_get_no_meaning(self, folder: Path, name: str, more: str) -> None:
        for claim in (OWN.replace("LicenseRef-ours", name), OWN.replace("house-licence", name)):
            (folder / "ours.yaml").write_text(claim + more)
            error = refused(folder)
            assert repr(name) in error.what and "nobody knows" in error.what and "ours.yaml" in error.where

    def test_it_is_replaced_where_that_is_said(self, folder: Path) -> None:
        own = OWN.replace("LicenseRef-ours", "MIT") + "replaces: true\ndefault_for: [openai]\n"
        (folder / "ours.yaml").write_text(own)
        registry = load_registry(folder)
        assert registry.records["MIT"].title == "House licence"
        assert len(registry.records) == 65
        assert registry.of_provider("openai") is registry.records["MIT"]
        assert registry.find("terms:openai/services-agreement/2026-01-01") is not None

    def test_what_is_replaced_is_gone_under_all_its_names(self, folder: Path) -> None:
        (folder / "ours.yaml").write_text(OWN.replace("LicenseRef-ours", LLAMA.lower()) + "replaces: true\n")
        registry = load_registry(folder)
        assert registry.find(LLAMA) is registry.find("house-licence")
        assert registry.find("llama3.3") is None
        assert len(registry.records) == 65

    def test_what_included_it_includes_the_one_in_its_place(self, folder: Path) -> None:
        (folder / "ours.yaml").write_text(OWN.replace("LicenseRef-ours", "cc-by-nc-4.0") + "replaces: true\n")
        registry = load_registry(folder)
        cohere = registry.find("LicenseRef-cohere-labs-cc-by-nc")
        assert cohere is not None and [each.title for each in registry.together(cohere)][1:] == ["House licence"]

    def test_two_of_ones_own_never_share_a_name(self, folder: Path) -> None:
        (folder / "a.yaml").write_text(OWN + "replaces: true\n")
        (folder / "b.yaml").write_text(OWN + "replaces: true\n")
        error = refused(folder)
        assert "a.yaml" in error.what and "b.yaml" in error.where

    def test_includes_that_lead_nowhere_or_back_are_refused(self, folder: Path) -> None:
        (folder / "a.yaml").write_text(OWN + "includes: [LicenseRef-b]\n")
        assert "the name of no record" in refused(folder).what
        other = OWN.replace("LicenseRef-ours", "LicenseRef-b").replace("house-licence", "b")
        (folder / "b.yaml").write_text(other + "includes: [LicenseRef-ours]\n")
        error = refused(folder)
        assert "LicenseRef-ours > LicenseRef-b > LicenseRef-ours" in error.what
        assert "a.yaml" in error.where


LLAMA, GEMMA = "LicenseRef-scancode-llama-3.3-license-2024", "LicenseRef-scancode-gemma-tou-2025-03-24"
OPENAI = "terms:openai/services-agreement/2026-01-01"


class TestExpressions:
    @pytest.mark.parametrize(
        ("expression", "alternatives"),
        [
            ("mit", {("MIT",)}),
            ("MIT AND llama3.3", {(LLAMA, "MIT")}),
            ("MIT or apache-2.0", {("Apache-2.0",), ("MIT",)}),
            ("gemma AND (MIT OR Apache-2.0)", {("Apache-2.0", GEMMA), (GEMMA, "MIT")}),
            ("MIT AND (MIT OR mit)", {("MIT",)}),
            (f"{OPENAI} AND MIT", {("MIT", OPENAI)}),
            ("gpl-3.0-only", {("GPL-3.0-only",)}),
            ("GPL-2.0-only WITH Classpath-exception-2.0", {("GPL-2.0-only WITH Classpath-exception-2.0",)}),
            ("Apache-2.0 WITH LLVM-exception", {("Apache-2.0 WITH LLVM-exception",)}),
            ("LicenseRef-nobodys OR MIT", {("LicenseRef-nobodys",), ("MIT",)}),
            ("Some Company's Own Terms", {("Some Company's Own Terms",)}),
            ("((", {("((",)}),
            ("unknown", {("NOASSERTION",)}),
            ("", {("unknown",)}),
            ("(" * 3000, {("unknown",)}),
            ("() GPL-2.0", {("() GPL-2.0",)}),
            ("( and or-later", {("( and or-later",)}),
        ],
    )
    def test_alternatives(self, registry: Registry, expression: str, alternatives: set[tuple[str, ...]]) -> None:
        assert set(resolve(expression, registry, {})) == alternatives

    @pytest.mark.parametrize("key", ["MIT OR Apache-2.0", "apache-2.0 or mit", "(MIT) OR (Apache-2.0)"])
    def test_a_choice_holds_however_it_is_written_and_wherever_the_or_stands(
        self, registry: Registry, key: str
    ) -> None:
        assert resolve("Apache-2.0 OR MIT", registry, {key: "mit"}) == (("MIT",),)
        assert resolve("gemma AND (MIT OR Apache-2.0)", registry, {key: "mit"}) == ((GEMMA, "MIT"),)
        assert len(resolve("MIT OR CC0-1.0", registry, {key: "mit"})) == 2

    @pytest.mark.parametrize("taken", ["gemma", "MIT AND Apache-2.0", "MIT OR Apache-2.0"])
    def test_a_choice_that_is_none_of_them_is_refused(self, registry: Registry, taken: str) -> None:
        with pytest.raises(UsageError) as caught:
            resolve("MIT", registry, {"MIT OR Apache-2.0": taken})
        assert "none of the alternatives" in caught.value.what
        assert caught.value.where == "policy.choose: MIT OR Apache-2.0"

    def test_an_expression_that_grows_without_bound_is_refused(self, registry: Registry) -> None:
        assert len(resolve(" AND ".join(f"(a{n} OR b{n})" for n in range(6)), registry, {})) == 64
        with pytest.raises(UsageError, match="more than 64"):
            resolve(" AND ".join(f"(a{n} OR b{n})" for n in range(7)), registry, {})


class TestCommands:
    def test_the_list_names_every_record(self, capsys: pytest.CaptureFixture[str], registry: Registry) -> None:
        assert cli.main(["licenses", "list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines[:-1]} == set(registry.records)
        assert "not legal advice" in lines[-1]

    def test_the_list_for_scripts(self, capsys: pytest.CaptureFixture[str], registry: Registry) -> None:
        assert cli.main(["licenses", "list", "--json"]) == 0
        told = {each["id"]: each["sha256"] for each in json.loads(capsys.readouterr().out)}
        assert told == {record.id: record.sha256 for record in registry.records.values()}

    def test_one_record_with_its_quotes_and_its_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["licenses", "show", "llama3.3"]) == 0
        shown = words(capsys.readouterr().out)
        assert "name_prefix = Llama, once: distribute_model_trained_on_outputs" in shown
        assert "1.b.i:" in shown and "(unsettled)" in shown and "the text that was read" in shown

    def test_a_provider_is_a_name_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["licenses", "show", "anthropic", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["together_with"] == ["terms:anthropic/usage-policy/2026-11-12"]
        assert told["text"] is None

    def test_ones_own(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "ours.yaml").write_text(OWN)
        (folder / "LicenseRef-ours.txt").write_text("No rivals.")
        given = ["--registry", str(folder), "--texts", str(folder)]
        assert cli.main(["licenses", "show", "house-licence", *given]) == 0
        assert "folder policy.texts" in capsys.readouterr().out

    def test_a_name_that_nobody_knows_exits_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["licenses", "show", "nobodys"]) == 2
        assert "licenses list" in capsys.readouterr().err

    def test_the_schema_is_the_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["licenses", "schema"]) == 0
        assert capsys.readouterr().out == SCHEMA.read_text("utf-8")
