"""The findings of `preflight` and rows as they are trained, as a terminal shows them and as scripts read them."""

import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from pipeline.cli.show import say, say_json
from pipeline.core.log import safe_text
from pipeline.student.preflight.findings import Finding, accept, summary
from pipeline.student.preflight.sample import Piece, Shown
from pipeline.student.preflight.worker import Looked

RESET: Final = "\x1b[0m"
COLOURS: Final = {"ok": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[1;31m", "not_applicable": "\x1b[2m"}
WORDS: Final = {"not_applicable": "-"}
TRAINED: Final = "\x1b[1;32m"
MASKED: Final = "\x1b[2m"
SPECIAL: Final = "\x1b[35m"
INDENT: Final = " " * 42
WHOLE: Final = 100_000
"""Columns of what is no terminal: a line is not broken, so that a search finds it."""


def say_preflight(found: Looked, accepted: Collection[str], *, as_json: bool) -> None:
    """All findings, then the rows."""
    findings = accept(found.findings, accepted)
    if as_json:
        table, rows = [each.to_json() for each in findings], [each.to_json() for each in found.samples]
        say_json({**summary(found.findings, accepted), "findings": table, "samples": rows})
        return
    coloured = is_coloured(os.environ)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WHOLE
    for finding in findings:
        for line in finding_lines(finding, coloured=coloured, width=width):
            say(line)
    for shown in found.samples:
        say("")
        say(row_text(shown, coloured=coloured))
    if found.samples:
        say("")
        say(_legend(coloured=coloured))


def is_coloured(environ: Mapping[str, str]) -> bool:
    """Whether stdout is a terminal that wants colours (https://no-color.org)."""
    wanted = not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"
    return wanted and sys.stdout.isatty()


def finding_lines(finding: Finding, *, coloured: bool, width: int = WHOLE) -> Sequence[str]:
    """A line for the table, and below it what is wrong and what to do; broken at `width` columns, 60 at least."""
    width = max(60, width)
    level = f"{WORDS.get(finding.level, finding.level):8}"
    if coloured:
        level = f"{COLOURS[finding.level]}{level}{RESET}"
    told = finding.message if finding.level == "not_applicable" else finding.figure
    first, *rest = textwrap.wrap(safe_text(told), width - len(INDENT)) or [""]
    lines = [f"{finding.id}  {level} {finding.name:26} {first}".rstrip(), *(f"{INDENT}{line}" for line in rest)]
    if finding.level in ("warning", "error"):
        named = f" (rows {', '.join(finding.rows)})" if finding.rows else ""
        for text in (f"{finding.message}{named}", f"do: {finding.fix}"):
            lines += textwrap.wrap(safe_text(text), width, initial_indent=" " * 15, subsequent_indent=" " * 15)
    return lines


def row_text(shown: Shown, *, coloured: bool) -> str:
    """A row: what is trained stands out, in colour or between double brackets; special tokens are written out."""
    head = f"row {shown.row_id}: {shown.trained:,} of {shown.tokens:,} tokens trained"
    if coloured:
        return f"{head}\n{''.join(map(_coloured, shown.pieces))}"
    text, inside = "", False
    for piece in shown.pieces:
        if piece.trained != inside:
            text += "[[" if piece.trained else "]]"
            inside = piece.trained
        text += safe_text(piece.text)
    return f"{head}\n{text}{']]' if inside else ''}"


def _coloured(piece: Piece) -> str:
    style = (TRAINED if piece.trained else MASKED) + (SPECIAL if piece.special else "")
    return f"{style}{safe_text(piece.text)}{RESET}"


def _legend(*, coloured: bool) -> str:
    if not coloured:
        return "[[trained]], and the rest masked"
    return f"{TRAINED}trained{RESET}, {MASKED}masked{RESET}, {TRAINED}{SPECIAL}special token{RESET}"
