"""TRL's trainer as every method here uses it: our rows in, our loss, our checkpoints out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from peft import PeftModel
from trl import SFTTrainer

from pipeline.core.errors import UsageError
from pipeline.student.batches import ROWS, UNTRAINED, Batch
from pipeline.student.checkpoints import newest_step
from pipeline.student.saver import WEIGHTS, Saver, load_trained
from pipeline.student.shards import row_ids_of, train_file

NAMED: Final = 5
"""Rows that an error names, at most."""
MOST_LOGITS: Final = 1 << 26
"""Logits that a forward pass on a CPU may hold at once: 256 MiB of them, and as much for their gradient."""


class CheckpointedTrainer(SFTTrainer):
    """TRL's trainer with a loss step, a watch over it and checkpoints of our own form.

    The loss is TRL's (the sum over the trained tokens of all processes' micro-batches, divided by their number),
    without its metrics of each step, without the balance of a mixture's experts (it is no sum over rows), and on a CPU
    without logits for tokens that are not trained.

    The trainer's own form of checkpoint holds the tokenizer and a pickle of the arguments, lets the names of some
    models' weights differ from those it looks for when it loads, and then only warns.

    Attributes:
        saver: writes checkpoints.
        step_rows, step_losses: of each micro-batch of this optimizer step in this process.
    """

    saver: Saver

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.step_rows: list[torch.Tensor] = []
        self.step_losses: list[torch.Tensor] = []

    def _set_signature_columns_if_needed(self) -> None:
        """What the collator gets of a row."""
        self._signature_columns = ["input_ids", "labels", "row"]

    # -------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the step's loss: nats per trained token, times the number of processes.

        DDP and FSDP average the processes' gradients, and `num_items_in_batch` counts the tokens of all of them.
        """
        self.step_rows.append(inputs.pop(ROWS))
        total, tokens = self.summed_loss(model, inputs)
        loss = total / (tokens if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self.step_losses.append(loss.detach())
        return loss

    def summed_loss(self, model: Any, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch in nats, summed over its trained tokens, and their number.

        Through TRL's fused head, which holds a part of the logits at a time, except where all those of the trained
        tokens fit: the output layer runs on these only, as a module, so that whatever wraps it counts.
        """
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=UNTRAINED).flatten()
        trained = (targets != UNTRAINED).nonzero().flatten()
        head = self._head()
        if self._is_fused(head, len(trained)):
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            return -outputs.log_probs.sum(), outputs.label_mask.sum()
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with _only(trained, head):
            logits = model(**rest, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets[trained], reduction="sum")
        return loss, torch.tensor(len(trained), device=loss.device)

    def _head(self) -> Any:
        """The output layer, or what wraps it."""
        model = self.accelerator.unwrap_model(self.model)
        return (model.get_base_model() if isinstance(model, PeftModel) else model).get_output_embeddings()

    def _is_fused(self, head: Any, trained: int) -> bool:
        """Whether TRL's head computes the loss.

        With FSDP all processes must go the same way, whatever their batches hold, for they gather weights together.
        The fused head reads `weight` and `bias`, which some of PEFT's wrappers have not.
        """
        if self.is_fsdp_enabled:
            return True
        fits = trained * self.model.config.get_text_config().vocab_size <= MOST_LOGITS
        if self.args.device.type == "cpu" and fits:
            return False
        return hasattr(head, "weight") and hasattr(head, "bias")

    # ------------------------------------------------------------------------------------------------------- watch

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called by the trainer in every process between the gradients of a step and the optimizer."""
        norm = super()._get_grad_norm(model, grad_norm)
        found = torch.stack([torch.as_tensor(norm, device=self.args.device), *self.step_losses]).isfinite().all()
        finite = self.accelerator.reduce(found.float()) == self.accelerator.num_processes
        if not bool(finite):
            self._refuse(model, float(norm))
        self.step_rows.clear()
        self.step_losses.clear()
        return norm

    def _refuse(self, model: Any, norm: float) -> None:
        """Say in all processes alike which rows of this step have no finite loss; the weights are still those before.

        Raises:
            UsageError: always.
        """
        numbers = [int(number) for rows in self.step_rows for number in rows]
        step = gather_object(numbers)
        bad = gather_object([number for number in numbers if not self._is_finite(model, number)])
        raise not_finite(self.saver, self.state.global_step + 1, step, bad, norm)

    def _is_finite(self, model: Any, number: int) -> bool:
        """Whether the loss of one row is. Every process asks for as many rows, as sharded weights need it."""
        batch = self._prepare_inputs(self.data_collator([self.train_dataset.row(number)]))
        del batch[ROWS]
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            total, _ = self.summed_loss(model, batch)
        return bool(total.isfinite())

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called by the trainer in every process when `control.should_save` is set."""
        self.saver.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Called by the trainer before the model is wrapped; with FSDP afterwards, and then Accelerate loads."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint) / WEIGHTS)


@contextmanager
def _only(positions: torch.Tensor, head: Any) -> Iterator[None]:
    """Within the block the output layer gets the hidden states at these positions of the flattened batch only.

    What the model does with logits (scale, soft cap) is then done to these: (1, positions, vocabulary).
    """

    def select(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = arguments
        return (hidden.flatten(0, 1).index_select(0, positions)[None], *others)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def not_finite(saver: Saver, step: int, rows: list[int], bad: list[int], norm: float) -> UsageError:
    """The error for a loss or a gradient that is infinite or no number.

    Args:
        step: the optimizer step that was not taken.
        rows: numbers of its rows, of all processes.
        bad: those of them whose loss, alone, is not finite.
        norm: of the step's gradient.
    """
    job = saver.curve.job
    named = bad or rows
    ids = row_ids_of(train_file(job), named[:NAMED])
    more = f" and {len(named) - len(ids)} more" if len(named) > len(ids) else ""
    kept = newest_step(saver.folder)
    weights = "no checkpoint was written yet" if kept is None else f"{saver.folder / f'step-{kept}'} is kept"
    if bad:
        what = f"the loss is not finite for {len(bad)} of the {len(rows)} rows of step {step}"
    else:
        what = f"the gradient of step {step} is not finite (norm {norm}), though each row's loss is"
    todo = f"leave these rows out, lower train.learning_rate, raise train.warmup_share or train in float32; {weights}"
    return UsageError(what, where=f"row_id {', '.join(ids)}{more}", todo=todo)
