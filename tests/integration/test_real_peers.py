"""Real servers of two makers, vLLM's and transformers' own, asked through one config: by a command line or by a URL."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_logprobs import LogprobsConfig
from pipeline.core.config_server import HOST, MODEL, PORT, ServerTeacher
from pipeline.core.config_teacher import Retry, Sampling, Teacher
from pipeline.core.errors import UsageError
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher.ask import ask
from pipeline.teacher.logprobs import wanted_logprobs
from pipeline.teacher.request import Asked
from pipeline.teacher.server import free_port
from tests.support import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SUMS = [(12, 3), (20, 5), (7, 8), (31, 11)]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ADDRESS = ("--host", HOST, "--port", PORT)


@dataclass(frozen=True)
class Peer:
    """A server that can be started: its command line, and what it calls the model."""

    command: tuple[str, ...]
    served_name: str


PEERS = {
    "vllm": Peer(
        (
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL),
            *("--served-model-name", "teacher", "--dtype", "float32", "--enforce-eager", *ADDRESS),
        ),
        "teacher",
    ),
    "transformers": Peer(
        (
            *(str(Path(sys.executable).with_name("transformers")), "serve", MODEL),
            *("--device", "cpu", "--dtype", "float32", *ADDRESS),
        ),
        MODEL,
    ),
}


@pytest.fixture(scope="module")
def model(root: Path) -> Path:
    return root / "data" / "models" / "tiny-teacher"


@pytest.fixture(scope="module", params=PEERS)
def url_and_name(request: pytest.FixtureRequest, model: Path, tmp_path_factory) -> Iterator[tuple[str, str]]:
    """Base URL of a server that somebody else started, and the model's name there."""
    peer, port = PEERS[request.param], free_port()
    values = {HOST: "127.0.0.1", PORT: str(port), MODEL: str(model)}
    command = [values.get(arg, arg) for arg in peer.command]
    log = tmp_path_factory.mktemp("peer") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **ENV}, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 500
        while not is_healthy(port):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", values.get(peer.served_name, peer.served_name)
    finally:
        process.terminate()
        process.wait()


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def answers(folder: Path, teacher: Teacher, logprobs: LogprobsConfig | None = None) -> list[Any]:
    asked = Asked.of(teacher, Sampling(max_tokens=16), 0, DigestCache(folder / "digests.json"))
    asked = replace(asked, logprobs=wanted_logprobs(logprobs, teacher))
    messages = [[Message("user", f"What is {a} + {b}?")] for a, b in SUMS]
    requests = [asked.request("sums", f"p{number}", 0, each) for number, each in enumerate(messages)]
    return list(ask(teacher, asked, Retry(timeout_s=120), requests, make_context(folder)))


def check(found: list[Any]) -> None:
    """The tiny teacher can add, so that a wrong template or a sampled answer would show."""
    assert [answer.text.strip() for answer in found] == [str(a + b) for a, b in SUMS]
    assert {answer.finish_reason for answer in found} == {"stop"}
    assert all(answer.prompt_tokens and answer.completion_tokens for answer in found)


def test_one_config_fits_the_urls_of_both(url_and_name: tuple[str, str], tmp_path: Path) -> None:
    url, name = url_and_name
    teacher = {"kind": "openai", "base_url": url, "provider": "peer", "model": name, "concurrency": 2}
    check(answers(tmp_path, OpenAITeacher.model_validate(teacher)))


def test_logprobs_come_from_the_one_that_offers_them_and_the_other_is_told_so(
    url_and_name: tuple[str, str], tmp_path: Path
) -> None:
    url, name = url_and_name
    settings = {"kind": "openai", "base_url": url, "provider": "peer", "model": name, "concurrency": 2}
    teacher, wanted = OpenAITeacher.model_validate(settings), LogprobsConfig(top_k=5, token_ids=True)
    if name != "teacher":  # transformers' server refuses the field
        with pytest.raises(UsageError, match="refuses to answer with logprobs"):
            answers(tmp_path, teacher, wanted)
        return
    found = answers(tmp_path, teacher, wanted)
    check(found)
    assert all(len(answer.logprobs.ids) == answer.completion_tokens for answer in found)


@pytest.mark.parametrize("peer", [pytest.param("vllm", marks=pytest.mark.soak), "transformers"])
def test_one_config_starts_both(peer: str, model: Path, tmp_path: Path) -> None:
    how = {"command": PEERS[peer].command, "served_name": PEERS[peer].served_name, "env": ENV, "concurrency": 2}
    check(answers(tmp_path, ServerTeacher.model_validate({"kind": "server", "model": str(model), **how})))
