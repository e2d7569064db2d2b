"""What a teacher's tokens cost: the config's own price, else the dated table beside this file, else unknown.

Money is whole nano-dollars. Not covered: discounts for cached prompts (counted in full, so that no sum is too low), and
prices per image, per search or per hour.
"""

from dataclasses import dataclass
from datetime import date
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_base import ConfigModel, Name
from pipeline.core.config_budget import TokenPrice, nano
from pipeline.core.config_server import LocalServer
from pipeline.core.errors import UsageError
from pipeline.core.load import read_yaml

TABLE: Final = Path(__file__).with_name("prices.yaml")
MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """What tokens cost, in nano-dollars per million of them."""

    input: int
    output: int

    @classmethod
    def of(cls, given: TokenPrice) -> "Price":
        """A price as it is written in a config, made exact."""
        return cls(nano(given.input), nano(given.output))

    def cost(self, input_tokens: int, output_tokens: int) -> int:
        """Nano-dollars for so many tokens, rounded up."""
        return -(-(input_tokens * self.input + output_tokens * self.output) // MILLION)


FREE: Final = Price(0, 0)
"""A server of our own: what it costs is not counted in tokens."""


class Listed(ConfigModel):
    """One entry of the table."""

    providers: tuple[Name, ...]
    """Names under which the provider is known (`provider` of a teacher)."""
    models: tuple[str, ...]
    """Models that cost this, by the names under which they are asked for."""
    price: TokenPrice
    """USD per million tokens."""
    as_of: date
    """When the source was read."""
    source: str
    """Where the price is published."""


def read_prices(path: Path = TABLE) -> tuple[Listed, ...]:
    """The entries of a price table.

    Raises:
        UsageError: it is not one.
    """
    todo = "correct the file: each entry has providers, models, price, as_of and source"
    try:
        entries = TypeAdapter(tuple[Listed, ...]).validate_python(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{path}: {'.'.join(map(str, first['loc']))}"
        raise UsageError(f"the price table is not valid: {first['msg']}", where=where, todo=todo) from None
    named = [(provider, model) for entry in entries for provider in entry.providers for model in entry.models]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise UsageError(
            f"the price table lists {' '.join(twice[0])} twice", where=str(path), todo="keep one of the two"
        )
    return entries


def batch_price_of(teacher: ApiTeacher, table: Path = TABLE) -> Price | None:
    """What a teacher's tokens cost in batch jobs, rounded up; None: unknown.

    Raises:
        UsageError: the price table is not valid.
    """
    given = teacher.price or _listed(teacher, table)
    if given is None:
        return None
    part, full = 1 - Decimal(repr(given.batch_discount)), Price.of(given)
    return Price(*(int((tokens * part).to_integral_value(ROUND_CEILING)) for tokens in (full.input, full.output)))


def price_of(teacher: LocalServer | ApiTeacher, table: Path = TABLE) -> Price | None:
    """What a teacher's tokens cost; None: unknown.

    Raises:
        UsageError: the price table is not valid.
    """
    given = token_price_of(teacher, table)
    return None if given is None else Price.of(given)


def token_price_of(teacher: LocalServer | ApiTeacher, table: Path = TABLE) -> TokenPrice | None:
    """The same in USD, as a config says it.

    Raises:
        UsageError: the price table is not valid.
    """
    if teacher.price is not None:
        return teacher.price
    return TokenPrice(input=0, output=0) if isinstance(teacher, LocalServer) else _listed(teacher, table)


def _listed(teacher: ApiTeacher, table: Path) -> TokenPrice | None:
    entries = (one for one in read_prices(table) if teacher.provider in one.providers and teacher.model in one.models)
    found = next(entries, None)
    return None if found is None else found.price
