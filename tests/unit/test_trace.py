"""`trace`: a model is found by its bytes wherever it was copied to, and its story goes back to every source."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.core.lineage import DigestCache, Manifest, file_sha256, path_digest, step_key
from pipeline.core.runs import link_artefact
from pipeline.core.stage import Result
from pipeline.core.store import MANIFEST, Store
from tests.support import logger_is_restored, write_project

FOLDER = Path("data/runs/small")
Trace = Callable[..., Any]


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project as current folder that has run up to `dataset`, with two made-up trainings and an evaluation."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    with logger_is_restored():
        assert cli.main(["run", "run.yaml", "--until", "dataset"]) == 0
    add_training("other", linked=False)
    add_training("weights", linked=True)
    add_evaluation()
    return tmp_path


def content_of(step: str) -> str:
    return Manifest.read(FOLDER / step / MANIFEST).content


def add_training(weights: str, *, linked: bool) -> None:
    """Commit a model as `train` does, with everything that `train` says of it."""
    config = {"train": {"epochs": 3.0, "seed": 0}, "student": {"model": "tiny/base", "base_models": {"a/b": "MIT"}}}
    parts: Any = {"stage": "train", "config": config, "files": {}, "inputs": {"dataset": content_of("dataset")}}
    parts["files"]["student.model"] = f"of {weights}"
    store = Store(Path("data/store"))
    with store.staging("train") as staged:
        (staged / "model").mkdir()
        (staged / "model" / "model.safetensors").write_bytes(weights.encode())
        (staged / "model" / "config.json").write_text("{}", "utf-8")
        content = path_digest(staged / "model", DigestCache(Path("none.json")))
        student: Any = {"model": "tiny/base", "revision": "7", "license": "Apache-2.0"}
        result = Result(12, 12, {}, content, {"steps": 9, "student": student})
        artefact = store.commit(staged, Manifest.of("train", step_key(parts), parts, result, {}))
    if linked:
        link_artefact(FOLDER, "train", artefact)


def add_evaluation() -> None:
    parts: Any = {"stage": "evaluate", "inputs": {"train": content_of("train"), "prompts": content_of("prompts")}}
    metrics: Any = {"metric": "exact", "n": 4, "retained": 0.5, "student": {"accuracy": 0.25, "ci95": [0.0, 0.5]}}
    store = Store(Path("data/store"))
    with store.staging("evaluate") as staged:
        manifest = Manifest.of("evaluate", step_key(parts), parts, Result(4, 4, {}, "e" * 64, metrics), {})
        link_artefact(FOLDER, "evaluate", store.commit(staged, manifest))


@pytest.fixture
def trace(capsys: pytest.CaptureFixture[str]) -> Trace:
    """The command, read as a script reads it; with `code` its message."""

    def run(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        with logger_is_restored():
            assert cli.main(["trace", *arguments, *(["--json"] if code == 0 else [])]) == code
        told = capsys.readouterr()
        return json.loads(told.out) if code == 0 else told.err

    return run


class TestStory:
    def test_from_the_model_to_every_step_that_it_was_made_of(self, done: Path, trace: Trace) -> None:
        found = trace(f"{FOLDER}/train/model")
        steps = ["train", "dataset", "dedup", "filter", "generate", "prompts"]
        assert [step["step"] for step in found["steps"]] == steps
        for step in found["steps"]:
            manifest = FOLDER / step["step"] / MANIFEST
            assert (step["content"], step["runs"]) == (Manifest.read(manifest).content, ["small"])
            assert step["manifest_sha256"] == file_sha256(manifest)
        assert found["missing"] == {}

    def test_its_training_and_how_it_was_measured(self, done: Path, trace: Trace) -> None:
        found = trace(f"{FOLDER}/train/model")
        assert (found["model"]["steps"], found["model"]["rows"], found["model"]["runs"]) == (9, 12, ["small"])
        assert found["settings"] == {"epochs": 3.0, "seed": 0}
        (evaluation,) = found["model"]["evaluations"]
        assert (evaluation["metric"], evaluation["questions"], evaluation["accuracy"]) == ("exact", 4, 0.25)

    def test_every_source_with_its_licence_and_its_rows(self, done: Path, trace: Trace) -> None:
        sources = {each["role"]: each for each in trace(f"{FOLDER}/train/model")["sources"]}
        assert sources.keys() == {"teacher", "prompt", "student_base"}
        assert (sources["teacher"]["name"], sources["teacher"]["rows"], sources["teacher"]["share"]) == (
            "humans",
            12,
            1,
        )
        assert (sources["prompt"]["name"], sources["prompt"]["rows"]) == ("facts", 12)
        base = sources["student_base"]
        assert (base["what"], base["revision"], base["identity"]) == ("tiny/base", "7", "of weights")
        assert base["licenses"] == ["Apache-2.0", "MIT"], "its own, and that of the model it was made from"

    def test_the_verdict_that_the_data_set_was_made_under(self, done: Path, trace: Trace) -> None:
        judgement = trace(f"{FOLDER}/train/model")["judgement"]
        told: Any = Manifest.read(FOLDER / "dataset" / MANIFEST).metrics["provenance"]
        assert judgement["outcome"] == told["verdict"]["outcome"]
        assert judgement["intended_use"] == "research"

    def test_a_step_that_is_gone_is_named_with_what_it_held(self, done: Path, trace: Trace) -> None:
        content = content_of("dedup")
        shutil.rmtree((FOLDER / "dedup").resolve())
        found = trace(f"{FOLDER}/train/model")
        assert found["missing"] == {"dedup": content}

    def test_for_people(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        with logger_is_restored():
            assert cli.main(["trace", f"{FOLDER}/train/model"]) == 0
        told = capsys.readouterr().out
        assert "exact 25.00% (95 % interval 0.00% to 50.00%) on 4 test prompts, run small" in told
        assert "teacher    humans: " in told
        assert "verdict    " in told


class TestWhichModel:
    def test_a_renamed_copy_with_a_card_of_its_own(self, done: Path, trace: Trace) -> None:
        shutil.copytree((FOLDER / "train" / "model").resolve(), "elsewhere")
        Path("elsewhere/README.md").write_text("# Mine", "utf-8")
        found = trace("elsewhere")
        assert found["model"]["content"] == content_of("train")
        assert (found["changed"], found["extra"]) == ([], [])

    def test_a_result_of_train_stands_for_its_model(self, done: Path, trace: Trace) -> None:
        assert trace(f"{FOLDER}/train")["model"]["content"] == content_of("train")

    def test_what_differs_besides_the_weights_is_named(self, done: Path, trace: Trace) -> None:
        shutil.copytree((FOLDER / "train" / "model").resolve(), "elsewhere")
        Path("elsewhere/config.json").write_text("{} ", "utf-8")
        Path("elsewhere/added.json").write_text("{}", "utf-8")
        found = trace("elsewhere")
        assert (found["changed"], found["extra"]) == (["config.json"], ["added.json"])

    def test_a_model_that_no_run_holds_any_more(self, done: Path, trace: Trace) -> None:
        Path("mine").mkdir()
        Path("mine/model.safetensors").write_bytes(b"other")
        found = trace("mine")
        assert found["model"]["runs"] == []
        assert found["changed"] == ["config.json"]

    def test_all_weights_count_not_some_of_them(self, done: Path, trace: Trace) -> None:
        shutil.copytree((FOLDER / "train" / "model").resolve(), "elsewhere")
        Path("elsewhere/adapter_model.safetensors").write_bytes(b"more")
        assert "wrote these weights" in trace("elsewhere", code=2)

    @pytest.mark.parametrize(
        ("weights", "told"),
        [(b"nobody's", "none of the 2 trainings in data wrote these weights"), (None, "the folder holds no weights")],
    )
    def test_a_model_that_nobody_knows_is_a_mistake(
        self, done: Path, trace: Trace, weights: bytes | None, told: str
    ) -> None:
        Path("mine").mkdir()
        if weights is not None:
            Path("mine/model.safetensors").write_bytes(weights)
        lines = trace("mine", code=2).splitlines()
        assert len(lines) == 3 and told in lines[0] and lines[1].endswith("mine")

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["nowhere"], "no such folder"),
            ([f"{FOLDER}/train/model", "--data", "nowhere"], "no such data folder"),
            ([f"{FOLDER}/train/model", "--data", "student"], "no data folder"),
        ],
    )
    def test_what_is_not_there_is_a_mistake_and_nothing_is_made(
        self, done: Path, trace: Trace, arguments: list[str], told: str
    ) -> None:
        assert told in trace(*arguments, code=2)
        assert not Path("nowhere").exists()
