"""The command line answers without loading the heavy libraries: `--help` and `status` must not wait for torch."""

from __future__ import annotations

import re
import sys

from tests.architecture.checkout import command

HEAVY = {"torch", "vllm", "transformers", "pyarrow"}
LOADED = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s+([\w.]+)$", re.MULTILINE)


def roots(names: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_importing_the_cli_loads_nothing_heavy() -> None:
    done = command(sys.executable, "-c", "import sys, pipeline.cli; print('\\n'.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    loaded = roots(done.stdout.split())
    assert {"pipeline", "click"} <= loaded
    assert sorted(loaded & HEAVY) == []


def test_help_loads_nothing_heavy() -> None:
    done = command(sys.executable, "-X", "importtime", "-m", "pipeline", "--help")
    assert done.returncode == 0, done.stderr
    loaded = roots(LOADED.findall(done.stderr))
    assert {"pipeline", "click"} <= loaded, "the import log was not understood"
    assert sorted(loaded & HEAVY) == []
    assert "Usage" in done.stdout
