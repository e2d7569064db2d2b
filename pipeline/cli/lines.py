"""Lines that tell of models, evaluations, terms and verdicts, wherever they are told."""

from collections.abc import Sequence

from pipeline.runner.models import Evaluated, Model
from pipeline.runner.provenance import Judgement, Term


def fact(name: str, value: str) -> str:
    """A named fact, indented."""
    return f"  {name:10} {value}"


def term_text(term: Term) -> str:
    """What is known of a licence."""
    if term.id is None:
        return f"{term.name}: no term record"
    dated = "" if term.effective is None else f", effective {term.effective}"
    return f"{term.name}: {term.title}{dated} ({term.confidence})"


def judgement_line(judgement: Judgement) -> str:
    """How a data set was judged, in one line."""
    use, dataset, model = judgement.intended_use, judgement.dataset_release, judgement.model_release
    accepted = f"; overrides in force: {', '.join(judgement.overrides)}" if judgement.overrides else ""
    return f"{judgement.outcome} (use {use}, data set {dataset}, model {model}){accepted}"


def model_line(model: Model) -> str:
    """A model in one line: where it lies, whose it is, how long it was trained."""
    steps = "" if model.steps is None else f", {model.steps:,} steps"
    return f"{model.path} ({runs_text(model.runs)}{steps}, {model.rows:,} rows)"


def evaluation_line(evaluation: Evaluated) -> str:
    """An evaluation in one line."""
    measured = ""
    if evaluation.accuracy is not None:
        measured = f"{evaluation.metric} {evaluation.accuracy:.2%}"
    if evaluation.ci95 is not None:
        measured += " (95 % interval {:.2%} to {:.2%})".format(*evaluation.ci95)
    asked = "" if evaluation.questions is None else f" on {evaluation.questions:,} test prompts"
    return f"evaluated: {measured}{asked}, {runs_text(evaluation.runs)}: {evaluation.path}"


def runs_text(names: Sequence[str]) -> str:
    """Who holds a result."""
    return f"run {', '.join(names)}" if names else "no run holds it any more"
