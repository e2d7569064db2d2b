"""Results as a terminal shows them and as scripts read them."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.core.errors import ExitCode
from pipeline.core.log import safe_text
from pipeline.runner.plan import Planned
from pipeline.runner.run import Outcome
from pipeline.runner.session import Session
from pipeline.runner.status import RunStatus


def say(text: str) -> None:
    """Print a result; a reader that has gone away (`| head -1`) is no error, the work is done."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_json(value: Any) -> None:
    """Print a result for scripts."""
    say(json.dumps(value, indent=2, default=str))


def say_plan(planned: Sequence[Planned], *, as_json: bool) -> None:
    """What would happen to each step."""
    if as_json:
        say_json([{"step": p.step.name, "state": p.state, "key": p.key, "reasons": list(p.reasons)} for p in planned])
        return
    for each in planned:
        reasons = "; ".join(each.reasons)
        say(safe_text(f"{each.step.name:10} {each.state:8} {reasons}".rstrip()))


def say_outcomes(session: Session, outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """What each step did, the evaluation's table and where the report lies."""
    by_name = {outcome.step.name: outcome for outcome in outcomes}
    evaluation = _read_evaluation(by_name["evaluate"]) if "evaluate" in by_name else None
    report = session.folder / "report" / "report.html" if "report" in by_name else None
    if as_json:
        rows = [_outcome_json(session, outcome) for outcome in outcomes]
        summary = {"run": session.loaded.run_name, "steps": rows, "evaluation": evaluation}
        say_json(summary | {"report": str(report) if report is not None else None})
        return
    for outcome in outcomes:
        manifest = outcome.artefact.manifest
        done = "done" if outcome.ran else "cached"
        say(f"{outcome.step.name:10} {done:7} {manifest.rows_in:>9,} in {manifest.rows_out:>9,} out   "
            f"{session.folder / outcome.step.name}")  # fmt: skip
    if evaluation is not None:
        say(_evaluation_table(evaluation))
    if report is not None:
        say(f"report: {report}")


def say_status(found: RunStatus, *, as_json: bool) -> None:
    """The state of a run."""
    if as_json:
        say_json(asdict(found))
        return
    for each in found.steps:
        rows = "" if each.rows_out is None else f"{each.rows_in:>9,} in {each.rows_out:>9,} out"
        unfinished = ("unfinished, will be resumed",) if each.unfinished else ()
        told = f"{each.step:10} {each.state:8} {rows:28} {'; '.join((*each.reasons, *unfinished))}"
        say(safe_text(told.rstrip()))
    if found.held_by is not None:
        say(safe_text(f"running: {found.held_by}"))
    elif found.last_end is not None and found.last_end != ExitCode.COMPLETE:
        say(safe_text(f"the last run ended with exit code {found.last_end}: {found.last_error}"))
    if found.next_command is not None:
        say(safe_text(f"next: {found.next_command}"))


def _outcome_json(session: Session, outcome: Outcome) -> dict[str, Any]:
    manifest = outcome.artefact.manifest
    return {
        "step": outcome.step.name,
        "ran": outcome.ran,
        "key": manifest.key,
        "content": manifest.content,
        "rows_in": manifest.rows_in,
        "rows_out": manifest.rows_out,
        "rejected": manifest.rejected,
        "path": str(session.folder / outcome.step.name),
    }


def _read_evaluation(outcome: Outcome) -> dict[str, Any]:
    text = (outcome.artefact.path / "evaluation.json").read_text("utf-8")
    evaluation: dict[str, Any] = json.loads(text)
    return evaluation


def _evaluation_table(evaluation: dict[str, Any]) -> str:
    """The evaluation for a terminal; a value that an API does not tell is shown as a dash."""
    lines = ["", f"{'model':8} {'accuracy':>9}  {'95 % interval':>15} {'parameters':>12} {'answers/s':>10}"]
    for name in ("teacher", "base", "student"):
        model = evaluation[name]
        interval = "{:>7.2%} – {:>6.2%}".format(*model["ci95"]) if model["ci95"] is not None else "-"
        parameters = f"{model['parameters']:,}" if model["parameters"] is not None else "-"
        speed = f"{model['answers_per_second']:,.1f}" if model["answers_per_second"] is not None else "-"
        lines.append(f"{name:8} {model['accuracy']:>9.2%}  {interval:>15} {parameters:>12} {speed:>10}")
    retained, closed = evaluation["retained"], evaluation["gap_closed"]
    kept = f"{retained:.1%} of the teacher's accuracy retained" if retained is not None else "retained: not defined"
    gap = f"{closed:.1%} of the gap closed" if closed is not None else "gap closed: not defined"
    return "\n".join([*lines, f"{kept}, {gap}, on {evaluation['n']:,} test prompts"])
