"""`licenses`: the terms that are known, clause by clause, and whose full text is here."""

import json
from pathlib import Path

import click

from pipeline.cli.call import JSON
from pipeline.cli.show import say
from pipeline.cli.show_licenses import say_record, say_records
from pipeline.cli.usage import Commands
from pipeline.core.errors import UsageError
from pipeline.terms.records import TermRecord, load_registry
from pipeline.terms.texts import find_text

FOLDER = click.Path(path_type=Path, readable=False)
REGISTRY = click.option("--registry", type=FOLDER, help="Folder with term records of your own, as policy.registry.")
TEXTS = click.option("--texts", type=FOLDER, help="Folder with full texts of your own, as policy.texts.")


@click.group("licenses", cls=Commands)
def licenses_command() -> None:
    """Show what is known of licences, API terms and policies: an automated reading, not legal advice.

    It may be wrong, incomplete or out of date. Terms that you signed yourself take precedence.
    """


@licenses_command.command("list")
@REGISTRY
@JSON
def list_command(registry: Path | None, as_json: bool) -> None:
    """List all term records: names, dates, and how sure they are."""
    say_records(load_registry(registry), as_json=as_json)


@licenses_command.command("show")
@click.argument("name")
@REGISTRY
@TEXTS
@JSON
def show_command(name: str, registry: Path | None, texts: Path | None, as_json: bool) -> None:
    """Show one record with its clauses and quotes.

    NAME is its id, an SPDX id, a Hugging Face hub id or a provider of an API.
    """
    known = load_registry(registry)
    record = known.find(name) or known.of_provider(name)
    if record is None:
        todo = "list them all: python -m pipeline licenses list"
        raise UsageError(f"there is no term record named {name}", where="licenses show", todo=todo)
    say_record(record, known.together(record)[1:], find_text(record.id, known, texts), as_json=as_json)


@licenses_command.command("schema")
def schema_command() -> None:
    """Print the JSON schema of a term record, for an editor or a check of your own."""
    say(json.dumps(TermRecord.model_json_schema(), indent=2, sort_keys=True))
