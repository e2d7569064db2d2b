"""The scan before anything is published: rows, shard by shard, and the texts that go with them."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipeline.core.errors import PolicyRefused, UsageError, boundary
from pipeline.core.stage import Fanout, Progress
from pipeline.runner.publish.files import README, Item, is_notice

if TYPE_CHECKING:
    from pipeline.text.scan import Finding, Scanned

LARGEST_TEXT: Final = 2_000_000
"""Bytes; larger texts that go with a model are vocabularies."""
TEXTS: Final = (".md", ".json", ".jinja", ".txt", ".py")
VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
SHORTEST_PLACE: Final = 5
"""Characters of a path or a host's name that is looked for; shorter ones are parts of words."""
SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What the scan of all that is to be published found.

    Attributes:
        scanned: the findings.
        texts: files that were scanned as texts.
        unscanned: files in which nothing was looked for: weights and vocabularies.
        unused: ids that were allowed and have nothing.
    """

    scanned: "Scanned"
    texts: tuple[str, ...]
    unscanned: tuple[str, ...]
    unused: tuple[str, ...]


def read_allowed(path: Path | None) -> Mapping[str, str]:
    """The ids of rows (and names of files) that somebody looked at and lets through -> the reason; one a line, the
    reason after a blank. Empty lines and those that begin with # are left out.

    Raises:
        UsageError: the file cannot be read, or names an id twice.
    """
    if path is None:
        return {}
    todo = "give a text file with one row id a line, and a reason after a blank"
    with boundary(UsageError, "the allowed rows cannot be read", where=f"--allow-rows {path}", todo=todo):
        lines = path.read_text("utf-8").splitlines()
    allowed: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        row_id, _, reason = line.strip().partition(" ")
        if row_id == "" or row_id.startswith("#"):
            continue
        if row_id in allowed:
            raise UsageError(f"{row_id} is there twice", where=f"--allow-rows {path}, line {number}", todo="keep one")
        allowed[row_id] = reason.strip()
    return allowed


def scan(
    items: Sequence[Item], allowed: Mapping[str, str], private: Sequence[str], fanout: Fanout, progress: Progress
) -> ScanReport:
    """Scan everything that can hold a text.

    Args:
        allowed: as `read_allowed` gives it.
        private: texts that name this machine, as `private_places` gives them; looked for in what is no row.
        fanout: maps over the shards.

    Raises:
        CorruptArtefact: a shard is not readable.
    """
    from pipeline.text.scan import Scanned

    ids = frozenset(allowed)
    shards = [item.source for item in items if item.name.endswith(".parquet")]
    texts = [item for item in items if _is_text(item)]
    progress.start(len(shards) + len(texts), "files")
    total = Scanned()
    for item in texts:
        total += _scan_item(item, ids, private)
        progress.advance()
    for part in fanout(partial(scan_shard, allowed=ids), shards):
        total += part
        progress.advance()
    looked_at = {item.name for item in texts}
    others = [item.name for item in items if item.name not in looked_at and not item.name.endswith(".parquet")]
    unused = sorted(ids - total.allowed_ids)
    return ScanReport(total, tuple(sorted(looked_at)), tuple(others), tuple(unused))


def scan_shard(path: Path, allowed: frozenset[str]) -> "Scanned":
    """Scan one shard, a batch of rows in memory at a time; runs in worker processes too.

    Raises:
        CorruptArtefact: it is not readable.
    """
    from pipeline.core.record import read_shard
    from pipeline.text.scan import Scanned, scan_table

    total = Scanned()
    table = read_shard(path)
    for start in range(0, table.num_rows, BATCH_ROWS):
        total += scan_table(table.slice(start, BATCH_ROWS), allowed)
    return total


BATCH_ROWS: Final = 1024
"""Rows whose texts are Python objects at the same time."""


def private_places(*folders: Path) -> tuple[str, ...]:
    """Texts that tell on which machine, and where on it, something was made: folders and the host's name."""
    places = {str(folder.resolve()) for folder in folders} | {str(Path.home()), platform.node()}
    return tuple(sorted(place for place in places if len(place) >= SHORTEST_PLACE and place != "localhost"))


def _is_text(item: Item) -> bool:
    name = item.name
    is_paper = name == README or is_notice(name)
    return is_paper or (name.endswith(TEXTS) and name not in VOCABULARIES and item.size <= LARGEST_TEXT)


_ESCAPED: Final = re.compile(r"\\([!-/:-@\[-`{-~])")
"""A character that Markdown takes as it is: the cards escape all that others wrote, addresses too."""


def _scan_item(item: Item, allowed: frozenset[str], private: Sequence[str]) -> "Scanned":
    from pipeline.text.scan import Finding, gather, scan_text

    text = _ESCAPED.sub(r"\1", item.text()) if item.name.endswith(".md") else item.text()
    is_license = item.name.startswith("LICENSES/")  # its authors have addresses that everybody may know
    told = [Finding(item.name, "text", "this_machine", text.find(place)) for place in private if place in text]
    return scan_text(item.name, text, allowed, personal=not is_license) + gather(0, told, allowed)


def refuse_findings(report: ScanReport) -> None:
    """Stop what must not be published.

    Raises:
        PolicyRefused: something was found that nobody let through. Its message names rows, fields and kinds; no value.
    """
    scanned = report.scanned
    if not scanned.kinds:
        return
    counts = ", ".join(f"{count:,} {kind}" for kind, count in scanned.kinds.items())
    what = f"secrets or personal data in what is to be published: {counts}"
    shown = [f"       {_line(finding)}" for finding in scanned.findings[:SHOWN]]
    more = sum(scanned.kinds.values()) - len(shown)
    rest = [f"       and {more:,} more: --json lists them"] if more > 0 else []
    todo = (
        "remove the prompt from its file, or leave its source out: dataset.exclude_teachers, "
        "dataset.exclude_prompt_sets;\n       for README.md or manifest.json change the prompt set's card or the "
        "config field that says it;\n       or, once you have looked at each, name them in a file, one id a line with "
        "your reason: --allow-rows FILE"
    )
    where = f"{scanned.dirty:,} rows or files"
    message = "\n".join([f"error: {what}", f"   at: {where}", *shown, *rest, f"   do: {todo}"])
    raise PolicyRefused(what, where=where, todo=todo, message=message)


def _line(finding: "Finding") -> str:
    place = "" if finding.at is None else f", character {finding.at:,}"
    return f"{finding.row_id}  {finding.kind}  {finding.field}{place}"
