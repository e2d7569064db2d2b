"""What `preflight` prints: a table of findings, and rows in which what is trained stands out."""

from __future__ import annotations

import io
import sys

import pytest

from pipeline.cli.show_preflight import finding_lines, is_coloured, row_text
from pipeline.student.preflight.findings import Finding, fine, flawed, in_order, skipped
from pipeline.student.preflight.sample import Piece, Shown

ROW = Shown("ab12", 5, 2, (Piece("<|user|>", False, True), Piece("2+2?", False, False), Piece("4", True, False),
                           Piece("</s>", True, True)))  # fmt: skip


class TestTheTable:
    def test_a_line_for_what_is_well(self) -> None:
        assert finding_lines(fine("PF04", "0 of 9 rows with two"), coloured=False) == [
            "PF04  ok       one BOS token              0 of 9 rows with two"
        ]

    def test_what_is_wrong_and_what_to_do_stand_below(self) -> None:
        finding = flawed("PF04", "error", "9 of 9", "two BOS tokens", fix="take one out", rows=["r1", "r2", "r3", "r4"])
        assert finding_lines(finding, coloured=False)[1:] == [
            "               two BOS tokens (rows r1, r2, r3)",
            "               do: take one out",
        ]

    def test_only_a_terminal_breaks_lines(self) -> None:
        finding = flawed("PF04", "error", "9 of 9", "two BOS tokens " * 12, fix="take one out")
        assert len(finding_lines(finding, coloured=False)) == 3
        narrow = finding_lines(finding, coloured=False, width=80)
        assert len(narrow) > 3 and max(map(len, narrow)) <= 80

    def test_why_a_check_was_not_made(self) -> None:
        (line,) = finding_lines(skipped("PF18", "no two rows share a sequence"), coloured=False)
        assert line.split() == [
            "PF18",
            "-",
            *["packed", "rows", "are", "apart", "no", "two", "rows", "share", "a", "sequence"],
        ]

    def test_colour_is_the_level_and_changes_no_column(self) -> None:
        (plain,), (coloured,) = (finding_lines(fine("PF01", "0"), coloured=each) for each in (False, True))
        assert coloured.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain

    def test_texts_of_rows_cannot_steer_the_terminal(self) -> None:
        finding = flawed("PF02", "warning", "\x1b[2J", "\x1b[2J", fix="")
        assert not any("\x1b" in line for line in finding_lines(finding, coloured=False))


class TestARow:
    def test_without_colour_brackets_hold_what_is_trained(self) -> None:
        assert row_text(ROW, coloured=False) == "row ab12: 2 of 5 tokens trained\n<|user|>2+2?[[4</s>]]"

    def test_with_colour_trained_masked_and_special_differ(self) -> None:
        text = row_text(ROW, coloured=True)
        assert "\x1b[2m2+2?\x1b[0m" in text and "\x1b[1;32m4\x1b[0m" in text
        assert "\x1b[1;32m\x1b[35m</s>\x1b[0m" in text

    def test_control_characters_are_written_out(self) -> None:
        assert "\\u001b" in row_text(Shown("r", 1, 1, (Piece("\x1b[2J", True, False),)), coloured=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({}, False)],
)
def test_colour_is_for_terminals_that_want_it(
    environ: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert is_coloured(environ) is coloured
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert is_coloured(environ) is False


class TestTheOrder:
    def test_a_check_is_made_once(self) -> None:
        with pytest.raises(ValueError, match="made twice"):
            in_order([fine("PF01", "0"), fine("PF01", "0")], "")

    def test_what_was_not_made_says_why(self) -> None:
        found = in_order([fine("PF02", "x")], "refused before")
        assert len(found) == 23 and found[0] == skipped("PF01", "refused before")

    def test_a_finding_survives_its_file(self) -> None:
        finding = Finding("PF08", "n", "warning", "1", "m", "f", ("r",))
        assert Finding.of_json(finding.to_json()) == finding
