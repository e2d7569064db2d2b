"""The commands. The only module that prints; results go to stdout, everything else to stderr."""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from pipeline import runner
from pipeline.core.config import RunConfig
from pipeline.core.errors import ExitCode, Interrupted, PipelineError, Terminated
from pipeline.core.load import load_config
from pipeline.core.log import configure_logging, safe_text, scrub


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit code (`ExitCode`)."""
    call = Call()
    try:
        commands.main(args=arguments, prog_name="python -m pipeline", standalone_mode=False, obj=call)
    except click.ClickException as error:
        error.show()
        return int(ExitCode.USAGE)
    except PipelineError as error:
        print(scrub(str(error), call.secrets), file=sys.stderr)
        return int(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("stopped at once; what was committed is kept, the same command resumes", file=sys.stderr)
        return int(call.exit_code or ExitCode.INTERRUPTED)
    except Exception:  # noqa: BLE001 (the one place where a bug becomes exit code 1)
        print(scrub(traceback.format_exc(), call.secrets), file=sys.stderr)
        print("this is a bug; the lines above say where", file=sys.stderr)
        return int(ExitCode.BUG)
    return int(ExitCode.COMPLETE)


class Call:
    """What one call of `main` shares with its command: the secrets that no message may hold, and the stop signals.

    The first SIGINT or SIGTERM is a request to stop, the second an immediate end.
    """

    def __init__(self) -> None:
        self.secrets: tuple[str, ...] = ()
        self.cancel = threading.Event()
        self.exit_code: ExitCode | None = None

    @contextmanager
    def caught(self, cancel: threading.Event) -> Iterator[None]:
        """Catch signals inside the block; the first one sets `cancel`.

        Raises:
            Interrupted, Terminated: the block stopped at the request of SIGINT or SIGTERM.
        """
        self.cancel = cancel
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Interrupted as error:
            if self.exit_code is ExitCode.TERMINATED:
                raise Terminated(error.what, where=error.where, todo=error.todo) from error
            raise
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED
        if self.cancel.is_set():
            raise KeyboardInterrupt
        self.cancel.set()
        # Not print: the signal may have come in the middle of one, which Python refuses to enter again.
        os.write(2, b"\nstopping: finishing what is in flight; once more stops at once\n")


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and options that every command on a config has."""
    options = (
        click.argument("config", type=click.Path(path_type=Path)),
        click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True,
                     help="Folder of store, responses and runs."),
        click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a config value; repeatable."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
        click.option("--verbose", is_flag=True, help="More messages."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _open(call: Call, config: Path, data: Path, overrides: Sequence[str], verbose: bool) -> runner.Session:
    session = runner.open_session(load_config(config, overrides), data)
    call.secrets = session.secrets
    configure_logging(session.secrets, verbose=verbose)
    return session


class InOrder(click.Group):
    """Lists the commands in the order in which they were added, which is the order in which data flows."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def commands() -> None:
    """Distil a big language model into a small one: prompts, teacher, filter, dedup, dataset, student, evaluation."""


@commands.command("run")
@_common
@click.option("--until", type=click.Choice(runner.step_names()), help="Last step to run.")
@click.pass_obj
def run_command(
    call: Call,
    config: Path,
    data: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    verbose: bool,
    until: str | None,
) -> None:
    """Run all steps that have no result yet."""
    session = _open(call, config, data, overrides, verbose)
    with call.caught(session.cancel):
        outcomes = runner.run_all(session, until)
    _print_outcomes(session, outcomes, as_json)


@commands.command("plan")
@_common
@click.pass_obj
def plan_command(
    call: Call, config: Path, data: Path, overrides: tuple[str, ...], as_json: bool, verbose: bool
) -> None:
    """Say what `run` would do and why, without doing it."""
    planned = runner.plan(_open(call, config, data, overrides, verbose))
    if as_json:
        rows = [{"step": p.step.name, "state": p.state, "key": p.key, "reasons": list(p.reasons)} for p in planned]
        _say(json.dumps(rows, indent=2))
        return
    for each in planned:
        reasons = "; ".join(each.reasons)
        _say(safe_text(f"{each.step.name:10} {each.state:8} {reasons}".rstrip()))


@commands.command("schema")
def schema_command() -> None:
    """Print the JSON schema of the config."""
    _say(json.dumps(RunConfig.model_json_schema(), indent=2, sort_keys=True))


def _add_stage_command(name: str) -> None:
    """`python -m pipeline <step> config`: that step alone."""

    @commands.command(name, help=f"Run {name} alone, on what the steps before it made.")
    @_common
    @click.option("--force", is_flag=True, help="Run it although it has a result; equal content keeps the old one.")
    @click.pass_obj
    def stage_command(
        call: Call,
        config: Path,
        data: Path,
        overrides: tuple[str, ...],
        as_json: bool,
        verbose: bool,
        force: bool,
    ) -> None:
        session = _open(call, config, data, overrides, verbose)
        with call.caught(session.cancel):
            if name == "train" and not runner.leads_launch():
                runner.follow_training(session)
                return
            outcome = runner.run_one(session, name, force=force)
        _print_outcomes(session, [outcome], as_json)


for _name in runner.step_names():
    _add_stage_command(_name)


# ---------------------------------------------------------------------------------------------------- printing


def _say(text: str) -> None:
    """Print a result; a reader that has gone away (`| head -1`) is no error, the work is done."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_outcomes(session: runner.Session, outcomes: Sequence[runner.Outcome], as_json: bool) -> None:
    by_name = {outcome.step.name: outcome for outcome in outcomes}
    evaluation = _read_evaluation(by_name["evaluate"]) if "evaluate" in by_name else None
    report = session.folder / "report" / "report.html" if "report" in by_name else None
    if as_json:
        rows = [_outcome_json(session, outcome) for outcome in outcomes]
        summary = {"run": session.loaded.run_name, "steps": rows, "evaluation": evaluation}
        _say(json.dumps(summary | {"report": str(report) if report is not None else None}, indent=2))
        return
    for outcome in outcomes:
        manifest = outcome.artefact.manifest
        done = "done" if outcome.ran else "cached"
        _say(f"{outcome.step.name:10} {done:7} {manifest.rows_in:>9,} in {manifest.rows_out:>9,} out   "
              f"{session.folder / outcome.step.name}")  # fmt: skip
    if evaluation is not None:
        _say(_evaluation_table(evaluation))
    if report is not None:
        _say(f"report: {report}")


def _outcome_json(session: runner.Session, outcome: runner.Outcome) -> dict[str, Any]:
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


def _read_evaluation(outcome: runner.Outcome) -> dict[str, Any]:
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
