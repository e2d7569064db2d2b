"""Somebody changes what a data set is or says of itself, on purpose: `train` refuses it, and names the file."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.lineage import DigestCache, Manifest, path_digest, step_key
from pipeline.core.load import load_config
from pipeline.core.runs import link_artefact
from pipeline.core.stage import Result
from pipeline.core.store import MANIFEST, Store
from pipeline.runner.run import committed_before
from pipeline.runner.session import open_session
from pipeline.terms.overrides import Decision, Evidence, append_override
from pipeline.terms.statement import Source, Statement
from tests.support import POLICY, logger_is_restored, pretend_trainable, write_project

FOLDER = Path("data/runs/small")


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project as current folder that has run up to `dataset`; the model of its student is no model, so nothing
    could be trained."""
    write_project(tmp_path)
    pretend_trainable(tmp_path)
    monkeypatch.chdir(tmp_path)
    make_dataset()
    return tmp_path


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command as the command line does."""

    def run(*arguments: str) -> Ended:
        capsys.readouterr()
        with logger_is_restored():
            code = cli.main(arguments)
        return Ended(code, *capsys.readouterr())

    return run


def make_dataset(*options: str) -> None:
    with logger_is_restored():
        assert cli.main(["run", "run.yaml", "--until", "dataset", *options]) == 0


def other_dataset() -> Path:
    """The data set of another run."""
    make_dataset("--set", "filter.min_chars=16")
    (folder,) = Path("data/runs").glob("small+*")
    return (folder / "dataset").resolve()


def dataset() -> Path:
    return (FOLDER / "dataset").resolve()


def shard() -> Path:
    (found,) = dataset().glob("data/train-*.parquet")
    return found


def edit_manifest() -> Path:
    """A more convenient verdict, by hand."""
    path = dataset() / MANIFEST
    text = path.read_text("utf-8")
    told = json.loads(text)
    assert told["rows_out"] == 12
    path.write_text(text.replace('"rows_out": 12', '"rows_out": 13'), "utf-8")
    return path


def edit_terms() -> Path:
    """Another licence in what the manifest says of its sources."""
    path = dataset() / MANIFEST
    path.write_text(path.read_text("utf-8").replace('"unknown"', '"MIT"'), "utf-8")
    return path


def swap_shard() -> Path:
    """A shard of another run, whole in itself."""
    (other,) = other_dataset().glob("data/train-*.parquet")
    path = shard()
    assert other.read_bytes() != path.read_bytes()
    shutil.copy(other, path)
    return path


def put_other_dataset() -> Path:
    """The whole data set of another run, whole in itself, in the place of this one."""
    other, place = other_dataset(), dataset()
    shutil.rmtree(place)
    shutil.copytree(other, place)
    return place


TAMPERING: dict[str, Callable[[], Path]] = {
    "edited manifest": edit_manifest,
    "edited terms in the manifest": edit_terms,
    "swapped shard": swap_shard,
    "data set of another run in its place": put_other_dataset,
}


class TestDataSet:
    @pytest.mark.parametrize("tampering", TAMPERING)
    def test_train_refuses_it_and_names_the_file(self, done: Path, command: Command, tampering: str) -> None:
        path = TAMPERING[tampering]()
        found = command("train", "run.yaml")
        assert found.code == 5, found.err
        what, where, todo = found.err.splitlines()[-3:]
        assert what.startswith("error: ")
        assert Path(where.removeprefix("   at: ")).resolve() == path
        assert todo.startswith("   do: ")

    def test_a_link_to_another_data_set_is_of_no_use(self, done: Path) -> None:
        """`train` finds the data set by its key, whatever the run's folder says."""
        before = dataset()
        (FOLDER / "dataset").unlink()
        (FOLDER / "dataset").symlink_to(other_dataset())
        session = open_session(load_config(Path("run.yaml")), Path("data"), quiet=True)
        assert committed_before(session, "train")["dataset"].path.resolve() == before


class TestOverrides:
    """A signed decision is a line in a file, each with the hash of the line before."""

    @pytest.fixture
    def signed(self, done: Path, command: Command) -> Path:
        """Two decisions in the file that the config names, the first of which was edited afterwards."""
        path = done / "overrides.jsonl"
        source = Source("teacher", "humans", "people", ("unknown",))
        policy = PolicyConfig.model_validate(POLICY)
        for reason in ("They said so in writing, on paper.", "And once more in front of two witnesses."):
            decision = Decision(
                rule="LG-001",
                atom="unknown",
                value="null",
                sources=("teacher:humans",),
                kind="permission",
                person="Ada Lovelace <ada@example.org>",
                reason=reason,
                evidence=Evidence(name="paper.pdf", sha256="a" * 64),
                expires=date.today() + timedelta(days=30),
            )
            append_override(path, decision, Statement((source,)), policy, today=date.today())
        write_project(done, policy={**POLICY, "overrides": path.name})
        pretend_trainable(done)
        make_dataset()
        assert command("verify", "run.yaml").code == 0
        path.write_text(path.read_text("utf-8").replace("in writing", "in passing"), "utf-8")
        return path

    def test_train_refuses_an_edited_line_and_names_it(self, signed: Path, command: Command) -> None:
        found = command("train", "run.yaml")
        assert found.code == 5, found.err
        assert f"{signed.name}:1" in found.err.splitlines()[-2]

    def test_verify_names_it_too(self, signed: Path, command: Command) -> None:
        found = command("verify", "run.yaml", "--json")
        assert found.code == 5, found.err
        assert breaks(found) == [(f"{signed.name}:1", "line 1 of the overrides is damaged: it was edited")]


class TestVerify:
    """What no hash of a file shows, since manifests carry no signature: the chain between them does."""

    def test_a_model_whose_data_set_is_not_there(self, done: Path, command: Command) -> None:
        place = dataset()
        parts = {"stage": "train", "inputs": {"dataset": Manifest.read(place / MANIFEST).content}}
        commit_training(parts)
        assert command("verify").code == 0
        shutil.rmtree(place)
        (FOLDER / "dataset").unlink()
        found = command("verify", "--json")
        assert found.code == 5
        ((where, what),) = breaks(found)
        assert where.startswith("data/store/train/") and where.endswith(MANIFEST)
        assert what.startswith("it was made of rows of dataset (content ")

    @pytest.mark.parametrize("name", ["statement", "record"])
    def test_terms_that_were_changed_in_a_manifest_that_was_sealed_again(
        self, done: Path, command: Command, name: str
    ) -> None:
        path = dataset() / MANIFEST
        manifest = Manifest.read(path)
        told: Any = json.loads(json.dumps(manifest.metrics["provenance"]))
        if name == "statement":
            told["statement"]["sources"][0]["licenses"] = ["MIT"]
        else:
            told["records"]["made-up"] = {"id": "made-up"}
        path.write_text(replace(manifest, metrics={**manifest.metrics, "provenance": told}).to_json(), "utf-8")
        found = command("verify", "run.yaml", "--json")
        assert found.code == 5
        ((where, what),) = breaks(found)
        assert (done / where).resolve() == path
        assert "is not the one that was hashed" in what


def breaks(found: Ended) -> list[tuple[str, str]]:
    """Where the chain breaks, and how, as `verify --json` tells it."""
    told = json.loads(found.out)["damage"]
    assert {each["kind"] for each in told} == {"chain"}
    return [(each["where"], each["what"]) for each in told]


def commit_training(parts: dict[str, Any]) -> None:
    """Commit and link a made-up model."""
    store = Store(Path("data/store"))
    with store.staging("train") as staged:
        (staged / "model").mkdir()
        (staged / "model" / "model.safetensors").write_bytes(b"weights")
        (staged / "model" / "config.json").write_text("{}", "utf-8")
        content = path_digest(staged / "model", DigestCache(staged.parent / "none.json"))
        result = Result(12, 12, {}, content)
        link_artefact(FOLDER, "train", store.commit(staged, Manifest.of("train", step_key(parts), parts, result, {})))
