"""What `responses` found and did, as a terminal shows it and as scripts read it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.cli.show import say, say_json
from pipeline.cli.show_store import size
from pipeline.core.log import safe_text
from pipeline.runner.session import Session
from pipeline.teacher.carry import Exported, Imported
from pipeline.teacher.inventory import Inventory, Row, Tally, Unfolded
from pipeline.teacher.purge import SHORT, Purge
from pipeline.teacher.wanted import Coverage

HEADS = (
    *("teacher", "model", "wire", "engine", "answers", "rejected", "cut"),
    *("tokens in", "tokens out", "on disk", "days"),
)
LEFT = frozenset({"teacher", "model", "wire", "engine", "days"})
WIDEST = 32
"""Characters of a name that the table shows; `--json` shows all."""


def say_inventory(found: Inventory, *, as_json: bool) -> None:
    """What is stored."""
    if as_json:
        say_json(_inventory_json(found))
        return
    if found.total.stored == 0:
        say(safe_text(f"no stored answers in {found.folder}"))
    else:
        lines = [_cells(row.kind, row.tally, row.disk_bytes) for row in found.rows]
        total = _cells(("total", "", "", ""), found.total, found.disk_bytes)
        say(safe_text(_table([HEADS, *lines, total])))
        say(safe_text(_reasons(found.total)))
        files = "1 folded file" if found.files == 1 else f"{found.files:,} folded files"
        say(f"{found.requests:,} requests in {files}, {size(found.disk_bytes)}")
    for segment in found.unfolded:
        say(safe_text(f"not folded: {segment.path} ({size(segment.bytes)}), {_holder(segment)}"))
    for path in found.damaged:
        say(safe_text(f"set aside as damaged: {path}; what was intact in it is among the answers"))


def _cells(kind: Sequence[str], tally: Tally, disk_bytes: int | None) -> tuple[str, ...]:
    first, last = tally.days
    return (
        kind[0][:SHORT],
        *(_short(name) or "-" if kind[0] != "total" else "" for name in kind[1:]),
        f"{tally.answers:,}",
        f"{tally.rejected.total():,}",
        f"{tally.cut:,}",
        f"{tally.prompt_tokens:,}",
        f"{tally.completion_tokens:,}" + ("+" if tally.uncounted else ""),
        "-" if disk_bytes is None else size(disk_bytes),
        first if first == last else f"{first} – {last}",
    )


def _short(name: str) -> str:
    return name if len(name) <= WIDEST else name[: WIDEST - 1] + "…"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for line in lines:
        cells = zip(HEADS, line, widths, strict=True)
        row = [cell.ljust(width) if head in LEFT else cell.rjust(width) for head, cell, width in cells]
        shown.append("  ".join(row).rstrip())
    return "\n".join(shown)


def _reasons(tally: Tally) -> str:
    """What the columns of the table do not say."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(tally.rejected.items())) or "none"
    uncounted = f"; +: {tally.uncounted:,} answers without a count of tokens" if tally.uncounted else ""
    return f"rejected: {reasons}; cut: they ended on length{uncounted}"


def _holder(segment: Unfolded) -> str:
    pid = "a process" if segment.pid is None else f"process {segment.pid}"
    return f"held by {pid}" if segment.is_held else f"left by {pid}, which has ended; the next run that asks folds it"


def say_count(found: Inventory, *, as_json: bool) -> None:
    """Totals."""
    if as_json:
        say_json({"requests": found.requests, **_tally_json(found.total), "disk_bytes": found.disk_bytes})
        return
    total = found.total
    say(f"{found.requests:,} requests: {total.answers:,} answers ({total.cut:,} cut), "
        f"{total.rejected.total():,} rejected; {total.prompt_tokens:,} tokens in, "
        f"{total.completion_tokens:,} tokens out; {size(found.disk_bytes)}")  # fmt: skip


def say_coverage(session: Session, found: Coverage, *, as_json: bool) -> None:
    """What a config's `generate` would find."""
    if as_json:
        say_json({"run": session.loaded.run_name, **asdict(found)})
        return
    say(f"requests  {found.requests:>10,}  of generate in {safe_text(session.loaded.run_name)}")
    say(f"answered  {found.answered:>10,}")
    for reason, count in found.refused.items():
        say(safe_text(f"refused   {count:>10,}  {reason}"))
    say(f"cut       {found.cut:>10,}  by a smaller cap; they would be asked again")
    say(f"missing   {found.missing:>10,}")


def say_exported(done: Exported, missing: int | None, *, as_json: bool) -> None:
    """The file that was written."""
    if as_json:
        say_json({**asdict(done), "missing": missing})
        return
    refused = sum(done.rejected.values())
    say(safe_text(f"{done.path}: {done.answers:,} answers, {refused:,} refused, {size(done.bytes)}"))
    say(f"sha256 {done.sha256}")
    if done.unreadable:
        say(f"left out: {done.unreadable:,} stored bodies that are not understood as answers")
    if done.withheld:
        say(f"left out: {done.withheld:,} refusals that concern this account only")


def say_imported(done: Imported, *, as_json: bool) -> None:
    """What is new."""
    if as_json:
        say_json(asdict(done))
        return
    say(f"added {done.added:,} of {done.answers:,} answers; {done.present:,} were not needed: "
        "their requests have stored answers")  # fmt: skip


def say_purge(found: Purge, *, as_json: bool) -> None:
    """What would go, or is gone."""
    if as_json:
        say_json(_purge_json(found))
        return
    if found.total.stored == 0:
        say(f"nothing to remove; {found.kept:,} answers stay")
        return
    lines = [_cells(row.kind, row.tally, None) for row in found.rows]
    say(safe_text(_table([HEADS, *lines, _cells(("total", "", "", ""), found.total, None)])))
    say(safe_text(_reasons(found.total)))
    say(f"{_cost(found)}; the record of what was sent and paid stays")
    if found.damaged:
        say(f"not touched: {found.damaged:,} files in {safe_text(str(found.folder / 'damaged'))}")
    if found.done:
        say(f"removed {found.total.stored:,}; {found.kept:,} stay")
    else:
        say(f"{found.total.stored:,} can go, {found.kept:,} stay; nothing was removed, --yes removes them for ever")


def _cost(found: Purge) -> str:
    if found.cost is None:
        return "what they cost is not recorded"
    unpriced = f" and {found.unpriced:,} of unknown cost" if found.unpriced else ""
    return f"they cost ${found.cost / 1e9:,.4f}{unpriced}"


# ------------------------------------------------------------------------------------------------------------ JSON


def _inventory_json(found: Inventory) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "rows": [_row_json(row) for row in found.rows],
        "total": _tally_json(found.total),
        "requests": found.requests,
        "files": found.files,
        "disk_bytes": found.disk_bytes,
        "unfolded": [asdict(segment) for segment in found.unfolded],
        "damaged": [str(path) for path in found.damaged],
    }


def _purge_json(found: Purge) -> dict[str, Any]:
    rows = [{**row.kind._asdict(), **_tally_json(row.tally)} for row in found.rows]
    facts = {"cost_nano_usd": found.cost, "unpriced": found.unpriced, "kept": found.kept, "damaged": found.damaged}
    return {"folder": str(found.folder), "done": found.done, "rows": rows, "total": _tally_json(found.total), **facts}


def _row_json(row: Row) -> dict[str, Any]:
    return {**row.kind._asdict(), **_tally_json(row.tally), "disk_bytes": row.disk_bytes}


def _tally_json(tally: Tally) -> Mapping[str, Any]:
    first, last = tally.days
    days = {"first_day": None if first == "-" else first, "last_day": None if last == "-" else last}
    facts = asdict(tally)
    return {**facts, "rejected": dict(sorted(tally.rejected.items())), **days}
