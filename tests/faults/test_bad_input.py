"""Bad configs and command lines end in three lines and exit code 2 before anything is made; the table of bad input.

| bad input                                            | tests                                                       |
|------------------------------------------------------|-------------------------------------------------------------|
| unknown key, wrong type, wrong value                 | `TestConfig`, here                                          |
| duplicate YAML key, missing config, no config at all | `TestConfigFile`, here                                      |
| `--set`, misspelt command or option                  | `TestOverrides`, `TestCommandLine`, here                    |
| missing files that the config names                  | `TestMissingFiles`, test_bad_input_files.py                 |
| empty prompt set, duplicate ids, missing column      | `TestPromptSets`, test_bad_input_files.py                   |
| lone surrogates, NUL, BOM, CRLF, 10 MB in prompts    | `TestOddPrompts`, test_bad_input_files.py                   |
| model folder without tokenizer                       | `TestModelFolders`, test_bad_input_files.py                 |
| read-only folder, `--data` at a file                 | `TestDataFolder`, test_bad_input_data.py                    |
| disk full                                            | `TestDiskFull`, test_bad_input_data.py; at every write:     |
|                                                      | test_nth_operation.py                                       |
| corrupt or truncated parquet artefact                | `TestArtefacts`, test_bad_input_data.py                     |
| a half-written SQLite segment                        | `TestResponses`, test_bad_input_data.py                     |
| unreachable server                                   | `TestServer`, test_bad_input_teacher.py                     |
| wrong API key, no API key                            | `TestKey`, test_bad_input_teacher.py                        |
| lone surrogates, NUL, 10 MB in completions           | `TestCompletions`, test_bad_input_teacher.py                |
| no row left                                          | `TestNothingLeft`, test_bad_input_teacher.py                |
| a terminal without colours                           | `TestTerminal`, test_bad_input_terminal.py                  |
| no terminal at all, an output that takes nothing     | `TestStreams`, test_bad_input_terminal.py                   |
| odd environments (HOME, LANG)                        | `TestEnvironment`, test_bad_input_terminal.py               |
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.bad_input import UNTIL_DATASET, change, obey_permissions, refusal
from tests.support import cli_env, run_cli, write_project

STREAM = "the config is read from a file, not from a stream"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project; its config is run.yaml."""
    write_project(tmp_path)
    return tmp_path


def line_of(project: Path, start: str) -> str:
    """`run.yaml:<line>` of the line that begins so."""
    lines = (project / "run.yaml").read_text("utf-8").splitlines()
    return f"run.yaml:{next(number for number, line in enumerate(lines, 1) if line.strip().startswith(start))}"


class TestConfig:
    @pytest.mark.parametrize(
        ("edit", "what", "at"),
        [
            (
                lambda c: c.update(filter={"min_char": 3}),
                "filter.min_char: unknown key; did you mean 'min_chars'?",
                "min_char:",
            ),
            (
                lambda c: c["teachers"]["humans"].update(kind="repaly"),
                "teachers.humans.kind: 'repaly' is not a valid value; did you mean 'replay'?",
                "kind: repaly",
            ),
            (lambda c: c.update(filter={"min_chars": "many"}), "filter.min_chars: give a whole number", "min_chars:"),
            (
                lambda c: c.update(name="../../elsewhere"),
                "name: give a name of letters, digits, `.`, `_` and `-` that begins with a letter or digit (at most "
                "100)",
                "name:",
            ),
            (lambda c: c["student"].pop("model"), "student.model: is required", "student:"),
        ],
        ids=["unknown key", "wrong value", "wrong type", "name that leaves the folder", "missing key"],
    )
    def test_a_mistake_is_named_with_its_line_and_the_nearest_valid_name(
        self, project: Path, edit: Edit, what: str, at: str
    ) -> None:
        change(project, edit)
        said = refusal(run_cli(*UNTIL_DATASET, cwd=project), 2)
        assert said.what == what
        assert said.where == line_of(project, at)
        assert said.todo == "correct it; `python -m pipeline schema` prints all valid keys"
        assert not (project / "data").exists()

    def test_several_are_named_at_once(self, project: Path) -> None:
        change(project, lambda c: c.update(filter={"min_char": 3, "verifier": "exat"}))
        done = run_cli(*UNTIL_DATASET, cwd=project)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "error: 2 mistakes:",
            "       filter.verifier: 'exat' is not a valid value; did you mean 'exact'? "
            f"({line_of(project, 'verifier:')})",
            f"       filter.min_char: unknown key; did you mean 'min_chars'? ({line_of(project, 'min_char:')})",
            "   at: run.yaml",
            "   do: correct them; `python -m pipeline schema` prints all valid keys",
        ]


class TestConfigFile:
    @pytest.mark.parametrize(
        ("content", "what", "where"),
        [
            (b"name: a\nname: b\n", "not valid YAML: duplicate key 'name'", "x.yaml:2:1"),
            (
                b"name: a\n\tfilter: {}\n",
                "not valid YAML: found character '\\t' that cannot start any token",
                "x.yaml:2:1",
            ),
            (b"name: a\x00b\n", "not valid YAML: a control character (#x0000)", "x.yaml:1"),
            ("name: a\n".encode("utf-16"), "the file is not UTF-8 text", "x.yaml"),
            (b"", "the config is not a mapping", "x.yaml"),
        ],
        ids=["duplicate key", "tab", "NUL", "UTF-16", "empty"],
    )
    def test_what_is_no_config_is_refused(self, project: Path, content: bytes, what: str, where: str) -> None:
        (project / "x.yaml").write_bytes(content)
        said = refusal(run_cli("run", "x.yaml", cwd=project), 2)
        assert (said.what, said.where) == (what, where)

    @pytest.mark.parametrize(
        ("name", "what", "todo"),
        [
            ("rum.yaml", "cannot read the file: No such file or directory", "did you mean run.yaml?"),
            (".", "cannot read the file: Is a directory", "name a file in it, such as accelerate.yaml"),
            ("-", STREAM, "save it as a file: the lock file is written"),
            (
                "pipe",
                "the config is read from a file, not from a stream",
                "save it as a file: the lock file is written",
            ),
        ],
    )
    def test_a_path_to_none_is_refused(self, project: Path, name: str, what: str, todo: str) -> None:
        os.mkfifo(project / "pipe")
        said = refusal(run_cli("run", name, cwd=project), 2)
        assert (said.what, said.where) == (what, name)
        assert said.todo.startswith(todo)

    def test_a_file_that_may_not_be_read_is_refused(self, project: Path) -> None:
        (project / "run.yaml").chmod(0)
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "run", "run.yaml"],
            cwd=project, env=cli_env(), capture_output=True, text=True, check=False, preexec_fn=obey_permissions,
        )  # fmt: skip
        said = refusal(done, 2)
        assert (said.what, said.todo) == ("cannot read the file: Permission denied", "give it read access")

    def test_spaces_and_other_letters_in_its_path_are_fine_and_the_command_that_resumes_can_be_typed(
        self, project: Path
    ) -> None:
        (project / "mein Ordner").mkdir()
        shutil.copy(project / "run.yaml", project / "mein Ordner" / "größer.yaml")
        name = "mein Ordner/größer.yaml"
        assert run_cli("prompts", name, "--data", "my data", cwd=project).returncode == 0
        said = refusal(run_cli("filter", name, "--data", "my data", cwd=project), 2)
        assert said.todo == f"run it first: python -m pipeline generate '{name}' --data 'my data'"


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "what", "where"),
        [
            (
                "filter.min_char=3",
                "filter.min_char: unknown key; did you mean 'min_chars'?",
                "--set filter.min_char=…",
            ),
            ("train.max_steps=four", "train.max_steps: give a whole number", "--set train.max_steps=…"),
            ("filter.min_chars=[", "the value is not valid YAML", "--set filter.min_chars=…"),
            ("filter.min_chars", "not of the form a.b=c", "--set"),
        ],
    )
    def test_a_mistake_is_placed_at_its_set(self, project: Path, override: str, what: str, where: str) -> None:
        said = refusal(run_cli(*UNTIL_DATASET, "--set", override, cwd=project), 2)
        assert (said.what, said.where) == (what, where)
        assert not (project / "data").exists()


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "what", "todo"),
        [
            (["genrate", "run.yaml"], "no such command: genrate; did you mean 'generate'?", ""),
            (["run", "run.yaml", "--untill", "x"], "no such option: --untill; did you mean '--until'?", " run"),
            (["run", "run.yaml", "--until", "filtr"], "--until: no such value: filtr; did you mean 'filter'?", " run"),
            (["run"], "CONFIG is missing", " run"),
            (["run", "run.yaml", "more"], "Got unexpected extra argument (more)", " run"),
        ],
    )
    def test_a_mistake_comes_with_the_nearest_valid_word(
        self, project: Path, arguments: list[str], what: str, todo: str
    ) -> None:
        said = refusal(run_cli(*arguments, cwd=project), 2)
        assert said.what == what
        assert said.todo == f"see python -m pipeline{todo} --help"

    def test_a_word_far_from_all_commands_lists_them(self, project: Path) -> None:
        said = refusal(run_cli("zzz", cwd=project), 2)
        assert said.what.startswith("no such command: zzz; valid here: ")
        assert {"run", "plan", "generate"} <= {word.strip() for word in said.what.partition("here: ")[2].split(",")}

    def test_no_command_shows_the_help(self, project: Path) -> None:
        done = run_cli(cwd=project)
        assert done.returncode == 2
        assert "Commands:" in done.stderr
