"""Bad teachers: unreachable, with a wrong key or none, with answers of megabytes or broken text; nothing is lost."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.bad_input import api_project, change, kept, refusal, rejected
from tests.faults.scripted_server import Act, Script, ScriptedServer, Seen, completion, echo, failure
from tests.support import cli_env, run_cli, write_project

UNTIL_FILTER = ("run", "run.yaml", "--until", "filter")
KEY = "sk-CANARY-0123456789abcdef"
RESUME = "resume with: python -m pipeline run run.yaml --data data --until filter"
TEN_MB = 10_000_000


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine at which nobody listens, and nobody else will."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class TestServer:
    def test_a_refused_connection_ends_with_the_time_budget_and_is_resumed(
        self, tmp_path: Path, closed_port: int
    ) -> None:
        project = api_project(tmp_path, f"http://127.0.0.1:{closed_port}/v1")
        done = run_cli(*UNTIL_FILTER, cwd=project)
        said = refusal(done, 3)
        assert said.where == f"127.0.0.1:{closed_port}"
        assert said.todo.endswith(RESUME)
        assert "connection: Connection refused" in done.stderr
        with ScriptedServer(echo) as server:
            change(project, lambda config: config["teachers"]["api"].update(base_url=server.url))
            assert run_cli(*UNTIL_FILTER, cwd=project).returncode == 0
            assert len(server.seen) == 12

    def test_a_name_that_nobody_knows_ends_likewise(self, tmp_path: Path) -> None:
        project = api_project(tmp_path, "https://no-such-host.invalid/v1", rows=2)
        done = run_cli(*UNTIL_FILTER, cwd=project)
        said = refusal(done, 3)
        assert said.where == "no-such-host.invalid"
        assert said.todo.endswith(RESUME)
        assert "connection: " in done.stderr

    def test_a_url_that_is_none_is_refused(self, tmp_path: Path) -> None:
        project = api_project(tmp_path, "http://api.example/v1")
        said = refusal(run_cli(*UNTIL_FILTER, cwd=project), 2)
        assert said.what == (
            "teachers.api.base_url: plain http is accepted for this machine only (localhost, 127.0.0.1, ::1); use https"
        )

    @pytest.mark.parametrize(
        ("act", "what", "todo"),
        [
            (
                failure(404, "no such model"),
                "the API does not know this URL or model (status:404): no such model",
                "model",
            ),
            (
                failure(400, "no"),
                'the teacher refused all of the first 12 requests: {"error": {"message": "no"}}',
                "samp",
            ),
            (
                Act(status=302, headers={"Location": "/"}),
                "the server redirects elsewhere; redirects are not",
                "base_url",
            ),
        ],
        ids=["404", "400", "302"],
    )
    def test_what_all_requests_would_meet_stops_everything_at_once(
        self, tmp_path: Path, act: Act, what: str, todo: str
    ) -> None:
        with ScriptedServer(lambda seen, n: act) as server:
            said = refusal(run_cli(*UNTIL_FILTER, cwd=api_project(tmp_path, server.url)), 2)
            assert said.what.startswith(what)
            assert said.where == f"127.0.0.1:{server.port}"
            assert todo in said.todo


class TestKey:
    def test_a_wrong_one_stops_after_those_in_flight_and_is_never_shown(self, tmp_path: Path) -> None:
        with ScriptedServer(lambda seen, n: failure(401, f"Incorrect API key: {KEY}")) as server:
            project = api_project(tmp_path, server.url, rows=40, key="${env:EXAMPLE_KEY}")
            done = run_cli(*UNTIL_FILTER, cwd=project, env={"EXAMPLE_KEY": KEY})
            said = refusal(done, 2)
            assert said.what == "the API refuses the key (status:401)"
            assert said.todo == "check the value of the environment variable EXAMPLE_KEY"
            assert len(server.seen) <= 4, "more than may be in flight at a time"
        assert KEY not in done.stderr
        assert "trying again" not in done.stderr

    def test_a_right_one_afterwards_asks_for_all_that_is_missing(self, tmp_path: Path) -> None:
        def script(seen: Seen, number: int) -> Act:
            return echo(seen, number) if seen.headers["authorization"] == f"Bearer {KEY}" else failure(401)

        with ScriptedServer(script) as server:
            project = api_project(tmp_path, server.url, key="${env:EXAMPLE_KEY}")
            refusal(run_cli(*UNTIL_FILTER, cwd=project, env={"EXAMPLE_KEY": "wrong"}), 2)
            before = len(server.seen)
            assert run_cli(*UNTIL_FILTER, cwd=project, env={"EXAMPLE_KEY": KEY}).returncode == 0
            assert len(server.seen) - before == 12

    @pytest.mark.parametrize(("command", "value"), [(UNTIL_FILTER, None), (("generate", "run.yaml"), "  ")])
    def test_an_unset_one_is_named_before_anything_is_done(
        self, tmp_path: Path, command: tuple[str, ...], value: str | None
    ) -> None:
        assert "EXAMPLE_KEY" not in os.environ
        project = api_project(tmp_path, "https://api.example/v1", key="${env:EXAMPLE_KEY}")
        said = refusal(run_cli(*command, cwd=project, env={} if value is None else {"EXAMPLE_KEY": value}), 2)
        assert said.what == "the environment variable EXAMPLE_KEY is not set"
        assert said.where == "run.yaml: teachers.api.api_key"
        assert said.todo.startswith("export EXAMPLE_KEY=…")
        assert not (project / "data").exists()

    def test_what_needs_none_does_not_ask_for_one(self, tmp_path: Path) -> None:
        """A stage before the teacher; then the same answers again, cached and from the store; then a new question."""
        with ScriptedServer(echo) as server:
            project = api_project(tmp_path, server.url, key="${env:EXAMPLE_KEY}")
            assert run_cli("run", "run.yaml", "--until", "prompts", cwd=project).returncode == 0
            assert run_cli(*UNTIL_FILTER, cwd=project, env={"EXAMPLE_KEY": KEY}).returncode == 0
            assert run_cli(*UNTIL_FILTER, "--set", "filter.min_chars=2", cwd=project).returncode == 0
            forced = run_cli("generate", "run.yaml", "--force", cwd=project)
            assert forced.returncode == 0
            assert "EXAMPLE_KEY is not set: only what is answered already can be used" in forced.stderr
            assert len(server.seen) == 12
            done = run_cli(*UNTIL_FILTER, "--set", "generate.draw=1", cwd=project)
            assert refusal(done, 2).what == "the environment variable EXAMPLE_KEY is not set"


def chunked(body: bytes) -> Act:
    """A response whose length is not told before."""
    framed = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    return Act(body=framed, headers={"Transfer-Encoding": "chunked"})


class TestCompletions:
    @pytest.mark.parametrize("framed", [False, True], ids=["length told", "length not told"])
    def test_10_mb_are_rejected_as_oversize_and_the_others_are_kept(self, tmp_path: Path, framed: bool) -> None:
        huge = completion("x" * TEN_MB)
        act = chunked(huge.body) if framed else huge
        with ScriptedServer(lambda seen, n: act if seen.prompt.endswith(" 3.") else echo(seen, n)) as server:
            project = api_project(tmp_path, server.url)
            assert run_cli(*UNTIL_FILTER, cwd=project).returncode == 0
            assert rejected(project, "generate") == ["oversize"]
            assert len(kept(project, "filter")) == 11
            assert len(server.seen) == 12, "a row that is too long is asked for once"

    def test_memory_is_bounded_by_what_is_in_flight_not_by_what_comes(self, tmp_path: Path) -> None:
        act = chunked(completion("x" * TEN_MB).body)
        small = peak_memory(tmp_path / "small", echo)
        huge = peak_memory(tmp_path / "huge", lambda seen, n: echo(seen, n) if n == 0 else act)
        assert huge - small < 100_000_000, "of 390 MB that were sent, 4 at a time, up to 4 MB of each"

    def test_lone_surrogates_become_u_fffd_and_nul_stays_both_flagged(self, tmp_path: Path) -> None:
        body = b'{"choices": [{"message": {"content": "a\\ud800b\\u0000c"}, "finish_reason": "stop"}]}'
        with ScriptedServer(lambda seen, n: Act(body=body)) as server:
            project = api_project(tmp_path, server.url, rows=1)
            assert run_cli(*UNTIL_FILTER, cwd=project).returncode == 0
            (row,) = kept(project, "filter")
            assert row["completion"][-1]["content"] == "a\ufffdb\0c"
            assert row["flags"] == ["nul", "sanitized"]


def peak_memory(folder: Path, script: Script) -> int:
    """Most bytes resident in a run of 40 rows against a server."""
    with ScriptedServer(script) as server:
        command = [sys.executable, "-m", "pipeline", "run", "run.yaml", "--until", "generate"]
        project = api_project(folder, server.url, rows=40)
        process = subprocess.Popen(command, cwd=project, env=cli_env(), stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_maxrss * 1024


class TestNothingLeft:
    def test_all_rows_rejected_is_said_with_where_to_look(self, tmp_path: Path) -> None:
        write_project(tmp_path, filter={"min_chars": 10_000})
        said = refusal(run_cli("run", "run.yaml", "--until", "dataset", cwd=tmp_path), 2)
        assert said.what == "no row is left for the data set"
        assert rejected(tmp_path, "filter") == ["too_short"] * 12

    def test_no_completion_for_any_prompt_names_the_columns_to_check(self, tmp_path: Path) -> None:
        write_project(tmp_path)
        change(tmp_path, lambda config: config["teachers"]["humans"].update(prompt_id="prompt"))
        said = refusal(run_cli(*UNTIL_FILTER, cwd=tmp_path), 2)
        assert said.what == "no prompt was answered: of 12 rows 12 were rejected as no_completion"
        assert said.todo == "check the path and the columns (prompt_id or prompt, completion) of teachers.humans"
