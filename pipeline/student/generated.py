"""Answers that the student gives in the midst of its training, to prompts of the validation split."""

import hashlib
import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft import PeftModel

from pipeline.core.config_train import GeneratedAnswers
from pipeline.core.errors import UsageError
from pipeline.core.record import read_shards
from pipeline.student.engines import Prompter, batches, continue_batch, greedy
from pipeline.student.jobs import Judge, Question, TrainJob
from pipeline.student.measure import sum_over_processes
from pipeline.student.sft import CheckpointedTrainer
from pipeline.student.tokenise import most_positions, plain_messages

COLUMNS: Final = ("prompt_set", "prompt_id", "prompt", "answer")


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts that the student answers, and how its answers are judged.

    Attributes:
        config: which prompts, and how long answers may be.
        prompter: how they are asked; as in stage `evaluate`.
        questions, references: of each prompt.
        judge: compares an answer with its reference.
    """

    config: GeneratedAnswers
    prompter: Prompter
    questions: tuple[Question, ...]
    references: tuple[str, ...]
    judge: Judge


def read_asked(job: TrainJob, config: GeneratedAnswers, tokenizer: Any, stops: tuple[int, ...], judge: Judge) -> Asked:
    """Choose the prompts by hash of their id, so that more rows never reshuffle those chosen.

    Raises:
        UsageError: the validation split is empty, or none of its prompts has a reference to compare an answer with.
    """
    found: dict[tuple[str, str], tuple[Question, str]] = {}
    rows = 0
    for table in read_shards(job.data, list(COLUMNS), stem="validation-"):
        rows += table.num_rows
        for row in table.to_pylist():
            if row["answer"] is not None and judge("", row["answer"]) is not None:
                question = Question(messages=tuple(plain_messages(row["prompt"])))
                found[row["prompt_set"], row["prompt_id"]] = question, row["answer"]
    if rows == 0:
        todo = "raise prompts.validation, or take generate out"
        raise UsageError("the data set has no validation row", where="train.evaluation.generate", todo=todo)
    if not found:
        todo = "give the prompt sets a column of reference answers (columns.answer), or take generate out"
        raise UsageError(
            f"no validation prompt has a reference for {config.metric} comparison",
            where="train.evaluation.generate",
            todo=todo,
        )
    chosen = heapq.nsmallest(config.prompts, found, key=lambda one: hashlib.sha256(repr(one).encode()).digest())
    prompter = Prompter(tokenizer, stops, most_positions(job.student.model, job.student.revision))
    questions, references = zip(*(found[one] for one in chosen), strict=True)
    return Asked(config, prompter, questions, references, judge)


def measure_accuracy(trainer: CheckpointedTrainer, asked: Asked) -> float:
    """Share of the prompts that the student answers rightly, greedily; one that leaves no room is not."""
    model = _generating(trainer)
    prompter, config = asked.prompter, asked.config
    prompts = prompter.prompts(asked.questions)
    caps = [prompter.cap(len(ids), config.max_tokens) for ids in prompts]
    fitting = [at for at, cap in enumerate(caps) if cap > 0]
    size = trainer.args.per_device_train_batch_size
    groups = batches([prompts[at] for at in fitting], [caps[at] for at in fitting], size)
    pad = prompter.tokenizer.pad_token_id
    right = 0
    with _answering(model, greedy(prompter.stops, prompter.stops[0] if pad is None else pad)) as pad_id:
        for group in groups[trainer.accelerator.process_index :: trainer.accelerator.num_processes]:
            ats = [fitting[place] for place in group]
            with torch.no_grad(), trainer.accelerator.autocast():
                outputs = continue_batch(model, [prompts[at] for at in ats], caps[ats[0]], prompter.stops, pad_id)
            for at, ids in zip(ats, outputs, strict=True):
                text = prompter.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                right += asked.judge(text, asked.references[at]) is True
    (total,) = sum_over_processes(trainer, right)
    return total / len(prompts)


def refuse_sharded(trainer: CheckpointedTrainer) -> None:
    """Refuse to generate with a model that several processes share.

    Raises:
        UsageError: it is sharded (FSDP): each token would gather all weights anew.
    """
    if trainer.is_fsdp_enabled:
        todo = "take train.evaluation.generate out, or train without FSDP; stage evaluate lets the student answer"
        what = "answers cannot be generated while processes share one model (FSDP)"
        raise UsageError(what, where="train.evaluation.generate", todo=todo)


def _generating(trainer: CheckpointedTrainer) -> Any:
    """The model that has `generate`: without what wraps it for several processes, with its adapters in place."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _answering(model: Any, config: Any) -> Iterator[int]:
    """Within the block the model answers as the config says, without dropout; gives the id that pads."""
    before = model.generation_config
    model.generation_config = config
    model.eval()
    try:
        yield config.pad_token_id
    finally:
        model.generation_config = before
        model.train()
