"""What `push` and `export` would send or have written, as a terminal shows it and as scripts read it."""

from dataclasses import asdict
from typing import Any

from pipeline.cli.show import say, say_json
from pipeline.cli.show_store import size
from pipeline.core.log import safe_text
from pipeline.runner.export import Exported
from pipeline.runner.publish.push import Proposal

MOST_FILES = 40
MOST_FINDINGS = 5


def say_proposal(proposal: Proposal, *, as_json: bool) -> None:
    """The files, the scan and the verdict."""
    if as_json:
        say_json(_proposal_json(proposal))
        return
    wish = proposal.wish
    say(safe_text(f"{wish.what} -> {wish.target.where}, {'public' if wish.public else 'not public'}"))
    for item in proposal.items[:MOST_FILES]:
        say(safe_text(f"  {size(item.size):>10}  {item.name}"))
    if len(proposal.items) > MOST_FILES:
        say(f"  {'':>10}  and {len(proposal.items) - MOST_FILES:,} more; --json lists them")
    say(f"  {size(proposal.bytes):>10}  in {len(proposal.items):,} files")
    if proposal.replaced:
        first = ", ".join(proposal.replaced[:MOST_FINDINGS])
        more = ", …" if len(proposal.replaced) > MOST_FINDINGS else ""
        say(safe_text(f"  replaced there: {len(proposal.replaced):,} files ({first}{more})"))
    for name in proposal.stale:
        say(safe_text(f"  removed there: {name}"))
    say(safe_text(_scan_text(proposal)))
    say(safe_text(_verdict_text(proposal)))


def _scan_text(proposal: Proposal) -> str:
    scanned = proposal.scan.scanned
    lines = [f"scan: {scanned.rows:,} rows and {len(proposal.scan.texts):,} texts looked at"]
    if proposal.scan.unscanned:
        lines.append(f"      {len(proposal.scan.unscanned):,} files hold no text to look at (weights, vocabularies)")
    if scanned.kinds:
        lines.append(f"      found in {scanned.dirty:,} rows or files: {_counts(scanned.kinds)}")
        for finding in scanned.findings[:MOST_FINDINGS]:
            lines.append(f"        {finding.row_id}  {finding.kind}  {finding.field}")
    else:
        lines.append("      nothing found that nobody looked at")
    if scanned.allowed:
        lines.append(f"      let through in {len(scanned.allowed_ids):,} allowed rows: {_counts(scanned.allowed)}")
    if proposal.scan.unused:
        lines.append(f"      allowed, but nothing is there: {', '.join(proposal.scan.unused[:MOST_FINDINGS])}")
    return "\n".join(lines)


def _counts(kinds: Any) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())


def _verdict_text(proposal: Proposal) -> str:
    verdict, policy = proposal.judged.verdict, proposal.session.loaded.config.policy
    release = getattr(policy.release, proposal.wish.what)
    lines = [f"licence verdict: {verdict.outcome} ({policy.intended_use}, release {release})"]
    for due in proposal.dues:
        value = "" if due.value is None else f" {due.value}"
        unsure = " (to be on the safe side)" if due.conservative else ""
        lines.append(f"      {due.atom}{value}{unsure}: {due.title}{'' if due.clause is None else f', {due.clause}'}")
    lines += [f"      warning: {warning}" for warning in verdict.warnings]
    return "\n".join([*lines, "      an automated reading of public documents, not legal advice"])


def _proposal_json(proposal: Proposal) -> dict[str, Any]:
    wish, scan = proposal.wish, proposal.scan
    scanned = asdict(scan.scanned) | {"allowed_ids": sorted(scan.scanned.allowed_ids)}
    return {
        "what": wish.what,
        "to": wish.target.where,
        "public": wish.public,
        "files": [{"name": item.name, "bytes": item.size, "sha256": item.sha256} for item in proposal.items],
        "replaced": [*proposal.replaced],
        "stale": [*proposal.stale],
        "scan": {**asdict(scan), "scanned": scanned},
        "verdict": proposal.judged.verdict.to_json(),
    }


def say_published(proposal: Proposal, address: str, *, as_json: bool) -> None:
    """Where it is."""
    if as_json:
        say_json(_proposal_json(proposal) | {"address": address})
        return
    say(safe_text(f"published: {len(proposal.items):,} files, {size(proposal.bytes)}: {address}"))


def say_exported(done: Exported, *, as_json: bool) -> None:
    """Rows in, out and left out, and the files."""
    if as_json:
        say_json(asdict(done))
        return
    for split in done.splits:
        say(safe_text(f"{split.name:10} {split.rows_in:>9,} in {split.rows_out:>9,} out   {done.folder / split.file}"))
        for reason, count in split.rejected.items():
            say(safe_text(f"{'':10} {count:>9,} left out: {reason}"))
    if any(split.rejected for split in done.splits):
        say(safe_text(f"which ones: {done.folder / 'rejects.jsonl'}"))
