"""`run`, `plan`, and a command for each stage."""

from collections.abc import Sequence

import click

from pipeline.cli.call import Call, Target, on_config
from pipeline.cli.show import say_outcomes
from pipeline.cli.show_plan import say_plan
from pipeline.core.runs import refuse_if_held, run_lock
from pipeline.runner.checks import warn_of_refusal
from pipeline.runner.locked import lock_to
from pipeline.runner.plan import plan, until
from pipeline.runner.run import committed_before, follow_training, leads_launch, run_all, run_one
from pipeline.runner.steps import step_names
from pipeline.runner.terms import judge_plan, refuse_plan

LOCKED = click.option("--locked", is_flag=True, help="Keep to the lock file: exit 5 if config, files or rows differ.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would run and why, and run nothing.")


@click.command("run")
@on_config
@click.option("--until", "last", type=click.Choice(step_names()), help="Last step to run.")
@click.option("--force", is_flag=True, help="Run all steps anew from the stored answers; equal content keeps the old.")
@LOCKED
@DRY_RUN
@click.pass_obj
def run_command(call: Call, target: Target, last: str | None, force: bool, locked: bool, dry_run: bool) -> None:
    """Run all steps that have no result yet."""
    session = target.open(call)
    if dry_run:
        session = lock_to(session, last) if locked else session
        planned = until(plan(session, force=force), last)
        warn_of_refusal(session, [each.step for each in planned], force=force)
        say_plan(session, planned, as_json=target.as_json)
        return
    with call.signals():
        if locked:
            refuse_if_held(run_lock(session.folder))  # before files are hashed, which may take a while
            session = lock_to(session, last)
        outcomes = run_all(session, last, force=force)
    say_outcomes(session, outcomes, as_json=target.as_json)


@click.command("plan")
@on_config
@click.pass_obj
def plan_command(call: Call, target: Target) -> None:
    """Say what `run` would do and why, what it would ask of teachers, and what that may cost; do nothing.

    Requests are counted once the prompts are made: `prompts` costs nothing and asks nobody. Exit 4 where terms forbid
    what `policy` means to do with the rows.
    """
    from pipeline.runner.estimate import estimate  # it knows rows, and so loads Arrow

    session = target.open(call)
    warn_of_refusal(session)
    planned = plan(session)
    judged = judge_plan(session)
    say_plan(session, planned, estimate(session, planned), judged.verdict, as_json=target.as_json)
    refuse_plan(session, judged)


def stage_commands() -> Sequence[click.Command]:
    """`python -m pipeline <step> config` for every step."""
    return [_stage_command(name) for name in step_names()]


def _stage_command(name: str) -> click.Command:
    @click.command(name, help=f"Run {name} alone, on what the steps before it made.")
    @on_config
    @click.option("--force", is_flag=True, help="Run it although it has a result; equal content keeps the old one.")
    @DRY_RUN
    @click.pass_obj
    def stage_command(call: Call, target: Target, force: bool, dry_run: bool) -> None:
        session = target.open(call)
        if dry_run:
            committed_before(session, name)
            planned = until(plan(session, force=force), name)[-1:]
            warn_of_refusal(session, [each.step for each in planned], force=force)
            say_plan(session, planned, as_json=target.as_json)
            return
        with call.signals():
            if name == "train" and not leads_launch():
                follow_training(session)
                return
            outcome = run_one(session, name, force=force)
        say_outcomes(session, [outcome], as_json=target.as_json)

    return stage_command
