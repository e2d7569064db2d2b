"""What of the validation split counts as trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.core.errors import Interrupted
from pipeline.core.record import Message, Record
from pipeline.stages.train.leakage import Index, compare_splits, find_leakage, hashes_of
from pipeline.student.preflight.leak import check_leak
from pipeline.text.near import NearIndex
from tests.training_rows import sum_row, write_dataset

TRAIN = [sum_row(number) for number in range(20)]


def asked(number: int, text: str, answer: str = "It is 5.") -> Record:
    return sum_row(number, prompt=(Message("user", text),), completion=(Message("assistant", answer),))


def test_the_same_prompt_in_other_clothes_is_the_same(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d", TRAIN, [asked(90, "  what IS 3 + 1?"), asked(91, "Name a colour.")]) / "data"
    leak = find_leakage(data)
    assert (leak.validation_rows, leak.same, leak.near, leak.compared) == (2, 1, 0, 20)
    assert leak.rows == (f"{90:032x}",)


def about(number: int, system: str, answer: str) -> Record:
    """The question is everyone's; what it is about is in the system message."""
    prompt = (Message("system", system), Message("user", "Summarise the document."))
    return sum_row(number, prompt=prompt, completion=(Message("assistant", answer),))


def test_the_document_in_a_system_message_makes_another_prompt(tmp_path: Path) -> None:
    rows = [about(number, f"Document {number}", f"{number} foxes and {number * 3} dogs") for number in range(30)]
    leak = find_leakage(write_dataset(tmp_path / "d", rows[:20], rows[20:]) / "data")
    assert (leak.same, leak.near) == (0, 0)
    assert find_leakage(write_dataset(tmp_path / "e", rows[:20], rows[19:]) / "data").same == 1


def test_a_long_system_message_that_all_rows_share_makes_none_near(tmp_path: Path) -> None:
    brief = " ".join(f"word{number}" for number in range(200))
    rows = [about(number, brief, f"Answer {number} is {number * 7} of {number}") for number in range(30)]
    assert find_leakage(write_dataset(tmp_path / "d", rows[:20], rows[20:]) / "data").near == 0


def test_long_rows_are_compared_where_they_differ(tmp_path: Path) -> None:
    """Pages that all prompts begin with say nothing; the questions behind them do."""
    page = " ".join(f"word{number}" for number in range(2000))
    question = " ".join("what is {}{} and".format("abc"[number % 3], number) for number in range(90))
    other = " ".join("who was {}{} then".format("abc"[number % 3], number) for number in range(90))
    train = [*TRAIN[2:], asked(1, f"{page} {question} one")]
    rows = [asked(90, f"{page} {question} two"), asked(91, f"{page} {other}")]
    leak = find_leakage(write_dataset(tmp_path / "d", train, rows) / "data")
    assert (leak.same, leak.near, leak.rows) == (0, 1, (f"{90:032x}",))


WORDS = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


@example(["a b c d e f g h i"], "a b c d e f g h")  # 4 of 5
@given(st.lists(WORDS, min_size=1, max_size=6), WORDS)
def test_near_is_what_the_exact_index_calls_near(known: list[str], text: str) -> None:
    index = Index.of({number: hashes_of(as_row(each)) for number, each in enumerate(known)})
    exact = [at for at, each in enumerate(known) if NearIndex([each], ngram=5, threshold=0.8).is_near(text)]
    assert index.near(hashes_of(as_row(text))) == exact


def as_row(text: str) -> dict[str, Any]:
    return {"prompt": [], "completion": [{"role": "assistant", "content": text}]}


def test_a_signal_ends_it(tmp_path: Path) -> None:
    def stop() -> None:
        raise Interrupted("stopped", where="here", todo="again")

    with pytest.raises(Interrupted):
        find_leakage(write_dataset(tmp_path / "d", TRAIN, [asked(90, "Why?")]) / "data", stop)


def test_what_was_found_of_the_same_files_is_found_once(tmp_path: Path) -> None:
    calls: list[None] = []
    data = write_dataset(tmp_path / "d", TRAIN, [asked(90, "Why?")]) / "data"
    compare_splits(data, tmp_path, lambda: calls.append(None))
    first = len(calls)
    compare_splits(data, tmp_path, lambda: calls.append(None))
    assert first == len(calls) > 0
    other = write_dataset(tmp_path / "e", TRAIN, [TRAIN[0], TRAIN[1]]) / "data"
    compare_splits(other, tmp_path, lambda: calls.append(None))
    assert len(calls) > first and check_leak(tmp_path).level == "error"


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
