"""`status`: what is there, and what is not any more what the config says."""

import click

from pipeline.cli.call import Call, Target, on_config
from pipeline.cli.show import say_status
from pipeline.runner.status import status


@click.command("status")
@on_config
@click.pass_obj
def status_command(call: Call, target: Target) -> None:
    """Say which results are there, which are stale and why, and how the last run ended."""
    say_status(status(target.open(call)), as_json=target.as_json)
