"""Markers and skips: a test that cannot run here says what it needs. No fixtures that replace our own modules."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

# Shared machines are slow at times, so no deadline. The default run is the same each time; the long one explores.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def find_chromium() -> str | None:
    named = os.environ.get("CHROMIUM")
    if named:
        return named if Path(named).is_file() else None
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# marker -> (is it here?, what to say when it is not)
NEEDS: dict[str, tuple[Callable[[], object], str]] = {
    "vllm": (
        lambda: find_spec("vllm"),
        "needs vLLM: `make test` installs the CPU build, the extra `vllm` the GPU build",
    ),
    "ray": (lambda: find_spec("ray"), "needs Ray: pip install ray"),
    "browser": (find_chromium, "needs Chromium: apt-get install chromium, or set CHROMIUM to its path"),
    "gpu": (lambda: Path("/dev/nvidiactl").exists(), "needs an NVIDIA GPU and its driver (/dev/nvidiactl)"),
}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if hypothesis.settings.get_current_profile_name() == "soak":
        for item in items:
            if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
                item.add_marker(pytest.mark.soak)  # their long form is the same test with more examples
    lacking = {marker: need for marker, (here, need) in NEEDS.items() if not here()}
    for item in items:
        for marker, need in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=need))


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; for tests marked `browser`, which are skipped where there is none."""
    path = find_chromium()
    assert path, NEEDS["browser"][1]
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parent.parent
