"""What leaves this machine for an API: a canary secret in prompts, and what the server sees of it under each policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.record import Record, iter_records, read_shards
from tests.faults.scripted_server import ScriptedServer, echo
from tests.support import run_cli, write_project

# In pieces, so that no scanner takes this file for a leak.
CANARY = "sk-" + "ant-api03-C4n4ryB1rd0fTh3C04lM1n3Qx7Zw9"
MAIL = "canary" + "@gmail.com"
SECRET_ROWS = {
    "in-the-question": f"Why is {CANARY} refused?",
    "in-the-system-message": [{"role": "system", "content": f"Key: {CANARY}"}, {"role": "user", "content": "Hi"}],
    "in-an-earlier-turn": [
        {"role": "user", "content": f"I use {CANARY}\n"},
        {"role": "assistant", "content": "Good."},
        {"role": "user", "content": "Is it?"},
    ],
}
MAIL_ROWS = {"mail": f"Write to {MAIL}."}
CLEAN = {f"clean{number}": f"Name number {number}." for number in range(4)}


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(echo) as server:
        yield server


class Project:
    """A project whose prompts hold the canaries, and its runs."""

    def __init__(self, folder: Path, server: ScriptedServer, prompts: dict[str, Any], **generate: Any) -> None:
        teacher = {"kind": "openai", "base_url": server.url, "provider": "here", "model": "m"}
        self.folder = folder
        write_project(folder, teachers={"api": teacher}, generate={"teacher": "api", **generate})
        rows = [json.dumps({"id": name, "prompt": prompt}) + "\n" for name, prompt in prompts.items()]
        (folder / "rows.jsonl").write_text("".join(rows), "utf-8")

    def run(self, *, code: int = 0) -> str:
        """All that the command printed."""
        done = run_cli("run", "run.yaml", "--until", "dataset", cwd=self.folder)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    @property
    def generated(self) -> Path:
        return self.folder / "data" / "runs" / "small" / "generate"

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.generated / "manifest.json").read_text("utf-8"))

    @property
    def rows(self) -> dict[str, Record]:
        return {record.prompt_id: record for record in iter_records(self.generated / "rows")}

    @property
    def rejects(self) -> dict[str, dict[str, Any]]:
        tables = read_shards(self.generated / "rejects")
        return {row["prompt_id"]: row for table in tables for row in table.to_pylist()}

    def files_of_generate(self) -> bytes:
        """The result, its answers and the events: everything behind the prompts themselves."""
        data = self.folder / "data"
        places = [self.generated.resolve(), data / "responses"]
        files = [path for place in places for path in place.rglob("*") if path.is_file()]
        return b"".join(path.read_bytes() for path in [*files, data / "runs" / "small" / "events.jsonl"])


def sent(server: ScriptedServer) -> str:
    return json.dumps([seen.json for seen in server.seen])


def counts(manifest: dict[str, Any]) -> tuple[int, int, int]:
    return manifest["rows_in"], manifest["rows_out"], sum(manifest["rejected"].values())


class TestSecrets:
    def test_by_default_prompts_with_secrets_are_not_asked_and_are_counted(
        self, tmp_path: Path, server: ScriptedServer
    ) -> None:
        project = Project(tmp_path, server, {**SECRET_ROWS, **CLEAN}, samples=2, sampling={"temperature": 1.0})
        told = project.run()
        assert sorted({*server.prompts}) == sorted(CLEAN.values()) and len(server.prompts) == 8
        assert CANARY not in sent(server) and CANARY not in told
        assert counts(project.manifest) == (14, 8, 6)
        assert project.manifest["rejected"] == {"outbound:anthropic_key": 6}
        assert {row["reason"] for row in project.rejects.values()} == {"outbound:anthropic_key"}
        outbound = {"prompts_blocked": 3, "prompts_redacted": 0, "matches": {"anthropic_key": 3}}
        assert project.manifest["metrics"]["outbound"] == outbound
        assert CANARY.encode() not in project.files_of_generate()

    def test_redacted_prompts_are_asked_and_kept_without_the_secret(
        self, tmp_path: Path, server: ScriptedServer
    ) -> None:
        project = Project(tmp_path, server, {**SECRET_ROWS, **CLEAN}, outbound={"secrets": "redact"})
        assert CANARY not in project.run()
        assert CANARY not in sent(server)
        assert "Why is [REDACTED:anthropic_key] refused?" in server.prompts
        assert len(server.prompts) == 7 and counts(project.manifest) == (7, 7, 0)
        assert {name for name, row in project.rows.items() if row.flags == ("redacted",)} == {*SECRET_ROWS}
        (question,) = project.rows["in-the-question"].prompt
        assert question.content == "Why is [REDACTED:anthropic_key] refused?"
        outbound = {"prompts_blocked": 0, "prompts_redacted": 3, "matches": {"anthropic_key": 3}}
        assert project.manifest["metrics"]["outbound"] == outbound
        assert CANARY.encode() not in project.files_of_generate()
        why = run_cli("why", "run.yaml", project.rows["in-the-question"].row_id, cwd=tmp_path)
        assert "HTTP 200" in why.stdout, "the request is found by what was asked"

    def test_off_means_that_they_leave_as_they_are(self, tmp_path: Path, server: ScriptedServer) -> None:
        project = Project(tmp_path, server, {**SECRET_ROWS, **CLEAN}, outbound={"secrets": False})  # YAML's bare off
        project.run()
        assert sent(server).count(CANARY) == 3
        assert counts(project.manifest) == (7, 7, 0) and "outbound" not in project.manifest["metrics"]
        assert all(row.flags == () for row in project.rows.values())

    def test_another_policy_asks_only_what_it_lets_out(self, tmp_path: Path, server: ScriptedServer) -> None:
        Project(tmp_path, server, {**SECRET_ROWS, **CLEAN}).run()
        server.seen.clear()
        Project(tmp_path, server, {**SECRET_ROWS, **CLEAN}, outbound={"secrets": "redact"}).run()
        assert len(server.prompts) == 3 and CANARY not in sent(server)

    def test_a_run_of_nothing_else_says_so_without_the_secret(self, tmp_path: Path, server: ScriptedServer) -> None:
        told = Project(tmp_path, server, SECRET_ROWS).run(code=2)
        assert server.seen == []
        assert "3 were rejected as outbound:anthropic_key" in told and "generate.outbound" in told
        assert CANARY not in told


class TestPersonalData:
    def test_it_leaves_unless_asked_to_stay(self, tmp_path: Path, server: ScriptedServer) -> None:
        Project(tmp_path, server, {**MAIL_ROWS, **CLEAN}).run()
        assert MAIL in sent(server)

    def test_each_policy_acts_on_its_own_kinds(self, tmp_path: Path, server: ScriptedServer) -> None:
        outbound = {"secrets": "block", "personal": "redact"}
        project = Project(tmp_path, server, {**SECRET_ROWS, **MAIL_ROWS, **CLEAN}, outbound=outbound)
        project.run()
        assert "Write to [REDACTED:email]." in server.prompts
        assert CANARY not in sent(server) and MAIL not in sent(server)
        assert project.manifest["rejected"] == {"outbound:anthropic_key": 3}
        assert project.manifest["metrics"]["outbound"]["matches"] == {"anthropic_key": 3, "email": 1}


def test_teachers_that_never_leave_this_machine_are_not_concerned(tmp_path: Path) -> None:
    config = write_project(tmp_path, rows=0)
    rows = [{"id": name, "prompt": prompt, "completion": "No."} for name, prompt in SECRET_ROWS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert run_cli("run", config.name, "--until", "generate", cwd=tmp_path).returncode == 0
    manifest = json.loads((tmp_path / "data/runs/small/generate/manifest.json").read_text("utf-8"))
    assert (manifest["rows_out"], "outbound" in manifest["metrics"]) == (3, False)
