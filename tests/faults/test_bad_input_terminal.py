"""Terminals and outputs of all kinds: without colours, closed, full, gone; and environments that lack the usual."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.core.lineage import Manifest
from pipeline.core.store import Store
from tests.faults.bad_input import change, refusal
from tests.support import cli_env, run_cli, write_project

UNTIL_FILTER = ("run", "run.yaml", "--until", "filter")
RUN = (sys.executable, "-m", "pipeline", *UNTIL_FILTER)
STEPS = ["prompts", "generate", "filter"]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project; its config is run.yaml."""
    write_project(tmp_path)
    return tmp_path


def run_on_terminal(project: Path, **env: str) -> str:
    """All that a run shows on a terminal; stdout and stderr are both there."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(RUN, cwd=project, env=cli_env(env), stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while read := os.read(ours, 65536):
                shown += read
        except OSError:  # how Linux says that nobody holds the other end any more
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode("utf-8")


class TestTerminal:
    @pytest.mark.parametrize("term", ["dumb", ""])
    def test_one_that_cannot_move_its_cursor_gets_plain_lines(self, project: Path, term: str) -> None:
        shown = run_on_terminal(project, TERM=term)
        assert "filter: 12 in, 12 out" in shown
        assert "\x1b" not in shown

    def test_one_without_colours_gets_none(self, project: Path) -> None:
        colourful = run_on_terminal(project, TERM="xterm-256color", NO_COLOR="")
        assert COLOUR.search(colourful) is not None, "this terminal is not taken for one, so the test shows nothing"
        shutil.rmtree(project / "data")
        plain = run_on_terminal(project, TERM="xterm-256color", NO_COLOR="1")
        assert [code for code in COLOUR.findall(plain) if re.search(r"[\[;](3|4|9|10)[0-8]", code)] == []


def shell(project: Path, redirection: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command with a redirection, as a shell makes it."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, cwd=project, env=cli_env(env), capture_output=True, text=True, check=False)


def is_complete(project: Path) -> bool:
    """Whether every event is a whole line, all steps are linked, and every artefact is what was committed."""
    folder = project / "data" / "runs" / "small"
    lines = (folder / "events.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["pid"] > 0 for line in lines] == [True] * len(lines)
    manifests = [Manifest.read(folder / step / "manifest.json") for step in STEPS]
    found = [Store(project / "data" / "store").find(manifest.stage, manifest.key) for manifest in manifests]
    return all(artefact is not None for artefact in found)


class TestStreams:
    @pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", ">&-", "2>&-", "2>/dev/full"])
    def test_a_run_needs_none_of_them_and_writes_nothing_for_people_into_its_files(
        self, project: Path, redirection: str
    ) -> None:
        done = shell(project, redirection, *UNTIL_FILTER)
        assert done.returncode == 0, done.stderr
        assert is_complete(project)

    @pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "2>/dev/full"])
    def test_an_error_that_nobody_can_read_keeps_its_exit_code(self, project: Path, redirection: str) -> None:
        assert shell(project, redirection, "run", "missing.yaml").returncode == 2

    @pytest.mark.parametrize("arguments", [UNTIL_FILTER, ("schema",), ("--help",)])
    def test_a_result_that_cannot_be_printed_is_an_error_in_three_lines(
        self, project: Path, arguments: tuple[str, ...]
    ) -> None:
        done = shell(project, ">/dev/full", *arguments)
        assert done.returncode == 3
        assert done.stderr.splitlines()[-3:] == [
            "error: the result cannot be printed: No space left on device",
            "   at: standard output",
            "   do: what was committed is kept; send the output elsewhere and run the same command again",
        ]
        assert "Traceback" not in done.stderr
        assert arguments != UNTIL_FILTER or is_complete(project), "what was done before is kept"

    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    def test_a_reader_that_has_gone_away_is_no_error(self, project: Path, stream: str) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
        done = subprocess.run(RUN, cwd=project, env=cli_env(), check=False, **quiet)  # type: ignore[call-overload]
        os.close(writing)
        assert done.returncode == 0
        assert is_complete(project)


def run_in(project: Path, env: Mapping[str, str | None], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run in our environment with some variables changed or, where None, taken out."""
    whole = {name: value for name, value in {**cli_env(), **env}.items() if value is not None}
    command = [*RUN[:3], *arguments]
    return subprocess.run(command, cwd=project, env=whole, capture_output=True, check=False, encoding="utf-8",
                          errors="surrogateescape")  # fmt: skip


class TestEnvironment:
    @pytest.mark.parametrize("home", [None, "/dev/null"])
    def test_no_home_folder_is_needed(self, project: Path, home: str | None) -> None:
        assert run_in(project, {"HOME": home}, *UNTIL_FILTER).returncode == 0

    @pytest.mark.parametrize(
        "env",
        [
            {"LC_ALL": "C", "LANG": "C"},
            {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
            {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
        ],
        ids=["C", "ASCII output", "Latin-1 output"],
    )
    def test_paths_of_other_letters_are_read_and_shown_whatever_the_language(
        self, project: Path, env: dict[str, str]
    ) -> None:
        (project / "übung").mkdir()
        (project / "rows.jsonl").rename(project / "übung" / "日本.jsonl")
        (project / "run.yaml").rename(project / "größer.yaml")
        text = (project / "größer.yaml").read_text("utf-8").replace("rows.jsonl", "übung/日本.jsonl")
        (project / "größer.yaml").write_text(text, "utf-8")
        arguments = ("run", "größer.yaml", "--until", "prompts", "--data", "dätä")
        done = run_in(project, env, *arguments)
        assert done.returncode == 0, done.stderr
        assert (project / "dätä" / "runs" / "small" / "prompts" / "manifest.json").is_file()
        (project / "übung" / "日本.jsonl").write_text("", "utf-8")
        done = run_in(project, env, *arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr

    def test_a_config_whose_name_is_no_text_at_all_is_read_and_shown_escaped(self, project: Path) -> None:
        name = os.fsdecode(b"\xff.yaml")
        (project / "run.yaml").rename(project / name)
        assert run_in(project, {}, "prompts", name).returncode == 0
        done = run_in(project, {}, "filter", name)
        assert done.returncode == 2
        assert "python -m pipeline generate '\\udcff.yaml' --data data" in done.stderr

    def test_a_data_folder_whose_name_is_no_text_at_all_is_refused(self, project: Path) -> None:
        done = run_in(project, {}, *UNTIL_FILTER, "--data", os.fsdecode(b"d\xff"))
        said = refusal(done, 2)
        assert (said.what, said.where) == ("the folder's path is not UTF-8 text", "--data d\\udcff")
        assert {path.name for path in project.iterdir()} == {"accelerate.yaml", "rows.jsonl", "run.yaml", "student"}

    def test_a_name_that_steers_terminals_is_shown_escaped(self, project: Path) -> None:
        change(project, lambda config: config["prompts"]["sets"]["facts"]["source"].update(path="\x1b[2J.jsonl"))
        done = run_cli(*UNTIL_FILTER, cwd=project)
        assert done.returncode == 2
        assert "\x1b" not in done.stderr
        assert "prompts.sets.facts.source.path: \\u001b[2J.jsonl" in done.stderr
