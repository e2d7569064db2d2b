"""What of the budget is spent and left, and which caps a plan may not fit into."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pipeline.core.config_budget import Caps, Spending, nano, usd
from pipeline.core.config_teacher import ReplayTeacher
from pipeline.runner.session import Session
from pipeline.teacher.accounts import spent_by
from pipeline.teacher.batch.door import in_flight
from pipeline.teacher.budget import Amount, Limits
from pipeline.teacher.forecast import Forecast
from pipeline.teacher.prices import price_of

Chance = Literal["surely", "probably", "perhaps"]
NOTHING: Final = Amount()


@dataclass(frozen=True, slots=True)
class Fund:
    """The caps of the run, or of one teacher.

    Attributes:
        teacher: whose; None: the run's.
        limits: the caps.
        spent: what counts against them already, unknown ends at their worst case.
        held: the worst case of the run's open batch jobs.
    """

    teacher: str | None
    limits: Limits
    spent: Amount
    held: Amount = NOTHING


@dataclass(frozen=True, slots=True)
class Alarm:
    """A cap that stands in a plan's way.

    Attributes:
        field: of the config (`budget.usd`).
        chance: `surely`: even the low estimate is above it; `probably`: the likely one; `perhaps`: only the high one.
        text: a line for a person.
    """

    field: str
    chance: Chance
    text: str


def funds_of(session: Session) -> tuple[Fund, ...]:
    """The caps that a config sets; none: nothing is capped.

    Raises:
        UsageError: money is capped, and nobody knows what earlier attempts at some teacher cost.
        CorruptArtefact: a file of attempts, or the record of a batch job, is damaged.
        Incomplete: the disk fails.
    """
    config = session.loaded.config
    budget = config.budget
    caps: list[tuple[str | None, Limits]] = [(None, _limits("budget", budget))]
    caps += [(teacher, _limits(f"budget.teachers.{teacher}", each)) for teacher, each in budget.teachers.items()]
    if not any(limits.is_any for _, limits in caps):
        return ()
    spending = Spending(run=config.name, budget=budget)
    prices = {
        name: price_of(teacher) for name, teacher in config.teachers.items() if not isinstance(teacher, ReplayTeacher)
    }
    responses = session.data / "responses"
    spent = spent_by(responses, spending.run, prices, budget)
    held = in_flight(responses, spending, identity="")
    return tuple(Fund(whose, limits, _of(spent, whose), _of(held, whose)) for whose, limits in caps if limits.is_any)


def _of(amounts: Mapping[str | None, Amount], teacher: str | None) -> Amount:
    """What one teacher has of them; None: all together."""
    return sum(amounts.values(), Amount()) if teacher is None else amounts.get(teacher, Amount())


def alarms(funds: Iterable[Fund], forecasts: Sequence[tuple[str, Forecast]]) -> Iterator[Alarm]:
    """The caps that may not be enough for what is forecast.

    Args:
        forecasts: teacher's name and what its requests may come to; those of several steps count together.
    """
    for fund in funds:
        counted = [each for teacher, each in forecasts if fund.teacher in (None, teacher)]
        if sum(each.requests.high for each in counted) == 0:
            continue
        low = sum((each.low for each in counted), Amount())
        likely = [each.likely or each.low for each in counted]
        high = sum((each.high for each in counted), Amount())
        levels: tuple[tuple[Chance, Amount], ...] = (
            ("surely", low),
            ("probably", sum(likely, Amount())),
            ("perhaps", high),
        )
        told: set[str] = set()
        for chance, amount in levels:
            held = Amount(requests=fund.held.requests) if chance == "surely" else fund.held  # jobs may cost less
            for cap in fund.limits.exceeded_by(fund.spent + held + amount):
                if cap not in told:
                    told.add(cap)
                    yield _alarm(fund, cap, chance, amount)


def _alarm(fund: Fund, cap: str, chance: Chance, amount: Amount) -> Alarm:
    field = f"{fund.limits.field}.{cap}"
    more, has, limit = (_shown(cap, each) for each in (amount, fund.spent, _as_amount(fund.limits)))
    held = "" if fund.held == Amount() else f", {_shown(cap, fund.held)} held by open jobs"
    which = {"surely": "low", "probably": "likely", "perhaps": "high"}[chance]
    ends = {
        "surely": "the run will stop there",
        "probably": "the run will probably stop there",
        "perhaps": "the run may stop there",
    }[chance]
    even = "even " if chance == "surely" else ""
    text = f"{field}: {limit}, {has} of it spent{held}; {even}the {which} estimate adds {more}: {ends} (exit code 3)"
    return Alarm(field, chance, text)


def left(fund: Fund) -> Amount:
    """What is left of each cap, not below 0; 0 also where there is none."""
    rest = _as_amount(fund.limits) - fund.spent - fund.held
    return Amount(max(0, rest.nano), max(0, rest.tokens), max(0, rest.requests))


def _as_amount(limits: Limits) -> Amount:
    return Amount(limits.nano or 0, limits.tokens or 0, limits.requests or 0)


def _shown(cap: str, amount: Amount) -> str:
    if cap == "usd":
        return usd(amount.nano)
    return f"{amount.tokens:,} tokens" if cap == "tokens" else f"{amount.requests:,} requests"


def _limits(field: str, caps: Caps) -> Limits:
    return Limits(field, None if caps.usd is None else nano(caps.usd), caps.tokens, caps.requests)
