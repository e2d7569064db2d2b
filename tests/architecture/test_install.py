"""`make` installs once for each lock, and an index without a CPU build of torch is explained in three lines."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.architecture.checkout import ROOT

LOCK = "torch==2.13.0\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installing part of the repository, with a lock of one package."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "Makefile", copy)
    shutil.copytree(ROOT / "tools", copy / "tools")
    (copy / "requirements-cpu.lock").write_text(LOCK)
    return copy


def make(checkout: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", f"PYTHON={sys.executable}", "VENV=.venv", *arguments],
        cwd=checkout,
        env=plain | env,
        capture_output=True,
        text=True,
        check=False,
    )


def torch_wheel(folder: Path, source: str) -> None:
    info = "torch-2.13.0.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "torch-2.13.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/__init__.py", source)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ('raise OSError("libcudart.so.13: cannot open shared object file")', "libcudart.so.13"),
        ('class version: cuda = "13.0"', "13.0"),
    ],
    ids=["does not import", "is a CUDA build"],
)
def test_torch_that_is_no_cpu_build_is_explained_in_three_lines(checkout: Path, source: str, cause: str) -> None:
    torch_wheel(checkout / "index", source)
    done = make(checkout, "install", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(checkout / "index"))
    assert done.returncode != 0
    what, where, to_do = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert what.startswith("error: torch==2.13.0 is not a CPU build") and cause in what
    assert where.startswith("where: pip install torch==2.13.0")
    assert "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" in to_do
    assert not list(checkout.glob(".venv/.installed-*")), "a failed install must not count as done"
    assert not list(checkout.glob(".venv/lib/*/site-packages/torch")), "pip would keep it at the next call"


def test_one_install_a_lock(checkout: Path) -> None:
    torch_wheel(checkout / "index", "class version: cuda = None")
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout / "index")}
    first = make(checkout, "install", **index)
    assert first.returncode == 0, first.stderr
    assert "installing 1 packages" in first.stdout
    stamp = hashlib.sha256(LOCK.encode()).hexdigest()[:16]
    assert [path.name for path in checkout.glob(".venv/.installed-*")] == [f".installed-{stamp}"]

    again = make(checkout, "install", **index)
    assert again.returncode == 0 and "installing" not in again.stdout

    (checkout / "requirements-cpu.lock").write_text(LOCK + "# another lock\n")
    assert "tools/install.sh" in make(checkout, "-n", "install").stdout


def test_another_python_is_refused_in_three_lines(checkout: Path) -> None:
    done = make(checkout, "VENV=other", "PYTHON=no-such-python", "install")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert [line.partition(":")[0] for line in lines] == ["error", "where", "to do"]
    assert not (checkout / "other").exists()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"
