"""The tools of `make lint` pass: import contracts, strict types, style, format."""

from __future__ import annotations

import sys
import tomllib

from tests.architecture.checkout import ROOT, command, modules, tool

CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


def test_imports_flow_down() -> None:
    contracts = {contract["id"] for contract in CONFIG["importlinter"]["contracts"]}
    assert {"rooms", "stages", "core"} <= contracts
    # The function behind lint-imports, without its banner.
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = command(sys.executable, "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(contracts)} kept, 0 broken" in done.stdout, done.stdout


def test_strict_types() -> None:
    assert CONFIG["mypy"]["strict"] is True
    assert "pipeline" in CONFIG["mypy"]["files"]
    assert len(modules()) >= 20
    tool("mypy")


def test_style() -> None:
    tool("ruff", "check", ".")


def test_format() -> None:
    tool("ruff", "format", "--check", ".")
