"""The examples of docs/examples say what their pages promise."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cli_env

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def test_the_table_of_temperatures() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "temperature.py"], env=cli_env(), capture_output=True, text=True, check=True
    )
    rows = {row.split()[0]: [float(cell) for cell in row.split()[1:]] for row in done.stdout.splitlines()[1:]}
    assert rows["1"] == pytest.approx([0.858, 0.116, 0.026], abs=0.002)
    assert rows["10"] == pytest.approx([0.396, 0.324, 0.279], abs=0.002)


def test_soft_labels_are_measured_beside_hard_ones() -> None:
    example = runpy.run_path(str(EXAMPLES / "soft_labels.py"))
    found = example["measure"](0)
    assert [*found] == ["teacher", "hard labels", "soft labels"]
    assert found["teacher"][1] == 1.0 and found["teacher"][0] > 0.9, "the teacher has learned the moons"
    assert all(0.5 < value <= 1 for pair in found.values() for value in pair)


def test_a_student_recognises_the_digit_that_it_never_saw() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "omitted_class.py"],
        env=cli_env({"OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()[1:]]
    omitted, overall = ({name: float(row[at]) for name, *row in rows} for at in (0, 1))
    assert omitted["student, labels"] == 0
    assert omitted["student, soft answers"] > 0.7
    assert omitted["student, soft answers, bias raised"] > 0.9
    assert omitted["student, soft answers, bias raised"] > omitted["student, labels, bias raised"] + 0.2
    assert overall["student, soft answers"] > overall["student, labels"] + 0.05
