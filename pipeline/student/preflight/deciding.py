"""Whether something can decide which weights are the best, where a training is asked for them."""

from pipeline.core.errors import UsageError
from pipeline.student.jobs import TrainJob
from pipeline.student.selection import asked_to_decide, undecided
from pipeline.student.shards import Tokens, rejected_validation


def require_measurable(job: TrainJob, tokens: Tokens) -> None:
    """Refuse, before any weight is loaded, a training whose best weights nothing tells.

    Raises:
        UsageError: there is no validation row, or none that can be used.
    """
    config = job.train.evaluation
    if not config.decides or config.by != "eval_loss" or tokens.validation_rows > 0:
        return
    asked, reasons = asked_to_decide(config), rejected_validation(job)
    if reasons:
        told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        why = f"none of the {sum(reasons.values()):,} validation rows can be used: {told}"
        todo = f"raise train.max_length for over_length, see PF23 for other reasons, or take {asked} out"
    else:
        why, todo = "the data set has no validation row", f"raise prompts.validation, or take {asked} out"
    raise UsageError(undecided(config, why), where="train.evaluation", todo=todo)
