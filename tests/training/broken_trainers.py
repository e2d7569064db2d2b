"""Trainers and collators with the faults of libraries in the field: what our own code makes impossible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.student.batches import ROWS, Collator, lay_out
from pipeline.student.checkpoints import Training
from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.batch import check_apart, check_columns_reach, check_padding
from pipeline.student.preflight.findings import Finding
from pipeline.student.preflight.model import check_identity, check_scaling, plain_ids
from pipeline.student.preflight.trial import undisturbed
from pipeline.student.sft import CheckpointedTrainer
from pipeline.student.shards import encode_shards, lengths_of, train_file
from pipeline.student.trainer import prepare
from pipeline.student.worker import course_of, order_of
from tests.training.preflight_cases import ROWS as RECORDS
from tests.training.preflight_cases import a_job, a_model, set_json


def a_trainer(job: TrainJob) -> CheckpointedTrainer:
    """The real trainer of a training, before its first step."""
    tokens = encode_shards(job)
    lengths, _ = lengths_of(train_file(job))
    order = order_of(job, lengths)
    training = Training("test", len(order) // job.train.batch_size, len(lengths), "")
    return prepare(job, tokens, course_of(job, lengths, order, training, None), lambda report: None).trainer


def some_rows(trainer: CheckpointedTrainer) -> list[Any]:
    """Four rows of different lengths."""
    return [trainer.train_dataset.row(number) for number in (0, 7, 13, 22)]


class MasksPadding:
    """As transformers' DataCollatorForLanguageModeling: labels are the ids, and wherever the padding token stands there
    is none."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorForLanguageModeling

        self.collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        return {**self.collate([{"input_ids": list(map(int, row["input_ids"]))} for row in rows])}


class Truncates(Collator):
    """As `max_length` of a trainer: rows are cut, without a word."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        cut = [{**row, **{name: row[name][:6] for name in ("input_ids", "labels")}} for row in rows]
        return super().__call__(cut)


class SeesNeighbours(Collator):
    """As packing without a block-diagonal mask: rows share one sequence, and attention sees all of it."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = lay_out(rows, [list(range(len(rows)))], sum(len(row["input_ids"]) for row in rows), self.pad_id)
        batch.pop("position_ids")
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


class ComparesNeighbours(CheckpointedTrainer):
    """As TRL's GOLD trainer: the output at a position is compared with the label after the next one."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["labels"] = torch.roll(inputs["labels"], 1, dims=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class AveragesParts(CheckpointedTrainer):
    """As TRL's GOLD trainer: each forward pass is averaged by itself, and their sum taken for the step's mean."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs.pop(ROWS)
        total, tokens = self.summed_loss(model, inputs)
        return total / tokens


def broken(folder: Path, trainer: type[CheckpointedTrainer] = CheckpointedTrainer, **train: Any) -> CheckpointedTrainer:
    found = a_trainer(a_job(folder, a_model(folder / "model"), RECORDS, **train))
    found.__class__ = trainer
    return found


def trip_05(folder: Path) -> Finding:
    model = a_model(folder / "model")
    set_json(model / "tokenizer_config.json", pad_token="</s>")
    trainer = a_trainer(a_job(folder, model, RECORDS))
    trainer.data_collator = MasksPadding(trainer.processing_class)
    return check_padding(trainer, some_rows(trainer), trainer.processing_class.pad_token_id, (2,))


def trip_12(folder: Path) -> Finding:
    trainer = broken(folder)
    trainer.data_collator = Truncates(0)
    return check_columns_reach(trainer, some_rows(trainer)[:2], plain_ids(trainer.processing_class))


def trip_13(folder: Path) -> Finding:
    trainer = broken(folder, ComparesNeighbours)
    with undisturbed(trainer):
        return check_identity(trainer, some_rows(trainer))


def trip_14(folder: Path) -> Finding:
    trainer = broken(folder, AveragesParts)
    with undisturbed(trainer):
        return check_scaling(trainer, some_rows(trainer))


def trip_18(folder: Path) -> Finding:
    trainer = broken(folder, packing=True)
    trainer.data_collator = SeesNeighbours(0)
    with undisturbed(trainer):
        return check_apart(trainer, some_rows(trainer), packing=True)
