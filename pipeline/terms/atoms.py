"""What a document can forbid or ask: the closed lists of atoms and triggers, and what each is about."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, Strict, StringConstraints, model_validator

from pipeline.core.config_base import ConfigModel
from pipeline.core.config_policy import Country

QUOTED_WORDS: Final = 40
"""A quote is a reference to a text, not a copy of it."""

RestrictionAtom = Literal[
    "no_train.any",
    "no_train.competing",
    "no_train.other_family",
    "no_train.general_purpose",
    "needs_permission",
    "noncommercial",
    "research_only",
    "no_derivatives",
    "no_redistribute_dataset",
    "internal_only",
    "territory_exclude",
    "mau_cap",
    "revenue_cap",
    "use_policy",
    "gated",
    "no_automated_extraction",
    "terminate_on_guardrail_bypass",
    "unknown",
]
ObligationAtom = Literal[
    "attribution",
    "share_alike",
    "license_copy",
    "notice_file",
    "display",
    "product_display_if",
    "name_prefix",
    "flow_down",
    "state_changes",
    "disclose_ai_generated",
    "delete_on_termination",
]
Trigger = Literal[
    "train_on_outputs",
    "distribute_dataset",
    "distribute_model_trained_on_outputs",
    "distribute_weights_copies",
    "distribute_licensed_material_or_derivative",
    "serve_product",
]
"""What makes an obligation due:

- `train_on_outputs`: a model is trained on what the model or service wrote.
- `distribute_dataset`: the licensed material itself is in a data set that is handed out. Prompts are; a teacher's
  outputs are none of its licence's material.
- `distribute_model_trained_on_outputs`: a student that was trained on the outputs is handed out.
- `distribute_weights_copies`: weights under the licence, or weights tuned from them, are handed out.
- `distribute_licensed_material_or_derivative`: a student is handed out that was trained on what the source gave, and
  the document leaves open whether such a model is a derivative of its material; the atom is conservative. Where the
  document says that it is, the trigger is `distribute_model_trained_on_outputs`.
- `serve_product`: a product with the model in it is offered.
"""
DUE: Final[Mapping[str, frozenset[Trigger]]] = MappingProxyType(
    {
        "dataset": frozenset[Trigger]({"distribute_dataset", "distribute_licensed_material_or_derivative"}),
        "model": frozenset[Trigger](
            {
                "train_on_outputs",
                "distribute_model_trained_on_outputs",
                "distribute_weights_copies",
                "distribute_licensed_material_or_derivative",
            }
        ),
    }
)
"""What is passed on -> the triggers that this meets."""
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Number = Annotated[int, Strict(), Field(ge=0)]


class DisplayIf(ConfigModel):
    """A text that a product shows once it is large; one of the limits is enough."""

    text: Text
    mau: Number | None = None
    """Monthly active users above which it is due."""
    revenue_usd: Number | None = None
    """Monthly revenue in US dollars above which it is due."""


Value: TypeAlias = Text | Number | tuple[Country, ...] | DisplayIf | None

VALUES: Final[Mapping[str, tuple[type | None, ...]]] = {
    "no_train.competing": (str,),
    "no_train.other_family": (str,),
    "needs_permission": (str,),
    "territory_exclude": (tuple,),
    "mau_cap": (int,),
    "revenue_cap": (int,),
    "use_policy": (str,),
    "gated": (str,),
    "attribution": (str, None),
    "share_alike": (str,),
    "notice_file": (str, None),
    "display": (str,),
    "product_display_if": (DisplayIf,),
    "name_prefix": (str,),
    "flow_down": (str,),
}
"""Atom -> what its value may be: provider, family, countries, users a month, dollars a year, address, repository, text,
licence family or policy. An atom that is not named has none."""


class Atom(ConfigModel):
    """What restrictions and obligations share."""

    value: Value = None
    """What the atom is about, where it is about something."""
    clause: Text | None = None
    """Section of the document; none where nobody could read it."""
    quote: Text | None = None
    """Its own words, at most 40 of them; none where nobody could read them."""
    conservative: bool = False
    """True where it is unsettled whether the clause reaches this far: it is said, and stops nothing."""

    @model_validator(mode="after")
    def _fits(self) -> "Atom":
        atom = getattr(self, "atom", "")
        allowed = VALUES.get(atom, (None,))
        if not any(self.value is None if kind is None else isinstance(self.value, kind) for kind in allowed):
            raise ValueError(f"the value of {atom} is {_in_words(allowed)}")
        if self.quote is not None and len(self.quote.split()) > QUOTED_WORDS:
            raise ValueError(f"a quote has at most {QUOTED_WORDS} words")
        return self


def _in_words(kinds: tuple[type | None, ...]) -> str:
    names: dict[type | None, str] = {
        str: "a text",
        int: "a whole number",
        tuple: "a list of countries",
        DisplayIf: "a mapping of text, mau and revenue_usd",
        None: "left out",
    }
    return " or ".join(names[kind] for kind in kinds)
