"""Config of servers that a command line starts and of several URLs: what counts, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_base import identity
from pipeline.core.config_server import ServerTeacher, command_that_counts
from pipeline.core.config_teacher import Sampling, VllmTeacher
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
    def test_the_programs_folder_does_not_and_arguments_do_as_they_are_written(self):
        assert command_that_counts(["./bin/serve", "--listen={host}:{port}"]) == ["serve", "--listen={host}:{port}"]

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (["serve", "--greedy", "{port}"], ["serve", "{port}"]),
            (["sh", "-c", "exec s --port {port} --lora a"], ["sh", "-c", "exec s --port {port} --lora b"]),
            (["serve", '{"port": {port}, "ctx": 8}'], ["serve", '{"port": {port}, "ctx": 9}']),
        ],
    )
    def test_what_stands_beside_a_placeholder_does(self, tmp_path, one, other):
        assert key(tmp_path, server(tmp_path, command=one)) != key(tmp_path, server(tmp_path, command=other))

    def test_the_name_in_requests_does_unless_it_is_the_default_or_the_models_own(self, tmp_path):
        names = {}
        for name in ("teacher", "{model}", "lora-a", "lora-b"):
            names.setdefault(key(tmp_path, server(tmp_path, served_name=name)), []).append(name)
        assert [*names.values()] == [["teacher", "{model}"], ["lora-a"], ["lora-b"]]
        assert "served_name" not in identity(server(tmp_path)) and identity(server(tmp_path, served_name="a"))

    @pytest.mark.parametrize(
        "changes",
        [
            {"operational_args": ["--threads", "4"]},
            {"command": ["/elsewhere/serve", "--port", "{port}"]},
            {"health": "/ready", "base_path": "/", "servers": 2, "concurrency": 3},
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
            ({"command": ["serve", "{port}", "--api-key", "x"]}, "--api-key looks like a secret"),
            ({"operational_args": ["--api-key=x"]}, "--api-key looks like a secret"),
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


SECRETS = [
    *(["--admin-api-key", "canary"], ["--admin_api_key=canary"], ["--Api-Key", "canary"], ["-hft", "canary"]),
    *(["--hf-token", "canary"], ["--ssl-keyfile-password", "canary"], ["--apikey=canary"], ["--db-passwd", "canary"]),
    *(["HF_TOKEN=canary"], ["x; export HF_TOKEN=canary; y"], ["-c", "serve --api-key canary"]),
    *(["--url", "http://user:canary@host/"], ["--x", "hf_canarycanarycanary"], ["--x=sk-canary-canary-canary"]),
    *(["--loader", '{"aws_secret_access_key": "canary"}'], ["--loader.aws_secret_access_key", "canary"]),
]
HARMLESS = [
    *(["--max-num-batched-tokens", "8"], ["--tokenizer-mode", "slow"], ["--long-prefill-token-threshold", "8"]),
    *(["--eos-token", "</s>"], ["--monkey-patch"], ["--skip-tokenizer-init"], ["--max-tokens=8"]),
    *(["--lora", "/data/hf_models/sk-small"], ["--url", "http://127.0.0.1:8000/a@b"], ["-k", "8"]),
    *(["--x", '{"eos_token": "</s>", "key": ""}'], ["{{ messages[0]['key'] }}"]),
]


class TestSecrets:
    @pytest.mark.parametrize("args", SECRETS, ids=str)
    def test_they_are_refused_in_the_arguments_of_both_kinds_and_never_quoted(self, tmp_path, args):
        for given in ({"command": ["serve", "{port}", *args]}, {"operational_args": args}):
            with pytest.raises(ValidationError, match="looks like a secret: export it") as caught:
                server(tmp_path, **given)
            assert "canary" not in str(caught.value)
        if args[0].startswith("--"):
            with pytest.raises(ValidationError, match="looks like a secret: export it"):
                VllmTeacher(kind="vllm", model="./m", args=tuple(args))

    @pytest.mark.parametrize("args", HARMLESS, ids=str)
    def test_what_only_sounds_like_one_is_taken(self, tmp_path, args):
        server(tmp_path, command=["serve", "{port}", *args], operational_args=args)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("HF_TOKEN", "x"), ("PASSWD", "x"), ("AWS_SESSION_CREDENTIALS", "x"), ("HUGGINGFACEHUB_APITOKEN", "x")),
            *(("WANDB_APIKEY", "x"), ("OPENAIAPIKEY", "x"), ("HTTPS_PROXY", "http://u:p@h"), ("S3_ACCESS_KEY_ID", "x")),
        ],
    )
    def test_they_are_refused_in_the_environment(self, tmp_path, name, value):
        with pytest.raises(ValidationError, match=f"{name} looks like a secret: export it"):
            server(tmp_path, env={name: value})

    @pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE", "PWD"])
    def test_other_variables_are_taken(self, tmp_path, name):
        assert server(tmp_path, env={name: "1"}).env == {name: "1"}


class TestFlagsOfVllm:
    @pytest.mark.parametrize("flag", ["--mod", "--served", "--host=x", "-t", "-qfp8", "--uds", "--hf-config-p"])
    def test_what_it_would_take_for_a_refused_one_is_refused(self, flag):
        with pytest.raises(ValidationError, match=f"{flag.partition('=')[0]} cannot be given here"):
            VllmTeacher(kind="vllm", model="./m", args=(flag, "x"))

    def test_a_template_in_a_file_is_refused_under_a_shorter_name_too(self):
        with pytest.raises(ValidationError, match="takes the template itself"):
            VllmTeacher(kind="vllm", model="./m", args=("--chat-templ", "file.jinja"))

    @pytest.mark.parametrize("flag", ["--model-impl", "--tokenizer-mode", "--seed", "-dp", "--port-range"])
    def test_longer_names_are_other_flags(self, flag):
        VllmTeacher(kind="vllm", model="./m", args=(flag, "x"))


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
