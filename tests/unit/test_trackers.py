"""Trackers: what they are sent, that none slows or ends a training, and that a missing one is told before it begins.

trackio and W&B are not installed for tests. Small packages of their names, in a process of their own, write down what
they are given; TensorBoard's own files are read back in tests/training/test_course.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_train import StudentModel
from pipeline.core.errors import ExitCode, UsageError
from pipeline.student.jobs import TrainJob
from pipeline.student.trackers import Feeder, Tracked, figures, require_trackers
from tests.support import cli_env
from tests.training_rows import ROOT, small_config

KEY = "0123456789abcdef"
POINTS: list[dict[str, Any]] = [
    {"step": 1, "time": "2026-01-01T00:00:00.000+00:00", "loss": 2.5, "tokens": 100},
    {"step": 5, "time": "2026-01-01T00:00:01.000+00:00", "loss": 2.0, "eval_loss": 2.25, "tokens": 500},
]

# Written as the packages' own functions are called; each call becomes a line of `sent.jsonl`.
STAND_IN = """
import json, os, time
from pathlib import Path

def write(*what):
    with open(os.environ["SENT"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    def log(self, figures, step):
        if os.environ.get("FAIL") == str(step):
            raise ConnectionError("the service is gone")
        write("log", figures, step)

    def finish(self):
        write("finish")

def init(**arguments):
    write("init", arguments)
    return Run()

def Settings(**settings):
    return settings
"""

# Trackers of a training that goes on after a point: first its old points, then new ones.
FEED = """
import json, sys
from pathlib import Path
from pipeline.student.jobs import TrainJob
from pipeline.student.trackers import Trackers

job, before, new = TrainJob.read(Path(sys.argv[1])), json.loads(sys.argv[2]), json.loads(sys.argv[3])
trackers = Trackers.open(job, before, lambda report: print(json.dumps(report), flush=True))
for point in new:
    trackers.log(point)
trackers.close()
"""


def a_job(folder: Path, *trackers: str) -> TrainJob:
    work = folder / KEY
    work.mkdir(parents=True, exist_ok=True)
    (folder / "secret-place").mkdir(exist_ok=True)
    student = StudentModel(model=str(folder / "secret-place"))
    cfg = small_config(trackers=trackers)
    return TrainJob(cfg, student, folder / "data", folder / "out", work, 1, "test", "small")


def feed(
    folder: Path, tracker: str, before: list[dict[str, Any]], new: list[dict[str, Any]], **env: str
) -> tuple[list[Any], list[Any]]:
    """What a stand-in package was sent, and what the trackers reported."""
    package = folder / "packages" / tracker
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(STAND_IN)
    job, sent = folder / "job.json", folder / "sent.jsonl"
    sent.unlink(missing_ok=True)
    a_job(folder, tracker).write(job)
    done = subprocess.run(
        [sys.executable, "-c", FEED, str(job), json.dumps(before), json.dumps(new)],
        cwd=ROOT,
        env=cli_env({"PYTHONPATH": f"{package.parent}:{ROOT}", "SENT": str(sent), **env}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in sent.read_text().splitlines()], [
        json.loads(line) for line in done.stdout.splitlines()
    ]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
class TestOneThatIsNotInstalled:
    def test_is_told_with_the_command_that_installs_it(self, name: str) -> None:
        with pytest.raises(UsageError, match=f"the tracker {name} is not installed") as caught:
            require_trackers(["tensorboard", name])
        assert caught.value.exit_code is ExitCode.USAGE
        assert caught.value.todo == f"pip install {name}, or take it out of train.trackers"

    def test_is_told_before_a_row_is_encoded(self, name: str, tmp_path: Path) -> None:
        from pipeline.core.config import TrainStep
        from pipeline.core.config_policy import PolicyConfig
        from pipeline.stages import train
        from tests.support import POLICY, make_context

        job = a_job(tmp_path, name)
        cfg = TrainStep(train=job.train, student=job.student, policy=PolicyConfig.model_validate(POLICY))
        with pytest.raises(UsageError, match="is not installed"):
            train.run(cfg, {"dataset": tmp_path / "missing"}, tmp_path / "out", make_context(tmp_path))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
class TestWhatIsSent:
    def test_each_point_once_although_an_attempt_made_some_again(self, name: str, tmp_path: Path) -> None:
        sent, told = feed(tmp_path, name, [], POINTS)
        logged = [call[1:] for call in sent if call[0] == "log"]
        assert logged == [[{"loss": 2.5, "tokens": 100}, 1], [{"loss": 2.0, "eval_loss": 2.25, "tokens": 500}, 5]]
        assert (sent[-1], told) == (["finish"], [])
        again, _ = feed(tmp_path, name, POINTS[:1], [POINTS[1], {**POINTS[1], "step": 10}])
        assert [call[2] for call in again if call[0] == "log"] == [10]

    def test_under_one_name_for_all_attempts_at_a_training(self, name: str, tmp_path: Path) -> None:
        sent, _ = feed(tmp_path, name, [], POINTS)
        (init,) = [call[1] for call in sent if call[0] == "init"]
        assert (init["project"], init["name"], init["resume"]) == ("pipeline", "small-01234567", "allow")

    def test_settings_without_paths(self, name: str, tmp_path: Path) -> None:
        sent, _ = feed(tmp_path, name, [], POINTS)
        (init,) = [call[1] for call in sent if call[0] == "init"]
        assert (init["config"]["student"], init["config"]["batch_size"]) == ("local", 8)
        told = json.dumps(init)
        assert str(tmp_path) not in told and "secret-place" not in told and str(ROOT) not in told

    def test_one_that_fails_is_told_once_and_left_alone(self, name: str, tmp_path: Path) -> None:
        more = [{**POINTS[1], "step": step} for step in range(6, 20)]
        sent, told = feed(tmp_path, name, [], [*POINTS, *more], FAIL="5")
        assert [call[2] for call in sent if call[0] == "log"] == [1]
        assert told == [{"tracker": name, "failure": f"{name} failed: ConnectionError: the service is gone"}]


def test_wandb_is_asked_to_send_nothing_else(tmp_path: Path) -> None:
    sent, _ = feed(tmp_path, "wandb", [], POINTS)
    settings = sent[0][1]["settings"]
    assert (settings["console"], settings["disable_code"], settings["disable_git"]) == ("off", True, True)
    assert settings["x_disable_meta"] and settings["x_disable_stats"] and settings["x_disable_machine_info"]


def test_a_slow_tracker_does_not_slow_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.student import trackers

    class Slow:
        def __init__(self, tracked: Tracked) -> None:
            time.sleep(60)

        def log(self, point: trackers.Point) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(trackers, "OPENERS", {"wandb": Slow})
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    feeder = Feeder("wandb", Tracked.of(a_job(tmp_path)))
    feeder.start()
    for step in range(1000):
        feeder.points.put({"step": step})
    feeder.stop()
    assert feeder.failure == "it did not end within 0 s"


def test_figures_are_the_numbers_of_a_point() -> None:
    assert figures(POINTS[0]) == {"loss": 2.5, "tokens": 100}


def test_the_whole_is_the_stages_business(tmp_path: Path) -> None:
    """The run's name reaches the processes through the job file."""
    job = a_job(tmp_path, "tensorboard")
    job.write(tmp_path / "job.json")
    assert TrainJob.read(tmp_path / "job.json").run == "small"
