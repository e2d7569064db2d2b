"""A checkpoint counts only if it is whole, undamaged and of this training; whatever else lies there is set aside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.student.checkpoints import (
    MARKER,
    Checkpoint,
    Setting,
    Training,
    commit,
    find_newest,
    prune,
    size_of,
    staging,
)

TRAINING = Training(key="a" * 64, steps=10, rows=40, order="b" * 64)
SETTING = Setting(world_size=2, micro_batch_size=4, sharded=False, torch="2", transformers="5")
FILES = {"trained.safetensors": b"weights" * 100, "optimizer.pt": b"moments" * 200, "model_0/shard": b"part"}


def write(folder: Path, step: int, training: Training = TRAINING) -> Checkpoint:
    for name, content in FILES.items():
        path = staging(folder, step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + b"%d" % step)
    return commit(folder, step, training, SETTING)


def names(folder: Path) -> list[str]:
    """What lies there; of what was set aside only what it was."""
    return sorted(
        path.name.rpartition("-")[0] if path.name.startswith("ignored-") else path.name for path in folder.iterdir()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, of the steps 3 and 12."""
    write(tmp_path, 3)
    write(tmp_path, 12)
    return tmp_path


class TestAWholeCheckpoint:
    def test_the_newest_is_found_with_what_it_says_of_itself(self, folder: Path) -> None:
        found, ignored = find_newest(folder, TRAINING)
        assert (found, ignored) == (Checkpoint(folder / "step-12", 12, SETTING), ())
        assert size_of(found) > sum(map(len, FILES.values()))  # type: ignore[arg-type]

    def test_there_may_be_none(self, tmp_path: Path) -> None:
        assert find_newest(tmp_path / "none", TRAINING) == (None, ())

    def test_only_the_newest_are_kept(self, folder: Path) -> None:
        write(folder, 13)
        prune(folder, 2)
        assert names(folder) == ["step-12", "step-13"]
        prune(folder, 5)
        assert names(folder) == ["step-12", "step-13"]

    def test_how_it_was_run_may_differ(self, folder: Path) -> None:
        shutil.rmtree(folder / "step-12")
        other = replace(SETTING, world_size=1)
        (staging(folder, 12)).mkdir()
        commit(folder, 12, TRAINING, other)
        found, _ = find_newest(folder, TRAINING)
        assert found is not None and found.setting == other


class TestADamagedCheckpoint:
    """The one before is used, and the damaged one is set aside."""

    def refused(self, folder: Path, reason: str) -> None:
        found, ignored = find_newest(folder, TRAINING)
        assert found is not None and found.step == 3
        assert [one.name for one in ignored] == ["step-12"]
        assert reason in ignored[0].reason
        assert names(folder) == ["ignored-step-12", "step-3"]

    @pytest.mark.parametrize("name", [*FILES, MARKER])
    def test_one_flipped_bit(self, folder: Path, name: str) -> None:
        path = folder / "step-12" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        self.refused(folder, f"{name} is damaged")

    @pytest.mark.parametrize("name", [*FILES, MARKER])
    def test_a_truncated_file(self, folder: Path, name: str) -> None:
        path = folder / "step-12" / name
        os.truncate(path, path.stat().st_size // 2)
        self.refused(folder, f"{name} is damaged")

    def test_every_single_bit_of_the_marker(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        marker = (folder / "step-12" / MARKER).read_bytes()
        for at in range(0, len(marker), 7):
            copy = tmp_path_factory.mktemp("copy") / "checkpoints"
            shutil.copytree(folder, copy)
            changed = bytearray(marker)
            changed[at] ^= 1 << at % 8
            (copy / "step-12" / MARKER).write_bytes(changed)
            found, _ = find_newest(copy, TRAINING)
            # White space between the entries says nothing.
            assert found is not None and (found.step == 3 or json.loads(changed) == json.loads(marker))

    def test_no_marker(self, folder: Path) -> None:
        (folder / "step-12" / MARKER).unlink()
        self.refused(folder, f"incomplete: no {MARKER}")

    def test_a_missing_file(self, folder: Path) -> None:
        (folder / "step-12" / "optimizer.pt").unlink()
        self.refused(folder, "files are missing or were added: optimizer.pt")

    def test_an_added_file(self, folder: Path) -> None:
        (folder / "step-12" / "optimizer.bin").touch()
        self.refused(folder, "files are missing or were added: optimizer.bin")

    def test_a_file_in_the_place_of_the_folder(self, folder: Path) -> None:
        shutil.rmtree(folder / "step-12")
        (folder / "step-12").touch()
        self.refused(folder, "cannot be read")

    def test_none_is_left_when_all_are_damaged(self, folder: Path) -> None:
        for path in folder.glob("step-*/optimizer.pt"):
            path.write_bytes(b"")
        found, ignored = find_newest(folder, TRAINING)
        assert found is None
        assert [one.name for one in ignored] == ["step-12", "step-3"]


class TestAForeignCheckpoint:
    @pytest.mark.parametrize(
        ("other", "reason"),
        [
            (replace(TRAINING, key="c" * 64), "another training: key cccc"),
            (replace(TRAINING, steps=11), "another training: steps 11 and not 10"),
            (replace(TRAINING, rows=41), "another training: rows 41 and not 40"),
            (replace(TRAINING, order="d" * 64), "another training: order dddd"),
        ],
    )
    def test_of_another_training(self, folder: Path, other: Training, reason: str) -> None:
        write(folder, 14, other)
        found, ignored = find_newest(folder, TRAINING)
        assert found is not None and found.step == 12
        assert reason in ignored[0].reason

    def test_under_the_name_of_another_step(self, folder: Path) -> None:
        shutil.copytree(folder / "step-3", folder / "step-40")
        found, ignored = find_newest(folder, TRAINING)
        assert found is not None and found.step == 12
        assert "step 3 and not 40" in ignored[0].reason


def killed_at(folder: Path, last: int) -> int:
    """Write the checkpoint of step 12 in a child that kills itself before its `last`-th file operation."""
    pid = os.fork()
    if pid == 0:
        events = 0

        def count(name: str, args: tuple[object, ...]) -> None:
            nonlocal events
            if name in ("open", "os.mkdir", "os.rename") and str(folder) in str(args[0]):
                events += 1
                if events == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            write(folder, 12)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TestAWriterThatIsKilled:
    """At each file operation in turn: there is the old checkpoint alone, or the new one whole."""

    def test_at_every_file_operation(self, tmp_path: Path) -> None:
        steps, event = [], 0
        while True:
            event += 1
            folder = tmp_path / str(event)
            write(folder, 3)
            code = killed_at(folder, event)
            found, ignored = find_newest(folder, TRAINING)
            assert found is not None and ignored == ()
            assert names(folder) in (["step-3"], ["step-12", "step-3"])
            steps.append(found.step)
            if code == 0:
                break
            assert code == -signal.SIGKILL
        print(f"killed at {event - 1} file operations")
        assert event > 10
        assert steps == sorted(steps) and {*steps} == {3, 12}
