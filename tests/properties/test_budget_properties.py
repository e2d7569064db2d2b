"""Any order of reservations, ends and crashes: no cap is exceeded, and nothing is lost or made up."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from pipeline.teacher.budget import Amount, Ledger, Limits, Scope

CAPS = st.none() | st.integers(0, 60)
WORSTS = st.builds(Amount, st.integers(0, 20), st.integers(0, 20), st.just(1))
STEPS = st.lists(
    st.tuples(st.just("reserve"), WORSTS)
    | st.tuples(st.just("settle"), st.tuples(st.integers(0, 30), st.floats(0, 1), st.booleans()))
    | st.tuples(st.just("crash"), st.none()),
    max_size=60,
)


@dataclass
class World:
    """A provider's bill and the attempts on record, beside the ledger that has to keep to its caps.

    Attributes:
        flying: worst case and what it really costs, of each attempt in flight.
        recorded: what each attempt that ended counts as.
    """

    limits: tuple[Limits, Limits]
    recorded: list[Amount] = field(default_factory=list)
    flying: list[Amount] = field(default_factory=list)
    billed: Amount = field(default_factory=Amount)
    before: Amount = field(default_factory=Amount)

    def ledger(self) -> Ledger:
        """As it is made at the start of every process, from the attempts on record."""
        self.before = sum(self.recorded, Amount())
        return Ledger(Scope(limits, self.before) for limits in self.limits)


def exceeded(limits: tuple[Limits, Limits], total: Amount) -> list[str]:
    return [cap for each in limits for cap in each.exceeded_by(total)]


@given(st.builds(Limits, st.just("budget"), CAPS, CAPS, CAPS), st.builds(Limits, st.just("t"), CAPS, CAPS, CAPS), STEPS)
def test_no_cap_is_exceeded_whatever_happens(run: Limits, teacher: Limits, steps: list[tuple[str, object]]) -> None:
    world = World((run, teacher))
    ledger = world.ledger()
    for kind, value in steps:
        if kind == "reserve" and isinstance(value, Amount):
            if ledger.reserve(value) is None:
                world.flying.append(value)
        elif kind == "settle" and isinstance(value, tuple) and world.flying:
            at, share, is_known = value
            worst = world.flying.pop(at % len(world.flying))
            really = Amount(int(worst.nano * share), int(worst.tokens * share), 1)
            counted = really if is_known else worst
            world.billed += really
            world.recorded.append(counted)
            ledger.settle(worst, counted)
        elif kind == "crash":
            world.billed = sum(world.flying, world.billed)  # the worst that may have become of them
            world.recorded += world.flying
            world.flying = []
            ledger = world.ledger()
        assert ledger.held == sum(world.flying, Amount()), "held is what is in flight"
        assert world.before + ledger.spent == sum(world.recorded, Amount()), "spent is what has ended"
        assert exceeded(world.limits, world.before + ledger.spent + ledger.held) == []
        assert exceeded(world.limits, sum(world.flying, world.billed)) == []
        assert ledger.in_flight == len(world.flying)


@given(WORSTS, st.builds(Limits, st.just("budget"), CAPS, CAPS, CAPS))
def test_a_reservation_is_refused_only_by_a_cap_that_it_would_exceed(worst: Amount, limits: Limits) -> None:
    refused = Ledger((Scope(limits),)).reserve(worst)
    assert (refused is None) == (not [*limits.exceeded_by(worst)])
    assert refused is None or refused.cap in limits.exceeded_by(worst)
