"""What the checks of rows look at, read once."""

from dataclasses import dataclass
from typing import Any

from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.sample import SampleRow, read_sample
from pipeline.student.preflight.survey import Survey, survey
from pipeline.student.shards import Tokens, train_file
from pipeline.student.tokenise import load_tokenizer


@dataclass(frozen=True, slots=True)
class Seen:
    """A training before its first step.

    Attributes:
        job, tokens: the training and what was encoded for it.
        tokenizer: the student's.
        survey: of the training rows.
        sample: some of them with their messages.
    """

    job: TrainJob
    tokens: Tokens
    tokenizer: Any
    survey: Survey
    sample: tuple[SampleRow, ...]


def look_at(job: TrainJob, tokens: Tokens) -> Seen:
    """Read it.

    Raises:
        UsageError: the tokenizer cannot be loaded.
        CorruptArtefact: a shard is damaged.
    """
    tokenizer = load_tokenizer(job.student.model, job.student.revision)
    found = survey(train_file(job), tokens.stops, tokenizer.bos_token_id)
    return Seen(job, tokens, tokenizer, found, read_sample(job))
