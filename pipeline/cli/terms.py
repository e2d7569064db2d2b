"""`licenses check` and `licenses override`: the verdict on a config, and what a person decides about it."""

from datetime import datetime
from pathlib import Path
from typing import get_args

import click

from pipeline.cli.call import Call, Target, on_config
from pipeline.cli.show import say, say_json
from pipeline.core.log import safe_text
from pipeline.runner.terms import Signed, judge_plan, record_override, refuse_plan
from pipeline.terms.overrides import Kind, Override
from pipeline.terms.verdict import Due, Finding, Verdict

PATH = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("check")
@on_config
@click.pass_obj
def check_command(call: Call, target: Target) -> None:
    """Say whether terms allow what a config's `policy` means to do, and what will be owed; exit 4 where they do not.

    It is an automated reading of public documents, not legal advice.
    """
    session = target.open(call)
    judged = judge_plan(session)
    if target.as_json:
        say_json(judged.verdict.to_json())
    else:
        for line in _lines(judged.verdict):
            say(safe_text(line))
    refuse_plan(session, judged)


@click.command("override")
@click.argument("rule")
@on_config
@click.option("--evidence", type=PATH, required=True, help="File with the permission, the contract or a note.")
@click.option("--reason", required=True, help="Why, for whoever reads it in a year; at least 20 characters.")
@click.option("--expires", type=click.DateTime(["%Y-%m-%d"]), required=True, help="Last day, within a year.")
@click.option("--person", required=True, help="Name and contact of who answers for it.")
@click.option("--kind", type=click.Choice(get_args(Kind)), default="permission", show_default=True)
@click.option("--source", help="Only for this source, such as teacher:main; an assertion needs it.")
@click.option("--license", "license_name", help="Of an assertion: the licence that the source is under.")
@click.pass_obj
def override_command(
    call: Call,
    target: Target,
    rule: str,
    evidence: Path,
    reason: str,
    expires: datetime,
    person: str,
    kind: Kind,
    source: str | None,
    license_name: str | None,
) -> None:
    """Record that somebody answers for what RULE refuses in a config, in the file that `policy.overrides` names.

    It is appended to a chain of hashes, holds for these sources only and until it expires, and stays visible in
    every manifest and card: the restriction is accepted, not removed.
    """
    session = target.open(call)
    signed = Signed(rule.upper(), kind, person, reason, evidence, expires.date(), source, license_name)
    made = record_override(session, signed)
    if target.as_json:
        say_json({"overrides": [each.to_json() for each in made]})
        return
    for each in made:
        say(safe_text(_recorded(each)))


def _recorded(override: Override) -> str:
    """What was written down."""
    until = f"until {override.expires}"
    if override.kind == "assertion":
        return f"{override.id}: asserted {override.license} for {override.source} {until}"
    value = "" if override.value == "null" else f" {override.value}"
    about = ", ".join(sorted(override.sources))
    return f"{override.id}: {override.rule} {override.atom}{value} accepted for {about} {until}"


def _lines(verdict: Verdict) -> list[str]:
    """The outcome, what stands against it, what is owed, and what to know besides."""
    return [
        f"terms: {verdict.outcome.replace('_', ' ')}",
        *(_finding(each) for each in verdict.findings),
        *(_due(each) for each in verdict.obligations),
        *(f"  warning      {each}" for each in verdict.warnings),
    ]


def _finding(finding: Finding) -> str:
    value = "" if finding.value == "null" else f"({finding.value.strip(chr(34))})"
    cited = "; ".join(f"{each.title}, {each.clause}" if each.clause else each.title for each in finding.cited)
    return f"  {finding.effect:12} {finding.rule} {finding.atom}{value}: {', '.join(finding.sources)} ({cited})"


def _due(due: Due) -> str:
    value = "" if due.value is None else f" {due.value!s}"
    reach = ", to be on the safe side" if due.conservative else ""
    return f"  owed         {due.atom}{value}: {due.trigger}{reach} ({due.title})"
