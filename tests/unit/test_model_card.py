"""The card of a student says what was meant, whatever the names in it are, and never names a licence by default."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stages.train.model_card import DatasetFacts, ModelCard, front_matter, is_hub_id, render_card
from pipeline.terms.statement import Source
from pipeline.terms.verdict import Due, Verdict
from pipeline.text.markdown import split_front_matter

NASTY = "x | y\n---\nlicense: mit\n# <script>alert(1)</script> ``` [a](javascript:x) \u202egnp.exe"


def a_due(atom: str, text: str, trigger: str, title: str, clause: str, quote: str, conservative: bool = False) -> Due:
    return Due(atom, text, trigger, "record", title, clause, quote, ("teacher:main",), conservative)


def a_verdict(outcome: Any, warning: str) -> Verdict:
    return Verdict("train", outcome, (), (), (warning,), (), (), ())


PREFIX = a_due("name_prefix", "Llama", "distribute_model_trained_on_outputs", "LLAMA 3.3", "1.b.i", "include Llama")
DISPLAY = a_due("display", "Built with Llama", "distribute_licensed_material", "LLAMA 3.3", "1.b.i", "display", True)
CARD = ModelCard(
    name="Llama-pupil",
    base=("org/base-1b", "local-folder name", "org/older"),
    base_revision="abc",
    license={"license": "other", "license_name": "llama3.3", "license_link": "LICENSES.md"},
    sources=(Source("teacher", "main", "meta/llama", ("llama3.3",)),),
    dataset=DatasetFacts("Sums", "a" * 64, "b" * 64, 12_345, ("me/sums",)),
    intended_use="research",
    release="public",
    verdict=a_verdict("allow_with_obligations", "override LG-012 holds until 2027-01-01"),
    duties=(PREFIX, DISPLAY),
    command="python -m pipeline run configs/x.yaml --set train.epochs=2",
    training={"rows": 12_000, "steps": 99, "tuning": "lora", "learning rate": 2e-05},
)


def rendered(card: ModelCard) -> tuple[Any, str]:
    return split_front_matter(render_card(card))


def test_the_front_matter_is_what_the_hub_reads() -> None:
    meta, _ = rendered(CARD)
    assert meta == {
        "license": "other",
        "license_name": "llama3.3",
        "license_link": "LICENSES.md",
        "base_model": ["org/base-1b", "org/older"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["me/sums"],
        "tags": ["distillation", "synthetic", "trl", "sft"],
    }


def test_the_hub_library_reads_the_card(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: the extra `train` installs it")
    (tmp_path / "README.md").write_text(render_card(CARD), "utf-8")
    assert hub.ModelCard.load(tmp_path / "README.md").data.to_dict() == front_matter(CARD)


def test_names_notices_hashes_and_the_command_are_told() -> None:
    _, body = rendered(CARD)
    assert body.startswith("\n# Llama\\-pupil\n\n**Built with Llama**\n")
    assert "must begin with: Llama." in body
    assert "a" * 64 in body and "b" * 64 in body and "12,345 rows" in body
    assert "```text\npython -m pipeline run configs/x.yaml --set train.epochs=2\n```" in body
    assert "allow\\_with\\_obligations" in body and "override LG\\-012" in body
    assert "not legal advice" in body and "| steps | 99 |" in body
    assert "(to be on the safe side)" in body and "local\\-folder name" in body


def test_what_is_absent_is_left_out() -> None:
    card = replace(CARD, verdict=None, duties=(), base=("a folder",), base_revision=None)
    meta, body = rendered(replace(card, dataset=replace(CARD.dataset, hub_ids=())))
    assert not {"base_model", "datasets"} & set(meta)
    assert "Nobody judged" in body and "must begin" not in body and "Built with" not in body


@pytest.mark.parametrize("fields", [{}, {"license": ""}, {"license_name": "x"}])
def test_no_licence_is_never_a_default(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no licence"):
        render_card(replace(CARD, license=fields))


def everywhere(text: str) -> ModelCard:
    """A card in which every free text is `text`."""
    return ModelCard(
        name=text,
        base=(text,),
        base_revision=text,
        license={"license": "other", "license_name": text},
        sources=(Source(cast(Any, text), text, text, (text,)),),
        dataset=DatasetFacts(text, "a" * 64, "b" * 64, 1, (text,)),
        intended_use=text,
        release=text,
        verdict=a_verdict(text, text),
        duties=(a_due("display", text, text, text, text, text), a_due("name_prefix", text, text, text, text, text)),
        command=text,
        training={text: text, "steps": 1},
    )


def test_nothing_that_others_wrote_acts_as_markup() -> None:
    meta, body = rendered(everywhere(NASTY))
    assert (meta["license"], meta["license_name"]) == ("other", NASTY)
    outside = "".join(body.split("````text\n")[::2][:1] + body.split("\n````\n")[1:])
    assert "<script>" not in outside and "](javascript" not in outside
    assert "\u202e" not in body
    assert "\n---\n" not in outside and "\nlicense:" not in outside


@given(text=st.text(max_size=60))
def test_any_text_leaves_front_matter_and_headings_intact(text: str) -> None:
    meta, body = rendered(everywhere(text))
    assert meta["license"] == "other" and set(meta) <= {*front_matter(everywhere(text))}
    for heading in ("## What it was made from", "## Licence", "## How it was trained", "## Limits"):
        assert body.count(f"\n{heading}\n") == 1
    assert yaml.safe_load(render_card(everywhere(text)).split("\n---\n")[0][4:]) == meta


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("org/model", True), ("gpt2", True), ("./student", False), ("a/b/c", False), ("a b", False), ("a--b/c", False),
     ("../x", False), ("", False), ("org/model\nlicense: mit", False)],
)  # fmt: skip
def test_hub_ids(name: str, is_one: bool) -> None:
    assert is_hub_id(name) is is_one
