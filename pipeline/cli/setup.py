"""`schema`: what a new user needs before the first run."""

import json

import click

from pipeline.cli.show import say
from pipeline.core.config import RunConfig


@click.command("schema")
def schema_command() -> None:
    """Print the JSON schema of the config."""
    say(json.dumps(RunConfig.model_json_schema(), indent=2, sort_keys=True))
