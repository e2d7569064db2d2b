"""Servers that a command line starts: supervised like vLLM's, and freed of the prompt that ends them."""

import asyncio
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_server import ServerTeacher
from pipeline.core.config_teacher import Retry, Sampling
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher import watchdog
from pipeline.teacher.ask import ask
from pipeline.teacher.request import Asked
from pipeline.teacher.server import serving
from pipeline.teacher.transport import open_session
from tests.faults import command_server
from tests.support import make_context, wait_for

QUICK = Retry(budget_s=60, first_wait_s=0.01, max_wait_s=0.05, timeout_s=20)
PROMPTS = [f"prompt {i}" for i in range(60)]


class Served:
    """A teacher served by `command_server.py`, and the folder its answers are kept in."""

    def __init__(self, folder: Path, *options: str, **teacher: Any) -> None:
        self.folder, self.ctx = folder, make_context(folder)
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "config.json").write_text("{}")
        command = [sys.executable, command_server.__file__, "{port}", str(folder), *options]
        settings = {"kind": "server", "model": str(folder / "model"), "command": command, "start_timeout_s": 60}
        self.teacher = ServerTeacher.model_validate({**settings, **teacher})

    def ask(self, prompts: list[str]) -> list[Any]:
        asked = Asked.of(self.teacher, Sampling(max_tokens=32), 0, DigestCache(self.folder / "digests.json"))
        requests = [asked.request("set", f"p{i}", 0, [Message("user", prompt)]) for i, prompt in enumerate(prompts)]
        return list(ask(self.teacher, asked, QUICK, requests, self.ctx))

    def texts(self, prompts: list[str]) -> list[str]:
        return [answer.rejected or answer.text for answer in self.ask(prompts)]

    @property
    def starts(self) -> list[str]:
        path = self.folder / "starts"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def answered(self) -> Counter[str]:
        path = self.folder / "answered"
        return Counter(path.read_text().splitlines() if path.exists() else [])

    def restarts(self) -> list[int]:
        return [fields["restarts"] for name, fields in self.ctx.events.seen if name == "server_restarted"]

    def kill(self) -> None:
        """Kill the server that was started last, as soon as it has answered something."""
        wait_for(lambda: self.answered, "an answer")
        os.kill(int(self.starts[-1].split()[0]), signal.SIGKILL)


def upper(prompts: list[str]) -> list[str]:
    return [prompt.upper() for prompt in prompts]


class TestCommandServers:
    def test_one_is_started_asked_and_gone_afterwards(self, tmp_path):
        served = Served(tmp_path, version_path="/version")
        assert served.texts(PROMPTS) == upper(PROMPTS)
        assert len(served.starts) == 1
        pid = int(served.starts[0].split()[0])
        assert not Path(f"/proc/{pid}").exists()
        assert list((served.ctx.data / watchdog.RECORDS).iterdir()) == []
        assert (served.ctx.workdir / "server-0.log").exists()

    def test_none_is_started_when_every_answer_is_stored(self, tmp_path):
        served = Served(tmp_path)
        first = served.ask(PROMPTS[:5])
        assert served.ask(PROMPTS[:5]) == first
        assert len(served.starts) == 1

    def test_placeholders_are_filled_and_operational_arguments_come_last(self, tmp_path):
        served = Served(tmp_path, "--path", "{model}", "--json", '{"a": 1}', operational_args=["--delay", "0.01"])
        served.ask(["one"])
        arguments = served.starts[0].split(maxsplit=2)[2]
        assert arguments == f'{tmp_path} --path {tmp_path}/model --json {{"a": 1}} --delay 0.01'

    def test_of_several_each_gets_requests_and_its_own_gpus(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pipeline.teacher.server.installed_gpus", lambda: 4)
        served = Served(tmp_path, "--delay", "0.01", servers=2, gpus_per_server=2, concurrency=2)
        assert served.texts(PROMPTS) == upper(PROMPTS)
        assert len(served.starts) == 2
        assert json.loads((tmp_path / "environment").read_text())["CUDA_VISIBLE_DEVICES"] in ("0,1", "2,3")

    def test_one_that_is_killed_is_restarted_and_no_row_is_lost(self, tmp_path):
        served = Served(tmp_path, "--delay", "0.02", concurrency=4)
        killer = threading.Thread(target=served.kill)
        killer.start()
        assert served.texts(PROMPTS) == upper(PROMPTS)
        killer.join()
        assert served.restarts() == [1]

    def test_one_that_cannot_start_says_why(self, tmp_path):
        (tmp_path / "refuse_start").touch()
        with pytest.raises(UsageError, match="ended while starting: the weights do not fit"):
            Served(tmp_path).ask(["one"])

    def test_one_that_does_not_start_again_is_given_up_after_the_restarts_allowed(self, tmp_path):
        """It worked before, so that its settings are no mistake: the run can be resumed."""
        served = Served(tmp_path, "--delay", "0.02", concurrency=4, restarts=1)
        (tmp_path / "refuse_start").write_text("2 3 4")
        killer = threading.Thread(target=served.kill)
        killer.start()
        with pytest.raises(Incomplete, match="ended 3 times"):
            served.ask(PROMPTS)
        killer.join()
        assert len(served.starts) == 3

    def test_a_start_that_fails_after_a_death_is_one_more_death(self, tmp_path):
        """The memory of the one that was killed may not be free yet."""
        served = Served(tmp_path, "--delay", "0.02", concurrency=4)
        (tmp_path / "refuse_start").write_text("2")
        killer = threading.Thread(target=served.kill)
        killer.start()
        assert served.texts(PROMPTS) == upper(PROMPTS)
        killer.join()
        assert served.restarts() == [1, 2]

    def test_a_restart_that_one_pass_began_is_finished_by_the_next(self, tmp_path):
        """A pass ends when nothing is left to ask, which may be amid a restart; longer answers are then asked for."""
        served = Served(tmp_path)

        async def work() -> None:
            async with open_session(5) as session, serving(served.teacher, session, served.ctx) as serves:
                gate = serves.endpoints[0].gate
                first = asyncio.create_task(serves.supervise())
                os.kill(int(served.starts[-1].split()[0]), signal.SIGKILL)
                while not gate.is_shut:
                    await asyncio.sleep(0.01)
                first.cancel()
                second = asyncio.create_task(serves.supervise())
                while gate.is_shut:
                    await asyncio.sleep(0.01)
                second.cancel()

        asyncio.run(asyncio.wait_for(work(), 60))
        assert len(served.starts) == 2

    def test_one_of_several_that_is_given_up_leaves_its_work_to_the_others(self, tmp_path):
        served = Served(tmp_path, "--delay", "0.02", concurrency=4, servers=2, restarts=0)
        (tmp_path / "refuse_start").write_text("3")
        killer = threading.Thread(target=served.kill)
        killer.start()
        prompts = [f"prompt {i}" for i in range(200)]
        assert served.texts(prompts) == upper(prompts)
        killer.join()
        assert len(served.starts) == 3
        assert [name for name, _ in served.ctx.events.seen].count("server_lost") == 1

    def test_one_that_serves_another_model_after_a_restart_gets_no_requests(self, tmp_path):
        served = Served(tmp_path, "--delay", "0.02", concurrency=4)

        def change_and_kill() -> None:
            wait_for(lambda: served.answered, "an answer")
            (tmp_path / "root").write_text("another")
            served.kill()

        killer = threading.Thread(target=change_and_kill)
        killer.start()
        with pytest.raises(Incomplete, match="serves 'another' as 'teacher', before it was 'one'"):
            served.ask(PROMPTS)
        killer.join()
        assert len(served.starts) == 2


class TestPoison:
    def test_a_prompt_that_ends_the_engine_is_refused_and_all_others_are_answered_once(self, tmp_path):
        prompts = [*PROMPTS[:30], f"the {command_server.POISON}", *PROMPTS[30:]]
        served = Served(tmp_path, "--delay", "0.05", concurrency=32)
        answers = served.ask(prompts)
        assert [answer.rejected for answer in answers] == [
            "engine_crash" if command_server.POISON in prompt else None for prompt in prompts
        ]
        assert [answer.text for answer in answers if answer.rejected is None] == upper(PROMPTS)
        assert len(served.starts) == 4, "three deaths, the last of them alone"
        assert set(served.answered) == set(PROMPTS)

    def test_several_use_up_no_restarts(self, tmp_path):
        """Each is found by the death it dies alone, after which the count begins anew."""
        poisons = [f"{command_server.POISON} {i}" for i in range(3)]
        served = Served(tmp_path, "--delay", "0.02", concurrency=64)
        assert served.texts([*PROMPTS, *poisons]) == [*upper(PROMPTS), *["engine_crash"] * 3]
        assert max(served.restarts()) <= 2
        assert set(served.answered) == set(PROMPTS)

    @pytest.mark.parametrize("servers", [1, 2])
    def test_several_are_found_without_a_restart_to_spare(self, tmp_path, servers):
        """The deaths that it takes to find them are no failures of the server, whichever of several died."""
        mixed = [*PROMPTS[:10], f"{command_server.POISON} 0", *PROMPTS[10:20], f"{command_server.POISON} 1"]
        served = Served(tmp_path, "--delay", "0.05", concurrency=64, servers=servers, restarts=0)
        texts = served.texts(mixed)
        assert texts == ["engine_crash" if command_server.POISON in prompt else prompt.upper() for prompt in mixed]
        assert set(served.answered) == set(PROMPTS[:20])

    def test_a_suspect_that_is_refused_for_something_else_keeps_nobody_waiting(self, tmp_path):
        prompts = [command_server.POISON, f"the {command_server.REFUSED} one", *PROMPTS]
        served = Served(tmp_path, "--delay", "0.1", concurrency=4)
        assert served.texts(prompts) == ["engine_crash", "bad_request", *upper(PROMPTS)]

    @pytest.mark.parametrize(("prompt", "most"), [("large", 4), ("other", 32)])
    def test_a_server_that_ran_out_of_memory_gets_half_as_many_requests_at_a_time(self, tmp_path, caplog, prompt, most):
        served = Served(tmp_path, concurrency=32)
        assert served.texts([f"{prompt} {command_server.POISON}"]) == ["engine_crash"]
        said = [record.args for record in caplog.records if "too little memory" in record.message]
        assert said == ([(16,), (8,), (most,)] if prompt == "large" else [])

    def test_the_refusal_is_remembered_as_long_as_the_engine_is_the_same(self, tmp_path):
        served = Served(tmp_path, "--delay", "0.02")
        assert served.texts(["fine", command_server.POISON]) == ["FINE", "engine_crash"]
        starts = len(served.starts)
        assert served.texts(["fine", command_server.POISON]) == ["FINE", "engine_crash"]
        assert len(served.starts) == starts, "nothing was left to ask"
        newer = tmp_path / "python"
        newer.symlink_to(sys.executable)
        again = served.teacher.model_copy(update={"command": (str(newer), *served.teacher.command[1:])})
        served.teacher = again
        assert served.texts(["fine", command_server.POISON]) == ["FINE", "engine_crash"]
        assert len(served.starts) > starts, "another engine may answer it"
