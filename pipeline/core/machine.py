"""How much memory this machine gives us."""

import re
from pathlib import Path


def cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that our cgroup may use (version 2, then 1); None: no limit. Limits further up are not looked for."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = read_setting(root / name)
        if text.isdigit():
            return int(text)
    return None


def usable_memory(meminfo: str, limit: int | None) -> tuple[int, int]:
    """(all, free) bytes of memory that we may use.

    Args:
        meminfo: the text of /proc/meminfo.
        limit: bytes that our cgroup may use; None: no limit.
    """
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", meminfo, re.MULTILINE)}
    total, free = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    if limit is not None and limit < total:
        total, free = limit, min(free, limit)
    return total, free


def read_setting(path: Path) -> str:
    """The text of one of the system's small files; "" where there is none."""
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""
