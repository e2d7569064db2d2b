"""docs/first-own-run.md does not rot: its commands run, in its order, and say of each step what the page says."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.runner.steps import step_names
from tests.support import cli_env

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/first-own-run.md"
UNTIL = "dataset"
REPLAY = re.compile(r"^#   replay:\n(?:#     .*\n)+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Typed:
    """A command of the page, and what stands below it."""

    command: str
    output: str


def typed() -> list[Typed]:
    """The commands of the page's console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    commands = [
        part.partition("\n") for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE) if part
    ]
    return [Typed(command, output) for command, _, output in commands]


def step_states(output: str) -> Iterator[tuple[str, str]]:
    """(step, state) of the lines that begin with a step's name."""
    for line in output.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] in step_names():
            yield words[0], words[1]


@dataclass(frozen=True, slots=True)
class Shell:
    """A folder where `python` is the interpreter of these tests."""

    folder: Path

    def type(self, command: str) -> str:
        """Run a command as a user would; returns its stdout."""
        bin_folder = self.folder / ".bin"
        bin_folder.mkdir(exist_ok=True)
        python = bin_folder / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        environment = cli_env({"PATH": f"{bin_folder}:{os.environ['PATH']}"})
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout


def without_a_model(folder: Path) -> None:
    """Take the config's own alternative of replayed answers, by taking the comment signs away as the config says."""
    config = folder / "my-first-run/config.yaml"
    text = REPLAY.sub(lambda block: block[0].replace("# ", "", 1).replace("\n# ", "\n"), config.read_text("utf-8"))
    config.write_text(text.replace("  teacher: tiny\n", "  teacher: replay\n"), "utf-8")


def test_the_page_goes_the_whole_way() -> None:
    commands = [each.command for each in typed()]
    verbs = [command.split()[3] for command in commands if command.startswith("python -m pipeline")]
    assert [*dict.fromkeys(verbs)] == ["init", "doctor", "plan", "run", "status"]
    assert len(commands) >= 10


def test_its_commands_say_what_it_says_up_to_the_data_set(tmp_path: Path) -> None:
    """Without vLLM and without training: the answers are replayed, and every run stops at `dataset`."""
    first = [*step_names()][: [*step_names()].index(UNTIL) + 1]
    for each in typed():
        command = each.command
        if command.split()[3:4] == ["run"] and "--until" not in command:
            command = f"{command} --until {UNTIL}"
        output = Shell(tmp_path).type(command)
        said = [(step, state) for step, state in step_states(output) if step in first]
        assert said == [(step, state) for step, state in step_states(each.output) if step in first], command
        if "pipeline init" in command:
            assert output == each.output
            without_a_model(tmp_path)


@pytest.mark.vllm
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_its_commands_say_what_it_says(tmp_path: Path) -> None:
    """As written: the tiny teacher behind vLLM, three trainings, three evaluations."""
    for each in typed():
        output = Shell(tmp_path).type(each.command)
        assert [*step_states(output)] == [*step_states(each.output)], each.command
