"""A process with the shim that has imported everything and forks one child a command, so that a run costs no start.

Reads a JSON line per command from stdin and answers with one; started by `preload.Host`.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

WARM = (
    "aiohttp",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.ipc",
    "pyarrow.parquet",
    "uvloop",
    "pipeline.cli",
    "pipeline.teacher.fetch",
    "tests.faults.shim.acts",
    *(f"pipeline.stages.{stage}" for stage in ("prompts", "generate", "filter", "dedup", "dataset")),
)
HUNG_S = 120
"""Seconds after which a child is ended by SIGALRM."""


class State(ctypes.Structure):
    """`struct state` of shim.c."""

    _fields_ = (
        ("count", ctypes.c_long),
        ("fired", ctypes.c_long),
        ("jumps", ctypes.c_long),
        ("what", ctypes.c_char * (4096 + 64)),
    )


def serve() -> None:
    for name in WARM:
        importlib.import_module(name)
    assert threads() <= {f"{os.getpid()}", "jemalloc_bg_thd"}, "a fork would lose threads"
    sys.modules["pipeline.core.versions"].collect_versions()
    gc.freeze()
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.shim_state.restype = ctypes.POINTER(State)
    state = shim.shim_state().contents
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        ctypes.memset(ctypes.byref(state), 0, ctypes.sizeof(State))
        child = os.fork()
        if child == 0:
            obey(shim, order)
        _, status = os.waitpid(child, 0)
        counts = {"count": state.count, "fired": state.fired, "jumps": state.jumps, "what": state.what.decode()}
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"number": order["number"], "code": code, **counts}), flush=True)


def threads() -> set[str]:
    """Names of the threads, the main one as its number; jemalloc's own one comes back after a fork."""
    main = str(os.getpid())
    tasks = Path("/proc/self/task").iterdir()
    return {main if task.name == main else (task / "comm").read_text("utf-8").strip() for task in tasks}


def obey(shim: ctypes.CDLL, order: dict[str, Any]) -> None:
    """Become the process that runs the command; does not return."""
    code = 1
    try:
        signal.alarm(HUNG_S)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(order["cwd"])
        trace = -1 if order["trace"] is None else os.open(order["trace"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if order["seed"] is not None:
            shim.shim_jumping_clock(ctypes.c_ulonglong(order["seed"]))
        if order["root"] is not None:
            root, at = os.fsencode(Path(order["root"]).resolve()), ctypes.c_long(order["at"])
            shim.shim_arm(root, order["kind"], at, order["reads"], order["coarse"], trace)
        if order["act"] is None:
            code = sys.modules["pipeline.cli"].main(order["arguments"])
        else:
            code = getattr(sys.modules["tests.faults.shim.acts"], order["act"])(*order["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()  # what would be said of files and connections that nobody closed
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
