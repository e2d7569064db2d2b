"""Charts as inline SVG: pure functions from numbers to markup, without a library and without scripts.

A chart is as wide as its container: horizontal positions are percentages, vertical ones pixels, so that its text keeps
its size on a telephone. Labels stand outside the plot area; the style sheet gives `figure` the room. Colours and fonts
come from classes in the style sheet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

BAR_ROW = 46
"""Height in pixels of one labelled row of a bar or interval chart."""


def element(tag: str, *children: str | Markup, **attributes: str | float) -> Markup:
    """One element with escaped attributes and children; `class_` is `class`, `_` in a name is `-`."""
    parts = [f' {_attribute(name)}="{escape(_value(value))}"' for name, value in attributes.items()]
    inner = Markup("").join(escape(child) for child in children)
    return Markup(f"<{tag}{''.join(parts)}>{inner}</{tag}>")  # tag: ours; the rest is escaped above


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    """At most two decimals, no trailing zeros, no negative zero."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _across(share: float) -> str:
    """A horizontal position or length: a share of the plot's width."""
    return f"{_number(100 * share)}%"


def _chart(title: str, height: float, *children: Markup) -> Markup:
    """The outer element: an image for assistive technology, named by its title."""
    return element(
        "svg",
        element("title", title),
        *children,
        class_="chart",
        role="img",
        width="100%",
        height=height,
    )


# ------------------------------------------------------------------------------------------------------ scales


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale with its ticks.

    Attributes:
        low, high: the values at its two ends.
        ticks: values that get a label, in order, all inside.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Position of a value: 0 at `low`, 1 at `high`, clipped to both."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def axis(low: float, high: float, *, ticks: int = 5, tight: bool = False) -> Axis:
    """A scale over [low, high] whose ticks are multiples of 1, 2 or 5 times a power of ten.

    Args:
        low, high: the values to cover; equal ones, or nearly so, are widened.
        ticks: about how many ticks.
        tight: end at `low` and `high` themselves instead of at the ticks around them.
    """
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    step = nice_step((high - low) / max(1, ticks))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(round(index * step, 10) for index in range(first, last + 1))
    if tight:
        return Axis(low, high, tuple(mark for mark in marks if low <= mark <= high))
    return Axis(marks[0], marks[-1], marks)


def nice_step(raw: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not under `raw` (> 0)."""
    power = 10.0 ** math.floor(math.log10(raw))
    factor = next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return factor * power


def label(value: float) -> str:
    """A tick's label: thousands separated, no superfluous zeros."""
    text = f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


def _x_axis(scale: Axis, height: float, suffix: str = "") -> list[Markup]:
    """Vertical hairlines with labels under the plot."""
    parts = []
    for tick in scale.ticks:
        at = _across(scale.share(tick))
        parts.append(element("line", x1=at, x2=at, y1=0.0, y2=height, class_="grid"))
        parts.append(element("text", label(tick) + suffix, x=at, y=height + 18, class_="tick mid"))
    return parts


def _y_axis(scale: Axis, top: float, height: float, suffix: str = "") -> list[Markup]:
    """Horizontal hairlines with labels left of the plot."""
    parts = []
    for tick in scale.ticks:
        at = top + height * (1 - scale.share(tick))
        parts.append(element("line", x1="0%", x2="100%", y1=at, y2=at, class_="grid"))
        parts.append(element("text", label(tick) + suffix, x=-8.0, y=at + 4, class_="tick end"))
    return parts


# ------------------------------------------------------------------------------------------- dots and whiskers


@dataclass(frozen=True, slots=True)
class Whisker:
    """A value with its interval, in percent.

    Attributes:
        name: shown above the row, with `text`.
        text: the numbers in words.
        value, low, high: the dot and the ends of its whisker; None draws nothing.
        mark: class of the series ("teacher", "base", "student", …).
    """

    name: str
    text: str
    value: float | None
    low: float | None
    high: float | None
    mark: str


def whiskers(title: str, rows: Sequence[Whisker], scale: Axis, reference: float | None = None) -> Markup:
    """Dot-and-whisker plot, one labelled row a value, percent along the horizontal axis.

    Args:
        title: names the image.
        rows: from top to bottom.
        scale: the horizontal axis.
        reference: a value to mark by a vertical line.
    """
    height = BAR_ROW * len(rows) + 6.0
    parts = _x_axis(scale, height, "\u202f%")
    if reference is not None:
        at = _across(scale.share(reference))
        parts.append(element("line", x1=at, x2=at, y1=0.0, y2=height, class_="reference"))
    for index, row in enumerate(rows):
        parts += _whisker(row, scale, BAR_ROW * index)
    return _chart(title, height, *parts)


def _whisker(row: Whisker, scale: Axis, top: float) -> list[Markup]:
    middle = top + 33.0
    name = element("tspan", row.name, class_="name")
    parts = [element("text", name, f"  {row.text}", x=0.0, y=top + 16, class_="row halo")]
    if row.low is not None and row.high is not None:
        ends = [_across(scale.share(end)) for end in (row.low, row.high)]
        parts.append(element("line", x1=ends[0], x2=ends[1], y1=middle, y2=middle, class_=f"whisker {row.mark}"))
        for end in ends:
            parts.append(element("line", x1=end, x2=end, y1=middle - 5, y2=middle + 5, class_=f"whisker {row.mark}"))
    if row.value is not None:
        parts.append(element("circle", cx=_across(scale.share(row.value)), cy=middle, r=4.5, class_=f"dot {row.mark}"))
    return parts


# -------------------------------------------------------------------------------------------------------- bars


@dataclass(frozen=True, slots=True)
class Bar:
    """One labelled bar.

    Attributes:
        name: shown above the bar, with `text`.
        text: the numbers in words.
        parts: (rows, class) of its parts from left to right; empty parts are not drawn.
    """

    name: str
    text: str
    parts: tuple[tuple[int, str], ...]

    @property
    def total(self) -> int:
        """Rows of all parts."""
        return sum(rows for rows, _ in self.parts)


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Stacked horizontal bars on one scale, from 0 to the longest."""
    longest = max([row.total for row in rows] + [1])
    parts: list[Markup] = []
    for index, row in enumerate(rows):
        parts += _bar(row, longest, BAR_ROW * index)
    return _chart(title, float(BAR_ROW * len(rows)), *parts)


def _bar(row: Bar, longest: int, top: float) -> list[Markup]:
    name = element("tspan", row.name, class_="name")
    parts = [element("text", name, f"  {row.text}", x=0.0, y=top + 16, class_="row")]
    parts.append(element("rect", x="0%", y=top + 23, width="100%", height=12.0, class_="track"))
    start = 0
    for rows, mark in row.parts:
        if rows > 0:
            x, width = _across(start / longest), _across(rows / longest)
            parts.append(element("rect", x=x, y=top + 23, width=width, height=12.0, class_=f"bar {mark}"))
        start += rows
    return parts


# --------------------------------------------------------------------------------------------------- histogram


@dataclass(frozen=True, slots=True)
class Panel:
    """One group of a histogram: its name, its count in words and the share (0 to 1) of its rows in each bin."""

    name: str
    text: str
    shares: tuple[float, ...]
    mark: str


PANEL_HEIGHT = 104.0
PANEL_GAP = 44.0


def histogram(title: str, panels: Sequence[Panel], edges: Sequence[float], *, open_end: bool) -> Markup:
    """Histograms of several groups above each other on one horizontal axis, each with its own vertical one.

    Args:
        title: names the image.
        panels: the groups; each has len(edges) - 1 shares.
        edges: edges of the bins, equally spaced.
        open_end: the last bin also holds everything beyond the last edge.
    """
    scale = axis(edges[0], edges[-1], ticks=4, tight=True)
    parts: list[Markup] = []
    for index, panel in enumerate(panels):
        parts += _panel(panel, 28.0 + index * (PANEL_HEIGHT + PANEL_GAP))
    bottom = len(panels) * (PANEL_HEIGHT + PANEL_GAP) - PANEL_GAP + 28.0
    for tick in scale.ticks:
        last = open_end and tick == scale.ticks[-1] == scale.high
        text = f"≥\u202f{label(edges[-2])}" if last else label(tick)
        parts.append(element("text", text, x=_across(scale.share(tick)), y=bottom + 18, class_="tick mid"))
    return _chart(title, bottom, *parts)


def _panel(panel: Panel, top: float) -> list[Markup]:
    scale = axis(0.0, 100 * max([*panel.shares, 0.01]), ticks=2)
    name = element("tspan", panel.name, class_="name")
    parts = [element("text", name, f"  {panel.text}", x=0.0, y=top - 12, class_="row")]
    parts += _y_axis(scale, top, PANEL_HEIGHT, "\u202f%")
    width = 1 / len(panel.shares)
    for index, share in enumerate(panel.shares):
        height = PANEL_HEIGHT * scale.share(100 * share)
        if share > 0:
            height = max(1.0, height)
            x, y = _across(index * width), top + PANEL_HEIGHT - height
            parts.append(element("rect", x=x, y=y, width=_across(width), height=height, class_=f"column {panel.mark}"))
    return parts


# ------------------------------------------------------------------------------------------------------ curves

CURVE_HEIGHT = 220.0

Points = Sequence[tuple[float, float]]


def curve(title: str, line: Points, dots: Points, *, x_scale: Axis, y_scale: Axis) -> Markup:
    """A line through `line` and separate marks at `dots`, both (x, y); one point of a line is drawn as a mark."""
    parts = [*_x_axis(x_scale, CURVE_HEIGHT), *_y_axis(y_scale, 0.0, CURVE_HEIGHT)]
    if len(line) > 1:
        parts.append(_polyline(line, x_scale, y_scale))
    for x, y in line if len(line) == 1 else ():
        parts.append(_dot(x_scale.share(x), y_scale.share(y), "kept"))
    for x, y in dots:
        parts.append(_dot(x_scale.share(x), y_scale.share(y), "validation"))
    return _chart(title, CURVE_HEIGHT, *parts)


def _polyline(points: Points, x_scale: Axis, y_scale: Axis) -> Markup:
    """The line in a nested picture of 1000 × 1000 units, stretched over the plot; its stroke is not stretched."""
    pairs = [f"{_number(1000 * x_scale.share(x))},{_number(1000 * (1 - y_scale.share(y)))}" for x, y in points]
    drawn = element("polyline", points=" ".join(pairs), class_="curve", vector_effect="non-scaling-stroke")
    return element("svg", drawn, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height=CURVE_HEIGHT)


def _dot(across: float, up: float, mark: str) -> Markup:
    return element("circle", cx=_across(across), cy=CURVE_HEIGHT * (1 - up), r=4.5, class_=f"dot {mark}")
