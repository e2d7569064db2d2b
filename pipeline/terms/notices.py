"""What goes along with a data set or a model: the full texts of its terms, NOTICE, and LICENSES.md."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.lineage import digest_json
from pipeline.core.stage import Json
from pipeline.terms.bind import WITH_ROWS, involves, unjudged
from pipeline.terms.licenses import UNKNOWN, hub_license
from pipeline.terms.records import Registry, TermRecord, resolve
from pipeline.terms.statement import Source, Statement
from pipeline.terms.texts import Text, file_name, find_text
from pipeline.terms.verdict import Due

FOLDER: Final = "LICENSES"
LICENSES_MD: Final = "LICENSES.md"
LONGEST_LICENSE_NAME: Final = 96
NOTICE: Final = "NOTICE"
DISCLAIMER: Final = (
    "Automated reading of public licence texts and terms at the dates shown. It may be wrong, incomplete or out of "
    "date, and it is not legal advice. You decide; ask a lawyer. Terms you signed yourself (enterprise agreements) "
    "take precedence and can be recorded as overrides."
)

NO_DOCUMENT: Final = frozenset({UNKNOWN, "NOASSERTION"})
"""Names that say that nobody stated a licence."""

DUTIES: Final[Mapping[str, str]] = {
    "attribution": "name the source",
    "share_alike": "share under the same licence",
    "license_copy": "give a copy of the terms along",
    "notice_file": "keep a notice",
    "display": "show a text",
    "product_display_if": "show a text in a large product",
    "name_prefix": "begin the model's name with",
    "flow_down": "pass the limits of use on",
    "state_changes": "say what was changed",
    "disclose_ai_generated": "say that it is generated",
    "delete_on_termination": "delete it when the terms end",
}
"""What each obligation asks for, in words."""
TRIGGERS: Final[Mapping[str, str]] = {
    "train_on_outputs": "a model is trained on it",
    "distribute_dataset": "the data set is passed on",
    "distribute_model_trained_on_outputs": "a model trained on it is passed on",
    "distribute_weights_copies": "the weights, or weights made from them, are passed on",
    "distribute_licensed_material_or_derivative": "the material, or what derives from it, is passed on",
    "serve_product": "a product is offered",
}
"""When each obligation is due, in words."""


@dataclass(frozen=True, slots=True)
class Term:
    """One document that binds some sources.

    Attributes:
        name: id of its record; where there is none, the name that was given.
        record: None: nobody knows the document.
        sources: whom it binds.
        text: its full text; None: nobody here has it.
        file: where its text lies beside the data; None: there is none.
    """

    name: str
    record: TermRecord | None
    sources: tuple[Source, ...]
    text: Text | None
    file: str | None

    @property
    def title(self) -> str:
        """As the document calls itself."""
        return self.name if self.record is None else self.record.title

    @property
    def status(self) -> str:
        """How sure its record is."""
        return "nobody knows it" if self.record is None else self.record.confidence


@dataclass(frozen=True, slots=True)
class Notices:
    """What goes along.

    Attributes:
        terms: every document, by name.
        files: path relative to the data set's or model's folder -> text.
    """

    terms: tuple[Term, ...]
    files: Mapping[str, str]

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the documents whose text is not along."""
        return missing_of(self.terms)

    def to_json(self) -> dict[str, Json]:
        """Document -> its text's file, hash and origin; null where there is none."""
        return {
            term.name: None
            if term.text is None
            else {"file": term.file, "sha256": term.text.sha256, "origin": term.text.origin}
            for term in self.terms
        }

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, text in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8", newline="\n")


def notices_of(
    statement: Statement,
    obligations: Sequence[Due],
    registry: Registry,
    policy: PolicyConfig,
    escape: Callable[[str], str],
) -> Notices:
    """What goes along with rows or a model of these sources.

    Args:
        obligations: those that are due.
        escape: makes text of others inert in Markdown.

    Raises:
        UsageError: a text in `policy.texts` cannot be used.
    """
    terms = tuple(_terms(statement.sources, registry, policy))
    texts = {term.file: term.text.text.strip() + "\n" for term in terms if term.file is not None and term.text}
    listed = licenses_md(statement, terms, obligations, escape, unjudged(statement, policy))
    return Notices(terms, {**texts, NOTICE: notice(statement, obligations), LICENSES_MD: listed})


def missing_of(terms: Iterable[Term]) -> tuple[str, ...]:
    """Names of the documents without a text; that no licence is stated is no document."""
    return tuple(term.name for term in terms if term.file is None and term.name not in NO_DOCUMENT)


def names_of(source: Source, registry: Registry, policy: PolicyConfig) -> tuple[str, ...]:
    """All documents that a source is under, or may be where nobody chose yet, with those that they include; sorted."""
    found: set[str] = set()
    for expression in source.licenses:
        for name in {name for each in resolve(expression, registry, policy.choose) for name in each}:
            record = registry.find(name)
            found |= {name} if record is None else {each.id for each in registry.together(record)}
    return tuple(sorted(found))


def _terms(sources: Iterable[Source], registry: Registry, policy: PolicyConfig) -> Iterable[Term]:
    bound: dict[str, list[Source]] = {}
    for source in sources:
        for name in names_of(source, registry, policy):
            bound.setdefault(name, []).append(source)
    taken: set[str] = set()
    for name in sorted(bound):
        text = find_text(name, registry, policy.texts)
        file = None if text is None else _free(file_name(name), name, taken)
        yield Term(name, registry.find(name), tuple(bound[name]), text, file)


def _free(wished: str, name: str, taken: set[str]) -> str:
    """The path of a text; one that another name has got gets a part of this name's hash."""
    if wished.casefold() in taken:
        wished = f"{wished.removesuffix('.txt')}-{digest_json(name)[:8]}.txt"
    taken.add(wished.casefold())
    return f"{FOLDER}/{wished}"


# -------------------------------------------------------------------------------------------------------- plain text


def notice(statement: Statement, obligations: Sequence[Due]) -> str:
    """NOTICE: the texts that terms ask to be kept or shown, word by word, then who the sources are."""
    lines = ["NOTICE", ""]
    for due in obligations:
        text = text_of(due)
        if due.atom in ("notice_file", "display", "attribution") and text is not None:
            lines += [text, f"  (asked for by {_line(due.title)}; for {', '.join(map(_line, due.sources))})", ""]
    lines.append("Made from:")
    for source in sorted(statement.sources, key=lambda each: each.place):
        lines.append(f"- {_line(source.role)} {_line(source.name)}: {_line(source.what)}")
        lines.append(f"  under {', '.join(map(_line, source.licenses)) or 'unknown terms'}")
    return "\n".join(lines) + "\n"


def text_of(due: Due) -> str | None:
    """The text that an obligation asks for; None: it names none."""
    value = due.value.get("text") if isinstance(due.value, dict) else due.value
    return value if isinstance(value, str) else None


def _line(text: str) -> str:
    """One line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ---------------------------------------------------------------------------------------------------------- Markdown


def licenses_md(
    statement: Statement,
    terms: Sequence[Term],
    obligations: Sequence[Due],
    escape: Callable[[str], str],
    left_out: Sequence[str] = (),
) -> str:
    """LICENSES.md: which documents bind which sources, and what they ask for.

    Args:
        left_out: what was not judged, a line each.
    """
    parts = ["# Licences and terms", "", *_sources_table(statement, terms, escape), ""]
    parts += ["## What they ask for", "", *_obligations_table(obligations, escape), ""]
    if left_out:
        parts += ["## What was not judged in full", "", *(f"- {escape(line)}" for line in left_out), ""]
    missing = [escape(name) for name in missing_of(terms)]
    if missing:
        parts += ["## Texts that are not along", "", "Nobody here has the text of these; read them at their source."]
        parts += ["", *(f"- {name}" for name in missing), ""]
    return "\n".join([*parts, DISCLAIMER, ""])


def _sources_table(statement: Statement, terms: Sequence[Term], escape: Callable[[str], str]) -> list[str]:
    lines = [
        "| source | what | rows | terms | title | dated | read | status | text |",
        "|---|---|---:" + "|---" * 6 + "|",
    ]
    placed = [(source, term) for term in terms for source in term.sources]
    for source, term in sorted(placed, key=lambda pair: (pair[0].role, pair[0].name, pair[1].name)):
        rows, record = rows_of(statement, source), term.record
        cells = [
            escape(f"{source.role} {source.name}"),
            escape(source.what),
            "" if rows is None else f"{rows:,}",
            escape(term.name),
            escape(term.title),
            "" if record is None or record.effective is None else escape(record.effective),
            "" if record is None else record.retrieved.isoformat(),
            escape(term.status),
            "missing" if term.file is None else f"[text]({term.file})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rows_of(statement: Statement, source: Source) -> int | None:
    """Rows that come from a source; None for sources that no row comes from (the student's base)."""
    if source.role not in WITH_ROWS:
        return None
    named = (source.bearer,)
    return sum(each.rows for each in statement.row_sets if involves(each, named, statement.sources))


def _obligations_table(obligations: Sequence[Due], escape: Callable[[str], str]) -> list[str]:
    if not obligations:
        return ["Nothing, for what the policy means to do."]
    lines = ["| do | text | when | asked for by | section | of | sure |", "|---|---|---|---|---|---|---|"]
    for due in obligations:
        cells = [
            escape(DUTIES.get(due.atom, due.atom)),
            escape(text_of(due) or ""),
            escape(TRIGGERS.get(due.trigger, due.trigger)),
            escape(due.title),
            escape(due.clause or ""),
            escape(", ".join(due.sources)),
            "unsettled whether it reaches this far" if due.conservative else "yes",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def license_fields(licenses: set[str]) -> dict[str, str]:
    """The licence of rows that are under all of these: an id of the hub's list where they are one, else `other`."""
    fields = hub_license(licenses)
    if fields["license"] != "other":
        return fields
    name = fields["license_name"]
    if len(name) > LONGEST_LICENSE_NAME:
        name = f"mixed-{digest_json([*sorted(licenses)])[:8]}"
    return {"license": "other", "license_name": name, "license_link": LICENSES_MD}
