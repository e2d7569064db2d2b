"""Runs a command and prints one JSON line of what it cost: a small process of its own, since a child's peak memory
counts from that of the process which made it."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    began = time.perf_counter()
    with Path(sys.argv[1]).open("wb") as out:
        subprocess.run(sys.argv[2:], stdout=out, check=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s, wall_s = usage.ru_utime + usage.ru_stime, time.perf_counter() - began
    print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": usage.ru_maxrss / 1024}))
