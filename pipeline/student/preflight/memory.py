"""Whether the training fits the device, by an estimate that is made before the first step."""

from typing import Final

from pipeline.student.memory import GIB, MemoryEstimate
from pipeline.student.preflight.findings import Finding, fine, flawed

CLOSE: Final = 0.9
"""Share of the device's memory from which on an estimate is too close to it."""

FIX: Final = (
    "lower train.micro_batch_size or train.max_length, set train.gradient_checkpointing, or train adapters "
    "(train.tuning)"
)


def check_memory(needed: MemoryEstimate) -> Finding:
    """PF22: number format of the weights, and what a training with the longest of the rows needs of the memory."""
    figure = str(needed)
    share = needed.share
    if share is None or share <= CLOSE:
        return fine("PF22", figure)
    message = f"it needs about {needed.total * needed.processes / GIB:,.1f} GiB, {share:.0%} of what the device has"
    return flawed("PF22", "error" if share > 1 else "warning", figure, message, fix=FIX)


def fits_whole(needed: MemoryEstimate) -> bool:
    """Whether one process can run the model forwards and backwards; it makes no step, and so needs no optimizer."""
    return needed.available is None or needed.total - needed.optimizer <= needed.available


def ran_out(needed: MemoryEstimate, check: str, told: str) -> Finding:
    """PF22: a check that takes no more than the training does found no memory.

    Args:
        check: its id.
        told: by the allocator.
    """
    told = (told.splitlines() or [""])[0]
    return flawed(
        "PF22", "error", str(needed), f"the device ran out of memory in {check}: {told}".rstrip(": "), fix=FIX
    )
