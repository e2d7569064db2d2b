"""What sources are bound to: atoms of term records, each with where it comes from; joined by union."""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast

from pydantic import BaseModel

from pipeline.core.config_policy import Confidence, PolicyConfig, Role
from pipeline.core.lineage import canonical_json
from pipeline.core.stage import Json
from pipeline.terms.licenses import UNKNOWN
from pipeline.terms.records import Obligation, Registry, Restriction, TermRecord

CONFIDENCE: Final[tuple[Confidence, ...]] = ("unverified", "inferred", "user_asserted", "mirrored", "verified")
"""From the lowest."""

Scope = Literal["any", "noncommercial", "research_only"]
Key: TypeAlias = tuple[str, str]
"""An atom and the canonical JSON of its value: what the algebra compares."""


@dataclass(frozen=True, slots=True)
class Held:
    """One atom that binds one source.

    Attributes:
        atom: `no_train.competing`, `name_prefix`, …
        value: canonical JSON of its value, so that it can be compared; `null` where it has none.
        trigger: when it is due; None: it is a restriction.
        role, source: of the source, and its name.
        record: id of the record; where there is none, the licence's name.
        kind: the record's; None: there is no record, or one that says that nobody knows.
        clause, quote: where the record has it from.
        conservative: it is unsettled whether the clause reaches this far: it is said, and stops nothing.
        asserted: an assertion answers for it (an `unknown` one only).
    """

    atom: str
    value: str
    trigger: str | None
    role: Role
    source: str
    record: str
    kind: str | None
    clause: str | None = None
    quote: str | None = None
    conservative: bool = False
    asserted: str | None = None

    @property
    def key(self) -> Key:
        """What it is compared by."""
        return self.atom, self.value

    @property
    def bearer(self) -> str:
        """`teacher:main`."""
        return f"{self.role}:{self.source}"


@dataclass(frozen=True, slots=True)
class Scalars:
    """Limits that have an order of their own, each joined to the stricter one.

    Attributes:
        mau_cap, revenue_cap: the lowest; None: no limit.
        territory_exclude: countries of all.
        scope: any < noncommercial < research_only.
    """

    mau_cap: int | None
    revenue_cap: int | None
    territory_exclude: frozenset[str]
    scope: Scope


@dataclass(frozen=True, slots=True)
class Grant:
    """All that binds some sources. Two grants are equal where the same atoms bind the same sources.

    Attributes:
        held: the atoms.
        records: ids of the records that they are from, and of those that ask for nothing.
    """

    held: frozenset[Held] = frozenset()
    records: frozenset[str] = frozenset()

    @property
    def restrictions(self) -> frozenset[Key]:
        """What is forbidden or limited."""
        return frozenset(held.key for held in self.held if held.trigger is None)

    @property
    def obligations(self) -> frozenset[Key]:
        """What is asked for, whether it is due or not."""
        return frozenset(held.key for held in self.held if held.trigger is not None)

    @property
    def scalars(self) -> Scalars:
        """The strictest limits of all."""
        excluded = (read_value(value) for atom, value in self.restrictions if atom == "territory_exclude")
        atoms = {atom for atom, _ in self.restrictions}
        scope: Scope = "noncommercial" if "noncommercial" in atoms else "any"
        return Scalars(
            self._lowest("mau_cap"),
            self._lowest("revenue_cap"),
            frozenset(str(country) for value in excluded for country in cast(list[Json], value)),
            "research_only" if "research_only" in atoms else scope,
        )

    def _lowest(self, name: str) -> int | None:
        limits = (read_value(value) for atom, value in self.restrictions if atom == name)
        return min((limit for limit in limits if isinstance(limit, int)), default=None)


def join(one: Grant, other: Grant) -> Grant:
    """What binds both together: the union of their atoms. Commutative, associative, idempotent, never looser."""
    return Grant(one.held | other.held, one.records | other.records)


def join_all(grants: Iterable[Grant]) -> Grant:
    """All of them together."""
    return functools.reduce(join, grants, Grant())


def join_scalars(one: Scalars, other: Scalars) -> Scalars:
    """The stricter of each limit; equals the scalars of the joined grants."""
    scopes: tuple[Scope, ...] = ("any", "noncommercial", "research_only")
    return Scalars(
        _lower(one.mau_cap, other.mau_cap),
        _lower(one.revenue_cap, other.revenue_cap),
        one.territory_exclude | other.territory_exclude,
        max(one.scope, other.scope, key=scopes.index),
    )


def _lower(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


def grant_of(names: Iterable[str], registry: Registry, policy: PolicyConfig, *, role: Role, source: str) -> Grant:
    """What one source is bound to by names that hold together.

    Args:
        names: ids of records, or names without one, whose atom is `unknown`; those that a record includes come along.
            A record below `policy.min_confidence` counts as unknown too, and what it is known to forbid still binds.
        role, source: whose.
    """
    found: set[Held] = set()
    records: set[str] = set()
    for name in names:
        record = registry.find(name)
        if record is None:
            found.add(Held(UNKNOWN, value_text(name), None, role, source, name, None))
        for each in () if record is None else registry.together(record):
            found |= _held(each, policy, role, source)
            records.add(each.id)
    return Grant(frozenset(found), frozenset(records))


def _held(record: TermRecord, policy: PolicyConfig, role: Role, source: str) -> set[Held]:
    atoms: tuple[Restriction | Obligation, ...] = (*record.restrictions, *record.obligations)
    held = {
        Held(
            atom=each.atom,
            value=value_text(record.id if each.atom == UNKNOWN else each.value),
            trigger=each.trigger if isinstance(each, Obligation) else None,
            role=role,
            source=source,
            record=record.id,
            kind=None if each.atom == UNKNOWN else record.kind,
            clause=each.clause,
            quote=each.quote,
            conservative=each.conservative and each.atom != UNKNOWN,
        )
        for each in atoms
    }
    if is_below(record.confidence, policy.min_confidence) and all(each.atom != UNKNOWN for each in atoms):
        held.add(Held(UNKNOWN, value_text(record.id), None, role, source, record.id, record.kind))
    return held


def is_below(confidence: Confidence, least: Confidence) -> bool:
    """Whether less is known than a policy asks for."""
    return CONFIDENCE.index(confidence) < CONFIDENCE.index(least)


def value_text(value: object) -> str:
    """The canonical JSON of an atom's value."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return canonical_json(cast(Json, [*plain] if isinstance(plain, tuple) else plain)).decode()


def read_value(text: str) -> Json:
    """The value of its canonical JSON."""
    return cast(Json, json.loads(text))
