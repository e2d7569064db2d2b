"""Puts the facts of a run into the template. All that it prints is escaped by Jinja or built by charts.py."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.stages.report import charts, headline, text
from pipeline.stages.report.facts import (
    ROW_STAGES,
    Evaluation,
    Interval,
    LossCurve,
    Source,
    Step,
)
from pipeline.stages.report.lengths import Bins, Lengths, bin_lengths, median
from pipeline.stages.report.samples import Sample

CURVE_POINTS = 600
"""Most points of the drawn loss curve; a longer curve is drawn as means of equally many steps."""

MESSAGES_SHOWN = 12
"""Most messages of one conversation that the report shows."""

REASONS_SHOWN = 12
"""Most reasons of one step that have a line of their own; the others are added up."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a report says, before it is set."""

    name: str
    evaluation: Evaluation
    steps: tuple[Step, ...]
    splits: Mapping[str, int]
    lengths: Lengths
    loss: LossCurve
    samples: tuple[Sample, ...]
    sources: tuple[Source, ...]


def render(facts: Facts) -> str:
    """The HTML text; equal facts give equal text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style, script = (environment.get_template(name).render() for name in ("report.css.jinja", "report.js.jinja"))
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        text=text,
        policy=content_policy(style, script),
        style=Markup(style),  # our own file, without any data in it
        script=Markup(script),  # our own file, without any data in it
        **_verdict(facts),
        **_funnel(facts),
        **_lengths(facts.lengths),
        **_loss(facts.loss),
        outcomes=outcomes(facts.samples),
        messages_shown=MESSAGES_SHOWN,
        method_name=headline.method_name,
    )


def content_policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy: nothing may load or run but exactly this style sheet and this script."""
    return (
        f"default-src 'none'; style-src '{_source_hash(style)}'; script-src '{_source_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _source_hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode('ascii')}"


# -------------------------------------------------------------------------------------------------- evaluation


def _verdict(facts: Facts) -> dict[str, Any]:
    found = facts.evaluation
    by_kind = {step.kind: step for step in facts.steps}
    timed = next((model for model in found.models if model.answers_per_second is not None), None)
    return {
        "verdict": headline.verdict(found),
        "base_sentence": headline.base_sentence(found),
        "cards": headline.cards(found, by_kind["dataset"].rows_out),
        "not_scored": by_kind["evaluate"].rejected,
        "passes": 0 if timed is None else timed.passes,
        "accuracy_chart": accuracy_chart(found),
        "comparison_chart": comparison_chart(found),
        "has_unknown_numbers": any(
            None in (model.parameters, model.bytes, model.answers_per_second) for model in found.models
        ),
    }


def accuracy_chart(found: Evaluation) -> Markup:
    """Accuracy of the three models with intervals, on the whole scale from 0 to 100 %."""
    rows = [_whisker(model.role.capitalize(), model.accuracy, model.role) for model in found.models]
    return charts.whiskers("Accuracy with 95 % confidence intervals", rows, charts.axis(0, 100))


def comparison_chart(found: Evaluation) -> Markup:
    """Retained accuracy and gap closed with intervals, on a scale that just holds them and 100 %."""
    rows = [_whisker("Retained", found.retained, "student"), _whisker("Gap closed", found.gap_closed, "student")]
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    scale = charts.axis(min([*ends, 98.0]), max([*ends, 100.0]), ticks=4)
    title = "Retained accuracy and gap closed, with 95 % confidence intervals"
    return charts.whiskers(title, rows, scale, reference=100.0)


def _whisker(name: str, found: Interval, mark: str) -> charts.Whisker:
    value, low, high = (None if end is None else 100 * end for end in (found.value, found.low, found.high))
    words = f"{text.percent(found.value)} ({text.bounds(found.low, found.high)})"
    return charts.Whisker(name, words if value is not None else "not defined", value, low, high, mark)


# ------------------------------------------------------------------------------------------------------ funnel


@dataclass(frozen=True, slots=True)
class FunnelRow:
    """A step of the funnel with the reasons that get a line, and what the remaining ones add up to."""

    step: Step
    reasons: tuple[tuple[str, int], ...]
    more_reasons: int
    more_rows: int

    @property
    def is_conserved(self) -> bool:
        """Whether every row that entered has left, kept or with a reason."""
        return self.step.rows_in == self.step.rows_out + self.step.lost


def _funnel(facts: Facts) -> dict[str, Any]:
    rows = [funnel_row(step) for step in facts.steps if step.kind in ROW_STAGES]
    return {"funnel": rows, "funnel_chart": funnel_chart(rows, facts.splits.get("test", 0))}


def funnel_row(step: Step) -> FunnelRow:
    """A step with its most frequent reasons."""
    shown, rest = step.rejected[:REASONS_SHOWN], step.rejected[REASONS_SHOWN:]
    return FunnelRow(step, shown, len(rest), sum(number for _, number in rest))


def funnel_chart(rows: list[FunnelRow], test_prompts: int) -> Markup:
    """What stayed and what left at each step, as bars; of the prompts also what was held out for the test."""
    found = [_bar(row.step, test_prompts if row.step.kind == "prompts" else 0) for row in rows]
    return charts.bars("Rows kept and rejected at each step", found)


def _bar(step: Step, held_out: int) -> charts.Bar:
    lost = f", {text.count(step.lost)} rejected" if step.lost > 0 else ""
    words = f"{text.count(step.rows_in)} in, {text.count(step.rows_out)} out{lost}"
    left = tuple((number, "left") for _, number in step.rejected)
    return charts.Bar(step.kind, words, ((step.rows_out - held_out, "kept"), (held_out, "held"), *left))


# ----------------------------------------------------------------------------------------------------- lengths


def _lengths(lengths: Lengths) -> dict[str, Any]:
    bins = bin_lengths(lengths)
    return {"lengths": lengths, "length_chart": None if bins is None else length_chart(bins, lengths)}


def length_chart(bins: Bins, lengths: Lengths) -> Markup:
    """Kept and rejected rows by length, each as shares of its own group."""
    panels = [
        _panel("Kept", lengths.kept, bins.kept, lengths.unit, "kept"),
        _panel("Rejected", lengths.rejected, bins.rejected, lengths.unit, "left"),
    ]
    title = f"Completion length in {lengths.unit}: share of the kept and of the rejected rows"
    return charts.histogram(title, panels, bins.edges, open_end=bins.open_end)


def _panel(name: str, group: Mapping[int, int], counts: tuple[int, ...], unit: str, mark: str) -> charts.Panel:
    total = sum(counts)
    middle = median(group)
    words = text.plural(total, "row") + ("" if middle is None else f", median {text.count(middle)} {unit}")
    return charts.Panel(name, words, tuple(number / total if total > 0 else 0.0 for number in counts), mark)


# -------------------------------------------------------------------------------------------------------- loss


def _loss(loss: LossCurve) -> dict[str, Any]:
    drawn = thin(loss.train)
    return {"loss_chart": loss_chart(drawn, loss.validation), "is_thinned": len(drawn) < len(loss.train)}


Series = tuple[tuple[int, float], ...]


def loss_chart(train: Series, validation: Series) -> Markup | None:
    """The loss curve, or None without any point."""
    points = [*train, *validation]
    if not points:
        return None
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    x_scale = charts.axis(0, max(steps), tight=True)
    y_scale = charts.axis(min(0.0, *losses), max(losses), ticks=4)
    return charts.curve("Loss by optimizer step", train, validation, x_scale=x_scale, y_scale=y_scale)


def thin(points: Series) -> Series:
    """At most `CURVE_POINTS` points: means of equally many neighbours, at the last one's step."""
    stride = -(-len(points) // CURVE_POINTS)
    if stride <= 1:
        return points
    groups = [points[start : start + stride] for start in range(0, len(points), stride)]
    return tuple((group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups)


# ----------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, slots=True)
class Outcome:
    """A way in which sample rows ended; `left_at` is None for the kept ones."""

    number: int
    left_at: str | None
    reason: str | None
    rows: tuple[Sample, ...]


def outcomes(samples: tuple[Sample, ...]) -> tuple[Outcome, ...]:
    """The sample rows by outcome: kept first, then by stage in order and by reason."""
    order = {stage: place for place, stage in enumerate((None, *ROW_STAGES))}
    ranked = sorted(samples, key=lambda sample: (order[sample.left_at], sample.counted_reason or ""))
    groups = groupby(ranked, key=lambda sample: (sample.left_at, sample.counted_reason))
    return tuple(Outcome(number, *key, tuple(rows)) for number, (key, rows) in enumerate(groups))
