"""The quickstart prompt set is what its recipe makes, and its splits hold out facts, not wordings."""

import importlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.text.split import split_of

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "prompts" / "quickstart.jsonl"
RECIPES = ROOT / "data" / "models" / "recipes"


@pytest.fixture(scope="module")
def recipes() -> Iterator[dict[str, ModuleType]]:
    """The recipe modules, which are scripts beside each other and not a package."""
    sys.path.insert(0, str(RECIPES))
    try:
        yield {name: importlib.import_module(name) for name in ("tasks", "make_prompts")}
    finally:
        sys.path.remove(str(RECIPES))
        for name in ("tasks", "make_prompts"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """The committed prompt set."""
    return [json.loads(line) for line in PROMPTS.read_text(encoding="ascii").splitlines()]


@pytest.fixture(scope="module")
def split_by_group(rows: list[dict[str, str]], recipes: dict[str, ModuleType]) -> dict[str, str]:
    """The split of each group, as a run with the recipe's shares assigns it."""
    shares: Any = recipes["tasks"]
    return {
        r["group_id"]: split_of(r["group_id"], validation=shares.VALIDATION_SHARE, test=shares.TEST_SHARE) for r in rows
    }


def test_regenerating_gives_the_committed_bytes(recipes: dict[str, ModuleType]) -> None:
    assert recipes["make_prompts"].render().encode("ascii") == PROMPTS.read_bytes()


def test_importing_the_recipe_loads_no_torch() -> None:
    text = "".join((RECIPES / f"{name}.py").read_text(encoding="utf-8") for name in ("tasks", "make_prompts"))
    assert "torch" not in text


def test_size() -> None:
    assert PROMPTS.stat().st_size <= 4 * 2**20


def test_every_task_has_500_facts(recipes: dict[str, ModuleType]) -> None:
    facts = {task.name: len({item.group_id for item in task.items()}) for task in recipes["tasks"].TASKS}
    assert min(facts.values()) >= 500, facts


def test_rows_are_complete_and_ids_unique(rows: list[dict[str, str]]) -> None:
    assert all(set(row) == {"id", "task", "prompt", "answer", "group_id"} for row in rows)
    assert all(value and value == value.strip() for row in rows for value in row.values())
    assert len({row["id"] for row in rows}) == len(rows)


def test_no_two_prompts_are_the_same(rows: list[dict[str, str]]) -> None:
    assert len({" ".join(row["prompt"].casefold().split()) for row in rows}) == len(rows)


def test_counts_by_split_and_task(rows: list[dict[str, str]], split_by_group: dict[str, str]) -> None:
    splits = Counter(split_by_group[row["group_id"]] for row in rows)
    assert splits["train"] == 20_000
    assert splits["validation"] == 1_000
    assert splits["test"] >= 2_000
    tasks = Counter(row["task"] for row in rows)
    assert len(tasks) == 20
    assert len(set(tasks.values())) == 1


def test_no_answer_to_a_test_question_can_be_read_off_another_split(
    rows: list[dict[str, str]], split_by_group: dict[str, str]
) -> None:
    """Not by the name of the group but by what a question is about: its numbers or its letters."""
    about: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        about[_subject(row)].add(split_by_group[row["group_id"]])
    assert {subject: splits for subject, splits in about.items() if len(splits) > 1} == {}


def _subject(row: dict[str, str]) -> str:
    """What a row asks about, derived from prompt and answer alone, equal for a question and its mirror or inverse."""
    numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in row["prompt"]).split()]
    answer = row["answer"]
    match row["task"]:
        case "add":
            return f"sum {sorted(numbers)}"
        case "subtract":
            return f"sum {sorted((max(numbers) - int(answer), int(answer)))}"
        case "larger" | "smaller":
            return f"pair {sorted(numbers)}"
        case "double":
            return f"double {answer}"
        case "halve":
            return f"double {int(answer) * 2}"
        case "next":
            return f"next {int(answer) - 1}"
        case "previous":
            return f"next {answer}"
        case "parity":
            return f"parity {numbers}"
        case "to_words" | "to_roman":
            return f"{row['task'][3:]} {numbers[0]}"
        case "from_words" | "from_roman":
            return f"{row['task'][5:]} {answer}"
        case "sort" | "reverse":
            return f"letters {sorted(answer.lower())}"
        case _:
            return f"letters {sorted(row['group_id'].removeprefix('letters:'))}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("add", ("12", "34")), ("add", ("34", "12"))),
        (("add", ("12", "34")), ("subtract", ("46", "12"))),
        (("add", ("12", "34")), ("subtract", ("46", "34"))),
        (("double", ("300",)), ("halve", ("600",))),
        (("next", ("199",)), ("previous", ("200",))),
        (("to_words", ("246",)), ("from_words", ("two hundred forty-six",))),
        (("to_roman", ("46",)), ("from_roman", ("XLVI",))),
    ],
)
def test_mirror_and_inverse_share_a_group(
    recipes: dict[str, ModuleType], first: tuple[str, tuple[str, ...]], second: tuple[str, tuple[str, ...]]
) -> None:
    groups = {
        (task.name, item.slots): item.group_id
        for task in recipes["tasks"].TASKS
        if task.name in (first[0], second[0])
        for item in task.items()
    }
    assert groups[first] == groups[second]


def test_all_questions_about_one_set_of_letters_share_a_group(recipes: dict[str, ModuleType]) -> None:
    letter_tasks = {"sort", "reverse", "dashes", "first_letter", "last_letter", "length", "vowels"}
    for task in recipes["tasks"].TASKS:
        if task.name in letter_tasks:
            assert all(item.group_id == "letters:" + "".join(sorted(item.slots[0])) for item in task.items())


def test_both_orders_of_a_pair_share_a_group(recipes: dict[str, ModuleType]) -> None:
    for task in recipes["tasks"].TASKS:
        if task.name in ("larger", "smaller"):
            assert all(item.group_id == "pair:" + ",".join(sorted(item.slots, key=int)) for item in task.items())
