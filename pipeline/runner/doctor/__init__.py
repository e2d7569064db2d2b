"""`doctor`: what of this machine a run needs, and what of it is there."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pipeline.core.load import Loaded
from pipeline.core.runs import lock_holder, run_lock
from pipeline.runner.doctor.finding import Finding
from pipeline.runner.doctor.folder import check_folder, nearest_folder
from pipeline.runner.doctor.machine import Gpu, check_clock, check_machine, find_gpus
from pipeline.runner.doctor.needs import WELL_KNOWN_KEYS, check_keys, check_needs, needs_engine
from pipeline.runner.doctor.software import check_hub, check_software
from pipeline.teacher.gpus import visible_gpus

CHECKOUT: Final = Path(__file__).parent.parent.parent.parent


def examine(data: Path, loaded: Loaded | None, environment: Mapping[str, str], home: Path) -> list[Finding]:
    """Look at this machine, and at what a config needs. Fetches nothing, asks no model, sends no key, ends no process.

    Args:
        data: the data folder; what is written to try it is removed.
        loaded: the config; None: what needs one is not looked at.
        environment: the environment variables.
        home: the user's folder.
    """
    gpus = find_gpus()
    usable = [] if isinstance(gpus, str) else usable_gpus(gpus, environment)
    needed = loaded is not None
    engine_needed = loaded is not None and needs_engine(loaded.config)
    software = check_software(CHECKOUT, usable, needed=needed, engine_needed=engine_needed)
    of_folder, written = check_folder(data)
    clock = check_clock(time.time(), written, Path(__file__).stat().st_mtime)
    found = [*software, *check_machine(gpus), *of_folder, clock, check_hub(environment, home)]
    if loaded is None:
        return [*found, *check_keys(WELL_KNOWN_KEYS, environment, needed=False)]
    if any(finding.state == "fail" for finding in software):
        detail = "what the config needs was not looked at, since the software is not complete"
        return [*found, Finding("config", "fail", detail, "install what is missing first")]
    holder = lock_holder(run_lock(data / "runs" / loaded.run_name))
    if holder is not None:
        found.append(Finding("run", "warn", f"held by {holder}", "wait for it to end, or end it"))
    free_disk = shutil.disk_usage(nearest_folder(data)).free
    try:
        return [*found, *check_needs(loaded, usable, environment, home, free_disk)]
    except ImportError as error:  # installed, by its metadata, and broken: a wheel of another Python or machine
        return [*found, Finding("config", "fail", f"a package cannot be imported: {error}", "install it anew")]


def usable_gpus(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves us; one that it names by its UUID is taken to be like the first."""
    if not gpus:
        return []
    names = visible_gpus(environment.get("CUDA_VISIBLE_DEVICES"), len(gpus))
    return [gpus[int(name) if name.isdigit() and int(name) < len(gpus) else 0] for name in names]
