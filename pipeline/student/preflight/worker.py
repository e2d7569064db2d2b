"""What `python -m pipeline preflight` starts: all checks of a training, and rows to look at; nothing is trained."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.stage import Json
from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.findings import Finding, in_order
from pipeline.student.preflight.sample import Shown
from pipeline.student.preflight.targets import Captured
from pipeline.student.process import Files, run_as_worker, write_json
from pipeline.student.tokenise import read_json


@dataclass(frozen=True, slots=True)
class PreflightJob:
    """One look at a training.

    Attributes:
        job: the training; `out` is a folder for rejected rows' ids.
        captured: soft targets of the rows; None: the run has none.
        samples: rows to show.
    """

    job: TrainJob
    captured: Captured | None
    samples: int

    def write(self, path: Path) -> None:
        """Write the job, and that of the training beside it, by rename."""
        self.job.write(path.with_name("training.json"))
        value: dict[str, Json] = {"samples": self.samples, "captured": None}
        if self.captured is not None:
            value["captured"] = {"folder": str(self.captured.folder), "temperature": self.captured.temperature}
        write_json(path, value)

    @classmethod
    def read(cls, path: Path) -> "PreflightJob":
        """Read what `write` wrote."""
        value = read_json(path)
        told = value["captured"]
        captured = None if told is None else Captured(Path(told["folder"]), told["temperature"])
        return cls(TrainJob.read(path.with_name("training.json")), captured, value["samples"])


@dataclass(frozen=True, slots=True)
class Looked:
    """What came of it.

    Attributes:
        findings: one a check, in their order, before anything is accepted.
        samples: the first rows.
    """

    findings: tuple[Finding, ...]
    samples: tuple[Shown, ...]

    def to_json(self) -> dict[str, Json]:
        """For a file."""
        return {
            "findings": [each.to_json() for each in self.findings],
            "samples": [each.to_json() for each in self.samples],
        }

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Looked":
        """What `to_json` gave."""
        return cls(
            tuple(Finding.of_json(each) for each in value["findings"]),
            tuple(Shown.of_json(each) for each in value["samples"]),
        )


def main(path: Path) -> None:
    """Look as the job says, and write `<name>.result.json`."""
    found = look(PreflightJob.read(path))
    write_json(Files(path).beside(".result.json"), found.to_json())


def look(asked: PreflightJob) -> Looked:
    """Encode the rows as a training does, make all checks and take the first rows.

    Raises:
        UsageError: the model, its tokenizer or its template cannot be used at all.
        CorruptArtefact: a shard is damaged.
    """
    from pipeline.student.layers import begin
    from pipeline.student.preflight.columns import check_columns
    from pipeline.student.preflight.rows import check_rows
    from pipeline.student.preflight.sample import read_sample, show
    from pipeline.student.shards import encode_shards
    from pipeline.student.tokenise import load_tokenizer

    columns = check_columns(asked.job.data)
    if columns.level == "error":
        return Looked(in_order([columns], "the rows cannot be read: see PF07"), ())
    job = begin(asked.job, is_first=True)
    tokens = encode_shards(job)
    found = check_rows(job, tokens, asked.captured)
    if tokens.rows_in == sum(tokens.rejected.values()):
        return Looked(in_order(found, "no row is left: see PF23"), ())
    found += _with_model(job, tokens, asked.captured)
    shown = show(load_tokenizer(job.student.model, job.student.revision), read_sample(job, asked.samples))
    return Looked(in_order(found, "not made"), tuple(shown))


def _with_model(job: TrainJob, tokens: Any, captured: Captured | None) -> list[Finding]:
    """Load the student as a training does, in this one process, and check it."""
    import torch

    from pipeline.student.checkpoints import Training
    from pipeline.student.memory import estimate
    from pipeline.student.preflight.model import check_model, loaded_of
    from pipeline.student.shards import lengths_of, train_file
    from pipeline.student.trainer import prepare
    from pipeline.student.worker import course_of, order_of

    if job.train.threads is not None:
        torch.set_num_threads(job.train.threads)
    lengths, _ = lengths_of(train_file(job))
    order = order_of(job, lengths)
    steps = len(order) // job.train.batch_size
    course = course_of(job, lengths, order, Training(job.workdir.name, steps, len(lengths), ""), None)
    trainer = prepare(replace(job, world_size=1), tokens, course, lambda report: None).trainer
    memory = estimate(job, longest=int(lengths.max()), device=trainer.args.device)
    return check_model(loaded_of(trainer, job, tokens, memory, captured))


if __name__ == "__main__":
    run_as_worker(main, sys.argv)
