"""How good the student is in the midst of its training, on rows of the validation split."""

import torch
from datasets import Dataset

from pipeline.student.sft import CheckpointedTrainer


def measure_loss(trainer: CheckpointedTrainer, rows: Dataset) -> float:
    """Mean loss in nats over the completion tokens of `rows`.

    Every process measures all of them, so that the figure does not depend on how many there are: the trainer's own
    evaluation averages batches, and fills the last ones up with rows it has counted already.
    """
    model, size = trainer.model_wrapped, trainer.args.per_device_train_batch_size
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), size):
            batch = trainer.data_collator([rows[at] for at in range(start, min(start + size, len(rows)))])
            batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
            total -= float(outputs.log_probs.double().sum())
            count += int(outputs.label_mask.sum())
    model.train()
    return total / count
