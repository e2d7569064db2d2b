"""Local servers, of vLLM or any other program: started, watched, restarted, and gone when we are."""

import asyncio
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_limits import Limits
from pipeline.core.config_server import LocalServer, ServerTeacher
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.stage import Context, check_cancelled
from pipeline.teacher import watchdog
from pipeline.teacher.endpoint import Endpoint, api_endpoints, open_gate
from pipeline.teacher.gpus import installed_gpus, server_environments
from pipeline.teacher.identity import Look, check_same, get, look_at
from pipeline.teacher.launch import LOOPBACK, Launch, installed_engine, launch_of, sets_chunking
from pipeline.teacher.poison import Quarantine
from pipeline.teacher.pool import keep_endpoints, together
from pipeline.teacher.request import Asked
from pipeline.teacher.seeds import settle_seeds, wants_seeds
from pipeline.teacher.wires.openai_chat import OPENAI_CHAT

log = logging.getLogger(__name__)

POLL_S = 0.25
LOG_LINES = 3
LOG_BYTES = 65_536


@dataclass(slots=True)
class Serving:
    """Endpoints that answer, and who looks after them.

    Attributes:
        supervise: the coroutine function that keeps them alive: it ends only by raising.
        quarantine: for servers of our own, whose engines a prompt may end.
    """

    endpoints: list[Endpoint]
    supervise: Callable[[], Coroutine[Any, Any, None]]
    quarantine: Quarantine | None = None


@dataclass(slots=True)
class Server:
    """One server behind its watchdog.

    Attributes:
        launch: how it is started.
        environment: its environment variables, with the GPUs that are its own.
        log: the server's output, appended to over restarts.
        records: folder of the watchdogs' records.
        endpoint: where it answers; its URL changes with a restart, since the port does.
        restarts: how often it was started again since the last death that was explained.
        first: what it said of its model when it was first healthy.
    """

    teacher: LocalServer
    launch: Launch
    environment: dict[str, str]
    log: Path
    records: Path
    endpoint: Endpoint
    process: subprocess.Popen[bytes] | None = None
    restarts: int = field(default=0)
    first: Look | None = None
    _log_start: int = 0

    def start(self) -> None:
        """Start the server on a free port; it is not healthy yet."""
        port = free_port()
        base_url = f"http://{LOOPBACK}:{port}{self.launch.base_path}"
        self.endpoint.url = OPENAI_CHAT.url(base_url, self.launch.served_name)
        self.endpoint.models_url = f"{base_url}/models"
        record = self.records / f"{secrets.token_hex(8)}.json"
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-I", watchdog.__file__, str(record), *self.launch.command_at(port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a ctrl-C in the terminal is ours to handle
                env=self.environment,
            )
        what, model = self.launch.label, self.teacher.model
        log.info("starting %s for %s, which may take a minute or so; its log: %s", what, model, self.log)

    async def wait_until_healthy(self, session: aiohttp.ClientSession, ctx: Context) -> None:
        """Poll the server's health.

        Raises:
            UsageError: it ended before it was healthy.
            Incomplete: it did not become healthy in time, or serves another model than before.
            Interrupted: a signal asked us to stop.
        """
        deadline = time.monotonic() + self.teacher.start_timeout_s
        while (await get(session, self.url(self.launch.health), {}))[0] != 200:
            check_cancelled(ctx)
            if self.exit_code() is not None:
                todo = f"see {self.log}; then correct the teacher's settings"
                raise UsageError(
                    f"{self.launch.label} ended while starting: {self.last_lines()}", where=str(self.log), todo=todo
                )
            if time.monotonic() > deadline:
                patience = f"{self.teacher.start_timeout_s:g} s"
                what = f"{self.launch.label} was not ready after {patience}: {self.last_lines()}"
                raise Incomplete(
                    what, where=str(self.log), todo="raise the teacher's `start_timeout_s`, or see the log"
                )
            await asyncio.sleep(POLL_S)
        self.endpoint.engine = await self._engine(session)
        now = await look_at(session, self.endpoint)
        self.first = self.first or now
        check_same(self.endpoint, self.first, now, ctx.resume_command)
        log.info("%s is ready at %s (%s)", self.launch.label, self.endpoint.host, self.endpoint.engine)

    async def _engine(self, session: aiohttp.ClientSession) -> str:
        """Name and, where there is a route for it, version of the engine."""
        if self.launch.version_path is None:
            return self.launch.engine
        _, body = await get(session, self.url(self.launch.version_path), {})
        version = body.get("version", "unknown") if isinstance(body, dict) else "unknown"
        return f"{self.launch.engine} {version}"

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

    def ran_out_of_memory(self) -> bool:
        """Whether the end of its log says so, in the words that PyTorch, CUDA and llama.cpp share."""
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, self.log.stat().st_size - LOG_BYTES))
            return b"out of memory" in file.read().lower()

    def last_lines(self) -> str:
        """The log's last lines, in one."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return " / ".join(line.strip()[-200:] for line in [line for line in lines if line.strip()][-LOG_LINES:])


@asynccontextmanager
async def serving(
    teacher: LocalServer | ApiTeacher, session: aiohttp.ClientSession, ctx: Context, asked: Asked | None = None
) -> AsyncIterator[Serving]:
    """The endpoints of a teacher: an API's URLs, or local servers that run as long as the block does.

    Args:
        asked: says whether requests are to carry seeds; None: they are not.

    Raises:
        UsageError, Incomplete: a server does not come up; see `Server.wait_until_healthy` and `server_environments`.
    """
    if isinstance(teacher, ApiTeacher):
        endpoints = api_endpoints(teacher)
        await settle_seeds(asked, teacher.kind, endpoints, session, ctx)
        firsts: dict[str, Look] = {}
        yield Serving(endpoints, lambda: keep_endpoints(endpoints, firsts, session, ctx))
        return
    gpus = installed_gpus()
    seeded_on_cpu = gpus == 0 and teacher.kind == "vllm" and wants_seeds(asked, teacher.kind)
    launch = launch_of(teacher, seeded_on_cpu=seeded_on_cpu and not sets_chunking(teacher))
    environments = server_environments(teacher, os.environ, gpus)
    records = ctx.data / watchdog.RECORDS
    records.mkdir(parents=True, exist_ok=True)
    clear_stale(records)
    servers = [
        _new_server(teacher, launch, environment, ctx.workdir / f"{teacher.kind}-{index}.log", records)
        for index, environment in enumerate(environments)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            await server.wait_until_healthy(session, ctx)
        quarantine = Quarantine(installed_engine(teacher))
        watches = [partial(_supervise, server, index, quarantine, session, ctx) for index, server in enumerate(servers)]
        endpoints = [server.endpoint for server in servers]
        for endpoint in endpoints:
            endpoint.takes_seeds = not (seeded_on_cpu and sets_chunking(teacher))
        await settle_seeds(asked, teacher.kind, endpoints, session, ctx)
        yield Serving(endpoints, lambda: together([watch() for watch in watches]), quarantine)
    finally:
        for server in servers:
            server.stop()


def _new_server(
    teacher: LocalServer, launch: Launch, environment: dict[str, str], log_path: Path, records: Path
) -> Server:
    gate = open_gate(teacher.concurrency, Limits())
    endpoint = Endpoint("", OPENAI_CHAT, launch.served_name, launch.engine, None, gate)
    endpoint.structured_outputs = teacher.structured_outputs if isinstance(teacher, ServerTeacher) else "vllm"
    return Server(teacher, launch, environment, log_path, records, endpoint)


def clear_stale(records: Path) -> None:
    """Kill the servers whose watchdog was killed, in this run or an earlier one."""
    for group in watchdog.clear_stale(records):
        log.warning("killed a server (process group %d) that had outlived its watchdog", group)


async def _supervise(
    server: Server, index: int, quarantine: Quarantine, session: aiohttp.ClientSession, ctx: Context
) -> None:
    """Restart what ends; requests in flight fail meanwhile and are tried again, under suspicion.

    Raises:
        Incomplete: the server ended once more than it may be restarted, not counting deaths by a prompt that was found.
        UsageError: it does not start again.
    """
    while True:
        await asyncio.sleep(POLL_S)
        code = server.exit_code()
        if code is None:
            continue
        if quarantine.crashed(index):
            server.restarts = 0
        await _restart(server, code, session, ctx)


async def _restart(server: Server, code: int, session: aiohttp.ClientSession, ctx: Context) -> None:
    label, allowed = server.launch.label, server.teacher.restarts
    if server.restarts >= allowed:
        what = f"{label} ended {allowed + 1} times (exit {code}): {server.last_lines()}"
        raise Incomplete(what, where=str(server.log), todo=f"see the log, then resume with: {ctx.resume_command}")
    log.warning("%s ended (exit %d): %s; restarting it", label, code, server.last_lines())
    ctx.events.emit("server_restarted", exit_code=code, restarts=server.restarts + 1)
    server.restarts += 1
    server.endpoint.gate.shut()
    if server.ran_out_of_memory():
        maximum = server.endpoint.gate.limit.halve()
        log.warning("its log speaks of too little memory: from now on it gets at most %d requests at a time", maximum)
    server.stop()
    server.start()
    await server.wait_until_healthy(session, ctx)
    server.endpoint.gate.reopen()


def free_port() -> int:
    """A port that is free now; somebody may take it before the server does, who then ends and says so."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port
