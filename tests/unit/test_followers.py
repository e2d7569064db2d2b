"""The other processes of a launch learn from the first one of that very launch whether there is anything to train."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.core.errors import Interrupted
from pipeline.core.lineage import Manifest, step_key
from pipeline.core.load import load_config
from pipeline.core.stage import Result
from pipeline.runner.keys import step_parts
from pipeline.runner.run import committed_before, follow_training, run_all, run_one
from pipeline.runner.session import Session, open_session
from pipeline.runner.steps import plan_steps
from pipeline.student.jobs import launch_id
from pipeline.student.worker import dismiss, follow, forget_dismissal
from tests.support import write_project

SOON_S = 3.0
"""Until a follower that nobody tells anything is stopped: several of its looks."""


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """We are the second process of a launch of three."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    return monkeypatch


@contextmanager
def stop_soon(stop: threading.Event) -> Iterator[threading.Event]:
    timer = threading.Timer(SOON_S, stop.set)
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()


def waits_for_ever(workdir: Path) -> None:
    with stop_soon(threading.Event()) as stop, pytest.raises(Interrupted):
        follow(workdir, stop)


class TestAFollower:
    def test_waits_until_it_is_told_or_stopped(self, tmp_path: Path) -> None:
        waits_for_ever(tmp_path / "key")

    def test_goes_when_it_is_dismissed_and_takes_its_word_with_it(
        self, tmp_path: Path, launched: pytest.MonkeyPatch
    ) -> None:
        dismiss(tmp_path / "train" / "key")  # of a result that another data folder's run brought: no folder yet
        for rank in ("1", "2"):
            launched.setenv("RANK", rank)
            follow(tmp_path / "train" / "key", threading.Event())
        assert list((tmp_path / "train").iterdir()) == []

    def test_does_not_take_files_of_another_launch_for_ours(self, tmp_path: Path, launched: pytest.MonkeyPatch) -> None:
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "worker.json").write_text(json.dumps({"launch": "another"}))
        with launched.context() as other:
            other.setenv("TORCHELASTIC_RESTART_COUNT", "7")
            dismiss(tmp_path / "key")
        waits_for_ever(tmp_path / "key")

    def test_trains_with_the_job_of_its_launch(self, tmp_path: Path) -> None:
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "worker.json").write_text(json.dumps({"launch": launch_id()}))
        with pytest.raises(KeyError, match="train"):  # it reads the job; this one has nothing in it
            follow(tmp_path / "key", threading.Event())

    def test_is_not_sent_away_by_a_word_that_the_first_process_took_back(self, tmp_path: Path) -> None:
        """Launches across machines may have one name; a follower that was killed has not read its word."""
        dismiss(tmp_path / "key")
        forget_dismissal(tmp_path / "key")
        waits_for_ever(tmp_path / "key")


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A run that has a result of `train`."""
    write_project(tmp_path / "project")
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):  # looked for and never loaded
        (tmp_path / "project" / "student" / name).write_text("{}")
    (tmp_path / "project" / "accelerate.yaml").write_text("distributed_type: 'NO'\n")
    monkeypatch.chdir(tmp_path / "project")
    session = open_session(load_config(Path("run.yaml"), ()), Path("data"), quiet=True)
    run_all(session, "dataset")
    step = next(step for step in plan_steps() if step.name == "train")
    parts = step_parts(session, step, committed_before(session, "train"))
    with session.store.staging("train") as staged:
        (staged / "loss.json").write_text("[]\n")
        manifest = Manifest.of("train", step_key(parts), parts, Result(1, 1, {}, "c" * 64), {})
        session.store.commit(staged, manifest)
    return session


class TestAResultThatIsThereAlready:
    def test_tells_a_follower_nothing(self, session: Session) -> None:
        """The first process may train all the same: told to (`--force`), or since it finds the result damaged."""
        with stop_soon(session.stop.requested), pytest.raises(Interrupted):
            follow_training(session)

    def test_the_first_process_dismisses_all_others(self, session: Session, launched: pytest.MonkeyPatch) -> None:
        launched.setenv("RANK", "0")
        assert not run_one(session, "train").ran
        for rank in ("1", "2"):
            launched.setenv("RANK", rank)
            with stop_soon(session.stop.requested):
                follow_training(session)

    def test_alone_it_has_nobody_to_tell(self, session: Session, launched: pytest.MonkeyPatch) -> None:
        launched.delenv("RANK")
        launched.delenv("WORLD_SIZE")
        assert not run_one(session, "train").ran
        assert list(Path("data/work").rglob("*.rank-*")) == []
