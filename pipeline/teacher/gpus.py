"""Which GPUs a local server gets: those that are visible to us, dealt out in equal slices."""

import subprocess
from collections.abc import Mapping, Sequence

from pipeline.core.config_server import LocalServer
from pipeline.core.errors import UsageError


def server_environments(teacher: LocalServer, inherited: Mapping[str, str], installed: int) -> list[dict[str, str]]:
    """The environment of each server: ours, no telemetry, what the config adds, and of several servers each its own
    `gpus_each` GPUs. Without GPUs, or with an empty CUDA_VISIBLE_DEVICES, none are dealt out.

    Args:
        inherited: our own environment; its CUDA_VISIBLE_DEVICES, or the config's, says which GPUs are ours.
        installed: number of GPUs in this machine.

    Raises:
        UsageError: there are fewer GPUs than the servers need.
    """
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    environment = {**inherited, **quiet, **teacher.env}
    gpus = visible_gpus(environment.get("CUDA_VISIBLE_DEVICES"), installed)
    each = teacher.gpus_each
    if not gpus:
        return [dict(environment) for _ in range(teacher.servers)]
    if len(gpus) < teacher.servers * each:
        what = f"{teacher.servers} servers of {each} GPUs each need {teacher.servers * each}; {len(gpus)} are visible"
        todo = "lower the teacher's `servers` or the GPUs of each, or set CUDA_VISIBLE_DEVICES"
        raise UsageError(what, where="teachers.*.servers", todo=todo)
    if teacher.servers == 1:
        return [environment]  # nobody to share with: its own arguments decide (pipeline parallel, say)
    slices = [gpus[index * each : (index + 1) * each] for index in range(teacher.servers)]
    return [{**environment, "CUDA_VISIBLE_DEVICES": ",".join(some)} for some in slices]


def visible_gpus(variable: str | None, installed: int) -> Sequence[str]:
    """Names of the GPUs we may use, as CUDA reads its variable: all when it is not set, else up to the first -1."""
    if variable is None or installed == 0:
        return [str(index) for index in range(installed)]
    names = [name.strip() for name in variable.split(",") if name.strip()]
    return names[: names.index("-1")] if "-1" in names else names


def installed_gpus() -> int:
    """Number of NVIDIA GPUs in this machine; 0 where their tool is missing or fails."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
