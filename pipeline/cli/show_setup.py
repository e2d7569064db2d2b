"""What `init` wrote and what `doctor` found, as a terminal shows them and as scripts read them."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipeline.cli.show import say, say_json
from pipeline.core.log import scrub
from pipeline.runner.init import Started

if TYPE_CHECKING:
    from pipeline.runner.doctor.finding import Finding

NEXT: Final = {"doctor": "is here what it needs?", "plan": "what would be done", "run": "do it"}
LABEL: Final = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


def say_started(started: Started, data: Path, *, as_json: bool) -> None:
    """Which files were written, and what to type next."""
    rest = [] if data == Path("data") else ["--data", str(data)]
    commands = {name: shlex.join(["python", "-m", "pipeline", name, str(started.config), *rest]) for name in NEXT}
    if as_json:
        say_json(asdict(started) | {"next": commands})
        return
    for path in started.files:
        say(f"wrote {path}")
    if started.name_taken:
        say(f"note: there is a run named {started.run} already; for one of its own change `name` in the config")
    toy = "; teacher and student are tiny: a toy that goes the whole way, in two or three minutes on two cores"
    say(f"{started.prompts} prompts{toy if started.is_toy else ''}")
    say("next:")
    width = max(map(len, commands.values()))
    for name, command in commands.items():
        say(f"  {command:{width}}   # {NEXT[name]}")


def say_findings(findings: "Sequence[Finding]", secrets: tuple[str, ...], *, as_json: bool) -> None:
    """What was found, a line a check, and another with what to do where something is wrong."""
    counts = {state: sum(finding.state == state for finding in findings) for state in LABEL}
    if as_json:
        say_json({"ok": counts["fail"] == 0, "findings": [asdict(finding) for finding in findings]})
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        say(scrub(f"{LABEL[finding.state]:4} {finding.name:{width}}  {finding.detail}", secrets))
        if finding.todo is not None:
            say(scrub(f"{'':{width + 5}}  do: {finding.todo}", secrets))
    say(f"{len(findings)} checks: {counts['fail']} failed, {counts['warn']} warnings")
