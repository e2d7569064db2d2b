"""What the tests of training share: a small data set on disk, a job on it, and a training in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.config_train import StudentModel, TrainConfig
from pipeline.core.record import RECORD_SCHEMA, Message, Record, to_table, write_parquet
from pipeline.stages.dataset import COLUMNS
from pipeline.student.jobs import TrainJob
from pipeline.student.worker import run_job
from tests.support import a_record

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = pa.schema([RECORD_SCHEMA.field(name) for name in COLUMNS])
SMALL: dict[str, Any] = {
    "max_length": 64,
    "epochs": 1,
    "batch_size": 8,
    "micro_batch_size": 8,
    "learning_rate": 5e-3,
    "precision": "float32",
    "threads": 1,
    "log_steps": 1,
    "accelerate": ROOT / "configs" / "accelerate" / "cpu.yaml",
}


def sum_row(number: int, **changes: Any) -> Record:
    """A row that asks for `number` + 1."""
    row = a_record(
        row_id=f"{number:032x}",
        prompt_id=f"p{number:04d}",
        prompt=(Message("user", f"What is {number} + 1?"),),
        completion=(Message("assistant", str(number + 1)),),
    )
    return replace(row, **changes)


def write_dataset(folder: Path, train: Sequence[Record], validation: Sequence[Record] = ()) -> Path:
    """An artefact folder of stage `dataset`, without its manifest."""
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", train), ("validation", validation)):
        if rows:
            table = to_table(RECORD_SCHEMA, rows).select(list(COLUMNS)).cast(SCHEMA)
            write_parquet(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def small_config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**SMALL, **changes})


def train_here(folder: Path, model: Path, dataset: Path, **changes: Any) -> tuple[TrainJob, dict[str, Any]]:
    """Train in this process; the job (its `out` holds model/ and loss.json) and what it says of itself."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    job = TrainJob(
        train=small_config(**changes),
        student=StudentModel(model=str(model)),
        data=dataset / "data",
        out=folder / "out",
        workdir=folder / "work",
        world_size=1,
        launch="test",
    )
    return job, run_job(job, lambda report: None)


def points(out: Path, name: str) -> list[float]:
    """One figure of all points of the loss curve in `out` that have it."""
    return [point[name] for point in json.loads((out / "loss.json").read_text()) if name in point]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not collected yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
