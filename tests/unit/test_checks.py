"""What is checked before the first step: model folders by the names of their files, and nothing that is not needed."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_train import StudentModel
from pipeline.core.errors import UsageError
from pipeline.core.lineage import Manifest
from pipeline.core.load import load_config
from pipeline.core.stage import Json, Result
from pipeline.runner.checks import check_before_start, check_model, check_test_rows, warn_of_refusal
from pipeline.runner.doctor.needs import check_training_needs
from pipeline.runner.session import Session, open_session
from pipeline.runner.steps import plan_steps
from tests.support import pretend_trainable, write_project

WHOLE = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
API: dict[str, Any] = {
    "teachers": {
        "api": {
            "kind": "openai",
            "base_url": "https://api.example/v1",
            "provider": "example",
            "model": "m",
            "api_key": "${env:EXAMPLE_KEY}",
        }
    },
    "generate": {"teacher": "api"},
}


def a_folder(path: Path, *names: str) -> StudentModel:
    """A model folder that holds files of these names."""
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_text("{}", "utf-8")
    return StudentModel(model=str(path.absolute()))


def lack(model: StudentModel, **more: bool) -> str:
    """What a model folder is refused for."""
    with pytest.raises(UsageError) as caught:
        check_model(model, "run.yaml: student.model", **more)
    assert caught.value.where == f"run.yaml: student.model: {model.folder}"
    return caught.value.what


class TestModels:
    def test_a_whole_one_passes(self, tmp_path: Path) -> None:
        check_model(a_folder(tmp_path, *WHOLE), "here")

    @pytest.mark.parametrize(
        ("missing", "what"),
        [
            ("config.json", "the model folder has no config.json"),
            ("model.safetensors", "the model folder has no weights"),
            ("tokenizer.json", "the model folder has no tokenizer"),
            ("chat_template.jinja", "the model folder has no chat template"),
        ],
    )
    def test_what_is_missing_is_named(self, tmp_path: Path, missing: str, what: str) -> None:
        assert lack(a_folder(tmp_path, *(name for name in WHOLE if name != missing))) == what

    @pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "merges.txt", "cl100k.tiktoken", "spiece.model"])
    def test_tokenizers_of_other_kinds_count(self, tmp_path: Path, name: str) -> None:
        names = [name if each == "tokenizer.json" else each for each in WHOLE]
        check_model(a_folder(tmp_path, *names), "here")

    def test_older_weights_count(self, tmp_path: Path) -> None:
        check_model(a_folder(tmp_path, "config.json", "pytorch_model.bin", *WHOLE[2:]), "here")

    def test_a_template_inside_the_tokenizers_settings_counts_unless_it_is_empty(self, tmp_path: Path) -> None:
        model = a_folder(tmp_path, *WHOLE[:3])
        for text, passes in (('{"chat_template": "x"}', True), ('{"chat_template": null}', False), ("[", False)):
            (tmp_path / "tokenizer_config.json").write_text(text, "utf-8")
            if passes:
                check_model(model, "here")
            else:
                assert lack(model) == "the model folder has no chat template"

    def test_a_template_from_elsewhere_is_enough(self, tmp_path: Path) -> None:
        check_model(a_folder(tmp_path, *WHOLE[:3]), "here", own_template=True)

    def test_a_file_is_no_model_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert lack(StudentModel(model=str(tmp_path / "file"))) == "not a folder"

    def test_a_hub_model_is_not_looked_at(self) -> None:
        check_model(StudentModel(model="org/model", revision="abc"), "here")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project as current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def session(project: Path, **sections: Any) -> Session:
    return open_session(load_config(write_project(project, **sections)), Path("data"), quiet=True)


def up_to(name: str) -> list[Any]:
    steps = plan_steps()
    return steps[: [step.name for step in steps].index(name) + 1]


class TestOnlyWhatIsNeeded:
    def test_no_student_before_training(self, project: Path) -> None:
        check_before_start(session(project), up_to("dataset"))
        with pytest.raises(UsageError, match="no weights"):
            check_before_start(session(project), up_to("train"))

    def test_no_key_before_the_teacher_is_asked(self, project: Path) -> None:
        check_before_start(session(project, **API), up_to("prompts"))
        with pytest.raises(UsageError, match="EXAMPLE_KEY is not set"):
            check_before_start(session(project, **API), up_to("generate"))

    def test_a_key_that_is_set_is_not_looked_at(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EXAMPLE_KEY", "x")
        check_before_start(session(project, **API), up_to("generate"))

    def test_where_answers_are_stored_a_missing_key_is_a_warning(
        self, project: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (project / "data" / "responses" / "answers").mkdir(parents=True)
        (project / "data" / "responses" / "answers" / "x.parquet").touch()
        with caplog.at_level(logging.WARNING, "pipeline"):
            check_before_start(session(project, **API), up_to("generate"))
        assert "EXAMPLE_KEY is not set: only what is answered already can be used" in caplog.text

    @pytest.mark.parametrize(
        ("sections", "where", "install"),
        [
            ({"train": {"trackers": ["wandb"]}}, "train.trackers", "pip install wandb"),
            ({"train": {"tuning": {"kind": "qlora"}}}, "train.tuning", "pip install bitsandbytes"),
            ({"train": {"liger": True}}, "train.liger", "pip install liger-kernel"),
            ({"train": {"attention": "flash_attention_2"}}, "train.attention", "pip install flash-attn"),
            (
                {"student": {"model": "./student", "init": {"from_teacher_layers": [0, 7]}}},
                "student.init.from_teacher_layers",
                "name layers from 0 to 3",
            ),
        ],
    )
    def test_what_training_would_refuse_is_said_before_the_teacher_is_asked(
        self, project: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], where: str, install: str
    ) -> None:
        for module in ("wandb", "bitsandbytes", "liger_kernel", "flash_attn"):
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        train = {"accelerate": "accelerate.yaml", **sections.pop("train", {})}
        loaded = session(project, train=train, **sections)
        pretend_trainable(project)
        (project / "student" / "config.json").write_text('{"num_hidden_layers": 4}', "utf-8")
        check_before_start(loaded, up_to("dataset"))
        with pytest.raises(UsageError) as caught:
            check_before_start(loaded, up_to("train"))
        assert caught.value.where.startswith(f"{loaded.loaded.path}: {where}")
        assert caught.value.todo.startswith(install)
        assert caught.value.todo.endswith("; or stop before the training: --until dataset")
        assert [each.state for each in check_training_needs(loaded.loaded.config)] == ["fail"]

    def test_what_training_needs_and_is_there_passes(self, project: Path) -> None:
        loaded = session(project, train={"accelerate": "accelerate.yaml", "trackers": ["tensorboard"]})
        pretend_trainable(project)
        check_before_start(loaded, up_to("train"))
        assert [*check_training_needs(loaded.loaded.config)] == []

    def test_nothing_is_made(self, project: Path) -> None:
        check_before_start(session(project), up_to("dataset"))
        assert not (project / "data").exists()

    def test_plan_warns_of_what_run_would_refuse(self, project: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "pipeline"):
            warn_of_refusal(session(project))
        assert "run would refuse to start: there is no test split to evaluate on" in caplog.text


def prompts_of(splits: Json) -> Manifest:
    result = Result(3, 3, {}, "c" * 64, {"splits": splits})
    return Manifest.of("prompts", "k" * 64, {}, result, {})


class TestTestRows:
    @pytest.mark.parametrize("splits", [{"train": 3}, {"train": 3, "test": 0}])
    def test_none_is_refused_where_an_evaluation_follows(self, project: Path, splits: Json) -> None:
        with pytest.raises(UsageError, match="none of 3 prompts is in the test split"):
            check_test_rows(session(project), plan_steps(), prompts_of(splits))

    def test_none_is_fine_without_one(self, project: Path) -> None:
        check_test_rows(session(project), up_to("train"), prompts_of({"train": 3}))

    def test_one_is_enough(self, project: Path) -> None:
        check_test_rows(session(project), plan_steps(), prompts_of({"train": 2, "test": 1}))
