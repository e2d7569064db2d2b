"""The store: an artefact is there completely or not at all, and what is there is what was committed."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptArtefact, Incomplete
from pipeline.core.lineage import Manifest
from pipeline.core.store import MANIFEST, Artefact, Store, write_by_rename
from tests.support import cli_env

KEY = "a" * 64


def a_manifest(content: str = "c" * 64, key: str = KEY) -> Manifest:
    return Manifest(
        key=key,
        stage="filter",
        parts={},
        content=content,
        files={},
        rows_in=1,
        rows_out=1,
        rejected={},
        metrics={},
        versions={},
    )


def write_files(folder: Path, text: str = "rows") -> None:
    (folder / "rows").mkdir()
    (folder / "rows" / "part-00000.parquet").write_text(text, "utf-8")
    (folder / "facts.json").write_text("{}", "utf-8")


def commit(store: Store, text: str = "rows", content: str = "c" * 64, *, force: bool = False) -> Artefact:
    with store.staging("filter") as staged:
        write_files(staged, text)
        return store.commit(staged, a_manifest(content), replace_other_content=force)


def staged_folders(store: Store) -> list[Path]:
    folder = store.root / ".staging"
    return sorted(folder.iterdir()) if folder.exists() else []


def quarantined(store: Store) -> list[Path]:
    folder = store.root / ".quarantine"
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(tmp_path / "store")


class TestCommit:
    def test_nothing_is_there_before(self, store: Store) -> None:
        assert store.find("filter", KEY) is None
        with store.staging("filter") as staged:
            write_files(staged)
            assert store.find("filter", KEY) is None

    def test_everything_is_there_after(self, store: Store) -> None:
        committed = commit(store)
        found = store.find("filter", KEY)
        assert found == committed
        assert found.path == store.root / "filter" / KEY
        assert (found.path / "rows" / "part-00000.parquet").read_text("utf-8") == "rows"
        assert set(found.manifest.files) == {"facts.json", "rows/part-00000.parquet"}
        assert found.manifest.files["facts.json"]["bytes"] == 2
        assert [*store.artefacts()] == [("filter", KEY)]
        assert staged_folders(store) == []

    def test_an_exception_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(ZeroDivisionError), store.staging("filter") as staged:
            write_files(staged)
            raise ZeroDivisionError
        assert staged_folders(store) == []
        assert store.find("filter", KEY) is None
        assert [*store.artefacts()] == []

    def test_two_stagings_of_one_stage_do_not_meet(self, store: Store) -> None:
        with store.staging("filter") as one, store.staging("filter") as other:
            assert one != other

    def test_a_second_writer_adopts_what_the_first_committed(self, store: Store) -> None:
        first = commit(store, "first", "1" * 64)
        second = commit(store, "second", "2" * 64)
        assert second == first
        assert (first.path / "rows" / "part-00000.parquet").read_text("utf-8") == "first"
        assert quarantined(store) == []
        assert staged_folders(store) == []

    def test_a_writer_that_loses_the_race_at_the_rename_adopts_the_winners(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.rename

        def rename(source: Path, target: Path) -> None:
            if target.name == KEY:
                monkeypatch.undo()
                commit(store, "winner", "1" * 64)
            real(source, target)

        monkeypatch.setattr(os, "rename", rename)
        loser = commit(store, "loser", "2" * 64)
        assert (loser.path / "rows" / "part-00000.parquet").read_text("utf-8") == "winner"
        assert loser.manifest.content == "1" * 64
        assert staged_folders(store) == []

    def test_a_second_writer_replaces_a_corrupt_one(self, store: Store) -> None:
        first = commit(store, "first")
        (first.path / "facts.json").write_text("[]", "utf-8")
        second = commit(store, "second")
        assert (second.path / "rows" / "part-00000.parquet").read_text("utf-8") == "second"
        assert len(quarantined(store)) == 1

    @pytest.mark.parametrize("call", ["fsync", "rename"])
    def test_a_disk_that_fails_leaves_no_artefact(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(Incomplete, match="No space left on device"):
            commit(store)
        monkeypatch.undo()
        assert store.find("filter", KEY) is None
        assert staged_folders(store) == []
        assert commit(store).path.is_dir(), "the same again succeeds"

    def test_no_fsync_may_fail_unnoticed(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fail the n-th fsync, for every n that happens: no commit may succeed or stay visible unless all did."""
        real, calls = os.fsync, 0
        fail_at = 0

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(5, "Input/output error")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        commit(store)
        happened, before_rename = calls, calls - 2
        assert before_rename >= 5, "two files, two folders, the manifest"
        for fail_at in range(1, happened + 1):
            shutil.rmtree(store.root)
            store.root.mkdir()
            calls = 0
            with pytest.raises(Incomplete):
                commit(store)
            assert (store.find("filter", KEY) is None) == (fail_at <= before_rename)


class TestForce:
    def test_equal_content_keeps_the_old_artefact(self, store: Store) -> None:
        commit(store, "first")
        kept = commit(store, "second", force=True)
        assert (kept.path / "rows" / "part-00000.parquet").read_text("utf-8") == "first"
        assert quarantined(store) == []

    def test_other_content_replaces_and_quarantines_it(self, store: Store) -> None:
        commit(store, "first", "1" * 64)
        new = commit(store, "second", "2" * 64, force=True)
        assert (new.path / "rows" / "part-00000.parquet").read_text("utf-8") == "second"
        assert store.find("filter", KEY) == new
        (old,) = quarantined(store)
        assert "replaced" in old.name
        assert (old / "rows" / "part-00000.parquet").read_text("utf-8") == "first"

    def test_a_corrupt_one_is_replaced_whatever_it_said_of_itself(self, store: Store) -> None:
        old = commit(store, "first")
        (old.path / MANIFEST).unlink()
        new = commit(store, "second", force=True)
        assert (new.path / "rows" / "part-00000.parquet").read_text("utf-8") == "second"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped byte": lambda folder: flip(folder / "rows" / "part-00000.parquet"),
    "truncated": lambda folder: os.truncate(folder / "rows" / "part-00000.parquet", 2),
    "emptied": lambda folder: os.truncate(folder / "facts.json", 0),
    "appended": lambda folder: (folder / "facts.json").write_text("{} ", "utf-8"),
    "missing": lambda folder: (folder / "facts.json").unlink(),
    "extra": lambda folder: (folder / "rows" / "part-00001.parquet").write_text("more", "utf-8"),
    "renamed": lambda folder: (folder / "facts.json").rename(folder / "fact.json"),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: os.truncate(folder / MANIFEST, 0),
    "changed manifest": lambda folder: (folder / MANIFEST).write_text(
        (folder / MANIFEST).read_text("utf-8").replace('"rows_out": 1', '"rows_out": 2'), "utf-8"
    ),
}


class TestCorruption:
    @pytest.mark.parametrize("damage", list(DAMAGE))
    def test_it_is_found_before_use(self, store: Store, damage: str) -> None:
        folder = commit(store).path
        DAMAGE[damage](folder)
        with pytest.raises(CorruptArtefact) as caught:
            store.find("filter", KEY)
        assert str(folder) in caught.value.where
        assert folder.exists(), "finding moves nothing"

    def test_an_artefact_under_another_key_is_found_too(self, store: Store) -> None:
        folder = commit(store).path
        shutil.copytree(folder, folder.with_name("b" * 64))
        with pytest.raises(CorruptArtefact, match="the manifest is of filter aaaaaaaaaaaa"):
            store.find("filter", "b" * 64)

    def test_every_single_flipped_bit_of_the_manifest_is_found(self, store: Store) -> None:
        path = commit(store).path / MANIFEST
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            if says_something_else(path, whole):
                with pytest.raises(CorruptArtefact):
                    store.find("filter", KEY)

    def test_it_is_quarantined_loudly_and_counts_as_missing(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        flip(commit(store).path / "facts.json")
        with caplog.at_level(logging.ERROR, logger="pipeline"):
            assert store.find_sound("filter", KEY) is None
        assert "facts.json" in caplog.text
        assert "sha256" in caplog.text
        (moved,) = quarantined(store)
        assert "corrupt" in moved.name
        assert store.find("filter", KEY) is None
        assert [*store.artefacts()] == []

    def test_quarantining_what_is_already_gone_is_no_error(self, store: Store) -> None:
        store.quarantine("filter", KEY, "corrupt")
        assert quarantined(store) == []


def says_something_else(path: Path, whole: bytes) -> bool:
    """Whether damaged JSON differs in what it says (white space between values says nothing)."""
    try:
        return bool(json.loads(path.read_bytes()) != json.loads(whole))
    except ValueError:
        return True


SYNCED_COMMIT = """
import sys
from pathlib import Path
from pipeline.core.store import Store
from tests.unit.test_store import commit
commit(Store(Path(sys.argv[1])))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace: apt-get install strace")
def test_all_bytes_are_on_disk_before_the_rename_and_the_manifest_is_last(tmp_path: Path) -> None:
    root, trace = tmp_path / "store", tmp_path / "trace"
    command = ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", str(trace)]
    done = subprocess.run(
        [*command, sys.executable, "-c", SYNCED_COMMIT, str(root)],
        env=cli_env(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "ptrace" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("needs the right to trace processes (ptrace)")
    assert done.returncode == 0, done.stderr
    calls = []
    for line in trace.read_text("utf-8").splitlines():
        if (match := re.search(r"fsync\(\d+<([^>]*)>", line)) and match[1].startswith(str(root)):
            calls.append(re.sub(r"^.*/\.staging/[^/]*", "STAGED", match[1]).replace(str(root), "STORE"))
        elif "rename" in line and str(root) in line:
            calls.append("RENAME")
    assert calls == [
        "STAGED/facts.json",
        "STAGED/rows/part-00000.parquet",
        "STAGED/rows",
        f"STAGED/{MANIFEST}",
        "STAGED",
        "RENAME",
        "STORE/filter",
        "STORE",
    ]


class TestWriteByRename:
    def test_the_new_text_is_there_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "lock.json"
        write_by_rename(path, "one")
        write_by_rename(path, "two")
        assert path.read_text("utf-8") == "two"
        assert [each.name for each in path.parent.iterdir()] == ["lock.json"]

    def test_a_failure_keeps_the_old_text(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "lock.json"
        write_by_rename(path, "one")

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write_by_rename(path, "two")
        monkeypatch.undo()
        assert path.read_text("utf-8") == "one"
        assert [each.name for each in path.parent.iterdir()] == ["lock.json"]

    def test_what_a_killed_process_left_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / f".lock.json.{os.getpid()}").write_text("half", "utf-8")
        write_by_rename(tmp_path / "lock.json", "one")
        assert [each.name for each in tmp_path.iterdir()] == ["lock.json"]
