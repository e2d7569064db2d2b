"""`status`, `why`, `verify`, `gc`: what is there, where it came from, whether it is whole, and what nobody needs."""

from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.cli.call import DATA, JSON, SET, VERBOSE, Call, Target, on_config
from pipeline.cli.show_status import say_status
from pipeline.cli.show_store import say_collection, say_verification
from pipeline.core.errors import CorruptArtefact
from pipeline.core.log import configure_logging
from pipeline.runner.gc import collect
from pipeline.runner.status import status
from pipeline.runner.verify import verify_data, verify_run

PATH = click.Path(path_type=Path, readable=False)


@click.command("status")
@on_config
@click.pass_obj
def status_command(call: Call, target: Target) -> None:
    """Say which results are there, which are stale and why, and how the last run ended."""
    say_status(status(target.open(call)), as_json=target.as_json)


@click.command("why")
@on_config
@click.argument("row")
@click.pass_obj
def why_command(call: Call, target: Target, row: str) -> None:
    """Tell one row's whole story.

    ROW is a row id (its first 6 digits do if they are unique) or PROMPT_SET/PROMPT_ID, which tells the prompt's and
    those of all its answers.
    """
    from pipeline.cli.show_why import say_story  # it knows rows, and so loads Arrow
    from pipeline.runner.why import tell

    say_story(tell(target.open(call), row), as_json=target.as_json)


@click.command("verify")
@click.argument("config", type=PATH, required=False)
@SET
@DATA
@JSON
@VERBOSE
@click.pass_obj
def verify_command(
    call: Call, config: Path | None, overrides: Sequence[str], data: Path, as_json: bool, verbose: bool
) -> None:
    """Hash everything again and name all damage (exit 5).

    Without CONFIG all results, links and stored answers of the data folder; with it the results that its run links and
    its lock file names.
    """
    if config is not None:
        found = verify_run(Target(config, data, overrides, as_json, verbose).open(call))
    elif overrides:
        raise click.UsageError("--set belongs to a CONFIG")
    else:
        configure_logging((), verbose=verbose)
        found = verify_data(data)
    say_verification(found, as_json=as_json)
    if found.damage:
        count = len(found.damage)
        what = "one place is damaged" if count == 1 else f"{count:,} places are damaged"
        todo = "see each of them above; a run rebuilds damaged results from the stored answers"
        raise CorruptArtefact(what, where=str(data), todo=todo)


@click.command("gc")
@click.argument("configs", type=PATH, nargs=-1)
@click.option("--delete", is_flag=True, help="Remove what is listed; without it nothing is removed.")
@DATA
@JSON
@VERBOSE
def gc_command(configs: Sequence[Path], delete: bool, data: Path, as_json: bool, verbose: bool) -> None:
    """List what nobody refers to: results that no run links, abandoned work, quarantine. Stored answers stay.

    What the lock files beside CONFIGS name is kept too. To let go of a run's results, delete its folder under runs/.
    """
    configure_logging((), verbose=verbose)
    say_collection(collect(data, configs, delete=delete), as_json=as_json)
