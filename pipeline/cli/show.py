"""Results as a terminal shows them and as scripts read them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.core.log import drop_output, safe_text
from pipeline.runner.locked import Locked
from pipeline.runner.run import Outcome
from pipeline.runner.session import Session


def say(text: str) -> None:
    """Print a result; a reader that has gone away (`| head -1`) is no error, the work is done."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output(sys.stdout)


def say_json(value: Any) -> None:
    """Print a result for scripts."""
    say(json.dumps(value, indent=2, default=str))


def say_outcomes(session: Session, outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """What each step did, the evaluation's table and where the report lies."""
    by_name = {outcome.step.name: outcome for outcome in outcomes}
    evaluation = _read_evaluation(by_name["evaluate"]) if "evaluate" in by_name else None
    report = session.folder / "report" / "report.html" if "report" in by_name else None
    if as_json:
        rows = [_outcome_json(session, outcome) for outcome in outcomes]
        summary = {"run": session.loaded.run_name, "steps": rows, "evaluation": evaluation}
        locked = None if session.locked is None else _locked_json(session.locked)
        say_json(summary | {"report": str(report) if report is not None else None, "locked": locked})
        return
    for outcome in outcomes:
        manifest = outcome.artefact.manifest
        done = "done" if outcome.ran else "cached"
        say(f"{outcome.step.name:10} {done:7} {manifest.rows_in:>9,} in {manifest.rows_out:>9,} out   "
            f"{session.folder / outcome.step.name}")  # fmt: skip
    if session.locked is not None:
        say(_locked_line(session.locked))
    if evaluation is not None:
        say(_evaluation_table(evaluation))
    if report is not None:
        say(f"report: {report}")


def _locked_json(locked: Locked) -> dict[str, Any]:
    return {"drift": [asdict(drift) for drift in locked.drift], "by_recipe": locked.by_recipe}


def _locked_line(locked: Locked) -> str:
    """How what there is compares with the lock file."""
    if not locked.drift:
        return f"as {locked.path} says"
    drift = ", ".join(f"{each.step} ({each.locked[:12]} -> {each.content[:12]})" for each in locked.drift)
    after = f"; compared by recipe only: {', '.join(locked.by_recipe)}" if locked.by_recipe else ""
    return safe_text(f"drift from {locked.path}: {drift}{after}")


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
