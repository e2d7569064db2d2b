"""The state of a run as a terminal shows it and as scripts read it."""

from dataclasses import asdict

from pipeline.cli.show import say, say_json
from pipeline.core.errors import ExitCode
from pipeline.core.log import safe_text
from pipeline.runner.status import LastRun, RunStatus, StepStatus, Unfinished


def say_status(found: RunStatus, *, as_json: bool) -> None:
    """The state of a run."""
    if as_json:
        say_json(asdict(found))
        return
    for each in found.steps:
        say(safe_text(_step_line(each).rstrip()))
    if found.last_run is not None and found.last_run.state != "running":
        say(safe_text(_last_run(found.last_run)))
    if found.held_by is not None:
        say(safe_text(f"running: {found.held_by}"))
    if found.next_command is not None:
        say(safe_text(f"next: {found.next_command}"))


def _step_line(each: StepStatus) -> str:
    rows = "" if each.rows_out is None else f"{each.rows_in:>9,} in {each.rows_out:>9,} out"
    notes = [*each.reasons]
    if each.held_by is not None:
        notes.append(f"{each.held_by} makes it")
    elif each.unfinished is not None:
        notes.append(_unfinished(each.unfinished))
    return f"{each.step:10} {each.state:8} {rows:27} {'; '.join(notes)}"


def _unfinished(work: Unfinished) -> str:
    if work.resumes is None:
        return "begun, not finished"
    return "begun, will be resumed" if work.resumes else "unfinished work of other settings is left"


def _last_run(last: LastRun) -> str:
    if last.state == "killed":
        return f"last run: killed or crashed without a word, started {last.started}: {last.command}"
    if last.exit_code == ExitCode.COMPLETE:
        return f"last run: complete, {last.ended}: {last.command}"
    return f"last run: ended with exit code {last.exit_code}, {last.ended}: {last.error}"
