"""Checks with the student in memory: its loss, its gradient, its vocabulary, its adapters. They take a few rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from pipeline.student.jobs import TrainJob
from pipeline.student.losses import distillation_loss
from pipeline.student.memory import MemoryEstimate
from pipeline.student.order import Indices
from pipeline.student.preflight.adapted import check_adapters
from pipeline.student.preflight.batch import (
    Row,
    check_apart,
    check_columns_reach,
    check_padding,
    collate,
    forward,
    tolerance,
)
from pipeline.student.preflight.findings import Finding, fine, flawed, skipped
from pipeline.student.preflight.memory import check_memory, ran_out
from pipeline.student.preflight.seen import look_at
from pipeline.student.preflight.survey import Survey
from pipeline.student.preflight.targets import Captured, Told, logprobs_of, told_of
from pipeline.student.preflight.trial import FEW, NARROW, cut, few, undisturbed
from pipeline.student.shards import Tokens, lengths_of, row_ids_of, train_file
from pipeline.student.tokenise import IGNORED

NEEDS_FORWARD: Final = ("PF13", "PF14", "PF15", "PF18")
SHARDED: Final = "the processes share one model (FSDP); `preflight` checks it in one process"
NO_ROOM: Final = "the training is not expected to fit the device (PF22)"
NO_LOSS: Final = "an id is not in the vocabulary (PF17), so that nothing can be computed"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A training whose student is in memory.

    Attributes:
        trainer: over the encoded rows in their order; not one step was taken.
        job, tokens: see `rows.check_rows`.
        survey: of the training rows.
        memory: what it will need.
        told: sampled rows with soft targets over the student's ids.
    """

    trainer: Any
    job: TrainJob
    tokens: Tokens
    survey: Survey
    memory: MemoryEstimate
    told: Sequence[Told] = ()


def loaded_of(
    trainer: Any, job: TrainJob, tokens: Tokens, memory: MemoryEstimate, captured: Captured | None = None
) -> Loaded:
    """What the checks look at.

    Args:
        captured: soft targets of the rows; None: there are none to read.
    """
    seen = look_at(job, tokens)
    return Loaded(trainer, job, tokens, seen.survey, memory, () if captured is None else told_of(seen, captured))


def check_model(loaded: Loaded) -> list[Finding]:
    """The checks that need the student, in their order, and PF22 where the memory did not suffice for one of them.

    Weights, gradients and random states stay as they were.
    """
    trainer, job = loaded.trainer, loaded.job
    numbers = shortest(job, FEW)
    rows = [trainer.train_dataset.row(int(number)) for number in numbers]
    vocabulary = check_vocabulary(trainer, loaded.survey)
    tokenizer = trainer.processing_class
    plain = plain_ids(tokenizer)
    found = [
        check_padding(trainer, rows, tokenizer.pad_token_id, loaded.tokens.stops),
        check_columns_reach(trainer, (rows * 2)[:2], plain),
        check_adapters(trainer.model, tokenizer, loaded.tokens.stops, job.train.tuning),
        vocabulary,
    ]
    why = SHARDED if trainer.is_fsdp_enabled else NO_LOSS if vocabulary.level == "error" else None
    if why is None and check_memory(loaded.memory).level == "error":
        why = NO_ROOM
    if why is not None:
        return sorted([*found, *(skipped(id_, why) for id_ in NEEDS_FORWARD)], key=lambda each: each.id)
    with undisturbed(trainer):
        found += run_checks(_with_forward(loaded, rows), loaded.memory)
    return sorted(found, key=lambda each: each.id)


Check = Callable[[], Finding]


def _with_forward(loaded: Loaded, rows: Sequence[Row]) -> list[tuple[str, Check]]:
    """The checks that run the student: none of their forward passes is larger than one of the training."""
    trainer, job = loaded.trainer, loaded.job
    narrow = [cut(row, NARROW) for row in rows]
    size, longest = trainer.args.per_device_train_batch_size, int(loaded.tokens.checks["longest"])
    return [
        ("PF13", partial(check_identity, trainer, narrow, loaded.told)),
        ("PF14", partial(check_scaling, trainer, few(rows, micro_batch_size=size, longest=longest))),
        ("PF15", partial(check_finite, trainer, job, first_rows(trainer))),
        ("PF18", partial(check_apart, trainer, narrow, packing=job.train.packing)),
    ]


def run_checks(checks: Sequence[tuple[str, Check]], memory: MemoryEstimate) -> list[Finding]:
    """Their findings; the device's memory running out ends them, and is a finding of its own (PF22)."""
    found: list[Finding] = []
    for at, (id_, check) in enumerate(checks):
        try:
            found.append(check())
        except torch.OutOfMemoryError as error:
            left = [skipped(each, f"the device ran out of memory in {id_}: see PF22") for each, _ in checks[at:]]
            return [*found, *left, ran_out(memory, id_, str(error))]
    return found


def shortest(job: TrainJob, count: int) -> Indices:
    """Numbers of the shortest rows that train anything, as they lie in the shard."""
    lengths, trained = lengths_of(train_file(job))
    able = np.flatnonzero(trained > 0)
    numbers: Indices = able[np.argsort(lengths[able], kind="stable")[:count]]
    return numbers


def first_rows(trainer: Any) -> list[Row]:
    """The rows of the first forward pass."""
    count = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    return [trainer.train_dataset[place] for place in range(count)]


def plain_ids(tokenizer: Any) -> list[int]:
    """Some ids of ordinary tokens."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [id_ for id_ in range(len(tokenizer)) if id_ not in special][:11]


# ------------------------------------------------------------------------------------------------------- vocabulary


def check_vocabulary(trainer: Any, survey: Survey) -> Finding:
    """PF17: the model has an embedding, and an output, for every id of the rows."""
    model, tokenizer = trainer.model, trainer.processing_class
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    size = min(int(end.weight.shape[0]) for end in ends)
    padded = size - len(tokenizer)
    figure = f"ids to {survey.largest:,} of {size:,} embeddings, {max(padded, 0):,} of them padding"
    if survey.largest >= size or survey.smallest < 0:
        message = f"the rows hold the id {survey.largest:,}, and the model has {size:,} embeddings"
        fix = "enlarge the model's embeddings to its tokenizer (resize_token_embeddings), and save it"
        return flawed("PF17", "error", figure, message, fix=fix)
    if padded < 0:
        message = f"the tokenizer has {len(tokenizer):,} tokens, {-padded:,} more than the model has embeddings"
        fix = "no row holds one of them, yet a prompt may: enlarge the embeddings, or take the model's own tokenizer"
        return flawed("PF17", "warning", figure, message, fix=fix)
    return fine("PF17", figure)


# ------------------------------------------------------------------------------------------------------------- loss


def loss_of(trainer: Any, rows: Sequence[Row], labels: torch.Tensor | None = None) -> float:
    """The trainer's loss of a batch, mean over its labels in nats; without a gradient.

    Args:
        labels: to take instead of the rows' own, shape of the batch.
    """
    batch = trainer._prepare_inputs(collate(trainer, rows))
    if labels is not None:
        batch["labels"] = labels.to(batch["labels"].device)
    with torch.no_grad(), trainer.accelerator.autocast():
        return float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=_counted(trainer, batch)))


def _counted(trainer: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Labels that count, of a sequence all but the first one's, which has no context; as often as there are processes,
    for the trainer multiplies a process's share by their number, and here one has the whole."""
    counted: torch.Tensor = (batch["labels"][:, 1:] != IGNORED).sum() * trainer.accelerator.num_processes
    return counted


def check_identity(trainer: Any, rows: Sequence[Row], told: Sequence[Told] = ()) -> Finding:
    """PF13: what the model itself says has the lowest loss at its own place, and a distribution is 0 from itself.

    The model's likeliest tokens are taken as labels, and then the same moved by one place either way: a loss that
    compares a position with the wrong label likes one of these better.
    """
    fix = "the loss compares positions with the labels of others: take the pipeline's own trainer"
    own, moved = [], []
    for row in rows:
        batch = collate(trainer, [row])
        with torch.no_grad(), trainer.accelerator.autocast():
            logits = forward(trainer, batch).cpu()
        if not bool(logits.isfinite().all()):
            return skipped("PF13", "the model's outputs are not finite: see PF15")
        counted = batch["labels"] != IGNORED
        best = torch.roll(logits.argmax(dim=-1), 1, dims=1)  # what the model says of each token, at its place
        if not knows_itself(logits, counted, distillation_loss):
            message = "a distribution is not 0 from itself, or it is from its neighbour's"
            return flawed("PF13", "error", "-", message, fix=fix)
        labels = [torch.where(counted, _moved(best, counted, by), IGNORED) for by in (0, 1, -1)]
        if all(torch.equal(labels[0], each) for each in labels[1:]):
            continue  # one and the same token throughout: nothing to tell them apart by
        losses = [loss_of(trainer, [row], each) for each in labels]
        own.append(losses[0])
        moved += [loss for loss, each in zip(losses[1:], labels[1:], strict=True) if not torch.equal(each, labels[0])]
        if not losses[0] < min(moved[-2:]):
            figure = f"{losses[0]:.4g}, moved {min(moved[-2:]):.4g}"
            return flawed("PF13", "error", figure, "labels at a neighbour's place have a lower loss", fix=fix)
    if told and (figures := _misplaced(told)) is not None:
        return flawed("PF13", "error", figures, "soft targets fit a neighbour's label better", fix="see PF11")
    if not own:
        return skipped("PF13", "the model says the same token everywhere")
    return fine("PF13", f"loss {np.mean(own):.4g} in place, {np.mean(moved):.4g} moved by one")


def _moved(labels: torch.Tensor, counted: torch.Tensor, by: int) -> torch.Tensor:
    """The labels that count, moved by so many places among themselves; (1, tokens)."""
    result = labels.clone()
    result[counted] = torch.roll(labels[counted], by)
    return result


def knows_itself(logits: torch.Tensor, counted: torch.Tensor, loss: Callable[..., torch.Tensor]) -> bool:
    """Whether a distillation loss is 0 for a distribution and itself, and at least what it must be for its neighbour.

    Pinsker's inequality: KL(p ‖ q) >= 2 TV(p, q)², the total variation being half the sum of the differences.

    Args:
        logits: float32 (1, tokens, vocabulary).
        counted: which of the tokens count.
        loss: as `losses.distillation_loss`.
    """
    labels = torch.where(counted, 0, IGNORED)
    neighbour = torch.roll(logits, 1, dims=1)
    same, apart = (float(loss(logits, other, labels, temperature=1.0, alpha=1.0)) for other in (logits, neighbour))
    p, q = logits[counted].softmax(dim=-1), neighbour[counted].softmax(dim=-1)
    least = float((2 * ((p - q).abs().sum(dim=-1) / 2) ** 2).mean())
    return abs(same) < 1e-4 and apart >= 0.99 * least - 1e-6


def _misplaced(told: Sequence[Told]) -> str | None:
    """The figures, where soft targets give their neighbours' labels more than their own."""
    means = []
    for by in (0, 1, -1):
        given = [
            np.exp(logprobs_of(each.targets, np.roll(each.row.trained, by).tolist()))
            for each in told
            if len(each.targets) == len(each.row.trained)
        ]
        means.append(float(np.mean(np.concatenate(given))) if given else math.nan)
    if not means[0] <= max(means[1:]):
        return None
    return f"probability {means[0]:.3f} in place, {max(means[1:]):.3f} moved by one"


def loss_and_norm(trainer: Any, parts: Sequence[Sequence[Row]]) -> tuple[float, float]:
    """Loss and norm of the gradient of one optimizer step over these forward passes, as the trainer scales them."""
    model = trainer.model
    model.zero_grad(set_to_none=True)
    batches = [trainer._prepare_inputs(collate(trainer, part)) for part in parts]
    count, total = sum(_counted(trainer, batch) for batch in batches), 0.0
    for batch in batches:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
        if not _is_scaled(trainer):
            loss = loss / len(batches)
        loss.backward()
        total += float(loss.detach())
    norms = [parameter.grad.float().norm() for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.stack([each.cpu() for each in norms]).norm()) if norms else 0.0
    return total, norm


def _is_scaled(trainer: Any) -> bool:
    """Whether the trainer takes the loss as it is, as `Trainer.training_step` decides."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return bool(told)
    return bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None)


def check_scaling(trainer: Any, rows: Sequence[Row]) -> Finding:
    """PF14: loss and gradient of the same rows are the same in one forward pass and in one for each row."""
    once, each = loss_and_norm(trainer, [rows]), loss_and_norm(trainer, [[row] for row in rows])
    figure = f"loss {once[0]:.6g} and {each[0]:.6g}, gradient {once[1]:.6g} and {each[1]:.6g}"
    if all(math.isclose(*pair, rel_tol=tolerance(trainer), abs_tol=1e-9) for pair in zip(once, each, strict=True)):
        return fine("PF14", figure)
    if not all(map(math.isfinite, (*once, *each))):
        return skipped("PF14", "loss or gradient are not finite: see PF15")
    message = f"{len(rows)} rows in one forward pass and in {len(rows)} are not the same step"
    return flawed(
        "PF14", "error", figure, message, fix="take the pipeline's own trainer, or set batch sizes to be equal"
    )


def check_finite(trainer: Any, job: TrainJob, rows: Sequence[Row]) -> Finding:
    """PF15: loss and gradient of the first forward pass are numbers; the trainer's log would show 0.0."""
    loss, norm = loss_and_norm(trainer, [rows])
    figure = f"loss {loss:.6g}, gradient {norm:.6g}"
    if math.isfinite(loss) and math.isfinite(norm):
        return fine("PF15", figure)
    bad = [row for row in rows if not math.isfinite(loss_of(trainer, [row]))]
    named = row_ids_of(train_file(job), [int(row["row"]) for row in bad or rows])
    which = f"for {len(bad)} of the {len(rows)} rows of the first forward pass" if bad else "though each row's loss is"
    message = f"{'the loss' if bad else 'the gradient'} is not finite {which}"
    fix = "look at these rows and at the weights; train in float32 (train.precision) if they are sound"
    return flawed("PF15", "error", figure, message, fix=fix, rows=named)
