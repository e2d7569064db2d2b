"""A plan as a terminal shows it and as scripts read it: steps with reasons, requests, tokens, money, the budget."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.cli.show import say, say_json
from pipeline.core.config_budget import usd
from pipeline.core.log import safe_text
from pipeline.runner.plan import Planned
from pipeline.runner.session import Session
from pipeline.terms.verdict import Verdict

if TYPE_CHECKING:  # these know rows, and so load Arrow
    from pipeline.runner.estimate import Estimate, Estimates
    from pipeline.runner.funds import Fund
    from pipeline.teacher.forecast import Span


def say_plan(
    session: Session,
    planned: Sequence[Planned],
    estimates: "Estimates | None" = None,
    verdict: Verdict | None = None,
    *,
    as_json: bool,
) -> None:
    """What would happen to each step and, where it was estimated, what that comes to."""
    if as_json:
        rows = [{"step": p.step.name, "state": p.state, "key": p.key, "reasons": list(p.reasons)} for p in planned]
        told = {} if estimates is None else _estimates_json(estimates)
        terms = {} if verdict is None else {"terms": verdict.to_json()}
        say_json({"run": session.loaded.run_name, "steps": rows, **told, **terms})
        return
    for each in planned:
        reasons = "; ".join(each.reasons)
        say(safe_text(f"{each.step.name:10} {each.state:8} {reasons}".rstrip()))
    for line in [*([] if estimates is None else _lines(estimates)), *([] if verdict is None else _terms(verdict))]:
        say(safe_text(line))


# ------------------------------------------------------------------------------------------------- for a person


def _lines(estimates: "Estimates") -> list[str]:
    lines = [line for each in estimates.estimates for line in _estimate_lines(each)]
    for each in estimates.unknown:
        lines.append(f"requests of {each.step}: {each.why}: {each.todo}")
    lines += [_fund_line(fund) for fund in estimates.funds]
    return [*lines, *(f"warning: {alarm.text}" for alarm in estimates.alarms)]


def _terms(verdict: Verdict) -> list[str]:
    """The verdict, and what whoever passes the results on will owe."""
    owed = dict.fromkeys(due.atom if due.value is None else f"{due.atom} {due.value}" for due in verdict.obligations)
    asks = f": {', '.join(owed)}" if owed and verdict.passes else ""
    return [f"terms: {verdict.outcome.replace('_', ' ')}{asks}", *(f"warning: {each}" for each in verdict.warnings)]


def _estimate_lines(each: "Estimate") -> list[str]:
    """Each begins with another word than the lines of the steps do."""
    stored = f"{each.answered:,} answered" + (f", {each.refused:,} refused" if each.refused else "")
    counts = f"{each.requests:,} requests, {stored}, {each.to_ask:,} to ask"
    counts += f" ({each.cut:,} of them were cut at a smaller cap)" if each.cut else ""
    counts += f", {each.shared:,} ask what another one asks" if each.shared else ""
    counts += f", {each.in_jobs:,} in open batch jobs" if each.in_jobs else ""
    counts += f"; {each.continued:,} of the answered may be continued" if each.continued else ""
    counts += f"; {each.blocked:,} more are blocked by generate.outbound" if each.blocked else ""
    lines = [f"teacher {each.teacher} ({each.model}) for {each.step}: {counts}"]
    cost = each.forecast
    if cost.requests.high == 0:
        return lines
    if each.target is not None:
        least = f"{cost.requests.low:,} requests or more to this teacher"
        lines.append(f"  target      {each.target:,} good rows (generate.accept): {least}")
    lines.append(f"  tokens in   {_span(cost.tokens_in)}")
    lines.append(f"  tokens out  {_span(cost.tokens_out)}")
    lines.append(f"  money       {'unknown: no price' if cost.nano is None else _money(cost.nano)}")
    if each.seconds is not None:
        lines.append(f"  time        about {_duration(each.seconds)}, at the pace of the last run")
    basis = f"from {each.attempts:,} answered requests" if each.attempts else "guess: nothing stored yet"
    return [*lines, f"  basis       {basis}; the high numbers are the most that requests can take, without retries"]


def _span(span: "Span") -> str:
    likely = "" if span.likely is None else f", likely {span.likely:,}"
    return f"{span.low:,} to {span.high:,}{likely}"


def _money(span: "Span") -> str:
    likely = "" if span.likely is None else f", likely {usd(span.likely)}"
    return f"{usd(span.low)} to {usd(span.high)}{likely}" if span.high > 0 else f"{usd(0)}: its tokens cost nothing"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _fund_line(fund: "Fund") -> str:
    from pipeline.runner.funds import left
    from pipeline.teacher.budget import Amount

    limits, spent, rest = fund.limits, fund.spent, left(fund)
    held, parts = fund.held, []
    in_jobs = "" if held == Amount() else ", {} held by open jobs"
    if limits.nano is not None:
        jobs = in_jobs.format(usd(held.nano))
        parts.append(f"{usd(spent.nano)} of {usd(limits.nano)} spent{jobs}, {usd(rest.nano)} left")
    if limits.tokens is not None:
        jobs = in_jobs.format(f"{held.tokens:,}")
        parts.append(f"{spent.tokens:,} of {limits.tokens:,} tokens spent{jobs}, {rest.tokens:,} left")
    if limits.requests is not None:
        jobs = in_jobs.format(f"{held.requests:,}")
        parts.append(f"{spent.requests:,} of {limits.requests:,} requests made{jobs}, {rest.requests:,} left")
    return f"{limits.field}: {'; '.join(parts)}"


# -------------------------------------------------------------------------------------------------- for scripts


def _estimates_json(estimates: "Estimates") -> dict[str, Any]:
    return {
        "requests": [_estimate_json(each) for each in estimates.estimates],
        "unknown": [asdict(each) for each in estimates.unknown],
        "budget": [_fund_json(fund) for fund in estimates.funds],
        "warnings": [asdict(alarm) for alarm in estimates.alarms],
    }


def _estimate_json(each: "Estimate") -> dict[str, Any]:
    """Money in US dollars; null: unknown."""
    counts = (
        "step",
        "teacher",
        "model",
        "requests",
        "answered",
        "refused",
        "to_ask",
        "cut",
        "shared",
        "in_jobs",
        "continued",
        "blocked",
        "target",
    )
    cost = each.forecast
    return {
        **{name: getattr(each, name) for name in ("step", "teacher", "model", *counts)},
        "sent": asdict(cost.requests),
        "tokens_in": asdict(cost.tokens_in),
        "tokens_out": asdict(cost.tokens_out),
        "usd": None if cost.nano is None else {name: _usd(value) for name, value in asdict(cost.nano).items()},
        "basis": {"kind": "answers" if each.attempts else "guess", "answers": each.attempts},
        "seconds": each.seconds,
    }


def _fund_json(fund: "Fund") -> dict[str, Any]:
    from pipeline.runner.funds import left

    rest, limits = left(fund), fund.limits
    return {
        "field": limits.field,
        "teacher": fund.teacher,
        "caps": {"usd": _usd(limits.nano), "tokens": limits.tokens, "requests": limits.requests},
        "spent": {"usd": _usd(fund.spent.nano), "tokens": fund.spent.tokens, "requests": fund.spent.requests},
        "held_by_jobs": {"usd": _usd(fund.held.nano), "tokens": fund.held.tokens, "requests": fund.held.requests},
        "left": {
            "usd": None if limits.nano is None else _usd(rest.nano),
            "tokens": None if limits.tokens is None else rest.tokens,
            "requests": None if limits.requests is None else rest.requests,
        },
    }


def _usd(nano: int | None) -> float | None:
    return None if nano is None else nano / 1e9
