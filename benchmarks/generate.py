"""What asking a teacher costs the client: this pipeline beside plain loops and the bulk clients of the field.

`python -m benchmarks.generate client` runs every client whose environment exists (`make bench-peers` makes those of the
peers) against one instant server, in turn, several rounds, and prints medians. `memory` asks 10k and 200k requests;
`plan` plans 1 M prompts; `vllm` compares wall time on a real server with a bare loop. Each writes its table into
benchmarks/results/.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.teacher import watchdog

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / ".peers"
RESULTS = ROOT / "benchmarks" / "results"
TIMEOUT_S = 1800.0
IN_PROCESS = "vllm.LLM.chat in process"
VLLM_FLAGS = ("--dtype", "float32", "--enforce-eager", "--generation-config", "vllm", "--max-model-len", "256")


@dataclass(frozen=True, slots=True)
class Client:
    """A program that asks.

    Attributes:
        name: for the table.
        module: under benchmarks/clients.
        environment: folder under benchmarks/.peers with its packages; None: this interpreter.
        share: part of the requests that it is given, since the slow ones need no more for a figure a request.
    """

    name: str
    module: str
    environment: str | None = None
    share: float = 1.0

    @property
    def python(self) -> Path:
        """The interpreter to run it with."""
        return Path(sys.executable) if self.environment is None else PEERS / self.environment / "bin" / "python"


BARE = Client("aiohttp", "aiohttp_loop")
CLIENTS = (
    Client("this pipeline, whole stage", "ours"),
    Client("the same again, all answers stored", "ours_again"),
    BARE,
    Client("httpx", "httpx_loop", "sdk", 0.2),
    Client("openai SDK", "openai_sdk", "sdk", 0.2),
    Client("curator", "curator_client", "curator", 0.2),
    Client("data-designer", "data_designer_client", "data-designer", 0.1),
    Client("distilabel", "distilabel_client", "distilabel", 0.1),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One run of one client.

    Attributes:
        cpu_ms: CPU milliseconds a request (user + system, children included).
        rate: requests a second.
        peak_mb: largest resident set of the process in MB.
    """

    client: str
    concurrency: int
    requests: int
    cpu_ms: float
    rate: float
    peak_mb: float


@contextmanager
def instant_server() -> Iterator[str]:
    """The base URL of an instant server in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "instant_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        server.stdin.close()


def run_client(client: Client, url: str, model: str, count: int, concurrency: int, max_tokens: int) -> Figure:
    """One run in a fresh process.

    Raises:
        RuntimeError: it failed, or did not get every answer.
    """
    asked = max(1, int(count * client.share))
    arguments = [url, model, str(asked), str(concurrency), str(max_tokens)]
    command = [str(client.python), "-m", f"benchmarks.clients.{client.module}", *arguments]
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=_environment(home),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # engines write to stdout as well
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{client.name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    figures = json.loads(lines[-1])
    if figures["answered"] != asked:
        raise RuntimeError(f"{client.name} got {figures['answered']} of {asked} answers")
    cpu_ms, rate = 1000 * figures["cpu_s"] / asked, asked / figures["wall_s"]
    return Figure(client.name, concurrency, asked, cpu_ms, rate, figures["peak_mb"])


def _environment(home: str) -> dict[str, str]:
    """A clean one: no telemetry, caches of its own, nothing that one client leaves for the next."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TELEMETRY_ENABLED": "false",
        "NEMO_TELEMETRY_ENABLED": "false",
        "DISTILABEL_LOG_LEVEL": "ERROR",
    }
    keys = {"OPENAI_API_KEY": "none", "CURATOR_DISABLE_RICH_DISPLAY": "1", "CURATOR_VIEWER": "0"}
    return {"PATH": "/usr/bin:/bin", "HOME": home, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **quiet, **keys}


def compare_clients(count: int, rounds: int, concurrencies: Sequence[int]) -> list[Figure]:
    """Every client that is installed, in turn, `rounds` times over, so that what else the machine does hits all."""
    figures = []
    clients = [client for client in CLIENTS if client.python.exists()]
    for client in CLIENTS:
        if client not in clients:
            print(f"not installed (make bench-peers): {client.name}", file=sys.stderr)
    with instant_server() as url:
        for number in range(rounds):
            for concurrency in concurrencies:
                for client in clients:
                    figure = run_client(client, url, "instant", count, concurrency, 128)
                    print(f"round {number + 1}: {figure}", file=sys.stderr)
                    figures.append(figure)
    return figures


def client_table(figures: Sequence[Figure]) -> str:
    """Medians as a Markdown table, with each client's CPU as a multiple of ours at the same concurrency."""
    lines = [
        "| client | in flight | requests | CPU ms/request (min–max) | × ours | requests/s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[int, str], list[Figure]] = {}
    for figure in figures:
        groups.setdefault((figure.concurrency, figure.client), []).append(figure)
    for (concurrency, name), group in sorted(groups.items(), key=lambda item: item[0][0]):
        cpu = [figure.cpu_ms for figure in group]
        ours = statistics.median(figure.cpu_ms for figure in groups[concurrency, CLIENTS[0].name])
        rate = statistics.median(figure.rate for figure in group)
        peak = max(figure.peak_mb for figure in group)
        lines.append(
            f"| {name} | {concurrency} | {group[0].requests:,} | {statistics.median(cpu):.3f} "
            f"({min(cpu):.3f}–{max(cpu):.3f}) | {statistics.median(cpu) / ours:.1f} | {rate:,.0f} | {peak:,.0f} |"
        )
    return "\n".join(lines)


def memory_table(url: str, counts: Sequence[int]) -> tuple[str, list[Figure]]:
    """Peak memory of our whole stage at different numbers of requests."""
    figures = [run_client(CLIENTS[0], url, "instant", count, 256, 128) for count in counts]
    lines = ["| requests | peak MB | CPU ms/request |", "|---|---|---|"]
    lines += [f"| {figure.requests:,} | {figure.peak_mb:,.0f} | {figure.cpu_ms:.3f} |" for figure in figures]
    return "\n".join(lines), figures


@contextmanager
def vllm_server(model: Path) -> Iterator[str]:
    """The base URL of a real vLLM server, with its watchdog; its start is not part of any figure."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *VLLM_FLAGS]
    command += ["--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "watchdog.json"
        watched = [sys.executable, "-I", watchdog.__file__, str(record), *command]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        log = (Path(folder) / "log").open("wb")
        with log, subprocess.Popen(watched, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment) as server:
            assert server.stdin is not None
            while not _is_healthy(port):
                if server.poll() is not None:
                    raise RuntimeError((Path(folder) / "log").read_text("utf-8", "replace")[-2000:])
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
            server.stdin.close()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def compare_on_vllm(count: int, rounds: int) -> list[Figure]:
    """Our whole stage and a bare aiohttp loop against one real server, in turn and in changing order; then the engine
    in process, once a round."""
    model = ROOT / "data" / "models" / "tiny-teacher"
    pair = [CLIENTS[0], BARE]
    figures = []
    with vllm_server(model) as url:
        for number in range(rounds):
            for client in pair if number % 2 == 0 else reversed(pair):
                figures.append(run_client(client, url, "teacher", count, 256, 32))
                print(f"round {number + 1}: {figures[-1]}", file=sys.stderr)
    for _ in range(rounds):
        figures.append(run_client(Client(IN_PROCESS, "vllm_in_process"), str(model), "teacher", count, 256, 32))
        print(f"in process: {figures[-1]}", file=sys.stderr)
    return figures


def vllm_table(figures: Sequence[Figure]) -> str:
    """Wall seconds: median and range of each way, and the ratio to the bare loop."""
    walls: dict[str, list[float]] = {}
    for figure in figures:
        walls.setdefault(figure.client, []).append(figure.requests / figure.rate)
    bare = statistics.median(walls[BARE.name])
    lines = ["| way | wall s, median (min–max) | ratio to the bare loop |", "|---|---|---|"]
    for name, times in walls.items():
        median = statistics.median(times)
        lines.append(f"| {name} | {median:.1f} ({min(times):.1f}–{max(times):.1f}) | {median / bare:.2f} |")
    return "\n".join(lines)


def measure_plan(count: int) -> tuple[str, list[Figure]]:
    """`plan` of a run whose prompts are imported and whose answers are all missing; every request is counted."""
    figure = run_client(Client("plan", "plan_only"), "http://127.0.0.1:9/v1", "none", count, 1, 128)
    wall, cpu = figure.requests / figure.rate, figure.cpu_ms * figure.requests / 1000
    table = "| prompts | wall s | CPU s | peak MB |\n|---|---|---|---|\n"
    return f"{table}| {count:,} | {wall:.1f} | {cpu:.1f} | {figure.peak_mb:,.0f} |", [figure]


def save(name: str, title: str, table: str, figures: Sequence[Figure]) -> None:
    """Print a table and write it, with the single runs and the machine, into benchmarks/results/."""
    print(f"{title}\n\n{table}")
    RESULTS.mkdir(exist_ok=True)
    day = datetime.now(UTC).date().isoformat()
    facts = {"machine": platform.processor() or platform.machine(), "python": platform.python_version(), "date": day}
    runs = json.dumps({**facts, "runs": [asdict(figure) for figure in figures]}, indent=1)
    (RESULTS / f"{name}.json").write_text(runs + "\n", "utf-8")
    (RESULTS / f"{name}.md").write_text(f"{title} ({day})\n\n{table}\n", "utf-8")


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["client", "memory", "vllm", "plan"])
    parser.add_argument("--requests", type=int, help="a figure's number of requests")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    count: int = chosen.requests or {"client": 10_000, "memory": 10_000, "vllm": 5_000, "plan": 1_000_000}[chosen.what]
    match chosen.what:
        case "client":
            figures = compare_clients(count, chosen.rounds, (64, 256))
            title = "Client cost against an instant local server, 100-token answers, medians"
            save("generate-client", title, client_table(figures), figures)
        case "memory":
            with instant_server() as url:
                table, figures = memory_table(url, (count, 20 * count))
            save("generate-memory", "Memory of the whole stage by number of requests", table, figures)
        case "vllm":
            figures = compare_on_vllm(count, chosen.rounds)
            title = f"Wall time on a real vLLM server, {count:,} prompts of at most 32 tokens, 256 in flight"
            save("generate-vllm", title, vllm_table(figures), figures)
        case "plan":
            table, figures = measure_plan(count)
            save("generate-plan", "Planning a run", table, figures)


if __name__ == "__main__":
    main()
