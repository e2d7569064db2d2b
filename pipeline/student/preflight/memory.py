"""Whether the training fits the device, by an estimate that is made before the first step."""

from typing import Final

from pipeline.student.memory import GIB, MemoryEstimate
from pipeline.student.preflight.findings import Finding, fine, flawed

CLOSE: Final = 0.9
"""Share of the device's memory from which on an estimate is too close to it."""


def check_memory(needed: MemoryEstimate) -> Finding:
    """PF22: number format of the weights, and what a training with the longest of the rows needs of the memory."""
    figure = str(needed)
    share = needed.share
    if share is None or share <= CLOSE:
        return fine("PF22", figure)
    fix = (
        "lower train.micro_batch_size or train.max_length, set train.gradient_checkpointing, or train adapters "
        "(train.tuning)"
    )
    message = f"it needs about {needed.total * needed.processes / GIB:,.1f} GiB, {share:.0%} of what the device has"
    return flawed("PF22", "error" if share > 1 else "warning", figure, message, fix=fix)
