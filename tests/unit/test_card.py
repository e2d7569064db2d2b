"""The card says what was meant, whatever the names in the data are."""

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.record import RECORD_SCHEMA, to_table
from pipeline.stages.dataset.card import SIZES, front_matter, write_card
from pipeline.stages.dataset.census import Census
from pipeline.stages.dataset.facts import Facts
from pipeline.stages.dataset.upstream import Passed
from pipeline.terms.bind import sources_there
from pipeline.terms.notices import DISCLAIMER, license_fields, notices_of
from pipeline.terms.policy import judge
from pipeline.terms.records import load_registry
from pipeline.terms.statement import Source, Statement
from pipeline.text.markdown import escape_markdown, split_front_matter
from tests.examples import examples
from tests.support import POLICY, a_record

NASTY = "x | y\n---\nlicense: mit\n# <script>alert(1)</script> `code` [a](javascript:x) ![i](http://t/p) \u202egnp"
PUBLIC = {"intended_use": "commercial", "release": {"dataset": "public", "model": "public"}}


def census_of(*rows: dict[str, Any]) -> Census:
    census = Census()
    census.add(to_table(RECORD_SCHEMA, [a_record(**changes) for changes in rows or ({},)]))
    return census


def facts_of(
    census: Census | None = None,
    *declared: Source,
    title: str = "Title",
    policy: dict[str, Any] = POLICY,
    passed: tuple[Passed, ...] = (),
    hub_ids: dict[str, str] | None = None,
    replayed: tuple[str, ...] = (),
    descriptions: tuple[tuple[str, str], ...] = (),
) -> Facts:
    counted = census_of() if census is None else census
    statement = Statement(declared or (Source("teacher", "tiny", "org/tiny", ("MIT",)),), counted.row_sets)
    meant, registry = PolicyConfig.model_validate(policy), load_registry()
    verdict = judge(statement, meant, registry, gate="dataset", today=date(2026, 11, 23))
    return Facts(
        title=title,
        content="c" * 64,
        census=counted,
        statement=statement,
        there=sources_there(statement),
        descriptions=descriptions,
        hub_ids=hub_ids or {},
        replayed=frozenset(replayed),
        policy=meant,
        verdict=verdict,
        notices=notices_of(statement, verdict.obligations, registry, meant, escape_markdown),
        passed=passed,
        near_test=0,
    )


def written(folder: Path, facts: Facts) -> tuple[Any, str]:
    """Front matter and body."""
    write_card(folder / "README.md", facts)
    return split_front_matter((folder / "README.md").read_text("utf-8"))


def hostile(text: str) -> Facts:
    """Facts in which every free text is `text`; a licence has a name of its own, which cannot hold control signs."""
    name = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200] or "unknown"
    census = census_of({"prompt_set": text, "teacher": text, "task": text, "license_set": (name,)})
    sources = [Source(role, text, text, (name,), text, {"revision": text}) for role in ("teacher", "prompt")]  # type: ignore[arg-type]
    passed = (Passed(text, 2, 1, {text: 1}),)
    return facts_of(census, *sources, title=text, passed=passed, hub_ids={text: text}, descriptions=((text, text),))


class TestHostileNames:
    def test_nothing_in_the_data_acts_as_markup(self, tmp_path: Path) -> None:
        meta, body = written(tmp_path, hostile(NASTY))
        assert (meta["license"], "extended" in str(meta)) == ("other", False)
        assert "<script>" not in body and "\u202e" not in body and "](javascript" not in body and "![" not in body
        assert not any(line.startswith(("---", "license")) for line in body.splitlines())
        bare = [re.sub(r"\\.", "", line) for line in body.splitlines()]
        assert {line.count("|") for line in bare if line.startswith("|")} <= {3, 4, 5, 7, 8}
        assert sum(line.startswith("#") for line in bare) == 9

    @examples(60)
    @given(text=st.text(max_size=60) | st.sampled_from(["---", "```", "<b>", "|", "license: mit", "\n---\n", NASTY]))
    def test_any_text_leaves_front_matter_and_headings_intact(
        self, tmp_path_factory: pytest.TempPathFactory, text: str
    ) -> None:
        facts = hostile(text)
        meta, body = written(tmp_path_factory.mktemp("card"), facts)
        assert meta == front_matter(facts)
        assert meta["license"] in {"other", "mit"} and set(meta) >= {"pretty_name", "configs", "size_categories"}
        assert meta["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
        assert body.count("\n## Columns\n") == 1 and body.endswith(f"{DISCLAIMER}\n")

    @given(st.text())
    def test_escaped_text_is_one_line_without_bare_specials(self, text: str) -> None:
        escaped = escape_markdown(text)
        assert len(escaped.splitlines()) <= 1
        bare = escaped.replace("\\\\", "").split("\\")
        assert not set("|<>`[]*_") & set(bare[0])
        assert not any(set("|<>`[]*_") & set(part[1:]) for part in bare[1:])


class TestTheLicence:
    @pytest.mark.parametrize(
        ("licenses", "fields"),
        [
            ({"MIT"}, {"license": "mit"}),
            ({"Apache-2.0", "MIT"}, {"license": "other", "license_name": "apache-2.0-and-mit"}),
            ({"unknown"}, {"license": "other", "license_name": "unknown"}),
            ({"MIT OR Apache-2.0"}, {"license": "other", "license_name": "mit-or-apache-2.0"}),
            ({"terms:openai/x"}, {"license": "other", "license_name": "terms-openai-x"}),
        ],
    )
    def test_it_is_an_id_of_the_hub_only_where_all_rows_are_under_it(
        self, licenses: set[str], fields: dict[str, str]
    ) -> None:
        link = {"license_link": "LICENSES.md"} if fields["license"] == "other" else {}
        assert license_fields(licenses) == {**fields, **link}

    def test_no_rows_have_no_licence(self) -> None:
        assert license_fields(set())["license_name"] == "unknown"

    def test_very_many_have_a_name_of_fixed_length(self) -> None:
        many = {f"LicenseRef-number-{at}" for at in range(30)}
        name = license_fields(many)["license_name"]
        assert re.fullmatch(r"mixed-[0-9a-f]{8}", name)
        assert name != license_fields({*many, "MIT"})["license_name"]


class TestWhoWroteIt:
    def test_a_model_that_was_asked_makes_it_synthetic(self) -> None:
        meta = front_matter(facts_of())
        assert meta["annotations_creators"] == ["machine-generated"] and meta["tags"] == ["synthetic", "distillation"]
        assert meta["language_creators"] == ["found", "machine-generated"]

    def test_answers_that_existed_are_found_and_their_origin_is_told(self, tmp_path: Path) -> None:
        people = Source("teacher", "tiny", "written by people of GSM8K", ("MIT",))
        meta, body = written(tmp_path, facts_of(None, people, replayed=("tiny",)))
        assert meta["annotations_creators"] == ["found"] and "tags" not in meta
        assert "written by people of GSM8K (completions that existed before)" in body
        assert "Completions are a model's" not in body

    def test_of_both_both_are_said(self) -> None:
        census = census_of({}, {"teacher": "people", "row_id": "1" * 32})
        sources = (Source("teacher", "tiny", "org/tiny", ("MIT",)), Source("teacher", "people", "p", ("MIT",)))
        meta = front_matter(facts_of(census, *sources, replayed=("people",)))
        assert meta["annotations_creators"] == ["found", "machine-generated"] and "synthetic" in meta["tags"]

    def test_prompts_from_the_hub_are_named(self) -> None:
        hub_ids = {"set": "openai/gsm8k", "unused": "org/other"}
        assert front_matter(facts_of(hub_ids=hub_ids))["source_datasets"] == ["extended|openai/gsm8k"]
        assert "source_datasets" not in front_matter(facts_of())


class TestTheBody:
    LLAMA = Source("teacher", "tiny", "meta-llama/Llama-3.3-70B-Instruct", ("llama3.3",), "llama")

    def test_obligations_are_ready_to_paste(self, tmp_path: Path) -> None:
        census = census_of({"license_set": ("MIT", "llama3.3")})
        prompts = Source("prompt", "set", "prompts", ("MIT",))
        _, body = written(tmp_path, facts_of(census, self.LLAMA, prompts, policy=PUBLIC))
        assert "Verdict: **allow with obligations**." in body
        assert "\n- Built with Llama\n" in body and "| begin the model's name with | Llama |" in body

    def test_restrictions_stay_in_sight(self, tmp_path: Path) -> None:
        _, body = written(
            tmp_path, facts_of(census_of({"license_set": ("unknown",)}), Source("teacher", "tiny", "?", ("unknown",)))
        )
        assert "LG\\-001" in body and "unknown terms were let through (`allow_unknown`)" in body

    @pytest.mark.parametrize(("policy", "how"), [(PUBLIC, "judged for handing the data set out only"),
                                                 (POLICY, "not judged")])  # fmt: skip
    def test_what_the_policy_leaves_out_is_said_and_not_taken_for_free(
        self, tmp_path: Path, policy: dict[str, Any], how: str
    ) -> None:
        if policy is POLICY:
            policy = {**POLICY, "release": {"dataset": "none", "model": "none"}}
        facts = facts_of(policy={**policy, "roles_that_train": ["student_base"]})
        _, body = written(tmp_path, facts)
        assert "No restriction is known" not in body
        assert how in body and "policy.roles\\_that\\_train has no teacher" in body
        assert how in facts.notices.files["LICENSES.md"]
        _, body = written(tmp_path, facts_of())
        assert "Not judged" not in body

    def test_the_funnel_adds_up_in_print(self, tmp_path: Path) -> None:
        _, body = written(tmp_path, facts_of(passed=(Passed("filter", 1200, 1000, {"too_long": 150, "empty": 50}),)))
        assert "| filter | 1,200 | 1,000 | 50 empty, 150 too\\_long |" in body

    @pytest.mark.parametrize(
        ("counts", "said"),
        [
            ((None,), None),
            ((0,), "0 completion tokens by the teacher's count."),
            ((3, 1500), "1,503 completion tokens by the teacher's count."),
            ((2, None, 3), "5 completion tokens by the teacher's count, in the 2 rows that have one."),
        ],
    )
    def test_tokens_are_named_only_where_the_teacher_counted(
        self, tmp_path: Path, counts: tuple[int | None, ...], said: str | None
    ) -> None:
        _, body = written(tmp_path, facts_of(census_of(*({"completion_tokens": count} for count in counts))))
        assert "completion tokens by" not in body if said is None else said in body
        assert "\n\n\n" not in body


def test_size_categories() -> None:
    facts = facts_of()
    found = []
    for rows in [limit - 1 for limit, _ in SIZES] + [SIZES[-1][0]]:
        facts.census.splits["train"] = rows
        found += front_matter(facts)["size_categories"]
    assert found == [name for _, name in SIZES] + ["100M<n<1B"]


class TestTheHubLibrary:
    """`RepoCard.validate` asks the hub, so offline there is what its data class checks and what it writes back."""

    @pytest.mark.parametrize("title", ["Sums", NASTY])
    def test_it_reads_the_card_and_writes_the_same_back(self, tmp_path: Path, title: str) -> None:
        hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: the extra `train` installs it")
        facts = facts_of(title=title, hub_ids={"set": "openai/gsm8k"})
        write_card(tmp_path / "README.md", facts)
        read = hub.DatasetCard.load(tmp_path / "README.md")  # raises on a field that it knows to be wrong
        assert read.data.to_dict() == front_matter(facts)
        again = hub.DatasetCard(str(read))
        assert again.data.to_dict() == read.data.to_dict() and again.text == read.text
        known = vars(hub.DatasetCardData())
        assert {*front_matter(facts)} - {*known} <= {"tags", "configs", "license_name", "license_link"}
