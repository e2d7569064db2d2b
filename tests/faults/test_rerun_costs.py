"""What a change costs, counted at the teacher: nothing is asked twice, and nothing runs that need not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from tests.faults.scripted_server import ScriptedServer, echo
from tests.support import logger_is_restored, read_events, write_project

FOLDER = Path("data/runs/small")
ROW_STEPS = ["prompts", "generate", "filter", "dedup", "dataset"]


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    with logger_is_restored():
        yield


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(echo) as server:
        yield server


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ScriptedServer) -> Path:
    """A project of 30 prompts, as current folder, that has asked the server for each of them once."""
    teacher = {"kind": "openai", "base_url": server.url, "provider": "here", "model": "m"}
    project = tmp_path / "project"
    write_project(
        project, rows=30, teachers={"api": teacher}, generate={"teacher": "api", "sampling": {"temperature": 1.0}}
    )
    monkeypatch.chdir(project)
    assert run() == ROW_STEPS
    assert sorted(server.prompts) == sorted(f"Name number {row}." for row in range(30))
    server.seen.clear()
    return project


def run(*arguments: str) -> list[str]:
    """Run up to `dataset`; the steps that were started."""
    before = len(read_events(FOLDER))
    assert cli.main(["run", "run.yaml", "--until", "dataset", *arguments]) == 0
    return [event["step"] for event in read_events(FOLDER)[before:] if event["event"] == "step_started"]


def status(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["status", "run.yaml", "--json"]) == 0
    return {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}


def edit(old: str, new: str) -> None:
    config = Path("run.yaml")
    text = config.read_text("utf-8")
    assert old in text
    config.write_text(text.replace(old, new), "utf-8")


def add_prompts(project: Path, count: int) -> None:
    with (project / "rows.jsonl").open("a", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"id": f"new{number}", "prompt": f"Name new number {number}."}) + "\n")


class TestOneThreshold:
    def test_status_names_it_and_run_does_the_filter_and_what_follows_without_one_request(
        self, project: Path, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        edit("generate:\n", "filter:\n  min_chars: 15\ngenerate:\n")
        steps = status(capsys)
        assert steps["filter"]["reasons"] == ["filter.min_chars: 1 -> 15"]
        assert [name for name in ROW_STEPS if steps[name]["state"] == "done"] == ["prompts", "generate"]
        assert [steps[name]["reasons"] for name in ("dedup", "dataset")] == [
            ["follows filter"],
            ["follows dedup, filter"],
        ]
        assert run() == ["filter", "dedup", "dataset"]
        assert server.prompts == []
        assert {status(capsys)[name]["state"] for name in ROW_STEPS} == {"done"}

    def test_one_that_changes_no_row_reruns_the_filter_alone(self, project: Path, server: ScriptedServer) -> None:
        edit("generate:\n", "filter:\n  min_chars: 2\ngenerate:\n")
        assert run() == ["filter"]
        assert server.prompts == []

    def test_and_back_again_nothing_runs(self, project: Path, server: ScriptedServer) -> None:
        edit("generate:\n", "filter:\n  min_chars: 15\ngenerate:\n")
        run()
        edit("  min_chars: 15\n", "  min_chars: 1\n")
        assert run() == []


class TestTenPrompts:
    def test_ten_requests(self, project: Path, server: ScriptedServer) -> None:
        add_prompts(project, 10)
        assert run() == ROW_STEPS
        assert sorted(server.prompts) == [f"Name new number {number}." for number in range(10)]

    def test_one_that_is_there_already_costs_none(self, project: Path, server: ScriptedServer) -> None:
        with (project / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": "again", "prompt": "Name number 3."}) + "\n")
        assert run()[0] == "prompts"
        assert server.prompts == []

    def test_prompts_that_leave_cost_none(self, project: Path, server: ScriptedServer) -> None:
        rows = (project / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)
        (project / "rows.jsonl").write_text("".join(rows[5:]), "utf-8")
        assert run() == ROW_STEPS
        assert server.prompts == []


class TestOtherChanges:
    def test_more_samples_cost_what_is_new(self, project: Path, server: ScriptedServer) -> None:
        edit("generate:\n  teacher: api\n", "generate:\n  teacher: api\n  samples: 3\n")
        run()
        assert len(server.prompts) == 2 * 30

    def test_a_renamed_project_folder_reruns_nothing(
        self, project: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved = project.with_name("renamed")
        project.rename(moved)
        monkeypatch.chdir(moved)
        assert run() == []
        assert server.prompts == []

    def test_a_moved_api_asks_nothing_again(self, project: Path, server: ScriptedServer) -> None:
        edit("127.0.0.1", "localhost")
        assert run() == []

    def test_force_computes_all_anew_from_the_stored_answers(self, project: Path, server: ScriptedServer) -> None:
        assert run("--force") == ROW_STEPS
        assert server.prompts == []

    def test_a_deleted_store_is_made_again_from_the_stored_answers(self, project: Path, server: ScriptedServer) -> None:
        (project / "data" / "store").rename(project / "gone")
        assert run("--locked") == ROW_STEPS
        assert server.prompts == []

    def test_removing_what_nobody_links_keeps_every_answer(self, project: Path, server: ScriptedServer) -> None:
        (project / "data" / "runs").rename(project / "gone")
        assert cli.main(["gc", "--delete"]) == 0
        assert run("--locked") == ROW_STEPS
        assert server.prompts == []
