"""Config of servers that a command line starts and of several URLs: what counts, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_server import ServerTeacher, command_that_counts
from pipeline.core.config_teacher import Sampling
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.runner.doctor.needs import check_program
from pipeline.teacher.launch import filled, installed_engine, launch_of
from pipeline.teacher.request import Asked
from pipeline.teacher.watchdog import names_of


def server(folder: Path, **changes: Any) -> ServerTeacher:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    settings = {"kind": "server", "model": str(folder / "model"), "command": ["serve", "--port", "{port}"]}
    return ServerTeacher.model_validate({**settings, **changes})


def pool(*urls: str) -> OpenAITeacher:
    settings = {"kind": "openai", "base_url": urls[0], "replicas": urls[1:], "provider": "p", "model": "m"}
    return OpenAITeacher.model_validate(settings)


def key(folder: Path, teacher: ServerTeacher | OpenAITeacher) -> str:
    asked = Asked.of(teacher, Sampling(), 0, DigestCache(folder / "digests.json"))
    return asked.request("s", "p", 0, [Message("user", "hello")]).key


class TestWhatCounts:
    @pytest.mark.parametrize(
        "command",
        [
            ["serve", "--port", "{port}", "--ctx", "8"],
            ["./bin/serve", "--ctx", "8", "--listen={host}:{port}"],
            ["serve", "--host", "{host}", "--ctx", "8", "{port}"],
        ],
    )
    def test_the_address_and_the_programs_folder_do_not(self, command):
        assert command_that_counts(command) == ["serve", "--ctx", "8"]

    def test_a_flag_before_a_placeholder_goes_with_it_and_no_other_does(self):
        assert command_that_counts(["serve", "--fast", "--port={port}", "x", "{port}"]) == ["serve", "--fast", "x"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"operational_args": ["--threads", "4"]},
            {"command": ["/elsewhere/serve", "--at", "{host}:{port}"]},
            {"served_name": "other", "health": "/ready", "base_path": "/", "servers": 2, "concurrency": 3},
            {"env": {"OMP_NUM_THREADS": "2"}},
        ],
    )
    def test_operational_settings_keep_the_stored_answers(self, tmp_path, changes):
        assert key(tmp_path, server(tmp_path, **changes)) == key(tmp_path, server(tmp_path))

    @pytest.mark.parametrize(
        "changes",
        [
            {"command": ["serve", "--port", "{port}", "--ctx", "8"]},
            {"command": ["other", "--port", "{port}"]},
            {"env": {"SEED": "2"}},
        ],
    )
    def test_what_may_change_answers_asks_anew(self, tmp_path, changes):
        assert key(tmp_path, server(tmp_path, **changes)) != key(tmp_path, server(tmp_path))

    def test_the_weights_do_by_their_bytes(self, tmp_path):
        before = key(tmp_path, server(tmp_path))
        (tmp_path / "model.gguf").write_bytes(b"weights")
        one = key(tmp_path, server(tmp_path, model=str(tmp_path / "model.gguf")))
        (tmp_path / "other.gguf").write_bytes(b"weights")
        assert one == key(tmp_path, server(tmp_path, model=str(tmp_path / "other.gguf"))) != before

    def test_more_urls_keep_the_stored_answers(self, tmp_path):
        assert key(tmp_path, pool("https://a.example/v1")) == key(
            tmp_path, pool("https://b.example/v1", "https://c.example/v1")
        )


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"command": ["serve", "--port", "8000"]}, "the pipeline chooses the port"),
            ({"command": []}, "at least 1"),
            ({"command": ["serve", "{port}", "--api-key", "x"]}, "takes a secret"),
            ({"operational_args": ["--api-key=x"]}, "takes a secret"),
            ({"env": {"HF_TOKEN": "x"}}, "looks like a secret"),
            ({"health": "health"}, "health"),
        ],
    )
    def test_of_a_server(self, tmp_path, changes, why):
        with pytest.raises(ValidationError, match=why):
            server(tmp_path, **changes)

    @pytest.mark.parametrize(
        ("url", "why"),
        [
            ("http://api.example/v1", "plain http"),
            ("https://user:word@api.example/v1", "must not hold a user"),
            ("https://a.example/v1/", "stands twice"),
        ],
    )
    def test_of_a_replica(self, url, why):
        with pytest.raises(ValidationError, match=why):
            pool("https://a.example/v1", url)


class TestDoctor:
    def test_a_program_that_is_not_there_is_said_before_a_run(self, tmp_path):
        assert check_program(server(tmp_path, command=["no-such-program", "{port}"])).state == "fail"
        assert check_program(server(tmp_path, command=["sh", "{port}"])).state == "ok"


class TestLaunch:
    def test_placeholders_are_replaced_once_and_other_braces_stay(self):
        assert filled('{"a": "{port}"}', {"{port}": "{host}", "{host}": "x"}) == '{"a": "{host}"}'

    def test_the_name_of_the_model_may_be_its_folder(self, tmp_path):
        assert launch_of(server(tmp_path, served_name="{model}")).served_name == str(tmp_path / "model")

    def test_another_version_of_a_program_is_another_engine(self, tmp_path):
        program = tmp_path / "serve"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        teacher = server(tmp_path, command=[str(program), "{port}"])
        before = installed_engine(teacher)
        assert before.startswith("serve ") and installed_engine(teacher) == before
        program.write_text("#!/bin/sh\nexit 1\n")
        assert installed_engine(teacher) != before

    def test_an_engine_that_python_runs_has_its_own_name(self, tmp_path):
        teacher = server(tmp_path, command=["python3", "-m", "sglang.launch_server", "--port", "{port}"])
        assert (launch_of(teacher).label, launch_of(teacher).engine) == ("the server sglang", "sglang")

    @pytest.mark.parametrize(
        ("command", "name"),
        [
            (["/usr/bin/python3.11", "-m", "vllm.entrypoints.openai.api_server", "--model", "x"], ["vllm"]),
            (["bin/llama-server", "--port", "1"], ["llama-server"]),
            (["python", "/a/serve.py", "8"], ["serve"]),
        ],
    )
    def test_the_word_by_which_a_servers_processes_are_known(self, command, name):
        assert names_of(command) == name
