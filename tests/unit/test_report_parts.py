"""The parts of stage `report`: charts, the showing of text and numbers, the choice of sample rows, loss thinning."""

import random
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from pipeline.stages.report import charts, headline, text
from pipeline.stages.report.lengths import Lengths, bin_lengths, median
from pipeline.stages.report.page import CURVE_POINTS, loss_chart, thin
from pipeline.stages.report.samples import choose

NUMBERS = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)


def parse(svg: Markup) -> ElementTree.Element:
    """A chart as XML; fails unless it is well-formed."""
    return ElementTree.fromstring(str(svg))


# ----------------------------------------------------------------------------------------------------- charts


@given(NUMBERS, NUMBERS)
def test_an_axis_covers_its_values_with_ticks_at_round_numbers(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = charts.axis(low, high)
    assert found.low <= low + 1e-6 * max(1, abs(low))
    assert found.high >= high - 1e-6 * max(1, abs(high))
    assert found.low < found.high
    assert 2 <= len(found.ticks) <= 12


def test_a_tight_axis_ends_where_its_values_do() -> None:
    assert charts.axis(0, 130, tight=True) == charts.Axis(0, 130, (0, 50, 100))


@pytest.mark.parametrize(("raw", "step"), [(0.7, 1), (1, 1), (1.2, 2), (3, 5), (7, 10), (23, 50), (0.013, 0.02)])
def test_steps_are_1_2_or_5_times_a_power_of_ten(raw: float, step: float) -> None:
    assert charts.nice_step(raw) == pytest.approx(step)


def test_names_in_charts_are_escaped() -> None:
    attack = "</text><script>alert(1)</script>"
    bars = charts.bars(attack, [charts.Bar(attack, attack, ((1, "kept"),))])
    found = parse(bars)
    assert [child.tag for child in found.iter()].count("script") == 0
    assert "".join(found.itertext()).count(attack) == 3


def test_a_chart_is_an_image_with_a_name() -> None:
    found = parse(charts.whiskers("Accuracy", [], charts.axis(0, 100)))
    assert found.attrib["role"] == "img"
    assert found[0].tag == "title"
    assert found[0].text == "Accuracy"


def test_the_parts_of_a_bar_lie_side_by_side_on_one_scale() -> None:
    rows = [charts.Bar("a", "", ((60, "kept"), (0, "held"), (40, "left"))), charts.Bar("b", "", ((50, "kept"),))]
    found = [rect.attrib for rect in parse(charts.bars("t", rows)).iter("rect") if rect.attrib["class"] != "track"]
    assert [(rect["x"], rect["width"], rect["class"]) for rect in found] == [
        ("0%", "60%", "bar kept"),
        ("60%", "40%", "bar left"),
        ("0%", "50%", "bar kept"),
    ]


def test_bars_of_no_rows_at_all_are_empty() -> None:
    found = parse(charts.bars("t", [charts.Bar("a", "", ((0, "kept"),))]))
    assert [rect.attrib["class"] for rect in found.iter("rect")] == ["track"]


def test_a_value_that_does_not_exist_draws_neither_dot_nor_whisker() -> None:
    rows = [charts.Whisker("a", "not defined", None, None, None, "student")]
    found = parse(charts.whiskers("t", rows, charts.axis(0, 100)))
    assert list(found.iter("circle")) == []
    assert [line for line in found.iter("line") if "whisker" in line.attrib["class"]] == []


def test_the_last_bin_says_that_it_is_open() -> None:
    panel = charts.Panel("Kept", "", (0.5, 0.5), "kept")
    closed = "".join(parse(charts.histogram("t", [panel], (0, 5, 10), open_end=False)).itertext())
    opened = "".join(parse(charts.histogram("t", [panel], (0, 5, 10), open_end=True)).itertext())
    assert "≥" not in closed
    assert "≥\u202f5" in opened


def test_one_point_of_a_curve_is_a_dot() -> None:
    svg = loss_chart(((1, 2.5),), ())
    assert svg is not None
    found = parse(svg)
    assert len(list(found.iter("circle"))) == 1
    assert list(found.iter("polyline")) == []


def test_no_point_is_no_chart() -> None:
    assert loss_chart((), ()) is None


@given(st.integers(0, 5 * CURVE_POINTS))
def test_thinning_keeps_the_mean_the_end_and_the_limit(number: int) -> None:
    points = tuple((step, float(step)) for step in range(number))
    found = thin(points)
    assert len(found) <= CURVE_POINTS
    assert found[-1:] == points[-1:] or found[-1][0] == points[-1][0]


# ---------------------------------------------------------------------------------------------------- lengths


@given(
    st.dictionaries(st.integers(0, 10_000), st.integers(1, 50)), st.dictionaries(st.integers(0, 99), st.integers(1, 9))
)
def test_every_row_is_in_exactly_one_bin(kept: dict[int, int], rejected: dict[int, int]) -> None:
    bins = bin_lengths(Lengths("tokens", kept, rejected, 0))
    if bins is None:
        assert not kept
        assert not rejected
        return
    assert sum(bins.kept) == sum(kept.values())
    assert sum(bins.rejected) == sum(rejected.values())
    assert len(bins.edges) == len(bins.kept) + 1 == len(bins.rejected) + 1
    assert len(bins.kept) <= 66


def test_a_few_very_long_rows_do_not_squeeze_the_others() -> None:
    bins = bin_lengths(Lengths("tokens", dict.fromkeys(range(100), 100) | {50_000: 1}, {}, 0))
    assert bins is not None
    assert bins.open_end
    assert bins.edges[-1] < 200
    assert bins.kept[-1] == 1


def test_the_median_counts_rows_not_lengths() -> None:
    assert median({1: 5, 100: 1}) == 1
    assert median({}) is None


# ------------------------------------------------------------------------------------------- text and numbers


@given(st.text())
def test_nothing_visible_is_changed_and_nothing_hidden_is_left(original: str) -> None:
    shown = text.show(original, limit=10_000)
    rebuilt = "".join(
        chr(int(piece.hint.split(" ", 1)[0].removeprefix("U+"), 16)) if piece.hint else piece.text
        for piece in shown.pieces
    )
    assert rebuilt == original
    assert all(piece.text.isprintable() for piece in shown.pieces if piece.hint)
    assert "\u202e" not in "".join(piece.text for piece in shown.pieces)


def test_lone_surrogates_can_be_written() -> None:
    "".join(piece.text for piece in text.show("a\ud800b").pieces).encode("utf-8")


def test_joiners_stay_where_writing_needs_them() -> None:
    assert text.show("👩\u200d🚀 می\u200cخواهم").pieces == (text.Piece("👩\u200d🚀 می\u200cخواهم"),)
    assert len(text.show("ad\u200dmin").pieces) == 3


def test_names_stay_on_one_line() -> None:
    assert text.plain("a\nb\tc") == "a␊b␉c"
    assert text.plain("x" * 200) == "x" * text.NAME_CHARS + "…"


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.9812, "98.1 %"),
        (0.0, "0.0 %"),
        (1.0, "100.0 %"),
        (0.9999, "> 99.9 %"),
        (0.0001, "< 0.1 %"),
        (-0.05, "−5.0 %"),
    ],
)
def test_a_share_never_rounds_to_all_or_nothing(share: float, words: str) -> None:
    assert text.percent(share).replace("\u202f", " ") == words


def test_what_is_not_known_is_a_dash() -> None:
    shown = [
        text.percent(None),
        text.count(None),
        text.rate(None),
        text.size(None),
        text.times(None),
        text.fraction(None),
    ]
    assert set(shown) == {text.NO_VALUE}


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0 B"), (999, "999 B"), (7_449_600, "7.4 MB"), (987_648, "988 kB"), (999_999, "1.0 MB")]
)
def test_sizes_are_decimal(value: int, words: str) -> None:
    assert text.size(value).replace("\u202f", " ") == words


@pytest.mark.parametrize(("share", "words"), [(1 / 7.5, "1/7.5"), (0.5, "1/2"), (1.0, "1.0 ×"), (1.3, "1.3 ×")])
def test_a_ratio_below_one_is_a_fraction(share: float, words: str) -> None:
    assert text.fraction(share).replace("\u202f", " ") == words


def test_method_names_are_words() -> None:
    assert headline.method_name("first_line") == "first line"


# ------------------------------------------------------------------------------------------------------ choice

KEPT = [f"kept-{number}" for number in range(50)]
REJECTED = [(f"gone-{number}", "filter", f"finish_reason:{number % 7}") for number in range(70)]


def test_the_choice_does_not_depend_on_the_order_of_the_rows() -> None:
    shuffled_kept, shuffled_rejected = KEPT.copy(), REJECTED.copy()
    random.Random(1).shuffle(shuffled_kept)
    random.Random(2).shuffle(shuffled_rejected)
    assert choose(KEPT, REJECTED, 20) == choose(shuffled_kept, shuffled_rejected, 20)


def test_rejected_rows_are_spread_over_the_reasons() -> None:
    found = choose(KEPT, REJECTED, 14)
    assert len(found.kept) == 7
    assert len({reason for _, _, reason in found.rejected}) == 7


def test_one_half_fills_up_for_the_other() -> None:
    assert len(choose(KEPT, [], 20).kept) == 20
    assert len(choose([], REJECTED, 20).rejected) == 20
    assert len(choose(KEPT[:3], REJECTED, 20).rejected) == 17


def test_more_rows_of_one_reason_than_fit_in_memory_change_nothing() -> None:
    many = [(f"gone-{number}", "dedup", f"duplicate_of:{number}") for number in range(5000)]
    assert choose([], many, 4) == choose([], many[::-1], 4)
