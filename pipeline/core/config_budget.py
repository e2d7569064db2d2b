"""Config of what answers may cost: caps, prices, and whose budget a step's requests count in.

None of it is in any key: fields of these kinds are marked OPERATIONAL where they stand.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated

from pydantic import Field

from pipeline.core.config_base import ConfigModel, Name

Usd = Annotated[float, Field(ge=0, le=1_000_000_000)]
PerMillion = Annotated[float, Field(ge=0, le=100_000)]
"""USD per million tokens."""


class TokenPrice(ConfigModel):
    """What a teacher's tokens cost, in USD per million."""

    input: PerMillion
    """Tokens of the prompt."""
    output: PerMillion
    """Tokens of the completion, reasoning included."""
    cached_input: PerMillion | None = None
    """Tokens of the prompt that the provider found in its cache. None: no discount."""
    batch_discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the price that is saved in batch jobs."""


class Caps(ConfigModel):
    """Caps that hold at every moment: a request leaves only if its worst case still fits."""

    usd: Usd | None = None
    """US dollars; needs the price of every teacher that is asked."""
    tokens: Annotated[int | None, Field(ge=0)] = None
    """Tokens of prompts and completions together."""
    requests: Annotated[int | None, Field(ge=0)] = None
    """Requests that leave, those that fail and are tried again included."""


class Budget(Caps):
    """What all requests of a run may cost together, whatever the number of times it is resumed."""

    teachers: dict[Name, Caps] = Field(default_factory=dict)
    """Caps of single teachers, by name; they hold beside those of the run."""


class Spending(ConfigModel):
    """Whose budget a step's requests count in; `run` and `teacher` are recorded with every attempt."""

    run: Name | None = None
    """Name of the run, as its config says it. None: nobody's, so that no cap holds over several calls."""
    teacher: Name | None = None
    """The teacher's name in the config."""
    budget: Budget = Budget()
    """The run's caps."""
    prices: dict[Name, TokenPrice] = Field(default_factory=dict)
    """What the tokens of the run's teachers cost, where money is capped: earlier requests to any of them count."""

    def by(self, teacher: str) -> "Spending":
        """The same budget, spent on one teacher."""
        return self.model_copy(update={"teacher": teacher})

    @property
    def is_money_capped(self) -> bool:
        """Whether any cap in money is set, of whichever teacher."""
        return any(caps.usd is not None for caps in (self.budget, *self.budget.teachers.values()))

    @property
    def is_capped(self) -> bool:
        """Whether any cap holds."""
        caps = [cap for each in (self.budget, self.teacher_caps) for cap in (each.usd, each.tokens, each.requests)]
        return any(cap is not None for cap in caps)

    @property
    def teacher_caps(self) -> Caps:
        """The caps of this teacher alone."""
        return self.budget.teachers.get(self.teacher or "", Caps())


def undeclared(budget: Budget, teachers: Mapping[str, object]) -> list[str]:
    """Names of teachers that have caps and are not in the config."""
    return [name for name in budget.teachers if name not in teachers]


def nano(usd: float) -> int:
    """US dollars as whole nano-dollars: money is counted in integers. Exact for what a person types."""
    return int((Decimal(repr(usd)) * 1_000_000_000).to_integral_value())


def usd(nano_dollars: int) -> str:
    """Nano-dollars as a person reads them: `$12.30`, and smaller sums with as many digits as they need."""
    value = Decimal(nano_dollars) / 1_000_000_000
    if abs(value) >= 1 or value == 0:
        return f"${value:,.2f}"
    return f"${value:.2g}" if abs(value) >= Decimal("0.0001") else f"${value:f}"
