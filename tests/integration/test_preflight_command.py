"""`python -m pipeline preflight` as a person and as a script use it, on a run that was not trained yet."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.student.preflight.findings import NAMES
from tests.support import run_cli, write_project
from tests.tiny_models import make_tiny_model
from tests.training_rows import ROOT, SMALL

ACCELERATE = str(ROOT / "configs" / "accelerate" / "cpu.yaml")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    path = write_project(folder, rows=30, train={**SMALL, "accelerate": ACCELERATE})
    make_tiny_model(folder / "student")
    missing = run_cli("preflight", path, cwd=folder)
    assert missing.returncode == 2 and "preflight needs the rows of prompts" in missing.stderr
    assert run_cli("run", path, "--until", "dataset", cwd=folder).returncode == 0
    return path


def test_all_checks_and_two_rows_are_printed_and_nothing_stays_behind(config: Path) -> None:
    done = run_cli("preflight", config, cwd=config.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:4] for line in lines if line.startswith("PF")] == [*NAMES]
    assert sum(line.startswith("row ") for line in lines) == 2
    assert "<|assistant|>[[It is number " in done.stdout and "</s>]]" in done.stdout
    assert "30 rows in, 30 trained" in done.stdout
    assert "\x1b" not in done.stdout, "this is no terminal"
    work = config.parent / "data" / "work" / "preflight"
    assert [*work.iterdir()] == []
    assert not (config.parent / "data" / "store" / "train").exists()


def test_an_error_ends_it_with_exit_2_and_all_is_printed_nevertheless(config: Path) -> None:
    done = run_cli("preflight", config, "--json", "--samples", "1", "--set", "train.max_length=8", cwd=config.parent)
    assert done.returncode == 2
    value = json.loads(done.stdout)
    assert value["errors"] == ["PF23"] and len(value["findings"]) == 23
    assert len(done.stderr.strip().splitlines()) == 3
    assert "no row is left to train on" in done.stderr and "PF23" in done.stderr


def test_an_unknown_id_is_refused_with_the_nearest(config: Path) -> None:
    done = run_cli("preflight", config, "--set", "train.accept_findings=[PF8]", cwd=config.parent)
    assert done.returncode == 2 and "did you mean 'PF08'?" in done.stderr


def test_what_train_refuses_by_its_config_alone_is_refused(config: Path) -> None:
    adapters = '{"kind": "lora", "target_modules": ["lm_head"]}'
    done = run_cli("preflight", config, "--set", f"train.tuning={adapters}", cwd=config.parent)
    assert done.returncode == 2 and "lm_head cannot have an adapter" in done.stderr
    if find_spec("trackio") is None:
        done = run_cli("preflight", config, "--set", "train.trackers=[trackio]", cwd=config.parent)
        assert done.returncode == 2 and "the tracker trackio is not installed" in done.stderr
