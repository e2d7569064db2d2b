"""What of the validation split counts as trained on."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.record import Message, Record
from pipeline.stages.train.leakage import compare_splits, find_leakage
from pipeline.student.preflight.leak import check_leak
from tests.training_rows import sum_row, write_dataset

TRAIN = [sum_row(number) for number in range(20)]


def asked(number: int, text: str, answer: str = "It is 5.") -> Record:
    return sum_row(number, prompt=(Message("user", text),), completion=(Message("assistant", answer),))


def test_the_same_prompt_in_other_clothes_is_the_same(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d", TRAIN, [asked(90, "  what IS 3 + 1?"), asked(91, "Name a colour.")]) / "data"
    leak = find_leakage(data)
    assert (leak.validation_rows, leak.same, leak.near, leak.compared) == (2, 1, 0, 20)
    assert leak.rows == (f"{90:032x}",)


def test_a_system_message_makes_no_difference(tmp_path: Path) -> None:
    brief = Message("system", "Be brief.")
    rows = [sum_row(90, prompt=(brief, Message("user", "What is 3 + 1?")))]
    assert find_leakage(write_dataset(tmp_path / "d", TRAIN, rows) / "data").same == 1


def test_a_row_with_a_word_changed_is_near(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(60))
    train, seen = asked(1, f"{text} laugh aloud"), asked(90, f"{text} laugh softly")
    leak = find_leakage(write_dataset(tmp_path / "d", [*TRAIN[2:], train], [seen]) / "data")
    assert (leak.same, leak.near) == (0, 1)


def test_few_shared_prompts_warn_and_many_are_refused(tmp_path: Path) -> None:
    others = [asked(100 + number, f"Name {number} things that are green.") for number in range(19)]
    for name, shared, level in (("few", 1, "warning"), ("many", 4, "error"), ("none", 0, "ok")):
        seen = [sum_row(number, row_id=f"{500 + number:032x}") for number in range(shared)]
        data = write_dataset(tmp_path / name, TRAIN, [*others, *seen]) / "data"
        compare_splits(data, tmp_path)
        assert check_leak(tmp_path).level == level


def test_without_validation_rows_there_is_nothing_to_compare(tmp_path: Path) -> None:
    compare_splits(write_dataset(tmp_path / "d", TRAIN) / "data", tmp_path)
    assert check_leak(tmp_path).level == "not_applicable"
