"""Term records, as a terminal shows them and as scripts read them."""

import textwrap
from collections.abc import Iterator, Sequence

from pipeline.cli.show import say, say_json
from pipeline.terms.atoms import DisplayIf, Value
from pipeline.terms.records import Obligation, Registry, Restriction, TermRecord
from pipeline.terms.texts import Text

WIDTH = 110


def say_records(registry: Registry, *, as_json: bool) -> None:
    """A line a record, in the order of their ids."""
    records = sorted(registry.records.values(), key=lambda record: record.id.casefold())
    if as_json:
        say_json([record.to_json() | {"sha256": record.sha256} for record in records])
        return
    width = max(len(record.id) for record in records)
    for record in records:
        names = ", ".join((*record.aliases, *(f"provider {name}" for name in record.default_for)))
        dated = record.effective or "-"
        say(f"{record.id:{width}}  {record.kind:13} {dated:10}  {record.confidence:10}  {names}".rstrip())
    say(f"{len(records)} records: an automated reading of public documents, not legal advice")


def say_record(record: TermRecord, included: Sequence[TermRecord], text: Text | None, *, as_json: bool) -> None:
    """One record whole, what it includes, and where its full text is."""
    if as_json:
        here = None if text is None else {"sha256": text.sha256, "origin": text.origin}
        names = [each.id for each in included]
        say_json(record.to_json() | {"sha256": record.sha256, "together_with": names, "text": here})
        return
    for line in _head(record, included, text):
        say(line)
    for title, atoms in (("restrictions", record.restrictions), ("obligations", record.obligations)):
        say(f"{title}:" if atoms else f"{title}: none")
        for atom in atoms:
            for line in _atom(atom):
                say(line)


def _head(record: TermRecord, included: Sequence[TermRecord], text: Text | None) -> Iterator[str]:
    yield f"{record.id}: {record.title}"
    names = (*record.aliases, *(f"provider {name}" for name in record.default_for))
    facts = {
        "also named": ", ".join(names),
        "kind": record.kind,
        "dated": record.effective or "",
        "read": f"{record.retrieved} ({record.confidence})",
        "source": record.source_url or "",
        "family": record.family or "",
        "with it hold": ", ".join(each.id for each in included),
        "full text": "not here" if text is None else f"{text.origin} ({_same(record, text)})",
        "note": record.note or "",
    }
    for name, fact in facts.items():
        if fact:
            yield from textwrap.wrap(f"{name:13} {fact}", WIDTH, initial_indent="  ", subsequent_indent=" " * 16)


def _same(record: TermRecord, text: Text) -> str:
    if record.text_sha256 is None:
        return "nobody compared it with the record"
    return "the text that was read" if text.sha256 == record.text_sha256 else "another text than was read"


def _atom(atom: Restriction | Obligation) -> Iterator[str]:
    value = _value(atom.value)
    due = f", once: {atom.trigger}" if isinstance(atom, Obligation) else ""
    unsettled = " (unsettled)" if atom.conservative else ""
    yield f"  {atom.atom}{f' = {value}' if value else ''}{due}{unsettled}"
    where = "section unknown" if atom.clause is None else atom.clause
    said = "nobody could quote it" if atom.quote is None else f'"{atom.quote}"'
    yield from textwrap.wrap(f"{where}: {said}", WIDTH, initial_indent="    ", subsequent_indent="    ")


def _value(value: Value) -> str:
    if isinstance(value, DisplayIf):
        return f"{value.text}, above {value.mau or '-'} users or {value.revenue_usd or '-'} US dollars a month"
    if isinstance(value, tuple):
        return ", ".join(value)
    return "" if value is None else str(value)
