"""TRL's trainer as every method here uses it: our rows in, our checkpoints out."""

from pathlib import Path
from typing import Any

from trl import SFTTrainer

from pipeline.student.saver import WEIGHTS, Saver, load_trained


class CheckpointedTrainer(SFTTrainer):
    """TRL's trainer with checkpoints of our own form: only what is trained, loaded strictly, committed as a whole.

    The trainer's own form holds the tokenizer and a pickle of the arguments, lets the names of some models' weights
    differ from those it looks for when it loads, and then only warns.
    """

    saver: Saver

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called by the trainer in every process when `control.should_save` is set."""
        self.saver.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Called by the trainer before the model is wrapped; with FSDP afterwards, and then Accelerate loads."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint) / WEIGHTS)
