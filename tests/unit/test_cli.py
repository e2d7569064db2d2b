"""The command line as other programs meet it: exit codes, JSON, help, signals, and no secret in any message."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.cli import show
from pipeline.cli.call import TOGETHER_S
from pipeline.core.config import RunConfig
from pipeline.runner.steps import step_names
from tests.support import cli_env, probe_command, read_events, run_cli, wait_for, write_project

SECRET = "sk-CANARY-0123456789abcdef"
API: dict[str, Any] = {
    "teachers": {
        "api": {
            "kind": "openai",
            "base_url": "https://api.example/v1",
            "provider": "example",
            "model": "m",
            "api_key": "${env:EXAMPLE_KEY}",
        }
    },
    "generate": {"teacher": "api"},
}
COMMANDS = (
    "init",
    "doctor",
    "run",
    "plan",
    *step_names(),
    "status",
    "why",
    "trace",
    "drop-source",
    "verify",
    "gc",
    "preflight",
    "responses",
    "export",
    "push",
    "licenses",
    "schema",
)


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    logger = logging.getLogger("pipeline")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project as current folder; its config is run.yaml."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestHelp:
    def test_commands_are_listed_in_the_order_in_which_data_flows(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--help"]) == 0
        listed = capsys.readouterr().out.split("Commands:")[1].splitlines()
        names = [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "]
        assert [name for name in names if name in step_names()] == [*step_names()]
        assert {"run", "plan", "schema"} <= set(names)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_explains_itself(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([name, "--help"]) == 0
        assert f"python -m pipeline {name}" in capsys.readouterr().out

    def test_a_command_exists_exactly_when_it_works(self) -> None:
        assert set(cli.commands.commands) == {*COMMANDS}


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["no-such-command"],
            ["run"],
            ["run", "run.yaml", "--until", "nonsense"],
            ["run", "run.yaml", "--no-such-option"],
            ["run", "missing.yaml"],
            ["run", "run.yaml", "--set", "nonsense"],
            ["run", "run.yaml", "--set", "filter.min_char=3"],
            ["dedup", "run.yaml"],
            ["run", "rows.jsonl"],
            ["run", "."],
        ],
    )
    def test_a_wrong_command_line_or_config_exits_2_without_a_traceback(
        self, project: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(arguments) == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert shown.out == ""
        assert shown.err != ""

    def test_a_process_exits_with_that_code(self, project: Path) -> None:
        assert run_cli("run", "missing.yaml", cwd=project).returncode == 2
        assert run_cli("--help", cwd=project).returncode == 0

    def test_an_error_says_what_where_and_what_to_do(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cli.main(["run", "missing.yaml"])
        starts = [line[:7] for line in capsys.readouterr().err.splitlines()]
        assert starts == ["error: ", "   at: ", "   do: "]

    def test_what_could_steer_a_terminal_is_shown_escaped(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cli.main(["run", "\x1b[2Jmissing.yaml"])
        shown = capsys.readouterr().err
        assert "\x1b" not in shown
        assert "\\u001b[2Jmissing.yaml" in shown


class TestResults:
    def test_run_prints_a_line_a_step_on_stdout_and_messages_on_stderr(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["run", "run.yaml", "--until", "filter"]) == 0
        shown = capsys.readouterr()
        assert [line.split()[:2] for line in shown.out.splitlines()] == [
            ["prompts", "done"],
            ["generate", "done"],
            ["filter", "done"],
        ]
        assert "data/runs/small/filter" in shown.out
        assert "filter: running" in shown.err
        assert cli.main(["run", "run.yaml", "--until", "filter"]) == 0
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["cached"] * 3

    def test_json_is_all_that_run_prints_on_stdout(self, project: Path) -> None:
        done = run_cli("run", "run.yaml", "--until", "dataset", "--json", cwd=project)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert (summary["run"], summary["evaluation"], summary["report"]) == ("small", None, None)
        for step in summary["steps"]:
            assert step["ran"]
            assert step["rows_in"] == step["rows_out"] + sum(step["rejected"].values())
            assert len(step["key"]) == len(step["content"]) == 64
            assert (project / step["path"] / "manifest.json").is_file()

    def test_plan_has_a_json_form_too(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "run.yaml", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["run"] == "small"
        assert [row["step"] for row in told["steps"]] == [*step_names()]
        assert told["steps"][0]["state"] == "run"
        assert told["steps"][0]["reasons"] == ["never ran"]

    def test_plan_for_people_says_why(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cli.main(["run", "run.yaml", "--until", "filter"])
        capsys.readouterr()
        assert cli.main(["plan", "run.yaml", "--set", "filter.min_chars=3"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("filter"))
        assert line.split(maxsplit=2) == ["filter", "run", "filter.min_chars: 1 -> 3"]

    def test_the_data_folder_can_lie_elsewhere(self, project: Path) -> None:
        assert cli.main(["run", "run.yaml", "--until", "prompts", "--data", "else/where"]) == 0
        assert (project / "else" / "where" / "runs" / "small" / "prompts" / "manifest.json").is_file()
        assert not (project / "data").exists()

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_schema_prints_the_configs_schema(self, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["schema", *options]) == 0
        assert json.loads(capsys.readouterr().out) == RunConfig.model_json_schema()


def model(accuracy: float, parameters: int | None, speed: float | None) -> dict[str, Any]:
    ci95 = [accuracy - 0.01, accuracy + 0.01]
    return {"accuracy": accuracy, "ci95": ci95, "parameters": parameters, "answers_per_second": speed}


class TestEvaluationTable:
    def test_what_an_api_does_not_tell_is_a_dash(self) -> None:
        table = show._evaluation_table(
            {
                "teacher": model(0.95, None, None),
                "base": model(0.0, 1_000_000, 100.0),
                "student": model(0.93, 1_000_000, 123.4),
                "retained": 0.979,
                "gap_closed": 0.978,
                "n": 2000,
            }
        )
        teacher, student = (
            next(line for line in table.splitlines() if line.startswith(name)) for name in ("teacher", "student")
        )
        assert teacher.split()[-2:] == ["-", "-"]
        assert student.split()[-2:] == ["1,000,000", "123.4"]
        assert table.endswith(
            "97.9% of the teacher's accuracy retained, 97.8% of the gap closed, on 2,000 test prompts"
        )

    def test_a_quotient_that_is_not_defined_is_said_to_be_so(self) -> None:
        scores = {name: model(0.0, 1, 1.0) for name in ("teacher", "base", "student")}
        table = show._evaluation_table({**scores, "retained": None, "gap_closed": None, "n": 10})
        assert "retained: not defined, gap closed: not defined" in table


# ------------------------------------------------------------------- a stage of our own, in a process of its own

POLITE = 'ctx.events.emit("ready")\nwhile True:\n    check_cancelled(ctx)\n    time.sleep(0.01)\n'
STUBBORN = 'ctx.events.emit("ready")\nwhile True:\n    time.sleep(0.01)\n'


def start(project: Path, body: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        probe_command(project, body, "run", "run.yaml"), cwd=project, env=cli_env(), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: any(event["event"] == "ready" for event in read_events(project / "data/runs/small")), "the stage")
    return process


def nothing_is_left_of(project: Path) -> bool:
    store = project / "data" / "store"
    return not [*store.glob("probe/*"), *store.glob(".staging/*"), *(project / "data").rglob("*.lock")]


class TestSignals:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_the_first_one_stops_between_shards_and_says_how_to_resume(
        self, project: Path, number: signal.Signals, code: int
    ) -> None:
        process = start(project, POLITE)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        assert "stopping: finishing what is in flight" in stderr
        assert stderr.splitlines()[-3:] == [
            "error: stopped by a signal",
            "   at: step probe",
            "   do: resume with: python -m pipeline run run.yaml --data data",
        ]
        assert nothing_is_left_of(project)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_the_second_one_stops_at_once(self, project: Path, number: signal.Signals, code: int) -> None:
        process = start(project, STUBBORN)
        assert process.stderr is not None
        process.send_signal(number)
        said = ""
        while "once more" not in said:
            said = process.stderr.readline()
            assert said, "the process ended at the first signal"
        time.sleep(2 * TOGETHER_S)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        assert "stopped at once" in stderr
        assert "Traceback" not in stderr
        assert nothing_is_left_of(project)

    def test_a_signal_between_two_steps_keeps_what_was_committed(self, project: Path) -> None:
        """The stage asks its own process to stop and then ends well: its result is committed, the run is complete."""
        body = "import signal\nos.kill(os.getpid(), signal.SIGTERM)\nreturn result"
        command = probe_command(project, body, "run", "run.yaml")
        done = subprocess.run(command, cwd=project, env=cli_env(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (project / "data/runs/small/probe/manifest.json").is_file()


class TestBugs:
    def test_an_unexpected_exception_is_a_traceback_and_exit_1(self, project: Path) -> None:
        command = probe_command(project, 'raise KeyError("surprise")', "run", "run.yaml")
        done = subprocess.run(command, cwd=project, env=cli_env(), capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "KeyError: 'surprise'" in done.stderr
        assert "probe.py" in done.stderr
        assert done.stderr.rstrip().endswith("this is a bug; the lines above say where")
        assert nothing_is_left_of(project)


class TestSecrets:
    """The environment holds a key that the config refers to; the stage says it wherever it can."""

    @pytest.mark.parametrize(
        "body",
        [
            'raise ValueError(os.environ["EXAMPLE_KEY"])',
            'raise Incomplete(os.environ["EXAMPLE_KEY"], where=os.environ["EXAMPLE_KEY"], todo="x")',
            'import logging\nlogging.getLogger("pipeline.x").error("%s", os.environ["EXAMPLE_KEY"])\nreturn result',
            'ctx.events.emit("oops", text=os.environ["EXAMPLE_KEY"])\nreturn result',
        ],
        ids=["traceback", "error", "log", "event"],
    )
    def test_none_is_shown_or_written(self, project: Path, body: str) -> None:
        write_project(project, **API)
        done = subprocess.run(
            probe_command(project, body, "run", "run.yaml"),
            cwd=project,
            env=cli_env({"EXAMPLE_KEY": SECRET}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert SECRET not in done.stdout + done.stderr
        written = [path for path in (project / "data").rglob("*") if path.is_file()]
        assert written != []
        assert [path for path in written if SECRET.encode() in path.read_bytes()] == []

    def test_the_value_is_not_needed_to_plan(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "EXAMPLE_KEY" not in os.environ
        write_project(project, **API)
        assert cli.main(["plan", "run.yaml"]) == 0


def test_a_reader_that_goes_away_is_no_error(project: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "schema"]
    with subprocess.Popen(
        command, cwd=project, env=cli_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
