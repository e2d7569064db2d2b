"""What a student's card says of its base and of the command that made it."""

from pathlib import Path

import pytest

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_train import StudentModel
from pipeline.stages.train.card import student_card, without_paths
from pipeline.stages.train.model_card import DatasetFacts, front_matter
from pipeline.terms.declared import declared_student, source_of
from pipeline.terms.training import judge_dataset, today
from tests.support import POLICY


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("x.yaml --data /home/me/data --force", "x.yaml --force"),
        ("/home/me/x.yaml", "x.yaml"),
        ("x.yaml --set a.path=/home/me/r.jsonl", "x.yaml --set a.path=r.jsonl"),
        ("x.yaml --set 'a=~/r s'", "x.yaml --set 'a=r s'"),
        ("x.yaml --data=/home/me/data", "x.yaml"),
        ("../../x.yaml --set a=../jane/r", "x.yaml --set a=r"),
        ("configs/../../x.yaml --set a=~jane", "x.yaml --set 'a=~'"),
        ("x.yaml --set=a=/home/me/b=c/r", "x.yaml --set=a=b=c/r"),
        ("x.yaml --set 'a=[/home/jane roe/x, {path: ~/y}]'", "x.yaml --set 'a=[x, {path: y}]'"),
        ("x.yaml --set a=file:///home/me/x", "x.yaml --set a=x"),
        ("configs/x.yaml --set train.epochs=3", "configs/x.yaml --set train.epochs=3"),
    ],
)
def test_a_command_is_told_without_the_places_of_one_machine(typed: str, shown: str) -> None:
    assert without_paths(f"python -m pipeline run {typed}") == f"python -m pipeline run {shown}"


def test_an_ancestor_that_is_a_folder_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "sft").mkdir(parents=True)
    ancestors = {"/home/jane/base": "MIT", "out/sft": "MIT", "org/older": "MIT"}
    student = StudentModel.model_validate({"model": "org/base", "revision": "r", "base_models": ancestors})
    policy = PolicyConfig.model_validate(POLICY)
    judged = judge_dataset(tmp_path, source_of(declared_student(student)), policy, "train", today())
    facts = DatasetFacts("t", "0" * 64, "1" * 64, 3)
    card = student_card("s", student, policy, judged, facts, {"rows": 3}, "x")
    assert card.base == ("org/base", "base (a folder)", "sft (a folder)", "org/older")
    assert front_matter(card)["base_model"] == ["org/base", "org/older"]


@pytest.mark.parametrize(("is_local", "named"), [(True, None), (False, ["org/base"])])
def test_a_folder_is_no_model_of_the_hub(tmp_path: Path, is_local: bool, named: list[str] | None) -> None:
    given = {"model": str(tmp_path / "base")} if is_local else {"model": "org/base", "revision": "r"}
    student = StudentModel.model_validate(given)
    policy = PolicyConfig.model_validate(POLICY)
    judged = judge_dataset(tmp_path, source_of(declared_student(student)), policy, "train", today())
    facts = DatasetFacts("t", "0" * 64, "1" * 64, 3)
    card = student_card("s", student, policy, judged, facts, {"rows": 3}, "python -m pipeline run x.yaml")
    assert front_matter(card).get("base_model") == named
    assert str(tmp_path) not in str(card)
