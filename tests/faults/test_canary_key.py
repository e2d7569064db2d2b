"""A key that is easy to find is used in requests that work and that fail, and repeated by the server wherever it can:
afterwards it stands in no file and in no output."""

import base64
import json
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.processes import running
from tests.faults.scripted_server import Act, ScriptedServer, Seen, failure
from tests.faults.table_run import Ended, Project
from tests.support import cli_env, probe_command, wait_for

KEY = "sk-CANARY-9f+2c/7a=e1-Zq04"
VARIABLE = "BIRD_KEY"
PIECE = "CANARY-9f"
"""Even this much of it would be a leak."""
RUN = ("run", "run.yaml", "--until", "generate", "--verbose", "--json")


def base64_forms(text: str) -> Iterator[str]:
    """How base64 of something that holds the text shows it, at each of the three places where it may begin."""
    for before in range(3):
        encoded = base64.b64encode(b"?" * before + text.encode()).decode()
        yield encoded[-(-before * 8 // 6) : len(encoded) - 4]


FORMS = [form.encode() for text in (PIECE, KEY) for form in (text, quote(text, safe=""), *base64_forms(text))]


def holds_key(text: bytes) -> bool:
    return any(form in text for form in FORMS)


def pieces(path: Path) -> Iterator[bytes]:
    """A file as it is, and what its format hides: all values of SQLite and Parquet files, uncompressed."""
    yield path.read_bytes()
    if path.suffix == ".sqlite":
        with tempfile.TemporaryDirectory() as folder:
            for file in path.parent.glob(f"{path.name}*"):
                shutil.copy(file, folder)
            with closing(sqlite3.connect(Path(folder) / path.name)) as db:
                for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    yield from _values(value for row in db.execute(f"SELECT * FROM {table}") for value in row)
    if path.suffix == ".parquet":
        yield str(pq.read_schema(path).metadata).encode()
        yield from _values(value for row in pq.read_table(path).to_pylist() for value in row.values())


def _values(values: Iterable[object]) -> Iterator[bytes]:
    for value in values:
        if not isinstance(value, bytes):
            yield repr(value).encode()
            continue
        yield value
        try:
            yield zlib.decompress(value)
        except zlib.error:
            continue


def leaks(folder: Path) -> list[str]:
    """Files below a folder that hold the key in any form."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) > 5
    return [str(path.relative_to(folder)) for path in files if any(map(holds_key, pieces(path)))]


class Parrot:
    """A script that repeats the key's header in every header and body, whatever it does with the request."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.came: set[str] = set()
        self.last_s = 3600.0
        """Seconds until the last prompt is answered."""

    def __call__(self, seen: Seen, _: int) -> Act:
        again, said = seen.prompt in self.came, json.dumps({**seen.headers, "url": quote(KEY, safe="")})
        assert KEY in said, "the server has it"
        self.came.add(seen.prompt)
        act = self._act("good" if again and seen.prompt != "bad" else seen.prompt, said)
        loud = next(value for value in seen.headers.values() if KEY in value)
        act.headers |= {"x-request-id": loud, "request-id": loud, "X-Echo": loud, "Retry-After-Ms": "1"}
        act.delay_s = self.last_s if seen.prompt == "last" else 0.0
        return act

    def _act(self, prompt: str, said: str) -> Act:
        match prompt:
            case "bad":
                return failure(400, said, headers={"WWW-Authenticate": said})
            case "broken":
                return failure(500, said)
            case "busy":
                return failure(429, said)
            case "page":
                return Act(body=f"<html>{said}".encode())
            case "garbled":
                return Act(body=self.answer(said)[:-4])
            case "cut":
                return Act(body=self.answer(said), cut=60)
            case "slashes":
                return Act(body=self.answer(said).replace(b"/", b"\\/"))
        return Act(body=self.answer(said))

    def answer(self, text: str) -> bytes:
        """A completion in the format of the kind."""
        match self.kind:
            case "anthropic":
                usage = {"input_tokens": 5, "output_tokens": 5}
                content = [{"type": "text", "text": text}]
                found: dict[str, Any] = {"content": content, "stop_reason": "end_turn", "usage": usage}
            case "gemini":
                content = {"role": "model", "parts": [{"text": text}]}
                found = {"candidates": [{"content": content, "finishReason": "STOP"}]}
            case _:
                message = {"role": "assistant", "content": text}
                found = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return json.dumps(found).encode()


def list_of_models(seen: Seen) -> Act:
    """A list that repeats the key too."""
    return Act(body=json.dumps({"data": [{"id": name, "root": KEY} for name in ("m", KEY)], **seen.headers}).encode())


PROMPTS = ("good", "bad", "broken", "busy", "page", "garbled", "cut", "slashes", "last")
FAILING = 5
"""Of them that fail at first and are asked again."""


def write(folder: Path, kind: str, server: ScriptedServer) -> Project:
    """A project of one kind of API whose key is in `VARIABLE`."""
    project = Project.write(folder, server, PROMPTS)
    teacher = {"kind": kind, "base_url": server.url, "model": "m", "api_key": f"${{env:{VARIABLE}}}", "concurrency": 2}
    teacher |= {"license": "MIT", "provider": "scripted"}  # else the terms of the kind's provider would be judged
    project.change(teachers={"api": teacher})
    return project


@pytest.fixture(autouse=True)
def exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


@pytest.mark.parametrize("kind", ["openai", "anthropic", "gemini"])
class TestOneOfEachApi:
    def test_a_run_that_is_killed_and_resumed_leaves_it_nowhere(self, tmp_path: Path, kind: str) -> None:
        parrot = Parrot(kind)
        with ScriptedServer(parrot, on_get=list_of_models) as server:
            project = write(tmp_path, kind, server)
            with running(*RUN, cwd=tmp_path) as run:
                run.await_(lambda: parrot.came == {*PROMPTS}, "all have been asked")
                run.await_(lambda: len(server.seen) == len(PROMPTS) + FAILING, "and again, where they failed")
                wait_for(lambda: any(size_of_wal(path) for path in project.segments), "something in the -wal")
                run.kill()
                assert not holds_key("\n".join(run.said).encode())
            assert project.segments
            assert leaks(tmp_path) == []
            parrot.last_s = 0.0
            ended = project.call(*RUN)
        assert ended.code == 0, ended.said
        assert project.texts().keys() == {*PROMPTS}
        assert project.rejects() == {"bad": "bad_request"}
        assert "***" in project.texts()["good"], "it was blotted out"
        assert leaks(tmp_path) == []
        assert silent(ended)
        for command in COMMANDS:
            shown = project.call(*(project.records()[0].row_id if word == "ROW_ID" else word for word in command))
            assert shown.code == (2 if "doctor" in command else 0), "the host is gone, which doctor tells"
            assert silent(shown), command
        assert leaks(tmp_path) == [], "nor in what was exported"

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_server_that_refuses_it_and_says_it_back_is_not_quoted(
        self, tmp_path: Path, kind: str, status: int
    ) -> None:
        quoting = failure(status, f"Bearer {KEY} is wrong", code=f"wrong: {KEY}", headers={"x-request-id": KEY})
        with ScriptedServer(lambda seen, number: quoting, on_get=list_of_models) as server:
            ended = write(tmp_path, kind, server).call(*RUN)
        assert ended.code == 2
        assert VARIABLE in ended.last[2]
        assert silent(ended)
        assert leaks(tmp_path) == []


COMMANDS = (
    ("status", "run.yaml", "--json"),
    ("plan", "run.yaml", "--json", "--verbose"),
    ("why", "run.yaml", "ROW_ID"),
    ("responses", "list", "--json"),
    ("responses", "count", "run.yaml", "--json"),
    ("responses", "export", "--all", "--out", "exported.parquet"),
    ("verify", "run.yaml"),
    ("doctor", "run.yaml", "--json"),
)


def size_of_wal(segment: Path) -> int:
    wal = segment.with_name(f"{segment.name}-wal")
    return wal.stat().st_size if wal.exists() else 0


def silent(ended: Ended) -> bool:
    return not holds_key((ended.said + ended.printed).encode())


class TestTracebacks:
    def test_a_bug_whose_message_holds_it_is_told_without_it(self, tmp_path: Path) -> None:
        """The whole program on a stage that logs its headers and fails with them, as a bug might."""
        with ScriptedServer(Parrot("openai")) as server:
            write(tmp_path, "openai", server)
        body = f"""
            import logging
            headers = {{"Authorization": "Bearer " + os.environ["{VARIABLE}"]}}
            logging.getLogger("pipeline.probe").warning("asking with %s", headers)
            ctx.events.emit("asking", headers=headers)
            try:
                raise KeyError(headers["Authorization"])
            except KeyError as error:
                raise ValueError(str(headers)) from error
        """
        command = probe_command(tmp_path, body, *RUN[:2], *RUN[4:])
        done = subprocess.run(command, cwd=tmp_path, env=cli_env(), capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert re.search(r"KeyError: 'Bearer \*\*\*'[\s\S]*ValueError: .*Bearer \*\*\*", done.stderr)
        assert not holds_key((done.stdout + done.stderr).encode())
        assert leaks(tmp_path) == []

    def test_one_that_no_header_can_hold_is_told_of_without_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two lines of a file, say."""
        monkeypatch.setenv(VARIABLE, f"{KEY}\n{KEY}")
        with ScriptedServer(Parrot("openai")) as server:
            ended = write(tmp_path, "openai", server).call(*RUN)
            assert (ended.code, server.seen) == (2, [])
        assert (
            ended.last[0]
            == f"error: the environment variable {VARIABLE} holds a line break or another control character"
        )
        assert silent(ended)
        assert leaks(tmp_path) == []


@pytest.mark.parametrize("placeholder", ["x", "null", "EMPTY", "event"])
def test_a_placeholder_for_servers_that_want_no_key_changes_no_answer(
    tmp_path: Path, placeholder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, placeholder)
    text = f"an EMPTY box, or a null event: {placeholder}"
    with ScriptedServer(lambda seen, number: Act(body=Parrot("openai").answer(text))) as server:
        project = write(tmp_path, "openai", server)
        assert project.call(*RUN).code == 0
    assert set(project.texts().values()) == {text}
    events = (tmp_path / "data/runs/small/events.jsonl").read_text("utf-8").splitlines()
    assert json.loads(events[-1])["event"] == "run_ended"


def test_the_search_would_find_it(tmp_path: Path) -> None:
    """In a compressed body, in the -wal of a living process, in a column, in a file's bytes, and encoded."""
    for number in range(6):
        (tmp_path / str(number)).write_text("nothing", "utf-8")
    assert leaks(tmp_path) == []
    (tmp_path / "plain").write_text(f"at {KEY}", "utf-8")
    (tmp_path / "piece").write_text(f"{KEY[:20]}…", "utf-8")
    (tmp_path / "url").write_text(f"?key={quote(KEY, safe='')}", "utf-8")
    for before in range(3):
        (tmp_path / f"base64-{before}").write_bytes(base64.b64encode(os.urandom(before) + KEY.encode() + b"xyz"))
    pq.write_table(pa.table({"body": [zlib.compress(KEY.encode())]}), tmp_path / "a.parquet", compression="zstd")
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE answers (body BLOB)")
        db.execute("INSERT INTO answers VALUES (?)", (zlib.compress(f"{KEY * 9}".encode()),))
        db.commit()
        expected = ["a.parquet", "a.sqlite", "base64-0", "base64-1", "base64-2", "piece", "plain", "url"]
        assert leaks(tmp_path) == expected
