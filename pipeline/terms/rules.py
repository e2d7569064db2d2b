"""What each restriction means for a policy: one function an atom, and its stable id."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, cast

from pipeline.core.config_policy import PolicyConfig
from pipeline.core.stage import Json
from pipeline.terms.grants import Held, read_value

Effect = Literal["deny", "undetermined", "overridden", "noted", "passed"]
"""deny: forbidden; undetermined: nobody knows, which refuses too; overridden: somebody signed for it; noted: holds, and
stops nothing; passed: does not reach what the policy means to do."""
EFFECTS: Final[tuple[Effect, ...]] = ("deny", "undetermined", "overridden", "noted", "passed")
"""From the strictest."""
REFUSED: Final[frozenset[Effect]] = frozenset({"deny", "undetermined"})

EU: Final = frozenset(
    {
        *("AT", "BE", "BG", "CY", "CZ", "DE", "DK", "EE", "ES", "FI", "FR", "GR", "HR", "HU"),
        *("IE", "IT", "LT", "LU", "LV", "MT", "NL", "PL", "PT", "RO", "SE", "SI", "SK"),
    }
)
"""Its members (ISO 3166-1)."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What an atom is judged by besides itself.

    Attributes:
        policy: what is meant to be done.
        families: of the student's base, in lower case; None among them: unknown. Empty: there is no student yet.
    """

    policy: PolicyConfig
    families: frozenset[str | None]


@dataclass(frozen=True, slots=True)
class Ruling:
    """What one atom of one source does.

    Attributes:
        why: why here, as a sentence without its full stop.
        warn: say it among the warnings too.
    """

    effect: Effect
    why: str
    warn: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A restriction's rule.

    Attributes:
        id: stable; overrides and documents name it.
        meaning: what the atom says, for people.
        judge: None where the atom does not concern such a source.
    """

    id: str
    meaning: str
    judge: Callable[[Held, Situation], Ruling | None]


def of_atom(atom: str) -> Rule:
    """The rule of a restriction; of an atom that is not listed, one that refuses: nobody knows what it says."""
    return RULES.get(atom, UNLISTED)


def rule_on(held: Held, at: Situation) -> Ruling | None:
    """What one restriction does; None: it does not concern such a source.

    A conservative one stops nothing.
    """
    ruling = of_atom(held.atom).judge(held, at)
    if ruling is not None and ruling.effect in REFUSED and held.conservative:
        return Ruling("noted", f"it is unsettled whether this reaches so far: {ruling.why}", warn=True)
    return ruling


def is_material(held: Held) -> bool:
    """Whether the licensed material itself is in the data set: prompts are, and replayed answers under a data licence;
    a model's outputs are none of its licence's material."""
    return held.role in ("prompt", "system_prompt") or (held.role != "student_base" and held.kind == "data_license")


def _outputs(held: Held) -> bool:
    """Whether the student learns from it. Prompts count: terms about outputs on a prompt set say that it is made of
    outputs."""
    return held.role != "student_base"


# ------------------------------------------------------------------------------------------------- one function an atom


def _unknown(held: Held, at: Situation) -> Ruling:
    what = f"nobody knows the terms of {held.record}"
    if held.kind is not None:
        what = f"what is known of {held.record} is below policy.min_confidence = {at.policy.min_confidence}"
    if held.asserted is not None:
        return Ruling("overridden", f"{what}; {held.asserted}")
    if at.policy.allow_unknown:
        return Ruling("noted", f"{what}, and policy.allow_unknown lets it through", warn=True)
    return Ruling("undetermined", f"{what}, and policy.allow_unknown = false")


def _commercial(held: Held, at: Situation) -> Ruling:
    effect: Effect = "deny" if at.policy.intended_use == "commercial" else "passed"
    return Ruling(effect, f"policy.intended_use = {at.policy.intended_use}")


def _no_derivatives(held: Held, at: Situation) -> Ruling:
    release = at.policy.release
    said = f"policy.release.dataset = {release.dataset}, policy.release.model = {release.model}"
    if held.role == "student_base":
        effect: Effect = "deny" if release.model != "none" else "passed"
        return Ruling(effect, f"policy.release.model = {release.model}, and the student is made from these weights")
    if is_material(held):
        effect = "deny" if release.dataset != "none" else "passed"
        return Ruling(effect, f"policy.release.dataset = {release.dataset}, and its rows were filtered or rewritten")
    if release.dataset == release.model == "none":
        return Ruling("passed", said)
    return Ruling("undetermined", f"{said}; whether outputs, or a student of them, are derivatives is unsettled")


def _no_redistribute(held: Held, at: Situation) -> Ruling | None:
    if held.role == "student_base":
        return None
    scope = at.policy.release.dataset
    return Ruling("deny" if scope != "none" else "passed", f"policy.release.dataset = {scope}")


def _internal_only(held: Held, at: Situation) -> Ruling:
    release = at.policy.release
    said = f"policy.release.model = {release.model}"
    scopes = [release.model]
    if held.role != "student_base":
        scopes.append(release.dataset)
        said += f", policy.release.dataset = {release.dataset}"
    return Ruling("deny" if "public" in scopes else "passed", said)


def _territory(held: Held, at: Situation) -> Ruling:
    excluded = _countries(cast(list[str], read_value(held.value)))
    if not at.policy.territory:
        listed = ", ".join(sorted(cast(list[str], read_value(held.value))))
        is_public = "public" in (at.policy.release.dataset, at.policy.release.model)
        effect: Effect = "undetermined" if is_public else "noted"
        return Ruling(effect, f"{held.record} excludes {listed}, and policy.territory names no country", warn=True)
    met = sorted(excluded & _countries(at.policy.territory))
    said = f"policy.territory = [{', '.join(at.policy.territory)}]"
    return Ruling("deny" if met else "passed", said)


def _countries(codes: list[str] | tuple[str, ...]) -> frozenset[str]:
    """With the members of the EU where it is named."""
    return frozenset(codes) | (EU if "EU" in codes else frozenset())


def _mau_cap(held: Held, at: Situation) -> Ruling:
    return _cap(read_value(held.value), at.policy.org.mau, "policy.org.mau")


def _revenue_cap(held: Held, at: Situation) -> Ruling:
    return _cap(read_value(held.value), at.policy.org.annual_revenue_usd, "policy.org.annual_revenue_usd")


def _cap(limit: Json, size: int, name: str) -> Ruling:
    over = not isinstance(limit, int) or size > limit
    return Ruling("deny" if over else "passed", f"{name} = {size:,}, the limit is {limit:,}")


def _no_training(held: Held, at: Situation) -> Ruling | None:
    return Ruling("deny", "a model is trained on this source") if _outputs(held) else None


def _general_purpose(held: Held, at: Situation) -> Ruling | None:
    return Ruling("deny", "the student is a language model of general purpose") if _outputs(held) else None


def _other_family(held: Held, at: Situation) -> Ruling | None:
    if not _outputs(held):
        return None
    family = str(read_value(held.value))
    others = sorted(name for name in at.families if name is not None and name != family.casefold())
    if others:
        return Ruling("deny", f"the student's base is of the family {', '.join(others)}, not {family}")
    if None in at.families or not at.families:
        return Ruling("undetermined", f"nobody said whether the student's base is of the family {family}")
    return Ruling("passed", f"the student's base is of the family {family} too")


def _competing(held: Held, at: Situation) -> Ruling | None:
    if not _outputs(held):
        return None
    provider = str(read_value(held.value))
    said = at.policy.competes(provider)
    effects: dict[str, Effect] = {"yes": "deny", "no": "passed"}
    return Ruling(effects.get(said, "undetermined"), f"policy.competes_with.{provider} = {said}")


def _permission(held: Held, at: Situation) -> Ruling | None:
    provider = read_value(held.value)
    return Ruling("deny", f"no permission of {provider} is recorded") if _outputs(held) else None


def _extraction(held: Held, at: Situation) -> Ruling | None:
    return Ruling("deny", "a pipeline asks automatically") if _outputs(held) else None


def _noted(why: str) -> Callable[[Held, Situation], Ruling]:
    return lambda held, at: Ruling("noted", why)


def _unlisted(held: Held, at: Situation) -> Ruling:
    return Ruling("undetermined", f"this version does not know what {held.atom} means")


RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "unknown": Rule("LG-001", "Nobody knows the terms, or not surely enough.", _unknown),
        "noncommercial": Rule("LG-002", "No commercial use.", _commercial),
        "research_only": Rule("LG-003", "Research only.", _commercial),
        "no_derivatives": Rule("LG-004", "What was changed may not be shared.", _no_derivatives),
        "no_redistribute_dataset": Rule("LG-005", "The data may not be passed on.", _no_redistribute),
        "internal_only": Rule("LG-006", "For use inside one organisation.", _internal_only),
        "territory_exclude": Rule("LG-007", "Not in some countries.", _territory),
        "mau_cap": Rule("LG-008", "Only up to so many monthly active users.", _mau_cap),
        "revenue_cap": Rule("LG-009", "Only up to so much revenue a year.", _revenue_cap),
        "no_train.any": Rule("LG-010", "No model may be trained on outputs.", _no_training),
        "no_train.other_family": Rule("LG-011", "Outputs may train models of one family only.", _other_family),
        "no_train.competing": Rule("LG-012", "Outputs may not train models that compete.", _competing),
        "no_train.general_purpose": Rule("LG-013", "Outputs may not train general models.", _general_purpose),
        "needs_permission": Rule("LG-014", "Training on outputs needs permission.", _permission),
        "no_automated_extraction": Rule("LG-015", "Outputs may not be extracted by programs.", _extraction),
        "terminate_on_guardrail_bypass": Rule(
            "LG-016", "Going round guardrails ends the licence.", _noted("holds for whoever runs the model")
        ),
        "use_policy": Rule("LG-017", "A policy limits what it is used for.", _noted("holds for use; read the policy")),
        "gated": Rule("LG-018", "Access is granted to persons.", _noted("whoever downloads it accepts the terms")),
    }
)
"""Atom -> rule."""
SHARE_ALIKE: Final = "conflict.share_alike"
NAME_PREFIX: Final = "conflict.name_prefix"
VERSIONS: Final = "conflict.cc_versions"
CONFLICTS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        SHARE_ALIKE: ("LG-019", "Two licences each want the whole under themselves."),
        NAME_PREFIX: ("LG-020", "Two names, each of which the student's name has to begin with."),
        VERSIONS: ("LG-021", "Share-alike and non-commercial Creative Commons licences that do not fit together."),
    }
)
"""Conflicts between what sources ask for -> rule id and meaning."""
UNLISTED: Final = Rule("LG-022", "An atom that this version does not know.", _unlisted)
