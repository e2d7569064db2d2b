"""Local vLLM servers: started, watched, restarted, and gone when we are."""

import asyncio
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_limits import Limits
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.stage import Context, check_cancelled
from pipeline.teacher import watchdog
from pipeline.teacher.endpoint import Endpoint, api_endpoint, open_gate
from pipeline.teacher.request import model_folder
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

log = logging.getLogger(__name__)

MODEL_NAME = "teacher"
"""What the served model is called in requests; no path leaves this machine."""
RESTARTS = 2
POLL_S = 0.25
LOG_LINES = 3


@dataclass(slots=True)
class Serving:
    """Endpoints that answer, and the coroutine function that keeps them alive: it ends only by raising."""

    endpoints: list[Endpoint]
    supervise: Callable[[], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class Server:
    """One vLLM server behind its watchdog.

    Attributes:
        environment: its environment variables, with the GPUs that are its own.
        log: the server's output, appended to over restarts.
        records: folder of the watchdogs' records.
        endpoint: where it answers; its URL changes with a restart, since the port does.
    """

    teacher: VllmTeacher
    environment: dict[str, str]
    log: Path
    records: Path
    endpoint: Endpoint
    process: subprocess.Popen[bytes] | None = None
    restarts: int = field(default=0)

    def start(self) -> None:
        """Start the server on a free port; it is not healthy yet."""
        port = free_port()
        self.endpoint.url = f"http://127.0.0.1:{port}/v1/chat/completions"
        record = self.records / f"{secrets.token_hex(8)}.json"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-I", watchdog.__file__, str(record), *server_command(self.teacher, port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a ctrl-C in the terminal is ours to handle
                env=self.environment,
            )
        log.info("starting vLLM for %s, which takes a minute or so; its log: %s", self.teacher.model, self.log)

    async def wait_until_healthy(self, session: aiohttp.ClientSession, ctx: Context) -> None:
        """Poll the server's health.

        Raises:
            UsageError: it ended before it was healthy.
            Incomplete: it did not become healthy in time.
            Interrupted: a signal asked us to stop.
        """
        deadline = time.monotonic() + self.teacher.start_timeout_s
        while not await _get_ok(session, self.url("/health")):
            check_cancelled(ctx)
            if self.exit_code() is not None:
                todo = f"see {self.log}; then correct the teacher's settings"
                raise UsageError(
                    f"the vLLM server ended while starting: {self.last_lines()}", where=str(self.log), todo=todo
                )
            if time.monotonic() > deadline:
                what = f"the vLLM server was not ready after {self.teacher.start_timeout_s:g} s: {self.last_lines()}"
                raise Incomplete(
                    what, where=str(self.log), todo="raise the teacher's `start_timeout_s`, or see the log"
                )
            await asyncio.sleep(POLL_S)
        version = await _get_json(session, self.url("/version"))
        self.endpoint.engine = f"vllm {version.get('version', 'unknown')}"
        log.info("vLLM server ready at %s (%s)", self.endpoint.host, self.endpoint.engine)

    def exit_code(self) -> int | None:
        """The server's exit code, None while it runs."""
        return None if self.process is None else self.process.poll()

    def stop(self) -> None:
        """Close the watchdog's pipe and wait until it has killed the whole server; if it was killed itself, do that."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=4 * watchdog.GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        clear_stale(self.records)

    def url(self, path: str) -> str:
        """URL of one of the server's other routes."""
        return f"http://{self.endpoint.host}{path}"

    def last_lines(self) -> str:
        """The log's last lines, in one."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return " / ".join(line.strip()[-200:] for line in [line for line in lines if line.strip()][-LOG_LINES:])


@asynccontextmanager
async def serving(
    teacher: VllmTeacher | ApiTeacher, session: aiohttp.ClientSession, ctx: Context
) -> AsyncIterator[Serving]:
    """The endpoints of a teacher: an API's URL, or local servers that run as long as the block does.

    Raises:
        UsageError, Incomplete: a server does not come up; see `Server.wait_until_healthy` and `server_environments`.
    """
    if isinstance(teacher, ApiTeacher):
        yield Serving([api_endpoint(teacher)], _sleep_for_ever)
        return
    environments = server_environments(teacher, os.environ, installed_gpus())
    records = ctx.data / watchdog.RECORDS
    records.mkdir(parents=True, exist_ok=True)
    clear_stale(records)
    servers = [
        _new_server(teacher, environment, ctx.workdir / f"vllm-{index}.log", records)
        for index, environment in enumerate(environments)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            await server.wait_until_healthy(session, ctx)
        yield Serving([server.endpoint for server in servers], lambda: _supervise(servers, session, ctx))
    finally:
        for server in servers:
            server.stop()


def _new_server(teacher: VllmTeacher, environment: dict[str, str], log_path: Path, records: Path) -> Server:
    endpoint = Endpoint("", OPENAI_CHAT, MODEL_NAME, "vllm", None, open_gate(teacher.concurrency, Limits()))
    return Server(teacher, environment, log_path, records, endpoint)


def clear_stale(records: Path) -> None:
    """Kill the servers whose watchdog was killed, in this run or an earlier one."""
    for group in watchdog.clear_stale(records):
        log.warning("killed a vLLM server (process group %d) that had outlived its watchdog", group)


async def _supervise(servers: list[Server], session: aiohttp.ClientSession, ctx: Context) -> None:
    """Restart what ends; requests in flight fail meanwhile and are tried again.

    Raises:
        Incomplete: a server ended once more than it may be restarted.
    """
    while True:
        await asyncio.sleep(POLL_S)
        for server in servers:
            code = server.exit_code()
            if code is not None:
                await _restart(server, code, session, ctx)


async def _restart(server: Server, code: int, session: aiohttp.ClientSession, ctx: Context) -> None:
    if server.restarts >= RESTARTS:
        what = f"the vLLM server ended {RESTARTS + 1} times (exit {code}): {server.last_lines()}"
        raise Incomplete(what, where=str(server.log), todo=f"see the log, then resume with: {ctx.resume_command}")
    log.warning("the vLLM server ended (exit %d): %s; restarting it", code, server.last_lines())
    ctx.events.emit("server_restarted", exit_code=code, restarts=server.restarts + 1)
    server.restarts += 1
    server.endpoint.gate.shut()
    server.stop()
    server.start()
    await server.wait_until_healthy(session, ctx)
    server.endpoint.gate.reopen()


def server_command(teacher: VllmTeacher, port: int) -> list[str]:
    """The command line of a server. Sampling defaults come from our config, not from the model's generation config;
    its end-of-turn tokens are still honoured."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model_folder(teacher)), "--served-model-name", MODEL_NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm", "--dtype", teacher.dtype]
    command += ["--tensor-parallel-size", str(teacher.tensor_parallel_size)]
    if teacher.max_model_len is not None:
        command += ["--max-model-len", str(teacher.max_model_len)]
    if teacher.quantization is not None:
        command += ["--quantization", teacher.quantization]
    return [*command, *teacher.args]


def server_environments(teacher: VllmTeacher, inherited: Mapping[str, str], installed: int) -> list[dict[str, str]]:
    """The environment of each server: ours, no telemetry, what the config adds, and of several servers each its own
    `tensor_parallel_size` GPUs. Without GPUs, or with an empty CUDA_VISIBLE_DEVICES, none are dealt out.

    Args:
        inherited: our own environment; its CUDA_VISIBLE_DEVICES, or the config's, says which GPUs are ours.
        installed: number of GPUs in this machine.

    Raises:
        UsageError: there are fewer GPUs than the servers need.
    """
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    environment = {**inherited, **quiet, **teacher.env}
    gpus = visible_gpus(environment.get("CUDA_VISIBLE_DEVICES"), installed)
    each = teacher.tensor_parallel_size
    if not gpus:
        return [dict(environment) for _ in range(teacher.servers)]
    if len(gpus) < teacher.servers * each:
        what = f"{teacher.servers} servers of {each} GPUs each need {teacher.servers * each}; {len(gpus)} are visible"
        todo = "lower the teacher's `servers` or `tensor_parallel_size`, or set CUDA_VISIBLE_DEVICES"
        raise UsageError(what, where="teachers.*.servers", todo=todo)
    if teacher.servers == 1:
        return [environment]  # nobody to share with: its own arguments decide (pipeline parallel, say)
    slices = [gpus[index * each : (index + 1) * each] for index in range(teacher.servers)]
    return [{**environment, "CUDA_VISIBLE_DEVICES": ",".join(some)} for some in slices]


def visible_gpus(variable: str | None, installed: int) -> Sequence[str]:
    """Names of the GPUs we may use, as CUDA reads its variable: all when it is not set, else up to the first -1."""
    if variable is None or installed == 0:
        return [str(index) for index in range(installed)]
    names = [name.strip() for name in variable.split(",") if name.strip()]
    return names[: names.index("-1")] if "-1" in names else names


def installed_gpus() -> int:
    """Number of NVIDIA GPUs in this machine; 0 where their tool is missing or fails."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def free_port() -> int:
    """A port that is free now; somebody may take it before the server does, who then ends and says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def _get_ok(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=5), allow_redirects=False) as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


async def _get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=5), allow_redirects=False) as response:
            body = await response.json(content_type=None)
            return body if isinstance(body, dict) else {}
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return {}


async def _sleep_for_ever() -> None:
    await asyncio.Event().wait()
