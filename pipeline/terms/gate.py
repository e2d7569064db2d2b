"""The gates' refusal: one screen that says what is forbidden, by whom, why here, and what to do about it."""

import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.errors import PolicyRefused
from pipeline.core.log import safe_text
from pipeline.terms.bind import MERGED
from pipeline.terms.grants import read_value
from pipeline.terms.statement import Statement
from pipeline.terms.verdict import Cited, Finding, Gate, Verdict

WIDTH: Final = 110
HEIGHT: Final = 24
LONGEST_CONFIG: Final = 120
"""Characters of a config's path and settings in a command."""
OTHERS: Final = 3
"""Further refusals that are listed."""
QUOTED: Final = 200
"""Characters of a quote that are shown."""
SHOWN: Final = 60
"""Characters of a name that are shown."""
LABEL: Final = 22
WORD: Final = r"""(?:'[^']*'|"[^"]*"|\S)+"""
"""A word of a shell command, quoted parts and all."""
NO_BREAK: Final = "\N{NO-BREAK SPACE}"
ADVICE: Final = "This is an automated reading of public documents, perhaps wrong or out of date, and not legal advice."


def enforce(
    verdict: Verdict, statement: Statement, policy: PolicyConfig, gate: Gate, where: str, command: str = ""
) -> None:
    """Let a verdict through, or refuse.

    Args:
        where: the config (or the rows) that it is about, for the message.
        command: that was typed; its config, `--data` and `--set` are in the commands of the message.

    Raises:
        PolicyRefused: the verdict is `deny` or `undetermined`.
    """
    if verdict.passes:
        return
    first = verdict.refusals[0]
    raise PolicyRefused(
        f"the terms of {_sources(first, statement)} do not allow it: {first.rule} {_clip(first.name)}",
        where=where,
        todo="use another source, say in `policy` what is meant to be done, or record a permission",
        message=screen(verdict, statement, policy, gate, where, command),
    )


def screen(
    verdict: Verdict, statement: Statement, policy: PolicyConfig, gate: Gate, where: str, command: str = ""
) -> str:
    """The refusal: at most 24 lines of 110 columns, where no single word (a path, say) is longer; text of documents and
    configs cannot steer a terminal.

    Args:
        verdict: one that refuses.
    """
    first, *others = verdict.refusals
    config = _config_of(where, command)
    above = [
        *_head(first, verdict, policy, gate),
        *_wrapped(f"  {_rows(first, statement)}", 2)[:2],
        *_terms(first.cited[0]),
        *_wrapped(f"  Why now: {_clip(first.why, QUOTED)}.", 11)[:2],
        "  What you can do, the cheapest first:",
        *_fixes(first, gate, config),
    ]
    below = [
        *([f"  Full text: {_plain(first.cited[0].source_url)}"] if first.cited[0].source_url else []),
        f"  {ADVICE}",
    ]
    room = min(OTHERS, HEIGHT - len(above) - len(below) - 1)  # one for their heading
    lines = [*above, *_others(others, statement, config, room), *below]
    return "\n".join(line.rstrip() for line in lines)


def _config_of(where: str, command: str) -> str:
    """The words that name the config and how it was changed, so that a command with them is about the same run.

    Where they are very long it is the config alone, and `CONFIG` where nobody knows it.
    """
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "pipeline"] and len(words) > 4:
        kept = [word for pair in pairwise(words[5:]) if pair[0] in ("--data", "--set") for word in pair]
        whole = shlex.join([words[4], *([] if kept[:2] == ["--data", "data"] else kept[:2]), *kept[2:]])
        return whole if len(whole) <= LONGEST_CONFIG else shlex.quote(words[4])
    return shlex.quote(where) if where.endswith((".yaml", ".yml")) else "CONFIG"


def _head(first: Finding, verdict: Verdict, policy: PolicyConfig, gate: Gate) -> list[str]:
    word = "DENIED" if verdict.outcome == "deny" else "UNDETERMINED"
    release = policy.release
    scope = f"dataset: {release.dataset}, model: {release.model}"
    return [
        f"LICENCE GATE: {word} at {gate}   [policy: {policy.intended_use}, {scope}]",
        f"  Rule {first.rule} {_clip(first.name)}",
    ]


# ----------------------------------------------------------------------------------------------------- what it is about


def _rows(finding: Finding, statement: Statement) -> str:
    said = _sources(finding, statement)
    if finding.rows is None:
        return f"It is about {said}."
    left = f"; {finding.rows_left:,} remain without them" if finding.rows_left else ""
    share = finding.rows / statement.rows if statement.rows else 0.0
    counted = f"{finding.rows:,} of {statement.rows:,} rows ({share:.1%})"
    brought = [bearer.partition(":")[2] for bearer in finding.sources if bearer.startswith(f"teacher:{MERGED}")]
    if len(brought) == len(finding.sources):
        carried = _clip(", ".join(dict.fromkeys(name.partition(": ")[2] for name in brought)))
        return f"{counted} carry {carried} from a merged duplicate{left}."
    return f"{counted} come from {said}{left}."


def _sources(finding: Finding, statement: Statement) -> str:
    """`teacher main` (`openai:gpt-4o`)`, of the first two."""
    what = {source.bearer: source.what for source in statement.sources}
    named = []
    for bearer in finding.sources[:2]:
        role, _, name = bearer.partition(":")
        is_same = what.get(bearer, name) == name
        named.append(f"{_word(role)} `{_clip(name)}`" + ("" if is_same else f" ({_clip(what[bearer])})"))
    more = len(finding.sources) - len(named)
    return " and ".join(named) + (f" and {more} more" if more else "")


def _word(role: str) -> str:
    return {"prompt": "prompt set", "student_base": "the student's base"}.get(role, role.replace("_", " "))


def _terms(cited: Cited) -> list[str]:
    said = f"  Terms: {_clip(cited.title, 100)}"
    said += f", {_plain(cited.effective)}" if cited.effective else ""
    said += f", section {_clip(cited.clause, 30)}" if cited.clause else ""
    if cited.quote:
        said += f': "{_clip(cited.quote, QUOTED)}"'
    if cited.confidence is not None:
        said += f" ({cited.confidence}, read {cited.retrieved})"
    elif cited.title == cited.record:
        said += " has no term record"
    return _wrapped(said, 9)[:4]


def _others(others: Sequence[Finding], statement: Statement, config: str, room: int) -> list[str]:
    if not others or room < 1:
        return []
    lines = ["  Refused as well:"]
    for finding in others[:room]:
        rows = "" if finding.rows is None else f"{finding.rows:,} rows of "
        line = f"    {finding.rule} {_clip(finding.name)}: {rows}{_sources(finding, statement)}"
        lines.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…")
    if len(others) > room:
        more = f"    and {len(others) - room + 1} more: python -m pipeline licenses check {config}"
        lines[-1] = more if len(more) <= WIDTH else f"{more.partition(':')[0]}: `licenses check` lists all"
    return lines


# ---------------------------------------------------------------------------------------------------------------- fixes


def _fixes(finding: Finding, gate: Gate, config: str) -> list[str]:
    steps = [_leave_out(finding, gate, config), _declare(finding), _record(finding, config)]
    lines: list[str] = []
    for number, (label, text) in enumerate([step for step in steps if step is not None], 1):
        head = f"    {number}. {label:<{LABEL}} "
        if text.startswith("python -m"):
            lines += _command(head, safe_text(text))
        else:
            lines += _wrapped(head + text, len(head))[:2]
    return lines


def _leave_out(finding: Finding, gate: Gate, config: str) -> tuple[str, str]:
    """Without the sources: before there are rows by naming others, later by dropping their rows, where some remain."""
    roles = {bearer.partition(":")[0] for bearer in finding.sources}
    names = [bearer.partition(":")[2] for bearer in finding.sources]
    role = sorted(roles)[0]
    key = {"teacher": "exclude_teachers", "prompt": "exclude_prompt_sets"}.get(role)
    if any(name.startswith(MERGED) for name in names):
        return "leave out its source", "dataset: {exclude_teachers: [the teacher that a duplicate came from]}"
    if gate == "plan" or len(roles) > 1 or key is None or not finding.rows_left:
        words = " or ".join(sorted(_word(role).removeprefix("the ") for role in roles))
        return "use another source", f"another {words} in the config"
    wanted = shlex.quote(f"dataset.{key}={json.dumps(sorted(names), ensure_ascii=False)}")
    return "drop these rows", f"python -m pipeline run {config} --set {wanted}"


def _declare(finding: Finding) -> tuple[str, str] | None:
    """What to say in the config, if it is so; None: nothing that one says makes a difference."""
    atom, value = finding.atom, read_value(finding.value)
    if atom == "no_train.competing":
        return "say so, if it is so", _setting("competes_with", f"{value}", "no")
    if atom == "no_train.other_family":
        return "say so, if it is so", "student: {family: …}, where the base is of that family"
    if atom == "unknown":
        return "name the licence", _name_licence(finding)
    said_of: dict[str, str] = {
        "noncommercial": _setting("intended_use", "research"),
        "research_only": _setting("intended_use", "research"),
        "no_redistribute_dataset": _setting("release", "dataset", "none"),
        "internal_only": "policy: {release: …}, with neither of both public",
        "no_derivatives": "policy: {release: {dataset: none, model: none}}",
        "conflict.share_alike": "one data set for each licence: a config each",
        "conflict.cc_versions": "one data set for each licence: a config each",
    }
    return None if atom not in said_of else ("change what is meant", said_of[atom])


def _setting(*path: str) -> str:
    """A setting of `policy`, as it is written in a config and on a command line."""
    *names, value = path
    nested = value
    for name in reversed(names):
        nested = f"{{{name}: {nested}}}"
    return f"policy: {nested} (or --set{NO_BREAK}policy.{'.'.join(names)}={value})"


def _name_licence(finding: Finding) -> str:
    cited = finding.cited[0]
    if cited.confidence is not None:
        return "read the text, and put a record of your own with what it says into the folder policy.registry"
    role = finding.sources[0].partition(":")[0]
    place = {"prompt": "its card", "student_base": "student.license or student.base_models"}.get(role, "`license`")
    return f"{place} with a licence that the registry knows, or a record of it in the folder policy.registry"


def _record(finding: Finding, config: str) -> tuple[str, str]:
    return (
        "record a permission",
        f"python -m pipeline licenses override {finding.rule} {config} --evidence FILE "
        '--reason "…" --expires DATE --person "…"',
    )


# ---------------------------------------------------------------------------------------------------------------- lines


def _command(head: str, text: str) -> list[str]:
    """A command that can be copied: a line that goes on ends on a backslash; an option stays with its value."""
    words = re.findall(rf"--\S+ {WORD}|{WORD}", text)
    lines, indent = [head], " " * len(head)
    for word in words:
        fits = len(lines[-1]) + len(word) + 3 <= WIDTH or lines[-1] in (head, indent)
        if fits:
            lines[-1] += word + " "
        else:
            lines[-1] += "\\"
            lines.append(indent + word + " ")
    return lines


def _wrapped(text: str, indent: int) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
    return [line.replace(NO_BREAK, " ") for line in lines]


def _plain(text: str | None) -> str:
    return safe_text(" ".join((text or "").split()))


def _clip(text: str | None, length: int = SHOWN) -> str:
    plain = _plain(text)
    return plain if len(plain) <= length else f"{plain[: length - 1]}…"
