"""A real vLLM server on this machine's CPU, serving a random tiny model, through the stage `generate`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.core.config import GenerateStep
from pipeline.core.errors import UsageError
from pipeline.core.record import PROMPT_SCHEMA, Message, ShardWriter, iter_records, to_table
from pipeline.core.stage import Context, Result
from pipeline.stages import generate
from tests.support import a_prompt, make_context
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.vllm

PROMPTS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny model and a `prompts` artefact; its data folder is shared by the tests."""
    folder = tmp_path_factory.mktemp("vllm")
    make_tiny_model(folder / "model")
    write_prompts(folder / "prompts", PROMPTS)
    return folder


def write_prompts(folder: Path, count: int) -> None:
    rows = [
        a_prompt(prompt_id=f"p{i:03d}", group_id=f"g{i}", prompt=(Message("user", f"Say {i}"),)) for i in range(count)
    ]
    with ShardWriter(folder / "rows", PROMPT_SCHEMA) as writer:
        writer.write(to_table(PROMPT_SCHEMA, rows))


def config(model: Path, max_tokens: int = 24, **teacher: object) -> GenerateStep:
    settings = {
        "kind": "vllm",
        "model": str(model),
        "dtype": "float32",
        "license": "Apache-2.0",
        "start_timeout_s": 500,
    }
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    sampling = {"max_tokens": max_tokens}
    return GenerateStep.model_validate(
        {
            "teachers": {"tiny": {**settings, "env": env, **teacher}},
            "generate": {"teacher": "tiny", "sampling": sampling},
        }
    )


def run(folder: Path, out: str, ctx: Context, cfg: GenerateStep | None = None) -> Result:
    return generate.run(cfg or config(folder / "model"), {"prompts": folder / "prompts"}, folder / out, ctx)


def records_of_servers(ctx: Context) -> list[Path]:
    return sorted((ctx.data / "cache" / "servers").glob("*.json"))


def kill_first_server(ctx: Context) -> None:
    """Kill the API server's whole group as soon as it has answered something."""
    while ctx.progress.done == 0:
        time.sleep(0.01)
    record = json.loads(records_of_servers(ctx)[0].read_text())
    os.killpg(record["group"], signal.SIGKILL)


@pytest.mark.timeout(1500)
def test_a_server_that_is_killed_is_restarted_and_no_row_is_lost(folder):
    ctx = make_context(folder)
    killer = threading.Thread(target=kill_first_server, args=(ctx,), daemon=True)
    killer.start()
    result = run(folder, "first", ctx, config(folder / "model", concurrency=2))
    killer.join()
    assert (result.rows_in, result.rows_out, result.rejected) == (PROMPTS, PROMPTS, {})
    records = list(iter_records(folder / "first" / "rows"))
    assert [record.prompt_id for record in records] == [f"p{i:03d}" for i in range(PROMPTS)]
    assert {record.finish_reason for record in records} <= {"stop", "length"}
    assert all(record.prompt_tokens and record.completion_tokens for record in records)
    assert [name for name, _ in ctx.events.seen].count("server_restarted") == 1
    assert records_of_servers(ctx) == []


def test_when_every_answer_is_stored_no_server_is_started_and_the_rows_are_the_same(folder):
    ctx = make_context(folder / "again")
    (folder / "again" / "data").symlink_to(folder / "data")
    result = run(folder, "second", ctx, config(folder / "model", concurrency=64, args=["--max-num-seqs", "7"]))
    assert list(ctx.workdir.glob("vllm-*.log")) == []
    assert ctx.events.seen == []
    first, second = (list(iter_records(folder / out / "rows")) for out in ("first", "second"))
    assert first == second
    assert result.rows_out == PROMPTS


KILLED = """
import sys
from pathlib import Path
from tests.integration import test_vllm_server as tests
folder = Path(sys.argv[1])
tests.run(folder, "never", tests.make_context(folder), tests.config(folder / "model", max_tokens=400))
"""


@pytest.mark.timeout(900)
def test_kill_nine_of_the_pipeline_leaves_no_server_behind(folder, tmp_path):
    (tmp_path / "model").symlink_to(folder / "model")
    write_prompts(tmp_path / "prompts", 2000)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."})
    ctx = make_context(tmp_path)
    segments = tmp_path / "data" / "responses" / "segments"
    while not list(segments.glob("*.sqlite")):
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.1)
    group = json.loads(records_of_servers(ctx)[0].read_text())["group"]
    assert len(processes_in(group)) >= 2, "API server and engine"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while processes_in(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_in(group) == []
    assert records_of_servers(ctx) == []


def processes_in(group: int) -> list[str]:
    """State and name of the living processes of a group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,comm="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [f"{state} {name}" for pgid, state, name in rows if int(pgid) == group and not state.startswith("Z")]


@pytest.mark.timeout(900)
def test_a_server_that_cannot_start_says_why_in_three_lines(folder, tmp_path):
    ctx = make_context(tmp_path)
    with pytest.raises(UsageError) as caught:
        run(folder, "bad", ctx, config(folder / "model", max_model_len=100_000))
    message = str(caught.value)
    assert len(message.splitlines()) == 3
    assert "ended while starting" in message and "vllm-0.log" in message
    assert records_of_servers(ctx) == []
