"""`responses`: list, count, carry and remove the answers that were paid for."""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click

from pipeline.cli.call import DATA, JSON, SET, VERBOSE, Call, Target
from pipeline.cli.usage import Commands
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.log import configure_logging

PATH = click.Path(path_type=Path, readable=False)
OPTIONAL_CONFIG = click.argument("config", type=PATH, required=False)


class Responses(Commands):
    """Lists when no subcommand is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `list` in front of options that are not the group's own."""
        named = args and not args[0].startswith("-")
        if not named and not {"-h", "--help"} & set(args[:1]):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group("responses", cls=Responses)
def responses_command() -> None:
    """List, count, export, import and purge the stored answers; alone: list.

    All runs of a data folder share them. Nothing but `purge --yes` ever removes one.
    """


@responses_command.command(
    "list", short_help="By teacher, model, format and server; this is what `responses` alone does."
)
@DATA
@JSON
@click.pass_obj
def list_command(call: Call, data: str | Path, as_json: bool) -> None:
    """List what is stored, by teacher, model, format and server; segments not folded yet; damage set aside."""
    from pipeline.cli.show_responses import say_inventory  # these know rows, and so load Arrow
    from pipeline.teacher.inventory import existing_data, take_inventory

    configure_logging((), verbose=False)
    with call.signals():
        found = take_inventory(existing_data(Path(data)), partial(call.stop.check, "responses list"))
    say_inventory(found, as_json=as_json)


@responses_command.command("count", short_help="Totals, or what CONFIG's requests would find.")
@OPTIONAL_CONFIG
@SET
@DATA
@JSON
@VERBOSE
@click.pass_obj
def count_command(
    call: Call, config: Path | None, overrides: Sequence[str], data: Path, as_json: bool, verbose: bool
) -> None:
    """Count what is stored, or which requests of CONFIG's `generate` are answered, refused, cut and missing."""
    from pipeline.cli.show_responses import say_count, say_coverage
    from pipeline.teacher.inventory import existing_data, take_inventory
    from pipeline.teacher.wanted import coverage

    _refuse_overrides(config, overrides)
    configure_logging((), verbose=verbose)
    check = partial(call.stop.check, "responses count")
    with call.signals():
        if config is None:
            say_count(take_inventory(existing_data(data), check), as_json=as_json)
            return
        from pipeline.runner.wanted import wanted_of

        session = Target(config, data, overrides, as_json, verbose).open(call)
        found = coverage(data / "responses", wanted_of(session), check)
    say_coverage(session, found, as_json=as_json)


@responses_command.command("export", short_help="Write the answers that CONFIG uses into one file.")
@OPTIONAL_CONFIG
@click.option("--out", type=PATH, required=True, metavar="FILE", help="The parquet file to write.")
@click.option("--all", "everything", is_flag=True, help="All that is stored, instead of what CONFIG uses.")
@SET
@DATA
@JSON
@VERBOSE
@click.pass_obj
def export_command(
    call: Call,
    config: Path | None,
    out: Path,
    everything: bool,
    overrides: Sequence[str],
    data: Path,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write the answers that CONFIG's `generate` uses into one file, which can go with a data set.

    Exit code 3 if some of its requests have no stored answer; the file then holds the others.
    """
    from pipeline.cli.show_responses import say_exported
    from pipeline.teacher.carry import every_answer, export
    from pipeline.teacher.inventory import existing_data
    from pipeline.teacher.wanted import chosen

    _refuse_overrides(config, overrides)
    if (config is None) != everything:
        what = "give either a CONFIG or --all" if everything else "CONFIG is missing"
        todo = "name the config whose answers shall go, or --all for everything"
        raise UsageError(what, where="responses export", todo=todo)
    configure_logging((), verbose=verbose)
    check = partial(call.stop.check, "responses export")
    with call.signals():
        folder = existing_data(data)
        if config is None:
            say_exported(export(every_answer(folder, check), out), None, as_json=as_json)
            return
        from pipeline.runner.wanted import wanted_of

        session = Target(config, data, overrides, as_json, verbose).open(call)
        wanted = wanted_of(session)
        done = export(chosen(folder, wanted, check), out)
    missing = len(wanted.rows) - done.keys - done.withheld
    say_exported(done, missing, as_json=as_json)
    if missing > 0:
        what = f"no stored answer to {missing:,} of {len(wanted.rows):,} requests; the file holds the others"
        raise Incomplete(what, where=str(out), todo=f"get them first: {session.command('generate')}")


@responses_command.command("import", short_help="Add the answers of an exported FILE that are missing.")
@click.argument("file", type=PATH)
@DATA
@JSON
@click.pass_obj
def import_command(call: Call, file: Path, data: Path, as_json: bool) -> None:
    """Add the answers of an exported FILE that are not stored yet; all of it is checked first, none is replaced."""
    from pipeline.cli.show_responses import say_imported
    from pipeline.teacher.carry import import_answers

    configure_logging((), verbose=False)
    with call.signals():
        done = import_answers(file, data, partial(call.stop.check, "responses import"))
    say_imported(done, as_json=as_json)


@responses_command.command("purge", short_help="List answers by what they have in common; --yes removes them.")
@click.option("--teacher", metavar="IDENTITY", help="Of the teacher whose identity begins with these digits.")
@click.option("--model", metavar="NAME", help="Of this model.")
@click.option("--rejected", metavar="REASON", help="Refusals for this reason.")
@click.option("--before", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="Stored before this day (UTC).")
@click.option("--config", type=PATH, metavar="CONFIG", help="To the requests of this config's `generate`.")
@click.option("--yes", "delete", is_flag=True, help="Remove what is listed; without it nothing is removed.")
@SET
@DATA
@JSON
@VERBOSE
@click.pass_obj
def purge_command(
    call: Call,
    teacher: str | None,
    model: str | None,
    rejected: str | None,
    before: datetime | None,
    config: Path | None,
    delete: bool,
    overrides: Sequence[str],
    data: Path,
    as_json: bool,
    verbose: bool,
) -> None:
    """List the answers for which all that is given holds, with what they cost; --yes removes them for ever.

    A run that needs one of them asks for it, and pays for it, again. The record of what was sent and paid stays.
    """
    from pipeline.cli.show_responses import say_purge
    from pipeline.teacher.purge import Selection, purge

    _refuse_overrides(config, overrides)
    if all(given is None for given in (teacher, model, rejected, before, config)):
        todo = "give --teacher, --model, --rejected, --before or --config"
        raise UsageError("nothing says which answers", where="responses purge", todo=todo)
    for name, given in (("--teacher", teacher), ("--model", model), ("--rejected", rejected)):
        if given == "":  # an unset shell variable
            raise UsageError("the name is empty", where=name, todo="give a name, or leave the option out")
    configure_logging((), verbose=verbose)
    with call.signals():
        keys = None
        if config is not None:
            from pipeline.runner.wanted import wanted_of

            keys = frozenset(wanted_of(Target(config, data, overrides, as_json, verbose).open(call)).rows)
        before_ms = None if before is None else int(before.replace(tzinfo=UTC).timestamp() * 1000)
        selection = Selection(teacher, model, rejected, before_ms, keys)
        done = purge(data, selection, delete=delete, check=partial(call.stop.check, "responses purge"))
    say_purge(done, as_json=as_json)


def _refuse_overrides(config: Path | None, overrides: Sequence[str]) -> None:
    if config is None and overrides:
        raise click.UsageError("--set belongs to a CONFIG")
