"""`push` and `export`: what leaves the store, once it was checked and shown."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from pipeline.cli.call import Call, Target, on_config
from pipeline.core.errors import UsageError
from pipeline.core.log import configure_logging

if TYPE_CHECKING:
    from pipeline.runner.publish.files import What

PATH = click.Path(path_type=Path, readable=False)


@click.command("push")
@on_config
@click.option("--what", type=click.Choice(["dataset", "model"]), required=True, help="What is published.")
@click.option(
    "--to",
    "address",
    required=True,
    metavar="TARGET",
    help="hf://OWNER/NAME, a folder, or an address that fsspec knows (s3://…).",
)
@click.option("--public", is_flag=True, help="Everybody may read it; without it a new repository is private.")
@click.option("--branch", metavar="NAME", help="Branch of the repository that gets the commit.")
@click.option("--allow-rows", type=PATH, metavar="FILE", help="Ids of rows that may go in spite of the scan.")
@click.option("--dataset-id", "hub_ids", multiple=True, metavar="OWNER/NAME",
              help="Where the data set is published, for the student's card; repeatable.")  # fmt: skip
@click.option("--yes", is_flag=True, help="Send it without asking.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@click.pass_obj
def push_command(
    call: Call,
    target: Target,
    what: str,
    address: str,
    public: bool,
    branch: str | None,
    allow_rows: Path | None,
    hub_ids: Sequence[str],
    yes: bool,
    dry_run: bool,
) -> None:
    """Publish the data set or the student: shows files, scan and licence verdict first, and asks.

    Only files on an allow-list go, never stored answers. Exit 4 if terms, the policy or the scan forbid it.
    """
    from pipeline.cli.show_publish import say_proposal, say_published  # these know rows, and so load Arrow
    from pipeline.runner.publish.hub import hub_token
    from pipeline.runner.publish.push import Wish, propose, publish, refuse
    from pipeline.runner.publish.targets import HUB, target_of

    session = replace(target.open(call), invoked=("push", "--what", what, "--to", address))
    if address.startswith(HUB) and (token := hub_token()) is not None:
        call.secrets = (*call.secrets, token)
        configure_logging(call.secrets, verbose=target.verbose)
    wish = Wish(cast("What", what), target_of(address, branch), public, allow_rows, tuple(hub_ids))
    with call.signals():
        proposal = propose(session, wish)
        if dry_run or not target.as_json:
            say_proposal(proposal, as_json=target.as_json)
        refuse(proposal)
        if dry_run:
            return
        _ask(wish.target.where, yes=yes)
        address = publish(proposal, partial(call.stop.check, "push"))
    say_published(proposal, address, as_json=target.as_json)


def _ask(where: str, *, yes: bool) -> None:
    """Wait for a yes.

    Raises:
        UsageError: there is nobody to ask, or the answer is no.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        what = "nobody can be asked here whether this shall be published"
        raise UsageError(what, where=where, todo="look at it with --dry-run, then give --yes")
    if not click.confirm(f"publish this to {where}?", default=False, err=True):
        raise UsageError("not published", where=where, todo="nothing was sent")


@click.command("export")
@on_config
@click.option("--format", "form", type=click.Choice(["jsonl", "messages", "sharegpt", "alpaca"]), required=True,
              help="Form of the rows.")  # fmt: skip
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Folder to write; an earlier export is replaced.")
@click.option("--split", "splits", multiple=True, type=click.Choice(["train", "validation"]),
              help="Only this split; repeatable.")  # fmt: skip
@click.pass_obj
def export_command(call: Call, target: Target, form: str, out: Path, splits: Sequence[str]) -> None:
    """Write the data set's rows in the form of another trainer (TRL, axolotl, LLaMA-Factory, Unsloth).

    A row that a form cannot say whole is left out, with its reason in rejects.jsonl.
    """
    from pipeline.cli.show_publish import say_exported
    from pipeline.runner.export import export

    session = target.open(call)
    with call.signals():
        done = export(session, form, out, tuple(splits))
    say_exported(done, as_json=target.as_json)
