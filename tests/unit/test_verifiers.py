"""Which completions give the reference answer."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text.verifiers import exact, final_number, numeric

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", "1234.5"),
        ("$5 and -$7", "-7"),
        ("$-5", "-5"),
        ("\u22125", "-5"),
        ("50%", "50"),
        ("it is 72.", "72"),
        ("3/4.", "3/4"),
        ("1 1/2 cups", "3/2"),
        ("1.5e-3", "3/2000"),
        (".5", "1/2"),
        ("\u0663.\u0665", "7/2"),
        ("1\u202f234", "1234"),
        ("7 - 2", "2"),
        ("7-2", "2"),
        ("- 5 apples", "5"),
        ("on 12/25/2020", "2020"),
        ("48/2 = 24 clips", "24"),
        ("#### 10\nas 3 + 7", "10"),
        ("#### **$1,000**\nbecause 2", "1000"),
        ("#### Step 3: add\nso 9", "9"),
        ("The answer is **42**. I like 7.", "42"),
        ("Answer: 3 apples of 9", "3"),
        (r"\boxed{x = 1{,}234} since 5", "1234"),
        (r"\boxed{-\frac{3}{4}}", "-3/4"),
        (r"\boxed{3\text{ m}^2}", "3"),
        (r"the answer is 5 but \boxed{6}", "6"),
        (r"7, \boxed{8", "8"),
    ],
)
def test_the_number_of_a_text(text: str, number: str) -> None:
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "5/0", "9" * 5000, "twelve", "#### ", "x\u00b2"])
def test_texts_without_a_number(text: str) -> None:
    assert final_number(text) is None


def test_numeric_compares_values() -> None:
    assert numeric("so it is 0.50", "1/2") is True
    assert numeric("so it is 0.5000001", "1/2") is False
    assert numeric("no idea", "1/2") is False
    assert numeric("5", "five") is None
    assert numeric("5", None) is None


def test_exact_forgives_form_only() -> None:
    assert exact(" Nine Hundred\n", "nine hundred") is True
    assert exact("nine hundred.", "nine hundred") is False
    assert exact("9", None) is None


@given(st.text(st.characters(), max_size=200) | st.text("0123456789.,/-$ e#\\boxed{}answeris:=", max_size=200))
def test_any_text_is_read_without_an_error_and_agrees_with_itself(text: str) -> None:
    number = final_number(text)
    assert numeric(text, text) is (None if number is None else True)


@given(st.integers(-(10**12), 10**12))
def test_thousands_separators_change_nothing(number: int) -> None:
    assert final_number(f"it is {number:,}") == final_number(f"it is {number}") == number


@pytest.mark.parametrize(
    "piece", ["1", "1 ", "1,111", "1/", " 1 1/", ".1", "-", "$", "\\boxed{", "answer is ", "####", "1,", "e1", "{,}"]
)
def test_a_megabyte_of_anything_is_read_in_linear_time(piece: str) -> None:
    final_number(piece * (1_000_000 // len(piece)))  # a quadratic rule would run into the test's timeout


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs ../shared/data/gsm8k/train.jsonl beside the repository")
def test_the_gold_answers_of_gsm8k() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text("utf-8").splitlines()]
    assert len(rows) == 7473
    for row in rows:
        gold = Fraction(row["answer"].rpartition("####")[2].strip().replace(",", ""))
        assert final_number(row["answer"]) == gold
        assert numeric(row["answer"], row["answer"]) is True
        assert numeric(f"The answer is {gold + 1}.", row["answer"]) is False
