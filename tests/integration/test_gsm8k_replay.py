"""`configs/gsm8k-replay.yaml`: people's solutions as a teacher, checked against gold numbers, through to training.

GSM8K itself is not in this repository. The first class runs on a file of the same form that is made up here, the second
on GSM8K's train.jsonl where it is found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support import run_cli

CONFIG = "configs/gsm8k-replay.yaml"
PLACES = ("data/gsm8k/train.jsonl", "../shared/data/gsm8k/train.jsonl")
"""Where the file is looked for, from the repository; the first is the config's own."""
ROWS = 7473
"""Rows of GSM8K's train split (Cobbe et al. 2021)."""

Row = dict[str, str]


def jam(number: int) -> Row:
    """A row in GSM8K's form: a question, and a solution with calculations in <<…>> that ends with the gold number."""
    eggs, each = number + 2, 3 * number + 1
    total = eggs * each
    solution = f"She fills {eggs} jars with {each} spoons each: {eggs}*{each}=<<{eggs}*{each}={total}>>{total} spoons."
    return {
        "question": f"Customer {number}: {eggs} jars take {each} spoons of jam each. How many spoons are that?",
        "answer": f"{solution}\nThe last jar is the 7th.\n#### {total:,}",
    }


def with_gold(row: Row, gold: str) -> Row:
    return {**row, "answer": f"{row['answer'].rpartition('#### ')[0]}#### {gold}"}


def one_more(row: Row) -> Row:
    """The row with a gold number that is wrong by one."""
    return with_gold(row, str(int(row["answer"].rpartition("#### ")[2].replace(",", "")) + 1))


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_column(folder: Path, column: str) -> list[Any]:
    return [value for path in sorted(folder.glob("*.parquet")) for value in pq.read_table(path)[column].to_pylist()]


class Run:
    """The config on a file of questions and gold numbers and a file of solutions."""

    def __init__(self, root: Path, folder: Path, questions: Path, solutions: Path, *arguments: str) -> None:
        self.folder = folder
        paths = {"prompts.sets.gsm8k.source.path": questions, "teachers.humans.path": solutions}
        sets = [word for name, path in paths.items() for word in ("--set", f"{name}={path}")]
        self.done = run_cli("run", CONFIG, "--data", folder, *sets, *arguments, cwd=root, timeout=400)

    def step(self, name: str) -> Path:
        (found,) = self.folder.glob(f"runs/gsm8k-replay+*/{name}")
        return found

    def manifest(self, name: str) -> dict[str, Any]:
        assert self.done.returncode == 0, self.done.stderr
        manifest: dict[str, Any] = json.loads((self.step(name) / "manifest.json").read_text("utf-8"))
        return manifest

    def counts(self, name: str) -> tuple[int, int, dict[str, int]]:
        manifest = self.manifest(name)
        return manifest["rows_in"], manifest["rows_out"], manifest["rejected"]

    def questions_of(self, step: str, part: str) -> list[str]:
        return [messages[-1]["content"] for messages in read_column(self.step(step) / part, "prompt")]


class TestAMadeUpFile:
    """60 rows in the form of GSM8K; 5 gold numbers are changed, and one row is too long for the student."""

    WRONG = (3, 17, 18, 40, 59)
    LONG = 30

    @pytest.fixture(scope="class")
    def rows(self) -> list[Row]:
        rows = [jam(number) for number in range(60)]
        counted = "".join(f"Jar {number} is full. " for number in range(100))
        rows[self.LONG]["answer"] = counted + rows[self.LONG]["answer"]
        return rows

    @pytest.fixture(scope="class")
    def run(self, root: Path, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Run:
        folder = tmp_path_factory.mktemp("made-up")
        gold = [one_more(row) if number in self.WRONG else row for number, row in enumerate(rows)]
        questions = write_rows(folder / "questions.jsonl", gold)
        # The solutions in another order: they are joined by the question, not by the line.
        solutions = write_rows(folder / "solutions.jsonl", reversed(rows))
        no_validation = ("--set", "prompts.validation=0")
        return Run(root, folder / "data", questions, solutions, *no_validation, "--until", "train")

    def test_every_question_gets_its_solution(self, run: Run, rows: list[Row]) -> None:
        assert run.counts("generate") == (60, 60, {})
        folder = run.step("generate") / "rows"
        solutions = [turns[-1]["content"] for turns in read_column(folder, "completion")]
        expected = {row["question"]: row["answer"] for row in rows}
        assert dict(zip(run.questions_of("generate", "rows"), solutions, strict=True)) == expected

    def test_exactly_the_rows_with_a_changed_gold_number_leave(self, run: Run, rows: list[Row]) -> None:
        assert run.counts("filter") == (60, 55, {"wrong_answer": 5})
        assert run.manifest("filter")["metrics"]["verified"] == {"right": 55, "wrong": 5, "not_compared": 0}
        assert set(run.questions_of("filter", "rejects")) == {rows[number]["question"] for number in self.WRONG}

    def test_the_dataset_holds_the_rest_with_its_terms(self, run: Run) -> None:
        assert run.counts("dataset") == (55, 55, {})
        data = run.step("dataset") / "data"
        assert set(read_column(data, "verified")) == {True}
        assert {tuple(terms) for terms in read_column(data, "license_set")} == {("MIT",)}
        assert set(read_column(data, "teacher")) == {"humans"}

    def test_who_wrote_the_solutions_is_recorded(self, run: Run) -> None:
        teacher = run.manifest("generate")["metrics"]["teachers"]["humans"]
        assert teacher["origin"] == "human-written solutions of GSM8K"

    def test_two_steps_are_trained_and_the_long_row_is_counted(self, run: Run) -> None:
        assert run.counts("train") == (55, 54, {"over_length": 1})
        assert run.manifest("train")["metrics"]["steps"] == 2
        assert (run.step("train") / "model" / "model.safetensors").is_file()


class TestOneFileForBoth:
    @pytest.fixture
    def filtered(self, root: Path, tmp_path: Path) -> Callable[[list[Row]], Run]:
        def run(rows: list[Row]) -> Run:
            path = write_rows(tmp_path / "train.jsonl", rows)
            return Run(root, tmp_path / "data", path, path, "--until", "filter")

        return run

    def test_is_enough(self, filtered: Callable[[list[Row]], Run]) -> None:
        run = filtered([jam(number) for number in range(12)])
        assert run.counts("filter") == (12, 12, {})

    def test_a_solution_without_a_number_is_not_counted_as_compared(self, filtered: Callable[[list[Row]], Run]) -> None:
        numberless = {"question": "How many spoons?", "answer": "Nobody knows.\n#### many"}
        run = filtered([jam(0), numberless])
        assert run.manifest("filter")["metrics"]["verified"] == {"right": 1, "wrong": 0, "not_compared": 1}


class TestGsm8k:
    """All of it, with 50 gold numbers changed in the file that gives them."""

    CHANGED = range(0, ROWS, 150)

    @pytest.fixture(scope="class")
    def train_file(self, root: Path) -> Path:
        found = next((root / place for place in PLACES if (root / place).is_file()), None)
        if found is None:
            pytest.skip(f"needs GSM8K's train.jsonl (github.com/openai/grade-school-math) at {PLACES[0]}")
        return found.resolve()

    @pytest.fixture(scope="class")
    def rows(self, train_file: Path) -> list[Row]:
        return [json.loads(line) for line in train_file.read_text("utf-8").splitlines()]

    @pytest.fixture(scope="class")
    def run(self, root: Path, train_file: Path, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Run:
        folder = tmp_path_factory.mktemp("gsm8k")
        gold = [one_more(row) if number in self.CHANGED else row for number, row in enumerate(rows)]
        questions = write_rows(folder / "questions.jsonl", gold)
        return Run(root, folder / "data", questions, train_file, "--until", "train")

    def test_all_rows_get_their_solution(self, run: Run) -> None:
        assert run.counts("generate") == (ROWS, ROWS, {})

    def test_exactly_the_rows_with_a_changed_gold_number_leave(self, run: Run, rows: list[Row]) -> None:
        assert run.counts("filter") == (ROWS, ROWS - 50, {"wrong_answer": 50})
        assert set(run.questions_of("filter", "rejects")) == {rows[number]["question"] for number in self.CHANGED}

    def test_two_steps_are_trained_on_what_the_student_can_read(self, run: Run) -> None:
        rows_in, rows_out, rejected = run.counts("train")
        assert set(rejected) == {"over_length"}
        assert rows_out > 0.8 * rows_in
        assert run.manifest("train")["metrics"]["steps"] == 2
