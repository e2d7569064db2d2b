"""A file system that is really full, at every stage of a run: it stops with 3, and goes on once there is room."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.scripted_server import ScriptedServer, echo
from tests.faults.shim.preload import Ended, Host, hosting
from tests.faults.shim.project import RUN, Made, leftovers, overcharged, unsound, write_api_project

DISK_KIB = 2048


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs (root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, free_kib: int) -> None:
    """Leave so much room and no more."""
    facts = os.statvfs(disk)
    (disk / "filler").write_bytes(b"\0" * (facts.f_bavail * facts.f_bsize - free_kib * 1024))


@pytest.mark.parametrize(
    ("before", "room_kib"),
    [
        pytest.param(None, range(0, 480, 20), id="from the start"),
        pytest.param("generate", range(0, 225, 9), id="after the teacher was asked"),
    ],
)
def test_a_full_disk_stops_a_run_and_room_lets_it_go_on(
    host: Host, disk: Path, tmp_path: Path, before: str | None, room_kib: range
) -> None:
    with ScriptedServer(echo) as server:
        write_api_project(tmp_path / "clean", server)
        assert host.run(tmp_path / "clean", *RUN).code == 0
        clean = Made.by(tmp_path / "clean")
        stopped: Counter[str] = Counter()
        for free_kib in room_kib:
            project = disk / "project"
            write_api_project(project, server)
            server.seen.clear()
            if before is not None:
                assert host.run(project, "run", "run.yaml", "--until", before).code == 0
            fill(disk, free_kib)
            ended = host.run(project, *RUN)
            told = f"with {free_kib} KiB free: {ended.stderr}"
            check_end(ended, told)
            assert unsound(project) == [], told
            done = len([*(project / "data" / "store").glob("[a-z]*/*")])
            stopped["complete" if ended.code == 0 else f"after {done} steps"] += 1
            (disk / "filler").unlink()
            again = host.run(project, *RUN)
            assert again.code == 0, f"{told}\n{again.stderr}"
            assert Made.by(project) == clean
            assert leftovers(project, could_clean=False) == [], told
            assert overcharged(project, server.prompts) == [], told
            shutil.rmtree(project)
    print(f"{stopped.total()} full disks: {dict(sorted(stopped.items()))}")
    assert len(stopped) >= 3, "it was full in several places"
    assert 0 < stopped["complete"] < stopped.total()


def check_end(ended: Ended, told: str) -> None:
    assert "Traceback" not in ended.stderr, told
    assert ended.code in (0, 3), told
    if ended.code == 3:
        what, _, todo = ended.stderr.splitlines()[-3:]
        assert any(word in what for word in ("space", "full", "disk")), told
        assert todo.startswith("   do: "), told
