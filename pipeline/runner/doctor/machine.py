"""What the computer is: cores, memory, GPUs, shared memory, clock."""

import csv
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipeline.core.machine import cgroup_memory, read_setting, usable_memory
from pipeline.runner.doctor.finding import Finding

GIB: Final = 2**30
SMALL_MEMORY: Final = 4 * GIB
SMALL_SHM: Final = GIB
"""Below this several GPUs' processes (NCCL) run out of it; containers get 64 MiB unless told otherwise."""
SKEW_S: Final = 5.0
NVIDIA_SMI: Final = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.used,driver_version",
    "--format=csv,noheader,nounits",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        total, used: bytes of its memory.
    """

    name: str
    total: int
    used: int
    driver: str


def check_machine(gpus: Sequence[Gpu] | str) -> list[Finding]:
    """All checks of this module but the clock's, which needs a folder (see `check_clock`)."""
    limit = cgroup_memory()
    return [
        check_cores(len(os.sched_getaffinity(0)), cgroup_cores(Path("/sys/fs/cgroup")), os.cpu_count() or 1),
        check_memory(Path("/proc/meminfo").read_text("utf-8"), limit),
        check_gpus(gpus),
        check_shared_memory(Path("/dev/shm")),
    ]


def check_cores(usable: int, quota: float | None, installed: int) -> Finding:
    """How many cores we may use.

    Args:
        usable: by our CPU affinity.
        quota: by our cgroup; None: no limit.
    """
    few = usable if quota is None else min(usable, quota)
    return Finding("cores", "ok", f"{few:g} of {installed}" if few < installed else f"{installed}")


def check_memory(meminfo: str, limit: int | None) -> Finding:
    """How much memory there is.

    Args:
        meminfo: the text of /proc/meminfo.
        limit: bytes that our cgroup may use; None: no limit.
    """
    total, free = usable_memory(meminfo, limit)
    detail = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB of it free"
    if free < SMALL_MEMORY:
        return Finding("memory", "warn", detail, "end other programs; vLLM and training take gigabytes")
    return Finding("memory", "ok", detail)


def cgroup_cores(root: Path) -> float | None:
    """Cores that our cgroup may use (version 2, then 1); None: no limit. Limits further up are not looked for."""
    quota, _, period = read_setting(root / "cpu.max").partition(" ")
    if not period:
        quota, period = read_setting(root / "cpu/cpu.cfs_quota_us"), read_setting(root / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) > 0 else None


def find_gpus(command: Sequence[str] = NVIDIA_SMI, timeout_s: float = 5) -> list[Gpu] | str:
    """The NVIDIA GPUs of this machine, or why their tool could not say; empty without the tool."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer within {timeout_s:g} s"
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"
    if done.returncode != 0:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
        return f"{command[0]} failed (exit {done.returncode}): {' '.join(last)}"
    return read_gpus(done.stdout)


def read_gpus(text: str) -> list[Gpu] | str:
    """What nvidia-smi printed. Where memory is shared with the CPU it says [N/A], which counts as 0."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != 4:
            return f"nvidia-smi said what is not understood: {text.strip()[:100]}"
        total, used = (int(size) * 2**20 if size.strip().isdigit() else 0 for size in row[1:3])
        gpus.append(Gpu(row[0], total, used, row[3].strip()))
    return gpus


def check_gpus(gpus: Sequence[Gpu] | str) -> Finding:
    """Which GPUs there are, and whether somebody uses them."""
    if isinstance(gpus, str):
        return Finding("GPU", "warn", gpus, "see why with nvidia-smi: a driver that does not run is no GPU")
    if not gpus:
        return Finding("GPU", "ok", "no NVIDIA GPU; models run on the CPU")
    kinds = {f"{gpu.name}, {gpu.total / GIB:.0f} GiB": 0 for gpu in gpus}
    for gpu in gpus:
        kinds[f"{gpu.name}, {gpu.total / GIB:.0f} GiB"] += 1
    detail = f"{'; '.join(f'{count} × {kind}' for kind, count in kinds.items())}, driver {gpus[0].driver}"
    busy = [f"GPU {index}: {gpu.used / GIB:.1f} GiB" for index, gpu in enumerate(gpus) if gpu.used * 10 > gpu.total > 0]
    if busy:
        todo = "end what uses it, choose others with CUDA_VISIBLE_DEVICES, or lower --gpu-memory-utilization"
        return Finding("GPU", "warn", f"{detail}; in use: {', '.join(busy)}", todo)
    return Finding("GPU", "ok", detail)


def check_shared_memory(folder: Path) -> Finding:
    """How large /dev/shm is."""
    try:
        total = shutil.disk_usage(folder).total
    except OSError as error:
        return Finding("shared memory", "warn", f"{folder}: {error.strerror}", "several GPUs together need it")
    detail = f"{folder} has {total / GIB:.1f} GiB"
    if total < SMALL_SHM:
        todo = "several GPUs together need more: docker run --shm-size 8g (or --ipc host)"
        return Finding("shared memory", "warn", detail, todo)
    return Finding("shared memory", "ok", detail)


def check_clock(now: float, written: float | None, installed: float) -> Finding:
    """Whether the clock can be right. Certificates are refused where it is far off; durations never depend on it.

    Args:
        now: seconds since 1970 by the clock.
        written: modification time of a file that was written just now in the data folder; None: none could be.
        installed: modification time of this program.
    """
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    todo = "set the clock (timedatectl set-ntp true)"
    if now < installed - 86_400:
        return Finding("clock", "warn", f"{shown}, which is before this program was installed", todo)
    if written is not None and abs(written - now) > SKEW_S:
        detail = f"{shown}, {abs(written - now):.0f} s away from that of the data folder's file system"
        return Finding("clock", "warn", detail, todo)
    return Finding("clock", "ok", shown)
