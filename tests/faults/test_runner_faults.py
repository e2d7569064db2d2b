"""What the runner does when a stage fails, loses rows, is killed or meets another process: each test writes its stage
and runs it in a process of its own."""

import json
import platform
import shlex
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import Incomplete, LostRows, UsageError
from pipeline.core.lineage import Manifest
from pipeline.core.load import load_config
from pipeline.core.runs import link_work
from pipeline.core.store import MANIFEST, Artefact
from pipeline.runner.gc import collect
from pipeline.runner.run import _unchanged, run_all
from pipeline.runner.session import open_session
from tests.support import cli_env, make_context, probe_command, read_events, wait_for, write_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project as current folder; its config is run.yaml."""
    write_project(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


WAIT = """
    ctx.events.emit("ready")
    while not Path("go").exists():
        check_cancelled(ctx)
        time.sleep(0.01)
    return result
"""


HALF = '(out / "half").write_text("x")\n' + textwrap.dedent(WAIT)


def probe(folder: Path, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        probe_command(folder, body, *(arguments or ("run", "run.yaml"))),
        env=cli_env(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def start_probe(folder: Path, body: str, *arguments: str) -> subprocess.Popen[str]:
    """The program running a stage of our own, once that stage has begun."""
    before = sum(event["event"] == "ready" for event in every_event())
    process = subprocess.Popen(
        probe_command(folder, body, *(arguments or ("run", "run.yaml"))),
        env=cli_env(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: sum(event["event"] == "ready" for event in every_event()) > before, "the stage begins")
    return process


def every_event() -> list[dict[str, Any]]:
    folders: Sequence[Path] = sorted(Path("data/runs").glob("*"))
    return [event for folder in folders for event in read_events(folder)]


def store_is_clean() -> bool:
    store = Path("data/store")
    return not [*store.glob("probe/*")] and not [*store.glob(".staging/*")]


class TestConservation:
    @pytest.mark.parametrize("counts", ["3, 2, {}", '3, 1, {"empty": 1}', '3, 3, {"empty": 1}', "3, 4, {}"])
    def test_a_stage_that_loses_or_invents_rows_is_a_bug_and_commits_nothing(self, project: Path, counts: str) -> None:
        done = probe(project, f'return Result({counts}, "c" * 64)')
        assert done.returncode == 1
        assert LostRows.__name__ in done.stderr
        assert store_is_clean()

    def test_one_that_accounts_for_all_is_committed(self, project: Path) -> None:
        done = probe(project, 'return Result(3, 1, {"empty": 1, "too_long": 1}, "c" * 64)')
        assert done.returncode == 0, done.stderr
        (event,) = [event for event in every_event() if event["event"] == "step_committed"]
        assert event["rejected"] == {"empty": 1, "too_long": 1}


class TestHolding:
    def test_a_second_process_is_told_who_holds_the_run(self, project: Path) -> None:
        first = start_probe(project, WAIT)
        try:
            events = len(every_event())
            second = probe(project, "return result")
            assert second.returncode == 6
            assert f"held by pid {first.pid} on {platform.node()}" in second.stderr
            assert len(every_event()) == events, "nothing was written"
        finally:
            Path("go").touch()
            assert first.wait(60) == 0
            first.communicate()
        assert probe(project, WAIT).returncode == 0

    def test_a_run_of_another_name_waits_for_the_same_step_and_takes_its_result(self, project: Path) -> None:
        first = start_probe(project, WAIT)
        second = subprocess.Popen(
            probe_command(project, WAIT, "run", "run.yaml", "--set", "report.sample_rows=1", "--json"),
            env=cli_env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        said = ""
        while "waiting for" not in said:
            said = second.stderr.readline()
            assert said, "the second process ended without waiting"
        assert f"waiting for pid {first.pid} on {platform.node()}, which makes the same step" in said
        Path("go").touch()
        assert first.wait(60) == 0
        first.communicate()
        stdout, _ = second.communicate(timeout=60)
        assert [step["ran"] for step in json.loads(stdout)["steps"]] == [False]

    def test_who_waits_for_a_step_can_be_interrupted(self, project: Path) -> None:
        first = start_probe(project, WAIT)
        second = subprocess.Popen(
            probe_command(project, WAIT, "run", "run.yaml", "--set", "report.sample_rows=1"),
            env=cli_env(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        while "waiting for" not in second.stderr.readline():
            pass
        second.send_signal(signal.SIGINT)
        _, stderr = second.communicate(timeout=60)
        assert second.returncode == 130
        assert "resume with: python -m pipeline run run.yaml --data data --set report.sample_rows=1" in stderr
        Path("go").touch()
        assert first.wait(60) == 0
        first.communicate()

    def test_three_processes_that_race_for_one_key_make_one_artefact(self, project: Path) -> None:
        body = """
            ctx.events.emit("made")
            (out / "row").write_text("x", "utf-8")
            time.sleep(0.3)
            return result
        """
        racers = [
            subprocess.Popen(
                probe_command(project, body, "run", "run.yaml", "--set", f"report.sample_rows={number}"),
                env=cli_env(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for number in range(3)
        ]
        for racer in racers:
            racer.communicate(timeout=60)
        assert [racer.returncode for racer in racers] == [0, 0, 0]
        assert len([*Path("data/store/probe").iterdir()]) == 1
        assert sum(event["event"] == "made" for event in every_event()) == 1

    def test_a_killed_process_holds_nothing(self, project: Path) -> None:
        first = start_probe(project, WAIT)
        first.kill()
        first.communicate()
        assert Path("data/runs/small/run.lock").read_text("utf-8").startswith("pid ")
        Path("go").touch()
        assert probe(project, WAIT).returncode == 0

    def test_what_a_killed_process_was_writing_is_removed_by_the_next_one(self, project: Path) -> None:
        first = start_probe(project, HALF)
        assert len([*Path("data/store/.staging").glob("*/half")]) == 1
        first.kill()
        first.communicate()
        Path("go").touch()
        done = probe(project, WAIT)
        assert done.returncode == 0, done.stderr
        assert "removing what a killed process left" in done.stderr
        assert [*Path("data/store/.staging").iterdir()] == []

    def test_what_a_living_process_is_writing_is_left_alone(self, project: Path) -> None:
        first = start_probe(project, HALF)
        other = probe(project, "return result", "run", "run.yaml", "--set", "filter.min_chars=3")
        assert other.returncode == 0, other.stderr
        assert len([*Path("data/store/.staging").glob("*/half")]) == 1
        Path("go").touch()
        assert first.wait(60) == 0
        first.communicate()


class TestEvents:
    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ("return result", 0),
            ('raise KeyError("surprise")', 1),
            ('raise Incomplete("the service is down", where="here", todo="wait")', 3),
            ("import signal\nos.kill(os.getpid(), signal.SIGINT)\ncheck_cancelled(ctx)", 130),
            ("import signal\nos.kill(os.getpid(), signal.SIGTERM)\ncheck_cancelled(ctx)", 143),
        ],
    )
    def test_the_last_one_holds_the_exit_code(self, project: Path, body: str, code: int) -> None:
        """A launcher around us ends with 0 or 1 whatever we end with."""
        assert probe(project, body).returncode == code
        events = read_events(Path("data/runs/small"))
        assert (events[0]["event"], events[-1]["event"]) == ("run_started", "run_ended")
        assert events[-1]["exit_code"] == code

    def test_a_killed_run_has_no_end(self, project: Path) -> None:
        first = start_probe(project, WAIT)
        first.kill()
        first.communicate()
        assert read_events(Path("data/runs/small"))[-1]["event"] == "ready"


class TestWorkdir:
    BODY = """
        done = ctx.workdir / "done"
        resumed = done.exists()
        done.touch()
        if not resumed:
            ctx.events.emit("ready")
            time.sleep(600)
        return Result(1, 1, {}, "c" * 64, {"resumed": resumed})
    """

    def test_it_survives_a_kill_and_is_gone_after_the_commit(self, project: Path) -> None:
        first = start_probe(project, self.BODY)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        assert [path.name for path in Path("data/work").rglob("*") if path.is_file() and path.suffix != ".lock"] == [
            "done"
        ]
        assert probe(project, self.BODY).returncode == 0
        manifest = json.loads((Path("data/runs/small/probe") / MANIFEST).read_text("utf-8"))
        assert manifest["metrics"] == {"resumed": True}
        assert [path for path in Path("data/work").rglob("*") if path.is_file()] == []


class TestFailures:
    def test_a_full_disk_is_incomplete_and_says_how_to_go_on(self, project: Path) -> None:
        """/dev/full refuses every write as a full disk does."""
        done = probe(project, 'with open("/dev/full", "w") as file:\n    file.write("x" * 100_000)\nreturn result')
        assert done.returncode == 3, done.stderr
        assert "No space left on device" in done.stderr
        assert "resume with: python -m pipeline run run.yaml --data data" in done.stderr
        assert store_is_clean()

    def test_another_error_of_the_system_is_a_bug(self, project: Path) -> None:
        done = probe(project, 'return open("no-such-file")')
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert store_is_clean()

    def test_an_error_for_people_keeps_its_code(self, project: Path) -> None:
        done = probe(project, 'raise Incomplete("the service is down", where="here", todo="wait")')
        assert done.returncode == 3
        assert done.stderr.splitlines()[-3:] == ["error: the service is down", "   at: here", "   do: wait"]
        assert store_is_clean()

    def test_a_data_folder_that_cannot_be_made_is_refused_before_anything_is_done(self, project: Path) -> None:
        (project / "taken").write_text("a file", "utf-8")
        blocked = open_session(load_config(Path("run.yaml")), Path("taken"), quiet=True)
        with pytest.raises(UsageError, match="not a folder") as caught:
            run_all(blocked, "prompts")
        assert "taken" in caught.value.where

    def test_the_resume_command_can_be_typed(self, project: Path) -> None:
        body = 'raise Incomplete("x", where="y", todo=ctx.resume_command)'
        overrides = ["--set", "filter.refusal_phrases=[I am, it's]", "--set", "dataset.seed=3"]
        done = probe(project, body, "run", "run.yaml", *overrides)
        command = done.stderr.splitlines()[-1].removeprefix("   do: ")
        assert shlex.split(command)[2:] == ["pipeline", "run", "run.yaml", "--data", "data", *overrides]


class TestLeftovers:
    """What a process leaves that is killed between its commit and its clearing up."""

    def test_finished_work_is_cleared_by_the_next_run(self, project: Path) -> None:
        assert probe(project, "return result").returncode == 0
        (key,) = (path.name for path in Path("data/store/probe").iterdir())
        workdir = Path("data/work/probe") / key
        workdir.mkdir(parents=True)
        link_work(Path("data/runs/small"), "probe", workdir)
        assert probe(project, "return result").returncode == 0
        assert not workdir.exists()
        assert not Path("data/runs/small/.work").exists()

    def test_a_result_that_is_not_linked_yet_is_not_collected(self, project: Path) -> None:
        assert probe(project, "return result").returncode == 0
        (artefact,) = Path("data/store/probe").iterdir()
        Path("data/runs/small/probe").unlink()
        assert [item.path for item in collect(Path("data")).items if item.kind == "result"] == [artefact]
        link_work(Path("data/runs/small"), "probe", Path("data/work/probe") / artefact.name)
        assert [item.path for item in collect(Path("data")).items if item.kind == "result"] == []


class TestLinks:
    def test_a_folder_in_the_place_of_a_link_is_named(self, project: Path) -> None:
        assert probe(project, "return result").returncode == 0
        shutil.copytree("data", "copy", symlinks=False)
        done = probe(project, "return result", "run", "run.yaml", "--data", "copy")
        assert done.returncode == 2
        assert done.stderr.splitlines()[-3:-1] == [
            "error: something lies where the link to a result belongs",
            "   at: copy/runs/small/probe",
        ]

    def test_the_folder_of_runs_may_be_a_link_to_another_disk(self, project: Path) -> None:
        Path("elsewhere/deep/down").mkdir(parents=True)
        Path("data").mkdir()
        Path("data/runs").symlink_to(Path("elsewhere/deep/down").resolve())
        assert probe(project, "return result").returncode == 0
        assert Path("data/runs/small/probe/manifest.json").is_file()


class TestForce:
    def test_a_dry_run_says_what_would_run_anew(self, project: Path) -> None:
        assert probe(project, "return result").returncode == 0
        done = probe(project, "return result", "run", "run.yaml", "--force", "--dry-run")
        assert done.stdout.split() == ["probe", "run", "--force"]

    def test_who_reads_what_is_replaced_meanwhile_commits_nothing(self, project: Path) -> None:
        """A second step reads the first one's rows while a forced run of another name puts other rows there."""
        load = load_config(Path("run.yaml"), ("dataset.seed=1",))
        reader = open_session(load, Path("data"), quiet=True)
        run_all(reader, "prompts")
        manifest = next(Path("data/store/prompts").iterdir()) / MANIFEST
        sealed = json.loads(manifest.read_text("utf-8"))
        ctx = make_context(Path("context"), "generate")
        artefact = Artefact(manifest.parent, Manifest.read(manifest))
        with (
            pytest.raises(Incomplete, match="another run replaced the rows of prompts"),
            _unchanged({"prompts": replace(artefact, manifest=replace(artefact.manifest, content="0" * 64))}, ctx),
        ):
            assert sealed["content"] != "0" * 64

    def test_the_command_that_resumes_keeps_it(self, project: Path) -> None:
        body = 'raise Incomplete("x", where="y", todo=ctx.resume_command)'
        done = probe(project, body, "run", "run.yaml", "--force")
        assert done.stderr.splitlines()[-1] == "   do: python -m pipeline run run.yaml --data data --force"
