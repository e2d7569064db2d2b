"""A model's story and a source's reach, as a terminal shows them and as scripts read them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.cli.lines import evaluation_line, fact, judgement_line, model_line, runs_text, term_text
from pipeline.cli.show import say, say_json
from pipeline.core.log import safe_text
from pipeline.runner.trace import Ancestor, SourceFacts, Traced

if TYPE_CHECKING:
    from pipeline.runner.drop_source import Dropped, Rebuild, TouchedModel
    from pipeline.runner.touched import Touched


def say_trace(traced: Traced, *, as_json: bool) -> None:
    """From the model back to its sources."""
    if as_json:
        say_json(asdict(traced))
        return
    for line in _trace(traced):
        say(safe_text(line))


def _trace(told: Traced) -> Iterator[str]:
    yield f"model {told.folder}"
    yield fact("trained as", model_line(told.model))
    yield fact("content", told.model.content)
    if told.changed:
        yield fact("", f"other than the training wrote them: {', '.join(told.changed)}")
    if told.extra:
        yield fact("", f"not written by the training: {', '.join(told.extra)}")
    yield fact("settings", ", ".join(f"{name} {value}" for name, value in told.settings.items()))
    yield from (fact("", evaluation_line(each)) for each in told.model.evaluations)
    for step in told.steps:
        yield from _step(step)
        if step.step == "dataset":
            yield fact("licences", ", ".join(told.licenses) or "unknown")
            verdict = "its manifest does not say" if told.judgement is None else judgement_line(told.judgement)
            yield fact("verdict", verdict)
    for name, content in told.missing.items():
        yield f"{name}: its result is not in the data folder any more (content {content})"
    yield "sources"
    yield from (_source(each) for each in told.sources)
    yield "terms"
    yield from (fact("", term_text(each)) for each in told.terms)


def _step(step: Ancestor) -> Iterator[str]:
    yield f"{step.step}: {step.path} ({runs_text(step.runs)})"
    yield fact("rows", f"{step.rows_in:,} in, {step.rows_out:,} out{_rejected(step.rejected)}")
    yield fact("content", step.content)
    yield fact("manifest", f"sha256 {step.manifest_sha256}")


def _rejected(counts: Mapping[str, int]) -> str:
    told = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"; rejected: {told}" if told else ""


def _source(source: SourceFacts) -> str:
    told = f"{source.name}: {source.what}"
    if source.revision is not None:
        told += f", revision {source.revision}"
    if source.identity is not None:
        told += f", identity {source.identity[:16]}…"
    told += f"; licence {', '.join(source.licenses)}"
    if source.rows is not None:
        told += f"; {source.rows:,} rows" + ("" if source.share is None else f" ({source.share:.1%})")
    return fact("base" if source.role == "student_base" else source.role, told)


# -------------------------------------------------------------------------------------------------- a source's reach


def say_dropped(dropped: "Dropped", *, as_json: bool) -> None:
    """What a source touched, and the commands that make the runs again without it."""
    if as_json:
        say_json(asdict(dropped))
        return
    for line in _dropped(dropped):
        say(safe_text(line))


def _dropped(told: "Dropped") -> Iterator[str]:
    meaning = told.meaning
    yield f"source {told.source}"
    for name, names in (
        ("teachers", meaning.teachers),
        ("prompts", meaning.prompt_sets),
        ("licences", meaning.licenses),
    ):
        if names:
            yield fact(name, ", ".join(names))
    yield "rows"
    yield from (_touched(each) for each in told.results)
    yield "models" if told.models else "models: none"
    for model in told.models:
        yield from _model(model)
    for rebuild in told.rebuilds:
        yield from _rebuild(rebuild)
    if told.clean_runs:
        yield f"runs without it: {', '.join(told.clean_runs)}"
    yield "nothing was changed"


def _touched(each: "Touched") -> str:
    share = f"{each.rows:,} of {each.of:,} rows ({each.share:.1%})"
    through = f", {each.through_duplicates:,} of them by a duplicate" if each.through_duplicates else ""
    return fact(each.stage, f"{share}{through}, {runs_text(each.runs)}: {each.path}")


def _model(each: "TouchedModel") -> Iterator[str]:
    why = "trained from it" if each.is_base else f"{each.rows:,} of the {each.of:,} rows of its data set"
    yield fact("", f"{model_line(each.model)}: {why}")
    yield from (fact("", f"  {evaluation_line(evaluation)}") for evaluation in each.model.evaluations)


def _rebuild(each: "Rebuild") -> Iterator[str]:
    left = "" if each.rows_left is None else f": {each.rows_left:,} rows would be left"
    yield f"run {each.run} without it{left}"
    if each.command is not None:
        yield f"  {each.command}"
    if each.note is not None:
        yield f"  note: {each.note}"
