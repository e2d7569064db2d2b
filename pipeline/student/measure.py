"""How good the student is in the midst of its training, on rows of the validation split.

The processes take turns at the batches, which are the same however many processes there are, and all of them get the
same figures. Nothing random is drawn and dropout is off, so that measuring never changes the training.
"""

import torch
from datasets import Dataset

from pipeline.student.batches import ROWS
from pipeline.student.sft import CheckpointedTrainer


def measure_loss(trainer: CheckpointedTrainer, rows: Dataset) -> float:
    """Mean loss in nats over the completion tokens of `rows`.

    The trainer's own evaluation averages batches, and fills the last ones up with rows it has counted already.
    """
    model, size = trainer.model_wrapped, trainer.args.per_device_train_batch_size
    batches = -(-len(rows) // size)
    total, count = 0.0, 0.0
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for first in range(0, batches, trainer.accelerator.num_processes):
            at = first + trainer.accelerator.process_index
            # Sharded weights need all processes in each forward pass: one without a batch repeats another's, uncounted.
            start = size * min(at, batches - 1)
            batch = trainer.data_collator([rows[row] for row in range(start, min(start + size, len(rows)))])
            batch.pop(ROWS, None)
            loss, tokens = trainer.summed_loss(model, trainer._prepare_inputs(batch))
            if at < batches:
                total, count = total + float(loss), count + int(tokens)
    model.train()
    total, count = sum_over_processes(trainer, total, count)
    return total / count


def sum_over_processes(trainer: CheckpointedTrainer, *numbers: float) -> list[float]:
    """Sums over all processes, alike in all of them."""
    sums: list[float] = trainer.accelerator.reduce(
        torch.tensor(numbers, dtype=torch.float64, device=trainer.accelerator.device), reduction="sum"
    ).tolist()
    return sums
