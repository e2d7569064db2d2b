"""Plan and run: what runs and why, what is cached, what the lock file says, what happens to a corrupt artefact."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptArtefact, UsageError
from pipeline.core.load import load_config
from pipeline.core.store import MANIFEST
from pipeline.runner.plan import Planned, plan
from pipeline.runner.run import run_all, run_one
from pipeline.runner.session import Session, open_session
from tests.support import cli_env, read_events, write_project

ROW_STEPS = ["prompts", "generate", "filter", "dedup", "dataset"]


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    logger = logging.getLogger("pipeline")
    before = (logger.handlers, logger.level, logger.propagate)
    logger.propagate = True
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project as current folder; its config is run.yaml."""
    write_project(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def session(*overrides: str) -> Session:
    return open_session(load_config(Path("run.yaml"), overrides), Path("data"), quiet=True)


def run(*overrides: str) -> dict[str, bool]:
    """Run up to `dataset`; which steps ran (True) and which were cached."""
    return {outcome.step.name: outcome.ran for outcome in run_all(session(*overrides), "dataset")}


def ran(*overrides: str) -> list[str]:
    return [name for name, did in run(*overrides).items() if did]


def planned(*overrides: str) -> dict[str, Planned]:
    return {each.step.name: each for each in plan(session(*overrides))}


def started(name: str = "small") -> list[str]:
    events = read_events(Path("data/runs") / name)
    return [event["step"] for event in events if event["event"] == "step_started"]


def artefact(step: str, name: str = "small") -> Path:
    return (Path("data/runs") / name / step).resolve()


def quarantined() -> list[str]:
    folder = Path("data/store/.quarantine")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.usefixtures("project")
class TestRunning:
    def test_the_first_run_runs_every_step_and_the_second_none(self) -> None:
        assert ran() == ROW_STEPS
        assert started() == ROW_STEPS
        assert ran() == []
        assert started() == ROW_STEPS, "no stage was started again"

    def test_every_step_of_the_run_is_found_without_knowing_a_key(self) -> None:
        run()
        for step in ROW_STEPS:
            link = Path("data/runs/small") / step
            assert link.is_symlink()
            assert not link.readlink().is_absolute()
            assert (link / MANIFEST).is_file()

    def test_nothing_temporary_is_left(self) -> None:
        run()
        assert [*Path("data/store/.staging").iterdir()] == []
        assert [path for path in Path("data/work").rglob("*") if path.is_file() or len(path.name) == 64] == []
        assert sorted(path.name for path in Path("data/runs/small").iterdir()) == sorted([*ROW_STEPS, "events.jsonl"])

    def test_a_changed_row_filter_runs_from_there_on(self) -> None:
        run()
        assert ran("filter.min_chars=16") == ["filter", "dedup", "dataset"]

    def test_a_rerun_that_gives_equal_rows_leaves_everything_after_it_cached(self) -> None:
        run()
        assert ran("filter.max_chars=5000") == ["filter"]

    def test_an_operational_setting_reruns_nothing(self) -> None:
        run()
        assert ran("generate.retry.budget_s=5", "dataset.shard_rows=3", "train.processes=2") == []

    def test_a_later_stages_setting_reruns_nothing_before_it(self) -> None:
        run()
        assert ran("train.seed=1", "evaluate.seed=1", "report.sample_rows=3") == []

    def test_a_changed_prompt_file_runs_from_the_start(self, project: Path) -> None:
        run()
        rows = project / "rows.jsonl"
        rows.write_text(rows.read_text("utf-8").replace("number 3", "number three"), "utf-8")
        assert ran() == ROW_STEPS

    def test_a_prompt_file_that_is_only_touched_runs_nothing(self, project: Path) -> None:
        run()
        os.utime(project / "rows.jsonl", ns=(1, 1))
        assert ran() == []

    def test_a_moved_project_runs_nothing_and_its_links_hold(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run()
        moved = project.parent / "elsewhere" / "renamed"
        moved.parent.mkdir()
        project.rename(moved)
        monkeypatch.chdir(moved)
        assert (Path("data/runs/small/dataset") / MANIFEST).is_file()
        assert ran() == []

    def test_a_copied_project_runs_nothing_either(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run()
        copy = project.parent / "copy"
        shutil.copytree(project, copy, symlinks=True)
        monkeypatch.chdir(copy)
        assert ran() == []

    def test_two_data_folders_give_equal_bytes(self) -> None:
        loaded = load_config(Path("run.yaml"))
        trees = []
        for data in (Path("one"), Path("two")):
            run_all(open_session(loaded, data, quiet=True), "dataset")
            shards = sorted(data.glob("store/*/*/**/*.parquet"))
            trees.append({path.relative_to(data): path.read_bytes() for path in shards})
        assert trees[0] == trees[1]
        assert len(trees[0]) >= 5

    def test_a_missing_file_is_named_before_anything_runs(self, project: Path) -> None:
        (project / "rows.jsonl").unlink()
        with pytest.raises(UsageError, match="no such file") as caught:
            run()
        assert "prompts.sets.facts.source.path" in caught.value.where
        assert not Path("data").exists()


@pytest.mark.usefixtures("project")
class TestPlan:
    def test_at_first_the_first_step_would_run_and_the_others_are_unknown(self) -> None:
        plan = planned()
        assert (plan["prompts"].state, plan["prompts"].reasons) == ("run", ("never ran",))
        assert {each.state for name, each in plan.items() if name != "prompts"} == {"unknown"}
        assert plan["dataset"].reasons == ("needs dedup, prompts, generate, filter",)

    def test_afterwards_all_are_cached(self) -> None:
        run()
        plan = planned()
        assert {plan[step].state for step in ROW_STEPS} == {"cached"}
        assert plan["train"].state == "run"

    def test_a_changed_field_is_the_reason(self, project: Path) -> None:
        run()
        config = project / "run.yaml"
        config.write_text(config.read_text("utf-8") + "filter: {min_chars: 5}\n", "utf-8")
        plan = planned()
        assert (plan["filter"].state, plan["filter"].reasons) == ("run", ("filter.min_chars: 1 -> 5",))
        assert plan["generate"].state == "cached"
        assert plan["dedup"].state == "unknown"

    def test_so_it_is_for_an_override(self) -> None:
        run()
        assert planned("filter.min_chars=5")["filter"].reasons == ("filter.min_chars: 1 -> 5",)

    def test_a_changed_file_is_the_reason(self, project: Path) -> None:
        run()
        with (project / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": "new", "prompt": "New?", "completion": "New."}) + "\n")
        (reason,) = planned()["prompts"].reasons
        assert reason.startswith("file prompts.sets.facts.source.path changed: ")
        assert " -> " in reason

    def test_a_lost_artefact_is_the_reason(self) -> None:
        run()
        shutil.rmtree(artefact("filter"))
        assert planned()["filter"].reasons == ("its artefact is not in the store",)

    def test_a_corrupt_artefact_is_the_reason_and_planning_moves_nothing(self) -> None:
        run()
        folder = artefact("filter")
        (folder / MANIFEST).write_text("{}", "utf-8")
        (reason,) = planned()["filter"].reasons
        assert reason.startswith("corrupt: ")
        assert folder.exists()
        assert quarantined() == []

    def test_planning_makes_no_run(self) -> None:
        planned()
        assert not Path("data/runs").exists()
        assert not Path("data/store").exists()
        assert not Path("run.lock.json").exists()


@pytest.mark.usefixtures("project")
class TestLockFile:
    def test_it_holds_key_content_and_parts_of_each_step(self) -> None:
        run()
        lock = json.loads(Path("run.lock.json").read_text("utf-8"))
        assert sorted(lock) == sorted(ROW_STEPS)
        manifest = json.loads((artefact("filter") / MANIFEST).read_text("utf-8"))
        assert lock["filter"] == {part: manifest[part] for part in ("key", "content", "parts")}

    def test_a_run_that_changes_nothing_does_not_touch_it(self) -> None:
        run()
        os.utime("run.lock.json", ns=(1, 1))
        run()
        assert Path("run.lock.json").stat().st_mtime_ns == 1

    def test_it_is_equal_for_equal_runs_in_other_places(self, project: Path, tmp_path: Path) -> None:
        run()
        first = Path("run.lock.json").read_text("utf-8")
        shutil.rmtree(project)
        write_project(project)
        os.chdir(project)
        run()
        assert Path("run.lock.json").read_text("utf-8") == first
        assert str(tmp_path) not in first

    def test_a_run_with_overrides_writes_none_and_has_a_folder_of_its_own(self) -> None:
        run("filter.min_chars=5")
        assert not Path("run.lock.json").exists()
        (folder,) = Path("data/runs").iterdir()
        assert folder.name.startswith("small+")

    @pytest.mark.parametrize("text", ["<<<<<<< ours\n{}", "[]", '{"filter": 3}', '{"filter": {}}'])
    def test_a_damaged_one_is_an_error_for_people(self, text: str) -> None:
        Path("run.lock.json").write_text(text, "utf-8")
        with pytest.raises(UsageError, match="lock file") as caught:
            planned()
        assert caught.value.where == "run.lock.json"


@pytest.mark.usefixtures("project")
class TestOneStep:
    def test_it_runs_on_what_the_steps_before_it_made(self) -> None:
        run_all(session(), "generate")
        assert run_one(session(), "filter").ran
        assert not run_one(session(), "filter").ran
        assert started() == ["prompts", "generate", "filter"]

    def test_without_them_it_names_the_command_that_makes_the_first(self) -> None:
        with pytest.raises(UsageError, match="dedup needs the rows of prompts") as caught:
            run_one(session("filter.refusal_phrases=[I am, not sorry]"), "dedup")
        words = shlex.split(caught.value.todo.removeprefix("run it first: "))
        assert words[:4] == ["python", "-m", "pipeline", "prompts"]
        done = subprocess.run([sys.executable, *words[1:]], env=cli_env(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with pytest.raises(UsageError, match="dedup needs the rows of generate"):
            run_one(session("filter.refusal_phrases=[I am, not sorry]"), "dedup")

    def test_rows_of_another_config_are_not_taken_for_them(self) -> None:
        run()
        with pytest.raises(UsageError, match="dataset needs the rows of filter"):
            run_one(session("filter.min_chars=16"), "dataset")

    def test_its_run_links_the_steps_before_it_too(self) -> None:
        run()
        overridden = session("dataset.seed=5")
        run_one(overridden, "dataset")
        assert sorted(path.name for path in overridden.folder.iterdir() if path.is_symlink()) == sorted(ROW_STEPS)

    def test_force_runs_it_again_and_keeps_the_old_artefact_if_equal(self) -> None:
        run()
        before = artefact("filter").stat().st_ino
        assert run_one(session(), "filter", force=True).ran
        assert artefact("filter").stat().st_ino == before
        assert started()[-1] == "filter"
        assert quarantined() == []


@pytest.mark.usefixtures("project")
class TestCorruption:
    def test_a_corrupt_artefact_is_quarantined_loudly_and_only_it_is_rebuilt(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        run()
        shard = next(artefact("filter").glob("rows/*.parquet"))
        good = shard.read_bytes()
        shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        with caplog.at_level(logging.INFO, logger="pipeline"):
            assert ran() == ["filter"]
        (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert shard.name in error
        assert "it will be rebuilt" in error
        assert shard.read_bytes() == good
        (moved,) = quarantined()
        assert moved.startswith("filter-")

    def test_a_stage_alone_refuses_to_read_it(self) -> None:
        run()
        (artefact("filter") / "rows" / "part-00000.parquet").unlink()
        with pytest.raises(CorruptArtefact):
            run_one(session(), "dedup", force=True)

    def test_force_makes_a_corrupt_artefact_whole_again(self) -> None:
        run()
        shard = artefact("filter") / "rows" / "part-00000.parquet"
        good = shard.read_bytes()
        shard.write_bytes(b"")
        run_one(session(), "filter", force=True)
        assert shard.read_bytes() == good


@pytest.mark.usefixtures("project")
def test_a_run_and_its_steps_alone_are_one() -> None:
    """Five commands one after the other leave what `run` leaves."""
    for step in ROW_STEPS:
        assert run_one(session(), step).ran
    assert ran() == []
