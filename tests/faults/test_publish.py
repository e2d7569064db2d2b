"""Publishing to a Hub that is a real HTTP server, and publishing that is killed or refused on the way."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.faults.hub_server import TOKEN, HubServer, Repository
from tests.publishing import EXAONE, Made, files_of, inside, make
from tests.support import cli_env, logger_is_restored, run_cli

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: the extra `train` installs it")

REPOSITORY = "datasets/me/rows"
Push = Callable[..., "Done"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("hub") / "project", attempts__part="what was paid for")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub, and the client in this process led to it as its environment would lead it, which it reads once."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@dataclass(frozen=True)
class Done:
    """What a command gave."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def push(capsys: pytest.CaptureFixture[str]) -> Push:
    """Runs `push` in this process."""

    def run(made: Made, *options: str, to: str = "hf://me/rows", what: str = "dataset") -> Done:
        with inside(made.folder), logger_is_restored():
            code = main(["push", "run.yaml", "--what", what, "--to", to, *options])
        return Done(code, *capsys.readouterr())

    return run


class TestTheHub:
    def test_the_clients_environment_leads_there(self, made: Made, hub: HubServer) -> None:
        arguments = ("push", "run.yaml", "--what", "dataset", "--to", "hf://me/rows", "--yes")
        done = run_cli(*arguments, cwd=made.folder, env=hub.env)
        assert done.returncode == 0, done.stderr
        assert [*hub.repositories] == [REPOSITORY]

    def test_a_new_repository_is_private_and_gets_one_commit(
        self, made: Made, push: Push, hub: HubServer, tmp_path: Path
    ) -> None:
        done = push(made, "--yes")
        assert done.returncode == 0, done.stderr
        repository = hub.repositories[REPOSITORY]
        assert repository.private and len(repository.commits) == 1
        assert push(made, "--yes", to=str(tmp_path / "out")).returncode == 0
        assert repository.branches["main"] == files_of(tmp_path / "out")
        shown = done.stdout.index("manifest.json"), done.stdout.index("scan:"), done.stdout.index("licence verdict:")
        assert shown < (done.stdout.index("published:"),) * 3
        assert TOKEN in hub.tokens and TOKEN not in done.stdout + done.stderr

    def test_the_same_again_changes_nothing(self, made: Made, push: Push, hub: HubServer) -> None:
        assert [push(made, "--yes").returncode for _ in range(2)] == [0, 0]
        assert len(hub.repositories[REPOSITORY].commits) == 1

    def test_shards_of_an_earlier_push_go_and_other_files_stay(self, made: Made, push: Push, hub: HubServer) -> None:
        old = {"data/train-00001-of-00002.parquet": b"old", "notes.txt": b"mine", ".gitattributes": b"x"}
        hub.repositories[REPOSITORY] = Repository(True, {"main": dict(old)})
        done = push(made, "--yes")
        assert "removed there: data/train-00001-of-00002.parquet" in done.stdout
        found = hub.repositories[REPOSITORY].branches["main"]
        assert {"notes.txt", ".gitattributes"} <= {*found} and "data/train-00001-of-00002.parquet" not in found

    def test_a_public_repository_gets_nothing_unless_that_is_said(self, made: Made, push: Push, hub: HubServer) -> None:
        hub.repositories[REPOSITORY] = Repository(private=False)
        refused = push(made, "--yes")
        assert refused.returncode == 4 and "this repository is public" in refused.stderr
        assert hub.repositories[REPOSITORY].branches["main"] == {} and hub.uploads == []
        assert push(made, "--yes", "--public").returncode == 0

    def test_a_commit_that_is_lost_is_made_by_the_same_command(self, made: Made, push: Push, hub: HubServer) -> None:
        hub.lost_commits = 1
        lost = push(made, "--yes")
        assert lost.returncode == 3 and "run the same command again" in lost.stderr
        assert hub.repositories[REPOSITORY].branches["main"] == {}
        uploads = len(hub.uploads)
        assert push(made, "--yes").returncode == 0
        assert len(hub.uploads) == uploads == 1, "the shard that had arrived is not sent again"

    def test_a_file_that_the_client_leaves_out_is_noticed(self, made: Made, push: Push, hub: HubServer) -> None:
        hub.ignored = ("NOTICE",)
        done = push(made, "--yes")
        assert done.returncode == 2 and "NOTICE" in done.stderr and ".gitignore" in done.stderr

    def test_a_branch_and_a_model(self, made: Made, push: Push, hub: HubServer) -> None:
        done = push(made, "--yes", "--public", "--branch", "v2", to="hf://me/pupil", what="model")
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["models/me/pupil"]
        assert "model.safetensors" in repository.branches["v2"] and repository.branches["main"] == {}
        assert "optimizer.pt" not in repository.branches["v2"] and not repository.private

    def test_a_dry_run_sends_nothing(self, made: Made, push: Push, hub: HubServer) -> None:
        done = push(made, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        shown = json.loads(done.stdout)
        assert [each["name"] for each in shown["files"]][-1] == "manifest.json"
        assert shown["verdict"]["outcome"] and shown["scan"]["scanned"]["rows"] == 2
        assert not hub.repositories and not any(request.startswith(("POST", "PUT")) for request in hub.requests)

    def test_without_a_terminal_somebody_has_to_say_yes(self, made: Made, push: Push, hub: HubServer) -> None:
        done = push(made)
        assert done.returncode == 2 and "--yes" in done.stderr
        assert not hub.repositories

    def test_a_hub_that_is_not_there_is_no_bug(
        self, made: Made, push: Push, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        env = hub.env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
        done = run_cli(
            "push", "run.yaml", "--what", "dataset", "--to", "hf://me/rows", "--yes", cwd=made.folder, env=env
        )
        assert done.returncode == 3 and "the Hub cannot be reached" in done.stderr
        assert TOKEN not in done.stdout + done.stderr


class TestRefusals:
    def test_terms_that_forbid_it_are_shown_and_nothing_is_sent(
        self, tmp_path: Path, push: Push, hub: HubServer
    ) -> None:
        made = make(tmp_path / "project", teacher=EXAONE)
        done = push(made, "--yes")
        assert done.returncode == 4 and "licence verdict: deny" in done.stdout
        assert not hub.repositories

    def test_yes_is_no_override(self, tmp_path: Path, push: Push, hub: HubServer) -> None:
        made = make(tmp_path / "project", **{"README.md": "---\nlicense: mit\n---\n\nwrite to jane.roe@gmail.com\n"})
        done = push(made, "--yes", "--public")
        assert done.returncode == 4 and "README.md  email" in done.stderr
        assert "jane.roe" not in done.stdout + done.stderr and not hub.repositories


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.runner.publish.files import Item
chunks = Item.chunks

def dying(self):
    for piece in chunks(self):
        yield piece
    if self.name == "NOTICE" and Path(sys.argv[-2]).with_name(".out.partial").exists():
        os.kill(os.getpid(), signal.SIGKILL)

Item.chunks = dying
from pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The program, which is killed when it has copied one of the files."""


class TestKills:
    def test_a_push_into_a_folder_that_is_killed_leaves_the_old_one_and_is_completed(
        self, made: Made, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        arguments = ["push", "run.yaml", "--what", "dataset", "--to", str(out), "--yes"]
        assert run_cli(*arguments, cwd=made.folder).returncode == 0
        before = older = files_of(out)
        (tmp_path / "killed.py").write_text(KILLED)
        command = [sys.executable, str(tmp_path / "killed.py"), *arguments]
        killed = subprocess.run(command, cwd=made.folder, env=cli_env(), capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert files_of(out) == older
        assert (tmp_path / ".out.partial").is_dir()
        assert run_cli(*arguments, cwd=made.folder).returncode == 0
        assert files_of(out) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.py", "out"]
