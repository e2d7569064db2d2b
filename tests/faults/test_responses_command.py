"""`responses` from the command line: paid answers carried elsewhere, removed, and safe from every mistake."""

import itertools
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Attempt
from tests.faults.bad_input import refusal
from tests.faults.processes import running
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.faults.shim.preload import KILLS, KINDS, Fault, Host, hosting
from tests.faults.shim.project import RUN, Made, attempts, write_api_project
from tests.stored_answers import answer, by_key, key, store, stored
from tests.support import run_cli, wait_for, write_project

PROMPTS = 12
CUT, REFUSED = "Name number 3.", "Name number 5."


def script(seen: Seen, _: int) -> Act:
    """One answer is cut, one prompt is refused."""
    if seen.prompt == REFUSED:
        return completion(None, finish="content_filter")
    return completion(seen.prompt.upper(), finish="length" if seen.prompt == CUT else "stop")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(script) as server:
        yield server


@pytest.fixture(scope="module")
def done(host: Host, server: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has run; not to be changed."""
    project = tmp_path_factory.mktemp("done") / "project"
    write_api_project(project, server, rows=PROMPTS)
    ended = host.run(project, *RUN)
    assert ended.code == 0, ended.stderr
    assert len(server.seen) == PROMPTS
    return project


@pytest.fixture
def project(done: Path, server: ScriptedServer, tmp_path: Path) -> Path:
    """A copy of it; the server has seen nothing since."""
    shutil.copytree(done, tmp_path / "project", symlinks=True)
    server.seen.clear()
    return tmp_path / "project"


def ask(host: Host, project: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The command's result as a script reads it."""
    ended = host.run(project, "responses", *arguments, "--json")
    assert ended.code == code, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


class TestList:
    def test_alone_it_lists(self, host: Host, project: Path) -> None:
        shown = host.run(project, "responses").stdout
        assert shown == host.run(project, "responses", "list").stdout
        assert "openai-chat" in shown
        assert "rejected: 1 content_filter" in shown

    def test_a_script_gets_the_same_facts(self, host: Host, project: Path) -> None:
        total = ask(host, project, "list")["total"]
        assert (total["answers"], total["rejected"], total["cut"]) == (PROMPTS - 1, {"content_filter": 1}, 1)
        assert ask(host, project, "count")["requests"] == PROMPTS

    def test_an_empty_folder_is_no_error(self, host: Host, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        assert host.run(tmp_path, "responses").stdout == "no stored answers in data/responses\n"
        assert ask(host, tmp_path, "list")["rows"] == []
        assert [*(tmp_path / "data").iterdir()] == []

    def test_damage_that_was_set_aside_is_named(self, host: Host, project: Path) -> None:
        (project / "data/responses/damaged").mkdir()
        (project / "data/responses/damaged/1-dead.sqlite").write_bytes(b"x")
        assert "set aside as damaged: data/responses/damaged/1-dead.sqlite" in host.run(project, "responses").stdout


class TestCount:
    def test_what_a_config_would_find(self, host: Host, project: Path) -> None:
        found = ask(host, project, "count", "run.yaml")
        assert found == {"run": "small", "requests": PROMPTS, "answered": PROMPTS - 1, "cut": 0, "missing": 0} | {
            "refused": {"content_filter": 1}
        }

    def test_a_larger_cap_would_ask_for_what_a_smaller_one_cut(self, host: Host, project: Path) -> None:
        found = ask(host, project, "count", "run.yaml", "--set", "generate.sampling.max_tokens=64")
        assert (found["answered"], found["cut"], found["missing"]) == (PROMPTS - 2, 1, 0)

    def test_more_samples_would_ask_for_the_new_ones(self, host: Host, project: Path) -> None:
        found = ask(host, project, "count", "run.yaml", "--set", "generate.samples=3")
        assert (found["requests"], found["missing"]) == (3 * PROMPTS, 2 * PROMPTS)

    def test_nothing_is_asked_to_know_it(self, host: Host, project: Path, server: ScriptedServer) -> None:
        ask(host, project, "count", "run.yaml", "--set", "generate.samples=3")
        assert server.seen == []


class TestCarry:
    def test_a_run_elsewhere_asks_nothing_and_makes_the_same(
        self, host: Host, project: Path, server: ScriptedServer, tmp_path: Path
    ) -> None:
        made = Made.by(project)
        assert ask(host, project, "export", "run.yaml", "--out", "answers.parquet")["missing"] == 0
        there = tmp_path / "there"
        shutil.copytree(project, there, ignore=shutil.ignore_patterns("data"))
        assert [ask(host, there, "import", "answers.parquet")["added"] for _ in range(2)] == [PROMPTS, 0]
        ended = host.run(there, *RUN, "--locked")
        assert ended.code == 0, ended.stderr
        assert (server.seen, Made.by(there)) == ([], made)

    def test_only_what_the_config_uses_goes(self, host: Host, project: Path) -> None:
        store(project / "data/responses", answer("of somebody else"))
        assert ask(host, project, "export", "run.yaml", "--out", "a.parquet")["answers"] == PROMPTS - 1
        assert ask(host, project, "export", "--all", "--out", "b.parquet")["answers"] == PROMPTS

    def test_what_lacks_an_answer_is_said_with_exit_code_3(self, host: Host, project: Path) -> None:
        ended = host.run(
            project, "responses", "export", "run.yaml", "--out", "a.parquet", "--set", "generate.samples=2"
        )
        assert ended.code == 3
        assert f"no stored answer to {PROMPTS} of {2 * PROMPTS} requests" in ended.stderr
        assert ended.stderr.splitlines()[-1].startswith("   do: get them first: python -m pipeline generate run.yaml")

    def test_ctrl_c_in_an_import_leaves_nothing_and_the_same_command_does_it(self, host: Host, tmp_path: Path) -> None:
        """The signal comes in the middle of a large file; should it come too late, nothing was stopped."""
        many = tmp_path / "many"
        store(many / "data/responses", *(answer(str(number)) for number in range(20_000)))
        assert host.run(many, "responses", "export", "--all", "--out", "../x.parquet").code == 0
        with running("responses", "import", "x.parquet", cwd=tmp_path) as command:
            wait_for(lambda: [*(tmp_path / "data/responses/answers").glob(".*.tmp")], "the import has begun")
            command.process.send_signal(signal.SIGINT)
            code = command.end()
        assert code in (130, 0)
        assert not [*(tmp_path / "data/responses/answers").glob(".*.tmp")]
        assert len([*(tmp_path / "data/responses/answers").iterdir()]) == (code == 0)
        assert ask(host, tmp_path, "import", "x.parquet")["added"] == (20_000 if code == 130 else 0)


class TestPurge:
    def test_it_lists_first_and_removes_only_when_told(self, host: Host, project: Path, server: ScriptedServer) -> None:
        listed = ask(host, project, "purge", "--rejected", "content_filter")
        assert (listed["done"], listed["total"]["rejected"], listed["kept"]) == (
            False,
            {"content_filter": 1},
            PROMPTS - 1,
        )
        assert ask(host, project, "count")["requests"] == PROMPTS
        assert ask(host, project, "purge", "--rejected", "content_filter", "--yes")["done"]
        assert ask(host, project, "count", "run.yaml")["missing"] == 1
        shutil.rmtree(project / "data/store")
        assert host.run(project, *RUN).code == 0
        assert server.prompts == [REFUSED]

    def test_all_of_a_config_are_asked_for_again_and_the_bill_stays(
        self, host: Host, project: Path, server: ScriptedServer
    ) -> None:
        paid = len(attempts(project))
        assert ask(host, project, "purge", "--config", "run.yaml", "--yes")["kept"] == 0
        assert len(attempts(project)) == paid
        shutil.rmtree(project / "data/store")
        assert host.run(project, *RUN).code == 0
        assert len(server.seen) == PROMPTS
        assert len(attempts(project)) == 2 * paid

    def test_beside_a_process_that_writes_answers_it_refuses_and_names_it(self, project: Path) -> None:
        with ResponseStore(project / "data/responses") as responses:
            responses.put(intents=[Attempt(1, key("x"), 64, 1)])
            done = run_cli("responses", "purge", "--model", "m", "--yes", cwd=project)
        assert "which writes answers" in refusal(done, 6).what

    def test_no_answer_that_stays_is_lost_where_it_fails_at_any_operation(self, host: Host, tmp_path: Path) -> None:
        """Each operation on a file fails once; six ways in turn."""
        going = [answer(f"old {number}", model="old") for number in range(40)]
        staying = [answer(f"new {number}") for number in range(40)]
        whole, folder = tmp_path / "whole", tmp_path / "project/data/responses"
        store(whole, *going[:20], *staying[:20])
        store(whole, *going[20:30])
        store(whole, *going[30:], *staying[20:], fold=False)
        command = ("responses", "purge", "--model", "old", "--yes")
        for number in itertools.count(1):
            shutil.rmtree(tmp_path / "project", ignore_errors=True)
            shutil.copytree(whole, folder)
            kind = KINDS[number % len(KINDS)]
            struck = host.run(tmp_path / "project", *command, fault=Fault(kind, number, coarse=True))
            told = f"{number} {kind.name} at {struck.what}: {struck.stderr}"
            assert struck.code in ((-9,) if kind in KILLS and struck.fired else (0, 3)), told
            assert not [word for word in ("Traceback", "Exception ignored") if word in struck.stderr], told
            there = stored(folder)
            assert [each for each in there if each.model != "old"] == by_key(staying), told
            assert {each for each in there if each.model == "old"} <= set(going), told
            again = host.run(tmp_path / "project", *command)
            assert again.code == 0 or "no stored answer is of model old" in again.stderr, f"{told}; {again.stderr}"
            assert stored(folder) == by_key(staying), told
            assert {row["key"] for row in attempts(tmp_path / "project")} == {each.key for each in (*going, *staying)}
            if struck.fired == 0:
                break
        print(f"{number - 1} file operations, each failed once: nothing else lost")
        assert number > 20


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["exprt", "run.yaml"], "no such command: exprt; did you mean 'export'?"),
            (["--jsn"], "no such option: --jsn; did you mean '--json'?"),
            (["list", "run.yaml"], "Got unexpected extra argument (run.yaml)"),
            (["--data", "nowhere"], "no such data folder"),
            (["count", "--data", "nowhere"], "no such data folder"),
            (["count", "nowhere.yaml"], "No such file"),
            (["count", "--set", "a.b=c"], "--set belongs to a CONFIG"),
            (["export", "run.yaml"], "--out is missing"),
            (["export", "--out", "x.parquet"], "CONFIG is missing"),
            (["export", "run.yaml", "--all", "--out", "x.parquet"], "give either a CONFIG or --all"),
            (["export", "run.yaml", "--out", "nowhere/x.parquet"], "no such folder"),
            (["export", "run.yaml", "--out", "run.yaml"], "something else lies there"),
            (["export", "run.yaml", "--out", "data"], "a folder, not a file"),
            (["import"], "FILE is missing"),
            (["import", "nowhere.parquet"], "no such file"),
            (["import", "run.yaml"], "not a parquet file"),
            (["import", "data"], "not a file"),
            (["purge"], "nothing says which answers"),
            (["purge", "--model", ""], "the name is empty"),
            (["purge", "--model", "n"], "no stored answer is of model n; valid here: m"),
            (["purge", "--rejected", "content"], "no stored answer is rejected as content"),
            (["purge", "--before", "yesterday"], "--before: 'yesterday' does not match the format '%Y-%m-%d'"),
            (["purge", "--before", "2026-01-01", "--data", "nowhere"], "no such data folder"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_they_end_with_2_and_three_lines(self, host: Host, done: Path, arguments: list[str], what: str) -> None:
        ended = host.run(done, "responses", *arguments)
        lines = ended.stderr.splitlines()
        assert (ended.code, ended.stdout) == (2, ""), ended.stderr
        assert [line[:7] for line in lines[-3:]] == ["error: ", "   at: ", "   do: "], ended.stderr
        assert what in lines[-3]
        assert {path.name for path in done.iterdir()} >= {"run.yaml", "data"}
        assert not (done / "nowhere").exists()

    @pytest.mark.parametrize("arguments", [["list"], ["count"], ["count", "run.yaml"], ["purge", "--model", "m"]])
    def test_a_damaged_file_ends_with_5_and_is_named(self, host: Host, project: Path, arguments: list[str]) -> None:
        (file,) = (project / "data/responses/answers").iterdir()
        file.write_bytes(file.read_bytes()[:-9] + b"x" * 9)
        ended = host.run(project, "responses", *arguments)
        assert (ended.code, ended.stdout) == (5, "")
        assert f"   at: {file.relative_to(project)}" in ended.stderr

    def test_a_damaged_file_is_not_imported(self, host: Host, project: Path, tmp_path: Path) -> None:
        assert host.run(project, "responses", "export", "run.yaml", "--out", "x.parquet").code == 0
        content = (project / "x.parquet").read_bytes()
        (project / "x.parquet").write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
        ended = host.run(project, "responses", "import", "x.parquet", "--data", str(tmp_path / "other"))
        assert ended.code == 5
        assert "nothing was imported" in ended.stderr

    def test_a_config_that_replays_a_file_has_no_stored_answers(self, host: Host, tmp_path: Path) -> None:
        write_project(tmp_path)
        (tmp_path / "data").mkdir()
        ended = host.run(tmp_path, "responses", "count", "run.yaml")
        assert ended.code == 2
        assert "replays a file" in ended.stderr

    def test_a_config_whose_prompts_are_not_made_names_the_command_that_makes_them(
        self, host: Host, project: Path
    ) -> None:
        shutil.rmtree(project / "data/store")
        ended = host.run(project, "responses", "count", "run.yaml")
        assert ended.code == 2
        assert "do: run it first: python -m pipeline prompts run.yaml" in ended.stderr
