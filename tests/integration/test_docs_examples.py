"""The examples of docs/examples say what their pages promise, started as their docstrings say."""

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def start(name: str, *arguments: str) -> list[str]:
    """The lines that an example prints after its heading: the very command of its docstring, in the checkout and with
    nothing in the environment that would find the package for it."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / name).read_text("utf-8"))) or ""
    (command,) = [line.strip() for line in docstring.splitlines() if line.startswith("    ")]
    assert command.endswith(f"python docs/examples/{name}")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    python = 'python() { "$INTERPRETER" "$@"; }; '
    done = subprocess.run(
        ["sh", "-c", f"{python}{command} {shlex.join(arguments)}"],
        cwd=ROOT,
        env=env | {"INTERPRETER": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


def test_the_table_of_temperatures() -> None:
    rows = {row.split()[0]: [float(cell) for cell in row.split()[1:]] for row in start("temperature.py")}
    assert rows["1"] == pytest.approx([0.858, 0.116, 0.026], abs=0.002)
    assert rows["10"] == pytest.approx([0.396, 0.324, 0.279], abs=0.002)


def test_soft_labels_are_measured_beside_hard_ones() -> None:
    rows = [line.replace("±", "").rsplit(maxsplit=4) for line in start("soft_labels.py", "2")]
    found = {name: (float(accuracy), float(agreement)) for name, accuracy, _, agreement, _ in rows}
    assert [*found] == ["teacher", "hard labels", "soft labels"]
    assert found["teacher"][1] == 1.0 and found["teacher"][0] > 0.9, "the teacher has learned the moons"
    assert all(0.5 < value <= 1 for pair in found.values() for value in pair)


def test_a_student_recognises_the_digit_that_it_never_saw() -> None:
    rows = [line.rsplit(maxsplit=2) for line in start("omitted_class.py")]
    omitted, overall = ({name: float(row[at]) for name, *row in rows} for at in (0, 1))
    assert omitted["student, labels"] == 0
    assert omitted["student, soft answers"] > 0.7
    assert omitted["student, soft answers, bias raised"] > 0.9
    assert omitted["student, soft answers, bias raised"] > omitted["student, labels, bias raised"] + 0.2
    assert overall["student, soft answers"] > overall["student, labels"] + 0.05
