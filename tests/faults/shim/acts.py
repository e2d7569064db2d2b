"""Work that a forked process of the host does besides whole commands: each returns an exit code as `main` would."""

import hashlib
import sys
from pathlib import Path

from pipeline.core.errors import Incomplete, PipelineError, disk_errors
from pipeline.student.checkpoints import Setting, Training, commit, find_newest, prune, staging
from pipeline.teacher.responses import ResponseStore

STEPS = 6
TRAINING = Training(key="7" * 64, steps=STEPS, rows=12, order="0" * 64)
SETTING = Setting(world_size=1, micro_batch_size=1, sharded=False, torch="2", transformers="5")


def weights(step: int) -> bytes:
    """What a training has learned after a step: a function of everything before it."""
    state = b"start"
    for number in range(1, step + 1):
        state = hashlib.sha256(state + bytes([number])).digest()
    return state * 500


def train(folder: str) -> int:
    """Go on from the newest checkpoint, with a checkpoint after each step, and write the weights at the end."""
    root = Path(folder)
    try:
        with disk_errors(folder, "make room, then run again"):
            root.mkdir(exist_ok=True)
            newest, _ = find_newest(root, TRAINING)
            state = b"start" if newest is None else (newest.path / "weights").read_bytes()[:32]
            for step in range(1 if newest is None else newest.step + 1, STEPS + 1):
                state = hashlib.sha256(state + bytes([step])).digest()
                staging(root, step).mkdir()
                (staging(root, step) / "weights").write_bytes(state * 500)
                (staging(root, step) / "curve.json").write_text(f"[{step}]", "utf-8")
                commit(root, step, TRAINING, SETTING)
                prune(root, keep=2)
            (root / "final").write_bytes(state * 500)
    except Incomplete as error:
        print(error, file=sys.stderr)
        return 3
    return 0


def fold(folder: str) -> int:
    """Read the stored answers and fold them, as a run does."""
    try:
        with disk_errors(folder, "make room, then run again"), ResponseStore(Path(folder)) as store:
            store.get_many({bytes(32): 64})
            store.fold()
    except PipelineError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0
