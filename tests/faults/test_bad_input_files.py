"""Bad files that a config names: missing, empty, malformed or odd; refused with file and line, or taken as they are."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.bad_input import UNTIL_DATASET, WITH_TEST, change, kept, refusal, write_rows
from tests.support import run_cli, write_project

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project; its config is run.yaml."""
    write_project(tmp_path)
    return tmp_path


def source(kind: str, path: str, **columns: str | None) -> Edit:
    """An edit that gives the prompt set another source."""
    prompt_set = {"source": {"kind": kind, "path": path}, "columns": columns}
    return lambda config: config["prompts"]["sets"].update(facts=prompt_set)


def part(name: str, path: str) -> Edit:
    """An edit that gives the prompt set a card or a template."""
    return lambda config: config["prompts"]["sets"]["facts"].update({name: path})


class TestMissingFiles:
    @pytest.mark.parametrize(
        ("edit", "where"),
        [
            (source("jsonl", "no.jsonl"), "prompts.sets.facts.source.path: no.jsonl"),
            (part("card", "no.yaml"), "prompts.sets.facts.card: no.yaml"),
            (part("template", "no.jinja"), "prompts.sets.facts.template: no.jinja"),
            (lambda c: c["teachers"]["humans"].update(path="no.jsonl"), "teachers.humans.path: no.jsonl"),
            (lambda c: c["train"].update(accelerate="no.yaml"), "train.accelerate: no.yaml"),
            (lambda c: c["student"].update(model="./no"), "student.model: no"),
        ],
        ids=["prompts", "card", "template", "completions", "accelerate file", "model folder"],
    )
    def test_a_file_that_is_not_there_is_named_before_anything_is_made(
        self, project: Path, edit: Edit, where: str
    ) -> None:
        change(project, edit)
        said = refusal(run_cli("run", "run.yaml", cwd=project), 2)
        assert (said.what, said.where) == ("no such file or folder", f"run.yaml: {where}")
        assert not (project / "data").exists()

    def test_a_pipe_in_place_of_the_prompts_is_refused_and_not_waited_for(self, project: Path) -> None:
        os.mkfifo(project / "pipe")
        change(project, source("jsonl", "pipe"))
        assert refusal(run_cli(*UNTIL_DATASET, cwd=project), 2).what == "a stream, not a file"

    def test_a_folder_in_place_of_the_completions_is_refused(self, project: Path) -> None:
        change(project, lambda config: config["teachers"]["humans"].update(path="student"))
        assert refusal(run_cli(*UNTIL_DATASET, cwd=project), 2).what == "a folder, not a file: student"


class TestPromptSets:
    @pytest.mark.parametrize(
        ("kind", "content"),
        [("jsonl", ""), ("jsonl", "\n \n\n"), ("csv", "id,prompt\n"), ("parquet", None)],
        ids=["0 bytes", "blank lines", "header only", "0 rows"],
    )
    def test_an_empty_one_is_refused(self, project: Path, kind: str, content: str | None) -> None:
        path = project / f"empty.{kind}"
        if content is None:
            pq.write_table(pa.table({"id": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}), path)
        else:
            path.write_text(content, "utf-8")
        change(project, source(kind, path.name))
        said = refusal(run_cli("prompts", "run.yaml", cwd=project), 2)
        assert (said.what, said.where) == ("the prompt set has no rows", f"prompts.sets.facts: empty.{kind}")

    def test_the_first_ten_of_the_ids_that_occur_twice_are_listed(self, project: Path) -> None:
        rows = [{"id": f"p{number % 15:02d}", "prompt": f"q{number}", "completion": "c"} for number in range(30)]
        (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        said = refusal(run_cli("prompts", "run.yaml", cwd=project), 2)
        assert said.what == f"ids that occur twice: {', '.join(repr(f'p{number:02d}') for number in range(10))}, …"
        assert said.where == "prompts.sets.facts: rows.jsonl"

    @pytest.mark.parametrize(
        ("lines", "edit", "what", "where"),
        [
            (['{"id": "b", "prompt": "x"'], None, "not JSON: Expecting ',' delimiter (character 27)", "rows.jsonl:2"),
            (
                ['{"id": "b", "prompt": "x"}'],
                source("jsonl", "rows.jsonl", prompt="promt"),
                "no column 'promt'; did you mean 'prompt'?",
                "rows.jsonl:1",
            ),
            (['{"id": "b", "prompt": 7}'], None, "a number where a text or a list of messages is needed", "jsonl:2"),
            (['{"id": "b", "prompt": "x\0"}'], None, "not JSON: Invalid control character (character 25)", ":2"),
        ],
        ids=["cut line", "misspelt column", "no text", "raw NUL"],
    )
    def test_a_row_that_cannot_be_read_is_named_with_its_line(
        self, project: Path, lines: list[str], edit: Edit | None, what: str, where: str
    ) -> None:
        if edit is not None:
            change(project, edit)
        text = "\n".join(['{"id": "a", "prompt": "x", "completion": "y"}', *lines, ""])
        (project / "rows.jsonl").write_text(text, "utf-8")
        said = refusal(run_cli("prompts", "run.yaml", cwd=project), 2)
        assert said.what == what
        assert where in said.where

    def test_a_row_without_the_templates_column_is_named_with_the_columns_it_has(self, project: Path) -> None:
        (project / "t.jinja").write_text("Answer: {{ promt }}", "utf-8")
        change(project, part("template", "t.jinja"))
        said = refusal(run_cli("prompts", "run.yaml", cwd=project), 2)
        assert said.what == "the template uses what the row lacks: 'promt' is undefined"
        assert said.where == "t.jinja, for rows.jsonl:1"
        assert said.todo == "did you mean 'prompt'? the row's columns: id, prompt, completion"

    def test_a_template_that_is_none_is_named_with_its_line(self, project: Path) -> None:
        (project / "t.jinja").write_text("Answer:\n{{ prompt | nofilter }}", "utf-8")
        change(project, part("template", "t.jinja"))
        said = refusal(run_cli("prompts", "run.yaml", cwd=project), 2)
        assert (said.what, said.where) == ("not a Jinja template: No filter named 'nofilter'.", "t.jinja:2")

    def test_a_card_is_checked_like_a_config(self, project: Path) -> None:
        (project / "card.yaml").write_text("source: here\nlicence: MIT\n", "utf-8")
        change(project, part("card", "card.yaml"))
        said = refusal(run_cli("prompts", "run.yaml", cwd=project), 2)
        assert (said.what, said.where) == ("licence: unknown key; did you mean 'license'?", "card.yaml:2")

    def test_a_single_row_is_enough(self, project: Path) -> None:
        write_rows(project, "only one")
        assert run_cli(*UNTIL_DATASET, cwd=project).returncode == 0

    def test_no_test_row_is_said_before_the_teacher_is_asked(self, project: Path) -> None:
        """A single row, and an evaluation at the end."""
        write_rows(project, "only one")
        complete_model(project / "student")
        change(project, lambda config: config.update(prompts={**WITH_TEST, "test": 0.01}))
        done = run_cli("run", "run.yaml", cwd=project)
        said = refusal(done, 2)
        assert said.what == "none of 1 prompts is in the test split, so nothing could be evaluated"
        assert said.where == "run.yaml: prompts.test: 0.01"
        assert "generate: running" not in done.stderr


class TestOddPrompts:
    def test_a_lone_surrogate_is_replaced_and_nul_stays(self, project: Path) -> None:
        write_rows(project, "lone \ud800 one", "nul \0 here")
        assert run_cli("prompts", "run.yaml", cwd=project).returncode == 0
        assert [row["prompt"][-1]["content"] for row in kept(project, "prompts")] == ["lone \ufffd one", "nul \0 here"]

    @pytest.mark.parametrize("kind", ["jsonl", "csv"])
    def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(self, project: Path, kind: str) -> None:
        lines = {
            "jsonl": ['{"id": "a", "prompt": "x"}', '{"id": "b", "prompt": "y"}'],
            "csv": ["id,prompt", "a,x", "b,y"],
        }
        (project / f"odd.{kind}").write_bytes(b"\xef\xbb\xbf" + "".join(line + "\r\n" for line in lines[kind]).encode())
        change(project, source(kind, f"odd.{kind}"))
        assert run_cli("prompts", "run.yaml", cwd=project).returncode == 0
        rows = kept(project, "prompts")
        assert [(row["prompt_id"], row["prompt"][-1]["content"]) for row in rows] == [("a", "x"), ("b", "y")]

    def test_a_prompt_of_10_mb_is_a_prompt(self, project: Path) -> None:
        write_rows(project, "x" * 10_000_000, "short")
        assert run_cli(*UNTIL_DATASET, cwd=project).returncode == 0
        assert len(kept(project, "dedup")[0]["prompt"][-1]["content"]) == 10_000_000

    def test_text_that_is_not_utf8_is_refused(self, project: Path) -> None:
        (project / "rows.jsonl").write_text('{"id": "a", "prompt": "é"}\n', "utf-16")
        said = refusal(run_cli("prompts", "run.yaml", cwd=project), 2)
        assert (said.what, said.where) == ("not UTF-8 text: invalid start byte", "rows.jsonl:1")


def complete_model(folder: Path) -> None:
    """The names that a model folder holds; nothing in them can be loaded."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}", "utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    (folder.parent / "accelerate.yaml").write_text("distributed_type: 'NO'\n", "utf-8")


class TestModelFolders:
    """What a folder lacks is said before the first step, without loading it."""

    @pytest.mark.parametrize("who", ["student", "teacher"])
    def test_a_folder_without_tokenizer_is_refused_before_anything_is_made(self, project: Path, who: str) -> None:
        complete_model(project / "student")
        (project / "student" / "tokenizer.json").unlink()
        if who == "teacher":
            teachers = {"tiny": {"kind": "vllm", "model": "./student"}}
            change(project, lambda config: config.update(teachers=teachers, generate={"teacher": "tiny"}))
            said = refusal(run_cli(*UNTIL_DATASET, cwd=project), 2)
            assert said.where == "run.yaml: teachers.tiny.model: student"
        else:
            change(project, lambda config: config.update(prompts=WITH_TEST))
            said = refusal(run_cli("run", "run.yaml", cwd=project), 2)
            assert said.where == "run.yaml: student.model: student"
        assert said.what == "the model folder has no tokenizer"
        assert not (project / "data").exists()

    def test_an_accelerate_file_without_its_type_is_refused(self, project: Path) -> None:
        complete_model(project / "student")
        (project / "accelerate.yaml").write_text("num_processes: 1\n", "utf-8")
        change(project, lambda config: config.update(prompts=WITH_TEST))
        said = refusal(run_cli("run", "run.yaml", cwd=project), 2)
        assert (said.what, said.where) == ("Accelerate's config has no `distributed_type`", "accelerate.yaml")

    def test_plan_tells_that_run_would_refuse(self, project: Path) -> None:
        change(project, lambda config: config.update(prompts=WITH_TEST))
        done = run_cli("plan", "run.yaml", cwd=project)
        assert done.returncode == 0
        assert "run would refuse to start: the model folder has no weights" in done.stderr
