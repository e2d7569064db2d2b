"""`init`, `doctor`, `schema`: what a new user needs before the first run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.cli.call import DATA, JSON, SET, Call
from pipeline.cli.show import say
from pipeline.cli.show_setup import say_findings, say_started
from pipeline.core.config import RunConfig
from pipeline.core.config_api import secret_values
from pipeline.core.errors import UsageError
from pipeline.core.load import load_config
from pipeline.runner.init import init

MODEL = "A model's folder or HUB_ID@REVISION"


@click.command("init")
@click.argument("folder", metavar="DIR", type=click.Path(readable=False))
@click.option("--teacher", metavar="MODEL", help=f"{MODEL}; left out: this project's tiny teacher.")
@click.option("--student", metavar="MODEL", help=f"{MODEL}; left out: this project's tiny student.")
@DATA
@JSON
def init_command(folder: str, teacher: str | None, student: str | None, data: Path, as_json: bool) -> None:
    """Write a commented config, prompts and their card to start from; overwrites nothing."""
    if not folder:  # an unset shell variable; a path would take it for the current folder
        raise UsageError("the folder's name is empty", where="DIR", todo="name a folder, or . for the current one")
    say_started(init(Path(folder), data, teacher, student), data, as_json=as_json)


@click.command("doctor")
@click.argument("config", required=False, type=click.Path(path_type=Path, readable=False))
@SET
@DATA
@JSON
@click.pass_obj
def doctor_command(call: Call, config: Path | None, overrides: Sequence[str], data: Path, as_json: bool) -> None:
    """Say whether this machine has what runs need, or what the run of CONFIG needs (exit 2 if it lacks something)."""
    from pipeline.runner.doctor import examine  # only this command needs what it loads

    if config is None and overrides:
        raise UsageError("--set needs a config", where="--set", todo="name one: doctor CONFIG --set a.b=c")
    loaded = None if config is None else load_config(config, overrides)
    call.secrets = () if loaded is None else secret_values(loaded.config.teachers.values())
    findings = examine(data, loaded, os.environ, Path(os.environ.get("HOME", "/")))
    say_findings(findings, call.secrets, as_json=as_json)
    failed = dict.fromkeys(finding.name for finding in findings if finding.state == "fail")
    if failed:
        where = "this machine" if config is None else f"this machine, for {config}"
        raise UsageError(f"not ready: {', '.join(failed)}", where=where, todo="mend what is marked FAIL above")


@click.command("schema")
@JSON
def schema_command(as_json: bool) -> None:
    """Print the JSON schema of the config; it is JSON with and without --json."""
    say(json.dumps(RunConfig.model_json_schema(), indent=2, sort_keys=True))
