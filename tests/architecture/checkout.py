"""What the architecture tests look at: the files of this checkout, committed or not yet, without the ignored ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"


def files(*under: str) -> list[str]:
    """Paths relative to the root, sorted; of the given folders only, if any are given."""
    listed = command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *under)
    assert listed.returncode == 0, f"git ls-files failed:\n{listed.stderr}"
    return sorted({path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()})


def modules() -> list[Path]:
    return [ROOT / path for path in files("pipeline") if path.endswith(".py")]


def command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, errors="replace"
    )


def tool(*arguments: str) -> None:
    """Runs a tool of the environment that runs the tests; its own report is the failure's message."""
    done = command(sys.executable, "-m", *arguments)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
