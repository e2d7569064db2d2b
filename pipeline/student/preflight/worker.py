"""What `python -m pipeline preflight` starts: all checks of a training, and rows to look at; nothing is trained."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pipeline.core.stage import Json
from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.findings import Finding, accept, errors_of, in_order
from pipeline.student.preflight.sample import Shown
from pipeline.student.preflight.targets import Captured
from pipeline.student.process import Files, run_as_worker, write_json
from pipeline.student.tokenise import read_json

WHOLE: Final = "the processes share one model (FSDP), which is too large for one device as a whole"
NO_ROOM: Final = "not made: the training does not fit the device (PF22)"


@dataclass(frozen=True, slots=True)
class PreflightJob:
    """One look at a training.

    Attributes:
        job: the training; `out` is a folder for rejected rows' ids.
        captured: soft targets of the rows; None: the run has none.
        samples: rows to show.
        environ: what Accelerate would set for the training's processes; see `memory.estimate`.
    """

    job: TrainJob
    captured: Captured | None
    samples: int
    environ: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the job, and that of the training beside it, by rename."""
        self.job.write(path.with_name("training.json"))
        value: dict[str, Json] = {"samples": self.samples, "captured": None, "environ": {**self.environ}}
        if self.captured is not None:
            value["captured"] = {"folder": str(self.captured.folder), "temperature": self.captured.temperature}
        write_json(path, value)

    @classmethod
    def read(cls, path: Path) -> "PreflightJob":
        """Read what `write` wrote."""
        value = read_json(path)
        told = value["captured"]
        captured = None if told is None else Captured(Path(told["folder"]), told["temperature"])
        return cls(TrainJob.read(path.with_name("training.json")), captured, value["samples"], value["environ"])


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
        UsageError: the model, its tokenizer or its template cannot be used at all, or nothing can decide which weights
            are kept.
        CorruptArtefact: a shard is damaged.
    """
    from pipeline.student.layers import begin
    from pipeline.student.preflight.columns import check_columns
    from pipeline.student.preflight.deciding import require_measurable
    from pipeline.student.preflight.rows import check_rows
    from pipeline.student.preflight.sample import read_sample, show
    from pipeline.student.shards import encode_shards
    from pipeline.student.tokenise import load_tokenizer

    columns = check_columns(asked.job.data)
    if columns.level == "error":
        return Looked(in_order([columns], "the rows cannot be read: see PF07"), ())
    job = begin(asked.job, is_first=True)
    tokens = encode_shards(job)
    require_measurable(job, tokens)
    found = check_rows(job, tokens, asked.captured)
    if tokens.rows_in == sum(tokens.rejected.values()):
        return Looked(in_order(found, "no row is left: see PF23"), ())
    more, why_not = _with_model(replace(asked, job=job), tokens)
    shown = show(load_tokenizer(job.student.model, job.student.revision), read_sample(job, asked.samples))
    return Looked(in_order([*found, *more], why_not), tuple(shown))


def _with_model(asked: PreflightJob, tokens: Any) -> tuple[Sequence[Finding], str]:
    """Load the student as a training does, in this one process, and check it; or PF22 alone, and why not more.

    A model that this process could not hold is not loaded: one that the training's processes cannot, unless that was
    accepted, and one that they share and that is too large for one device.
    """
    import torch

    from pipeline.student.memory import estimate
    from pipeline.student.preflight.findings import merged
    from pipeline.student.preflight.memory import check_memory, fits_whole
    from pipeline.student.preflight.model import check_model, loaded_of
    from pipeline.student.shards import lengths_of, train_file
    from pipeline.student.trainer import use_cpu

    job = asked.job
    if job.train.threads is not None:
        torch.set_num_threads(job.train.threads)
    lengths, _ = lengths_of(train_file(job))
    device = torch.device("cpu") if use_cpu(os.environ) else torch.accelerator.current_accelerator()
    assert device is not None
    memory = estimate(job, longest=int(lengths.max()), device=device, environ=asked.environ)
    needed = check_memory(memory)
    if errors_of(accept([needed], job.train.accept_findings)):
        return [needed], NO_ROOM
    alone = replace(job, world_size=1)
    if asked.environ and not fits_whole(estimate(alone, longest=int(lengths.max()), device=device, environ={})):
        return [needed], WHOLE
    trainer = _trainer(job, tokens, lengths)
    return merged([needed], check_model(loaded_of(trainer, job, tokens, memory, asked.captured))), "not made"


def _trainer(job: TrainJob, tokens: Any, lengths: Any) -> Any:
    """The training's trainer in one process, with the micro-batches of all."""
    from pipeline.student.checkpoints import Training
    from pipeline.student.trainer import prepare
    from pipeline.student.worker import course_of, order_of

    order = order_of(job, lengths)
    steps = len(order) // job.train.batch_size
    course = course_of(job, lengths, order, Training(job.workdir.name, steps, len(lengths), ""), None)
    return prepare(replace(job, world_size=1), tokens, course, lambda report: None).trainer


if __name__ == "__main__":
    run_as_worker(main, sys.argv)
