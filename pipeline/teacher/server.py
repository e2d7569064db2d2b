"""Local servers, of vLLM or any other program: started, watched, restarted, and gone when we are."""

import asyncio
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
from pipeline.teacher.poison import Death, Quarantine
from pipeline.teacher.pool import first_looks, keep_endpoints, together
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
        deaths: how often it ended since the last end, of any server, that was explained.
        unexplained: how many of these count against the restarts that it is allowed.
        is_lost: it is not started any more.
        first: what it said of its model when it was first healthy.
    """

    teacher: LocalServer
    launch: Launch
    environment: dict[str, str]
    log: Path
    records: Path
    endpoint: Endpoint
    process: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    unexplained: int = 0
    is_lost: bool = False
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

    async def wait_until_healthy(self, session: aiohttp.ClientSession, ctx: Context) -> Incomplete | None:
        """Poll the server's health; gives what went wrong where it ended, or was not healthy in time.

        Raises:
            Incomplete: it serves another model than before.
            Interrupted: a signal asked us to stop.
        """
        deadline = time.monotonic() + self.teacher.start_timeout_s
        while (await get(session, self.url(self.launch.health), {}))[0] != 200:
            check_cancelled(ctx)
            if self.exit_code() is not None:
                what = f"{self.launch.label} ended while starting: {self.last_lines()}"
                return Incomplete(what, where=str(self.log), todo=f"see the log, then run: {ctx.resume_command}")
            if time.monotonic() > deadline:
                patience = f"{self.teacher.start_timeout_s:g} s"
                what = f"{self.launch.label} was not ready after {patience}: {self.last_lines()}"
                return Incomplete(
                    what, where=str(self.log), todo="raise the teacher's `start_timeout_s`, or see the log"
                )
            await asyncio.sleep(POLL_S)
        self.endpoint.engine = await self._engine(session)
        now = await look_at(session, self.endpoint)
        self.first = self.first or now
        check_same(self.endpoint, self.first, now, ctx.resume_command)
        log.info("%s is ready at %s (%s)", self.launch.label, self.endpoint.host, self.endpoint.engine)
        return None

    async def become_healthy(self, session: aiohttp.ClientSession, ctx: Context) -> None:
        """Wait for the first start.

        Raises:
            UsageError: it ended before it was healthy.
            Incomplete: it did not become healthy in time.
            Interrupted: a signal asked us to stop.
        """
        trouble = await self.wait_until_healthy(session, ctx)
        if trouble is None:
            return
        if self.exit_code() is None:
            raise trouble
        todo = f"see {self.log}; then correct the teacher's settings"
        raise UsageError(trouble.what, where=trouble.where, todo=todo)

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
        UsageError, Incomplete: a server does not come up; see `Server.become_healthy` and `server_environments`. Or the
            URLs of an API serve different models.
    """
    if isinstance(teacher, ApiTeacher):
        endpoints = api_endpoints(teacher)
        await settle_seeds(asked, teacher.kind, endpoints, session, ctx)
        firsts = await first_looks(endpoints, session)
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
            await server.become_healthy(session, ctx)
        fleet = Fleet(servers, Quarantine(installed_engine(teacher), len(servers)), session, ctx)
        endpoints = [server.endpoint for server in servers]
        for endpoint in endpoints:
            endpoint.takes_seeds = not (seeded_on_cpu and sets_chunking(teacher))
        await settle_seeds(asked, teacher.kind, endpoints, session, ctx)
        yield Serving(endpoints, fleet.supervise, fleet.quarantine)
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


@dataclass(slots=True)
class Fleet:
    """The servers of one teacher, kept alive.

    Attributes:
        quarantine: of requests in whose company one of them died.
    """

    servers: Sequence[Server]
    quarantine: Quarantine
    session: aiohttp.ClientSession
    ctx: Context

    async def supervise(self) -> None:
        """Restart what ends; requests in flight fail meanwhile and are tried again, under suspicion. A server that ends
        too often is given up while others work.

        Raises:
            Incomplete: none is left, or one serves another model than before.
        """
        await together([self._keep(server, index) for index, server in enumerate(self.servers)])

    async def _keep(self, server: Server, index: int) -> None:
        """Go on wherever an earlier pass over the requests left the server, be it in the middle of a restart."""
        gate = server.endpoint.gate
        while not server.is_lost:
            code = server.exit_code()
            if code is not None:
                self._bury(server, index, code)
            elif not gate.is_shut:
                await asyncio.sleep(POLL_S)
            elif (trouble := await server.wait_until_healthy(self.session, self.ctx)) is None:
                gate.reopen()
            elif server.exit_code() is None:
                self._give_up(server, trouble)

    def _bury(self, server: Server, index: int, code: int) -> None:
        """A server ended: start it again, if it may be."""
        ctx, label, allowed = self.ctx, server.launch.label, server.teacher.restarts
        was_up = not server.endpoint.gate.is_shut
        server.endpoint.gate.shut()
        server.deaths += 1
        match self.quarantine.crashed(index):
            case Death.EXPLAINED:
                for each in self.servers:
                    each.deaths = each.unexplained = 0
            case Death.UNEXPLAINED:
                server.unexplained += 1
        if server.unexplained > allowed:
            what = f"{label} ended {server.deaths} times (exit {code}): {server.last_lines()}"
            todo = f"see the log, then resume with: {ctx.resume_command}"
            self._give_up(server, Incomplete(what, where=str(server.log), todo=todo))
            return
        log.warning("%s ended (exit %d): %s; restarting it", label, code, server.last_lines())
        ctx.events.emit("server_restarted", exit_code=code, restarts=server.deaths)
        if was_up and server.ran_out_of_memory():
            maximum = server.endpoint.gate.limit.halve()
            log.warning("its log speaks of too little memory: from now on it gets at most %d requests at once", maximum)
        server.stop()
        server.start()

    def _give_up(self, server: Server, why: Incomplete) -> None:
        """Let no request to a server any more.

        Raises:
            Incomplete: it was the last one.
        """
        server.stop()
        server.is_lost = True
        if all(each.is_lost for each in self.servers):
            raise why
        log.warning("%s; it is not started again, the other servers go on without it", why.what)
        self.ctx.events.emit("server_lost", host=server.endpoint.host)


def free_port() -> int:
    """A port that is free now; somebody may take it before the server does, who then ends and says so."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port
