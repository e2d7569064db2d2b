"""A training by several processes, on one machine or two, comes to the same as by one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.core.config import TrainStep
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_train import StudentModel
from pipeline.core.errors import ExitCode, UsageError
from pipeline.core.record import Message
from pipeline.stages import train
from pipeline.stages.train import launch
from pipeline.student.jobs import TrainJob
from tests.support import POLICY, RecordedEvents, cli_env, make_context, read_events, run_cli, write_project
from tests.tiny_models import make_tiny_model
from tests.training_rows import ROOT, small_config, sum_row, train_here, write_dataset

LORA = {"kind": "lora", "r": 4, "alpha": 8, "train_tokens": []}
FIGURES = ("loss", "grad_norm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [sum_row(number, completion=(Message("assistant", str(number) * (number % 4 + 1)),)) for number in range(44)]
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", rows[:40], rows[40:])


def figures(out: Path, name: str) -> list[float]:
    """One of the figures of each step, of the first process."""
    return [point[name] for point in json.loads((out / "loss.json").read_text()) if name in point]


def launched(folder: Path, base: Path, dataset: Path, **changes: Any) -> tuple[Path, dict[str, Any], RecordedEvents]:
    """Train as the stage does, in processes of their own; `out`, metrics and events."""
    student, policy = StudentModel(model=str(base)), PolicyConfig.model_validate(POLICY)
    (folder / "out").mkdir(parents=True)
    ctx = make_context(folder)
    cfg = TrainStep(train=small_config(**changes), student=student, policy=policy)
    result = train.run(cfg, {"dataset": dataset}, folder / "out", ctx)
    assert isinstance(ctx.events, RecordedEvents)
    return folder / "out", {**result.metrics}, ctx.events


class TestTwoProcessesOfOneMachine:
    """Adapters, whose path through the training a wrong share of the gradient would change at the first step; rows of
    unequal lengths, so that the processes have unequal numbers of tokens."""

    STEPS = 10

    @pytest.fixture(scope="class")
    def both(
        self, tmp_path_factory: pytest.TempPathFactory, base: Path, dataset: Path
    ) -> tuple[Path, Path, dict[str, Any], RecordedEvents]:
        settings = {"tuning": LORA, "epochs": 2, "learning_rate": 1e-2, "micro_batch_size": 4}
        folder = tmp_path_factory.mktemp("both")
        one, _ = train_here(folder / "one", base, dataset, **settings)
        two, metrics, events = launched(folder / "two", base, dataset, processes=2, **settings)
        return one.out, two, metrics, events

    def test_both_take_part(self, both: tuple[Path, Path, dict[str, Any], RecordedEvents]) -> None:
        """Accelerate starts one process where it is asked for two with `--cpu`, without a word."""
        *_, metrics, events = both
        assert metrics["world_size"] == 2
        assert [fields["world_size"] for name, fields in events.seen if name == "train_started"] == [2]

    @pytest.mark.parametrize("name", FIGURES)
    def test_every_step_has_the_loss_and_the_gradient_of_one_process(
        self, both: tuple[Path, Path, dict[str, Any], RecordedEvents], name: str
    ) -> None:
        one, two, *_ = both
        assert len(figures(one, name)) == self.STEPS
        assert figures(two, name) == pytest.approx(figures(one, name), rel=1e-4, abs=1e-5)

    def test_the_adapters_end_where_those_of_one_process_do(
        self, both: tuple[Path, Path, dict[str, Any], RecordedEvents], base: Path
    ) -> None:
        one, two, start = (
            load_file(folder / "model.safetensors") for folder in (both[0] / "model", both[1] / "model", base)
        )
        moved = {name for name in one if not one[name].equal(start[name])}
        assert len(moved) >= 14, "every linear layer"
        for name in one:
            assert (one[name] - two[name]).abs().max() < 1e-4, name

    def test_only_the_first_one_reports_and_writes(
        self, both: tuple[Path, Path, dict[str, Any], RecordedEvents]
    ) -> None:
        _, two, _, events = both
        steps = [fields["step"] for name, fields in events.seen if name == "train_point" and "loss" in fields]
        assert steps == list(range(1, self.STEPS + 1)), "each once"
        for name in ("train_started", "memory_estimated"):
            assert len([1 for event, _ in events.seen if event == name]) == 1
        assert [point["step"] for point in json.loads((two / "loss.json").read_text()) if "loss" in point] == steps


@pytest.mark.soak
def test_two_processes_that_share_one_models_weights_train_like_one(tmp_path: Path, base: Path, dataset: Path) -> None:
    """FSDP2, which divides weights, gradients and the optimizer's state, here over gloo on a CPU."""
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True}))
    settings = {"max_steps": 4, "micro_batch_size": 2, "checkpoint": {"steps": 2}}
    one, _ = train_here(tmp_path / "one", base, dataset, **settings)
    two, metrics, _ = launched(
        tmp_path / "two", base, dataset, processes=2, accelerate=tmp_path / "fsdp2.yaml", **settings
    )
    assert metrics["world_size"] == 2
    assert metrics["memory"]["weights"] * 2 == pytest.approx(4 * metrics["parameters"], abs=8), "each holds a half"
    for name in FIGURES:
        assert len(figures(one.out, name)) == 4
        assert figures(two, name) == pytest.approx(figures(one.out, name), rel=1e-4, abs=1e-5)
    weights = (load_file(out / "model" / "model.safetensors") for out in (one.out, two))
    alone, gathered = weights
    assert set(alone) == set(gathered)
    assert all((alone[name] - gathered[name]).abs().max() < 1e-3 for name in alone)


# ------------------------------------------------------------------------------------------------------ two machines


SHIM = """
import os, socket

def watched(name):
    original = getattr(socket.socket, name)
    def call(self, *arguments):
        address = arguments[-1]
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost", "0.0.0.0")):
            tell(f"{name} {address}")
        return original(self, *arguments)
    setattr(socket.socket, name, call)

def tell(what):
    with open(os.environ["OUTGOING"], "a") as file:
        file.write(what + "\\n")
    raise PermissionError("no connection to other machines: " + what)

for name in ("connect", "connect_ex", "sendto"):
    watched(name)
resolve = socket.getaddrinfo

def getaddrinfo(host, *arguments, **named):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname(), socket.getfqdn()):
        tell(f"getaddrinfo {host}")
    return resolve(host, *arguments, **named)

socket.getaddrinfo = getaddrinfo
"""
"""Loaded by every Python process at its start: names whoever turns to another machine, and forbids it."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in whose data folder `one` a process has trained, and in `two` two launchers on this machine, a process
    each, that know each other by an address only."""
    folder = tmp_path_factory.mktemp("project")
    make_tiny_model(folder / "base")
    (folder / "shim").mkdir()
    (folder / "shim" / "sitecustomize.py").write_text(SHIM)
    cpu = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    settings = small_config(max_steps=3, micro_batch_size=2, batch_size=4, accelerate=cpu)
    write_project(folder, student={"model": "./base"}, train=settings.model_dump(mode="json"))
    for data in ("one", "two"):
        done = run_cli("run", "run.yaml", "--until", "dataset", "--data", data, cwd=folder)
        assert done.returncode == 0, done.stderr
    one = subprocess.run(
        [sys.executable, "-m", "pipeline", "train", "run.yaml", "--data", "one"],
        cwd=folder,
        env=watched(folder, "one"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert one.returncode == 0, one.stderr
    port = free_port()
    machines = [start_machine(folder, rank, port) for rank in (0, 1)]
    codes = [machine.wait(timeout=300) for machine in machines]
    assert codes == [0, 0], "\n".join((folder / f"machine-{rank}.log").read_text()[-3000:] for rank in (0, 1))
    return folder


def watched(folder: Path, data: str) -> dict[str, str]:
    """The environment of somebody who set nothing, whose connections to other machines are forbidden and told."""
    unset = ("CI", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE")
    paths = f"{folder / 'shim'}:{ROOT}"
    env = cli_env({"PYTHONPATH": paths, "OUTGOING": str(folder / f"outgoing-{data}.txt"), "OMP_NUM_THREADS": "1"})
    return {name: value for name, value in env.items() if name not in unset}


class TestTwoMachines:
    def test_train_together_and_give_what_one_process_gives(self, project: Path) -> None:
        (run,) = (project / "two" / "runs").iterdir()
        events = read_events(run)
        assert [event["world_size"] for event in events if event["event"] == "train_started"] == [2]
        committed = [event["step"] for event in events if event["event"] == "step_committed"]
        assert committed.count("train") == 1, "the first one, once"
        (one,), (two,) = ((project / data / "store" / "train").iterdir() for data in ("one", "two"))
        assert two.name == one.name, "the same recipe"
        for name in FIGURES:
            assert len(figures(one, name)) == 3
            assert figures(two, name) == pytest.approx(figures(one, name), rel=1e-4, abs=1e-5)

    def test_leave_nothing_of_how_they_found_each_other(self, project: Path) -> None:
        assert not any((project / "two" / "nodes").iterdir())

    @pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
    def test_are_not_started_from_one(self, tmp_path: Path, base: Path, dataset: Path, kind: str) -> None:
        """The launcher would wait for the others for ever."""
        config = ROOT / "configs" / "accelerate" / f"{kind}-multi-node.yaml"
        cfg = small_config(accelerate=config)
        job = TrainJob(cfg, StudentModel(model=str(base)), dataset / "data", tmp_path, tmp_path, 1, "test")
        with pytest.raises(UsageError, match="is for 2 machines") as refused:
            launch(job, make_context(tmp_path), train.Progress(make_context(tmp_path)))
        assert refused.value.exit_code is ExitCode.USAGE
        assert "accelerate launch --config_file" in refused.value.todo and "--machine_rank" in refused.value.todo


@pytest.mark.parametrize("data", ["one", "two"])
def test_no_process_of_a_training_turns_to_another_machine(project: Path, data: str) -> None:
    """Neither launched by us nor by Accelerate: TRL would report its use, and transformers look for newer files."""
    outgoing = project / f"outgoing-{data}.txt"
    assert not outgoing.exists(), outgoing.read_text()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_machine(folder: Path, rank: int, port: int) -> subprocess.Popen[bytes]:
    """What is typed on one of two machines, with a process a machine on its CPU."""
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / "ddp-multi-node.yaml").read_text())
    (folder / "accelerate-two.yaml").write_text(
        yaml.safe_dump({**config, "num_processes": 2, "main_process_port": port})
    )
    flags = ["--config_file", "accelerate-two.yaml", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
    train_command = ["-m", "pipeline", "train", "run.yaml", "--data", "two"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *train_command]
    env = {**watched(folder, "two"), "ACCELERATE_USE_CPU": "true"}
    with (folder / f"machine-{rank}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
