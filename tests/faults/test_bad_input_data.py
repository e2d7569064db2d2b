"""Bad data folders and damaged results: refused before anything is done, or rebuilt, and never used."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.bad_input import UNTIL_DATASET, api_project, obey_permissions, refusal
from tests.faults.scripted_server import ScriptedServer, echo
from tests.support import cli_env, run_cli, write_project

STEPS = ("prompts", "generate", "filter", "dedup", "dataset")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project; its config is run.yaml."""
    write_project(tmp_path)
    return tmp_path


def run_unprivileged(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Like `run_cli`, as a process that permission bits bind even if it is root's."""
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=cli_env(), capture_output=True, text=True, check=False, preexec_fn=obey_permissions
    )


def states(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What `run` says of each step, in order: done or cached."""
    assert done.returncode == 0, done.stderr
    return [line.split()[1] for line in done.stdout.splitlines()]


class TestDataFolder:
    @pytest.mark.parametrize(
        ("name", "command"),
        [("file", UNTIL_DATASET), ("file/below", ("dedup", "run.yaml")), ("dangling", UNTIL_DATASET)],
    )
    def test_what_is_no_folder_is_refused(self, project: Path, name: str, command: tuple[str, ...]) -> None:
        (project / "file").touch()
        (project / "dangling").symlink_to("gone")
        said = refusal(run_cli(*command, "--data", name, cwd=project), 2)
        assert (said.what, said.where) == ("not a folder", f"--data {name}")
        assert said.todo == "choose another folder with --data"

    @pytest.mark.parametrize("name", ["data", "data/store"])
    def test_one_that_cannot_be_written_is_refused_before_anything_is_done(self, project: Path, name: str) -> None:
        (project / name).mkdir(parents=True)
        (project / name).chmod(0o555)
        said = refusal(run_unprivileged(*UNTIL_DATASET, cwd=project), 2)
        assert said.what == "the folder cannot be written"
        assert name in said.where
        assert [path for path in (project / "data").rglob("*") if path.is_file()] == []

    def test_a_place_where_none_can_be_made_is_refused(self, project: Path) -> None:
        (project / "closed").mkdir(mode=0o555)
        said = refusal(run_unprivileged(*UNTIL_DATASET, "--data", "closed/data", cwd=project), 2)
        assert (said.what, said.where) == ("the folder cannot be written", "--data closed/data")

    def test_a_config_beside_which_no_lock_file_can_be_written_is_refused(self, project: Path, tmp_path: Path) -> None:
        (project / "data").mkdir()
        project.chmod(0o555)
        said = refusal(run_unprivileged(*UNTIL_DATASET, cwd=project), 2)
        project.chmod(0o755)
        assert (said.what, said.where) == ("the folder cannot be written", "run.lock.json")
        assert [*(project / "data").rglob("*")] == []

    def test_plan_needs_no_write_access_and_tells_that_run_does(self, project: Path) -> None:
        (project / "data").mkdir(mode=0o555)
        done = run_unprivileged("plan", "run.yaml", "--set", "prompts.test=0.3", cwd=project)
        assert done.returncode == 0
        assert "run would refuse to start: the folder cannot be written (--data data)" in done.stderr

    def test_a_link_to_a_folder_is_a_folder(self, project: Path) -> None:
        (project / "elsewhere").mkdir()
        (project / "data").symlink_to("elsewhere")
        assert states(run_cli(*UNTIL_DATASET, cwd=project)) == ["done"] * 5
        assert states(run_cli(*UNTIL_DATASET, "--data", "elsewhere", cwd=project)) == ["cached"] * 5


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


class TestDiskFull:
    def test_what_is_done_is_kept_and_the_same_command_goes_on_when_there_is_room(
        self, project: Path, full_disk: Path
    ) -> None:
        done = run_cli(*UNTIL_DATASET, "--data", "disk", cwd=project)
        said = refusal(done, 3)
        assert said.what.endswith("No space left on device")
        assert said.where.startswith("disk")
        assert "python -m pipeline run run.yaml --data disk --until dataset" in said.todo
        subprocess.run(["mount", "-o", "remount,size=16m", str(full_disk)], check=True)
        again = states(run_cli(*UNTIL_DATASET, "--data", "disk", cwd=project))
        assert again == ["cached"] * done.stderr.count(" out\n") + ["done"] * (5 - done.stderr.count(" out\n"))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestArtefacts:
    @pytest.mark.parametrize(
        ("name", "damage"),
        [("rows/part-00000.parquet", halve), ("rows/part-00000.parquet", flip), ("manifest.json", Path.unlink)],
        ids=["truncated", "one bit", "no manifest"],
    )
    def test_a_stage_refuses_a_damaged_one_and_run_rebuilds_it_loudly(
        self, project: Path, name: str, damage: Callable[[Path], object]
    ) -> None:
        assert run_cli(*UNTIL_DATASET, cwd=project).returncode == 0
        artefact = (project / "data" / "runs" / "small" / "filter").resolve()
        damage(artefact / name)
        said = refusal(run_cli("dedup", "run.yaml", cwd=project), 5)
        assert str(artefact.relative_to(project)) in said.where
        assert said.todo == "run the pipeline again: it will be rebuilt"
        done = run_cli(*UNTIL_DATASET, cwd=project)
        assert states(done) == ["cached", "cached", "done", "cached", "cached"]
        assert "it will be rebuilt" in done.stderr
        assert "moved the corrupt artefact" in done.stderr

    def test_a_damaged_lock_file_is_named(self, project: Path) -> None:
        assert run_cli(*UNTIL_DATASET, cwd=project).returncode == 0
        halve(project / "run.lock.json")
        said = refusal(run_cli(*UNTIL_DATASET, cwd=project), 2)
        assert (said.what, said.where) == ("the lock file is not JSON", "run.lock.json")


class TestResponses:
    """What was paid for: nothing of it is dropped in silence."""

    @pytest.fixture
    def server(self) -> Iterator[ScriptedServer]:
        with ScriptedServer(echo) as server:
            yield server

    def test_a_damaged_file_of_answers_is_named_and_none_of_it_is_asked_again(
        self, tmp_path: Path, server: ScriptedServer
    ) -> None:
        project = api_project(tmp_path, server.url)
        assert run_cli(*UNTIL_DATASET, cwd=project).returncode == 0
        (answers,) = (project / "data" / "responses" / "answers").glob("*.parquet")
        halve(answers)
        shutil.rmtree(project / "data" / "store" / "generate")
        said = refusal(run_cli(*UNTIL_DATASET, cwd=project), 5)
        assert said.where == str(answers.relative_to(project))
        assert len(server.seen) == 12

    @pytest.mark.parametrize("keep", [100, 5000])
    def test_a_half_written_segment_is_moved_aside_loudly_and_costs_nothing(
        self, tmp_path: Path, server: ScriptedServer, keep: int
    ) -> None:
        """The first bytes of a segment: what a machine that lost its power may leave."""
        project = api_project(tmp_path, server.url)
        assert run_cli(*UNTIL_DATASET, cwd=project).returncode == 0
        segment = project / "data" / "responses" / "segments" / "1-dead.sqlite"
        segment.write_bytes(a_segment(tmp_path / "other")[:keep])
        shutil.rmtree(project / "data" / "store" / "generate")
        done = run_cli(*UNTIL_DATASET, cwd=project)
        assert done.returncode == 0, done.stderr
        assert "a file of stored answers was damaged" in done.stderr
        assert (project / "data" / "responses" / "damaged" / segment.name).is_file()
        assert len(server.seen) == 12


def a_segment(folder: Path) -> bytes:
    """The bytes of a segment that holds one attempt."""
    from pipeline.teacher.segment import Attempt, Segment

    folder.mkdir()
    segment = Segment(folder)
    segment.write([Attempt(1, bytes(32), 8, 0)], [], [])
    segment.close()
    return segment.path.read_bytes()
