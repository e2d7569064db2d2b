"""Term records: what one document forbids and asks, atom by atom, each with its section and a short quote."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import yaml
from license_expression import Licensing
from pydantic import BeforeValidator, StringConstraints, ValidationError

from pipeline.core.config_base import ConfigModel
from pipeline.core.config_policy import Confidence
from pipeline.core.errors import UsageError
from pipeline.core.lineage import digest_json
from pipeline.core.load import read_yaml, refusal
from pipeline.core.mistakes import mistakes_in
from pipeline.core.stage import Json
from pipeline.terms.atoms import Atom, ObligationAtom, RestrictionAtom, Text, Trigger
from pipeline.terms.licenses import NO_EXPRESSION, UNKNOWN, parse_license

BUILT_IN: Final = Path(__file__).parent / "registry"
NOBODYS: Final = frozenset({UNKNOWN, "noassertion"})
"""Names, in lower case, that say that nobody knows the terms: no record of one's own can give them a meaning."""
MOST_ALTERNATIVES: Final = 64
"""Of one expression; every further OR may double them."""

Kind = Literal["model_license", "api_terms", "data_license", "policy", "gated_click_through"]


def _text_of_date(value: Any) -> Any:
    """YAML reads 2024-07-23 as a date and 2024 as a number."""
    if isinstance(value, date):
        return value.isoformat()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _no_number(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError("give a date, such as 2026-11-22")
    return value


RecordName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:/+_-]{0,149}$")]
PartOfDate = Annotated[
    str, BeforeValidator(_text_of_date), StringConstraints(pattern=r"^[0-9]{4}(-[0-9]{2}(-[0-9]{2})?)?$")
]


class Restriction(Atom):
    """Something that a document forbids or limits."""

    atom: RestrictionAtom


class Obligation(Atom):
    """Something that a document asks for once its trigger is met."""

    atom: ObligationAtom
    trigger: Trigger


class TermRecord(ConfigModel):
    """One document (licence, API terms, usage policy) at one date."""

    id: RecordName
    """SPDX id, `LicenseRef-…`, or `terms:<provider>/<document>/<date>`."""
    aliases: tuple[RecordName, ...] = ()
    """Other names of it, such as the hub's id."""
    title: Text
    kind: Kind
    effective: PartOfDate | None = None
    """The date in the document: a year, a month or a day; none where it has none."""
    retrieved: Annotated[date, BeforeValidator(_no_number)]
    """When it was read last."""
    source_url: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")] | None = None
    """Where it was published."""
    confidence: Confidence
    """verified: the text was read; mirrored: a copy of it, or its author's staff; inferred: from what others write;
    unverified: nobody looked; user_asserted: whoever runs the pipeline says so."""
    text_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Hash of the text that was read, as terms/texts.py normalises it."""
    family: RecordName | None = None
    """Family of the models under it, as narrow as its clauses are: Llama 2 is another one than Llama 3."""
    provider: RecordName | None = None
    """Whose API or service the terms are of."""
    default_for: tuple[RecordName, ...] = ()
    """Providers, as configs name them, whose answers come under these terms where the config says nothing else."""
    includes: tuple[RecordName, ...] = ()
    """Names of records that hold together with this one."""
    replaces: bool = False
    """True in a record of your own that takes the place, or names, of one that comes along."""
    note: Text | None = None
    """What a reader should know besides."""
    restrictions: tuple[Restriction, ...] = ()
    obligations: tuple[Obligation, ...] = ()

    @property
    def sha256(self) -> str:
        """64 hex digits over all of it: what it said when a verdict was made."""
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Json]:
        """As plain JSON; `TermRecord.model_validate` reads it back."""
        return self.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Registry:
    """All records that are known.

    Attributes:
        records: id -> record.
        names: id, alias or hub id in lower case -> id.
        providers: provider in lower case, as configs name it -> id of its API terms.
    """

    records: Mapping[str, TermRecord]
    names: Mapping[str, str]
    providers: Mapping[str, str]

    def find(self, name: str) -> TermRecord | None:
        """The record of an id, SPDX id, alias or hub id, in any case; None: there is none."""
        found = self.names.get(name.strip().casefold())
        return None if found is None else self.records[found]

    def of_provider(self, provider: str) -> TermRecord | None:
        """The API terms that hold where a config names none; None: nobody knows the provider."""
        found = self.providers.get(provider.casefold())
        return None if found is None else self.records[found]

    def together(self, record: TermRecord) -> tuple[TermRecord, ...]:
        """A record and all that it includes, in turn, each once; itself first."""
        found = {record.id: record}
        for name in record.includes:
            found |= {each.id: each for each in self.together(self.records[self.names[name.casefold()]])}
        return tuple(found.values())


# ------------------------------------------------------------------------------------------------------------ reading


def load_registry(extra: Path | None = None) -> Registry:
    """The records that come along, and those of a folder of one's own.

    Args:
        extra: folder with `*.yaml`, one record a file.

    Raises:
        UsageError: a file is no valid record, two records claim one name, one claims `unknown` or `NOASSERTION`, or
            `includes` names no record or runs in a circle; it names the file.
    """
    built_in = _built_in()
    if extra is None:
        return _registry(built_in, {})
    files = sorted((*extra.glob("*.yaml"), *extra.glob("*.yml"))) if extra.is_dir() else []
    if not files:
        todo = "name a folder with *.yaml files, one record each"
        raise UsageError("there are no term records", where=f"policy.registry: {extra}", todo=todo)
    return _registry(built_in, {path: _validated(path, read_yaml(path)) for path in files})


@functools.cache
def _built_in() -> Mapping[Path, TermRecord]:
    return {path: _validated(path, _read_ours(path)) for path in sorted(BUILT_IN.glob("*.yaml"))}


def _read_ours(path: Path) -> Any:
    """One of our own files, by the fast parser; the strict one says what is wrong with a damaged one."""
    try:
        return yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (yaml.YAMLError, ValueError):
        return read_yaml(path)


def _validated(path: Path, data: Any) -> TermRecord:
    try:
        return TermRecord.model_validate(data)
    except ValidationError as error:
        raise refusal(path, mistakes_in(TermRecord, data, error), "correct it") from None


def _registry(built_in: Mapping[Path, TermRecord], own: Mapping[Path, TermRecord]) -> Registry:
    for path, record in own.items():
        _refuse_nobodys(path, record)
    replaced = {record.id.casefold() for record in own.values() if record.replaces}
    files = {path: record for path, record in built_in.items() if record.id.casefold() not in replaced}
    files |= own
    names = _claimed(files, own, lambda record: (record.id, *record.aliases))
    providers = _claimed(files, own, lambda record: record.default_for)
    registry = Registry(
        {record.id: record for record in files.values()},
        {name: files[path].id for name, path in names.items()},
        {name: files[path].id for name, path in providers.items()},
    )
    for path, record in files.items():
        _follow(registry, record, path, ())
    return registry


def _refuse_nobodys(path: Path, record: TermRecord) -> None:
    for name in (record.id, *record.aliases):
        if name.casefold() in NOBODYS:
            what = f"{name!r} stands for terms that nobody knows, and can be the name of no record"
            todo = "give the record a name of its own, and name that where its terms hold"
            raise UsageError(what, where=str(path), todo=todo)


def _claimed(
    files: Mapping[Path, TermRecord],
    own: Mapping[Path, TermRecord],
    names_of: Callable[[TermRecord], Iterable[str]],
) -> dict[str, Path]:
    """Name in lower case -> the one file that claims it; one's own record with `replaces` wins over ours."""
    claimed: dict[str, Path] = {}
    for path, record in files.items():
        for name in {name.casefold() for name in names_of(record)}:
            other = claimed.get(name)
            if other is not None and not (record.replaces and other not in own):
                todo = "give one of them another name, or say `replaces: true` in a record of your own"
                raise UsageError(f"two term records claim {name!r}: also {other}", where=str(path), todo=todo)
            claimed[name] = path
    return claimed


def _follow(registry: Registry, record: TermRecord, path: Path, above: tuple[str, ...]) -> None:
    """Raises: UsageError: what a record includes has no record, or leads back to it."""
    if record.id in above:
        what = f"`includes` runs in a circle: {' > '.join((*above, record.id))}"
        raise UsageError(what, where=str(path), todo="remove one of these includes")
    for name in record.includes:
        included = registry.find(name)
        if included is None:
            what = f"{record.id} includes {name!r}, which is the name of no record"
            raise UsageError(what, where=str(path), todo="write a record for it, or correct the name")
        _follow(registry, included, path, (*above, record.id))


# -------------------------------------------------------------------------------------------------------- expressions

Alternative: TypeAlias = tuple[str, ...]
"""Names that hold together: ids of records, or names without a record, sorted."""

_SLASH: Final = ":_:"
"""Stands for the `/` of our ids in expressions, whose grammar has none."""


def resolve(expression: str, registry: Registry, choose: Mapping[str, str]) -> tuple[Alternative, ...]:
    """What a licence expression lets one choose from.

    Args:
        expression: SPDX expression over SPDX ids, ids of records, aliases and hub ids; any other text is one name.
        choose: OR expression -> the alternative of it that is taken, wherever the OR stands in an expression.

    Returns:
        At least one alternative; names without a record stay, an SPDX id in its canonical case.

    Raises:
        UsageError: a choice is none of its expression's alternatives, or there are more than 64 alternatives.
    """
    choices = {}
    for text, taken in choose.items():
        where = f"policy.choose: {text}"
        options, one = _alternatives(text, registry, {}, where), _alternatives(taken, registry, {}, where)
        if len(one) != 1 or not one <= options:
            listed = ", ".join(" AND ".join(each) for each in sorted(options))
            raise UsageError(f"{taken!r} is none of the alternatives", where=where, todo=f"name one of: {listed}")
        choices[options] = one
    return tuple(sorted(_alternatives(expression, registry, choices, f"licence: {expression}")))


def _alternatives(
    text: str,
    registry: Registry,
    choices: Mapping[frozenset[Alternative], frozenset[Alternative]],
    where: str,
) -> frozenset[Alternative]:
    if registry.find(text) is not None:
        return frozenset({(_canonical(text, registry),)})
    try:
        parsed = Licensing().parse(text.replace("/", _SLASH), simple=True)
    except NO_EXPRESSION:
        parsed = None
    if parsed is None:
        return frozenset({(_canonical(text, registry),)})

    def expand(node: Any) -> frozenset[Alternative]:
        if node.isliteral:
            return frozenset({(_canonical(node.render().replace(_SLASH, "/"), registry),)})
        parts = [expand(part) for part in node.args]
        if isinstance(node, Licensing().OR):
            together = frozenset[Alternative]().union(*parts)
            return choices.get(together, together)
        if prod(map(len, parts)) > MOST_ALTERNATIVES:
            todo = "choose in its parts: policy.choose"
            raise UsageError(f"it has more than {MOST_ALTERNATIVES} alternatives", where=where, todo=todo)
        return frozenset(tuple(sorted({*chain(*each)})) for each in product(*parts))

    return expand(parsed)


def _canonical(name: str, registry: Registry) -> str:
    """The id of a name's record; of a name without one, as terms/licenses.py writes it."""
    record = registry.find(name)
    if record is not None:
        return record.id
    try:
        return parse_license(name).name
    except ValueError:  # blank, too long, or with control characters
        return UNKNOWN
