"""What `verify` and `gc` found, as a terminal shows it and as scripts read it."""

from dataclasses import asdict

from pipeline.cli.show import say, say_json
from pipeline.core.log import safe_text
from pipeline.runner.gc import Collection
from pipeline.runner.verify import Verification


def say_verification(found: Verification, *, as_json: bool) -> None:
    """What was hashed, and all damage."""
    if as_json:
        say_json(asdict(found))
        return
    hashed = f"{found.artefacts:,} results, {found.files:,} files, {size(found.bytes)}"
    say(f"hashed: {hashed}; {found.contents:,} content digests computed anew")
    others = [(found.links, "links"), (found.locked, "lock entries"), (found.answer_files, "files of stored answers")]
    say(f"looked at: {', '.join(f'{count:,} {what}' for count, what in others)}")
    for damage in found.damage:
        say(safe_text(f"damaged: {damage.where}\n         {damage.what}\n     do: {damage.todo}"))
    if not found.damage:
        say("no damage found")


def say_collection(found: Collection, *, as_json: bool) -> None:
    """What can go, or went."""
    if as_json:
        say_json(asdict(found))
        return
    for item in found.items:
        say(safe_text(f"{item.kind:10} {size(item.bytes):>10}  {item.modified[:16]}  {item.path}"))
    for link in found.dangling:
        say(safe_text(f"note: {link} links a result that is not there"))
    kept = f"{found.kept:,} results are kept: a run or a given lock file refers to them"
    if not found.items:
        say(f"nothing to remove; {kept}")
    elif found.deleted:
        say(f"removed {len(found.items):,}, {size(found.bytes)}; {kept}")
    else:
        say(f"{len(found.items):,} can go, {size(found.bytes)}; {kept}; nothing was removed, --delete removes them")


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:,.1f} {unit}" if unit != "B" else f"{count} B"
