"""Which obligations are due under a policy, and which of them contradict each other."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Final, Literal, cast

from pipeline.core.config_policy import PolicyConfig, ReleaseScope
from pipeline.terms.grants import Held, read_value
from pipeline.terms.rules import NAME_PREFIX, SHARE_ALIKE, VERSIONS, is_material

Answer = Literal["no", "unsettled", "yes"]
MONTHS: Final = 12
_VERSION: Final = re.compile(r"^(?P<kind>.+?)-(?P<version>[0-9]+(?:\.[0-9]+)*)$")


@dataclass(frozen=True, slots=True)
class Owed:
    """An obligation that is due.

    Attributes:
        conservative: it is unsettled whether it is: it is said, and stops nothing.
    """

    held: Held
    conservative: bool


@dataclass(frozen=True, slots=True)
class Conflict:
    """Obligations that cannot be met together.

    Attributes:
        atom: `conflict.share_alike`, …
        values: what contradicts, sorted.
        held: the obligations (and restrictions) that do.
        why: why here.
    """

    atom: str
    values: tuple[str, ...]
    held: tuple[Held, ...]
    why: str


def owed(held: Iterable[Held], policy: PolicyConfig) -> tuple[Owed, ...]:
    """The obligations that are due. With an internal release nothing may count as distributed, so what asks for
    something on distribution is kept and marked conservative."""
    found = []
    for each in held:
        answer = "no" if each.trigger is None else is_due(each, policy)
        if answer != "no":
            found.append(Owed(each, each.conservative or answer == "unsettled"))
    return tuple(found)


def is_due(held: Held, policy: PolicyConfig) -> Answer:
    """Whether an obligation's trigger is met; one that is not known is taken as met, and unsettled."""
    student, release = held.role == "student_base", policy.release
    match held.trigger:
        case "train_on_outputs":
            return "no" if student else "yes"
        case "distribute_dataset":
            return _given_out(release.dataset) if is_material(held) else "no"
        case "distribute_model_trained_on_outputs":
            return "no" if student else _given_out(release.model)
        case "distribute_weights_copies":
            return _given_out(release.model) if student else "no"
        case "distribute_licensed_material_or_derivative":
            return _material(held, policy)
        case "serve_product":
            return _served(held, policy)
        case _:
            return "unsettled"


def _given_out(scope: ReleaseScope) -> Answer:
    answers: dict[ReleaseScope, Answer] = {"none": "no", "internal": "unsettled", "public": "yes"}
    return answers[scope]


def _material(held: Held, policy: PolicyConfig) -> Answer:
    """Weights are handed out with a student that was made from them, prompts with the data set; whether a student of
    outputs or prompts is a derivative is unsettled."""
    release = policy.release
    if held.role == "student_base":
        return _given_out(release.model)
    if is_material(held) and release.dataset != "none":
        return _given_out(release.dataset)
    return "no" if release.dataset == release.model == "none" else "unsettled"


def _served(held: Held, policy: PolicyConfig) -> Answer:
    if policy.intended_use != "commercial":
        return "no"  # research makes no product
    if held.atom != "product_display_if":
        return "yes"
    limits = cast(dict[str, int | None], read_value(held.value))
    users, revenue = limits.get("mau"), limits.get("revenue_usd")
    large = (users is not None and policy.org.mau > users) or (
        revenue is not None and policy.org.annual_revenue_usd > MONTHS * revenue
    )
    return "yes" if large or (users is None and revenue is None) else "no"


# ------------------------------------------------------------------------------------------------------------ conflicts


def conflicts(held: Iterable[Held], policy: PolicyConfig) -> tuple[Conflict, ...]:
    """What cannot be met together, of the material of the data set and of the student apart.

    What its records mark as conservative conflicts with nothing; an internal release conflicts like a public one.
    """
    firm = tuple(sorted((each for each in held if not each.conservative), key=lambda each: (each.key, each.bearer)))
    due = [each for each in firm if each.trigger is not None and is_due(each, policy) != "no"]
    found = [_names(due)]
    for in_student in (False, True):
        shared = [each for each in due if each.atom == "share_alike" and (each.role == "student_base") == in_student]
        found.append(_families(shared))
        if not in_student and policy.release.dataset != "none":
            free = [each for each in firm if each.atom == "noncommercial" and each.role != "student_base"]
            found.append(_versions(shared, free))
    return tuple(conflict for conflict in found if conflict is not None)


def _names(due: list[Held]) -> Conflict | None:
    asked = [each for each in due if each.atom == "name_prefix"]
    names = {str(read_value(each.value)) for each in asked}
    clashing = {name for pair in combinations(sorted(names), 2) if not _fit(*pair) for name in pair}
    members = [each for each in asked if read_value(each.value) in clashing]
    return _conflict(NAME_PREFIX, clashing, members, "no name begins with all of these")


def _fit(one: str, other: str) -> bool:
    one, other = one.casefold(), other.casefold()
    return one.startswith(other) or other.startswith(one)


def _families(shared: list[Held]) -> Conflict | None:
    kinds = {_kind(str(read_value(each.value)))[0] for each in shared}
    clashing = {str(read_value(each.value)) for each in shared} if len(kinds) > 1 else set()
    return _conflict(SHARE_ALIKE, clashing, shared, "what is handed out cannot be under all of these at once")


def _versions(shared: list[Held], noncommercial: list[Held]) -> Conflict | None:
    """Versions of one share-alike licence, or one that allows commercial use beside a Creative Commons licence that
    does not."""
    asked = {each.record: each for each in (*shared, *noncommercial) if each.record.startswith("CC-")}
    clashing: set[str] = set()
    for one in {each.record for each in shared} & set(asked):
        for other in set(asked) - {one}:
            (kind, version), (other_kind, other_version) = _kind(one), _kind(other)
            if version != other_version or (kind != other_kind and "-NC" not in kind):
                clashing |= {one, other}
    members = [each for each in (*shared, *noncommercial) if each.record in clashing]
    return _conflict(VERSIONS, clashing, members, "the data set holds material under all of these, and is handed out")


def _kind(name: str) -> tuple[str, str]:
    """`CC-BY-SA-4.0` as its kind and its version."""
    found = _VERSION.match(name)
    return (name, "") if found is None else (found["kind"], found["version"])


def _conflict(atom: str, values: set[str], held: list[Held], why: str) -> Conflict | None:
    return Conflict(atom, tuple(sorted(values)), tuple(held), why) if values else None
