"""The request key: what makes two questions the same question."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.core.config_api import OpenAITeacher
from pipeline.core.config_base import identity
from pipeline.core.config_teacher import ReplayTeacher, Sampling, VllmTeacher
from pipeline.core.errors import UsageError
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher.request import Asked, request_key, teacher_identity

ROOT = Path(__file__).parents[2]
MESSAGES = (Message("system", "Be brief."), Message("user", "What is 1 + 1?"))


def openai(**changes: object) -> OpenAITeacher:
    settings = {"kind": "openai", "base_url": "https://api.example.com/v1", "provider": "example", "model": "big"}
    return OpenAITeacher.model_validate({**settings, **changes})


def vllm(folder: Path, **changes: object) -> VllmTeacher:
    return VllmTeacher.model_validate({"kind": "vllm", "model": str(folder), **changes})


@pytest.fixture
def cache(tmp_path) -> DigestCache:
    return DigestCache(tmp_path / "digests.json")


def model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return folder


def key(teacher, cache, sample=0, messages=MESSAGES, draw=0, **sampling: object) -> str:
    return request_key(Asked.of(teacher, Sampling.model_validate(sampling), draw, cache), messages, sample)


def test_the_key_is_pinned_since_stored_answers_hang_on_it(cache):
    assert key(openai(), cache) == "7c66f040000fb01a4dcb886820830045adeaa2c4450e2c3af9e219565a0ded73"


@pytest.mark.parametrize(
    "change",
    [
        {"sample": 1},
        {"draw": 1},
        {"temperature": 0.1},
        {"top_p": 0.9},
        {"top_k": 5},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"stop": ["\n"]},
        {"messages": MESSAGES[1:]},
        {"messages": (*MESSAGES[:1], Message("user", "What is 1 + 2?"))},
        {"messages": (*MESSAGES[:1], Message("user", "What is 1 + 1?", "hm"))},
    ],
    ids=str,
)
def test_what_shapes_the_answer_changes_the_key(cache, change):
    assert key(openai(), cache, **change) != key(openai(), cache)


@pytest.mark.parametrize("change", [{"provider": "other"}, {"model": "small"}], ids=str)
def test_another_teacher_changes_the_key(cache, change):
    assert key(openai(**change), cache) != key(openai(), cache)


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": "https://elsewhere.example.com/v2"},
        {"api_key": "${env:OTHER}"},
        {"concurrency": 3},
        {"license": "MIT"},
        {"max_tokens_field": "max_completion_tokens"},
    ],
    ids=str,
)
def test_where_and_how_fast_we_ask_does_not_change_the_key(cache, change):
    assert key(openai(**change), cache) == key(openai(), cache)


def test_the_cap_does_not_change_the_key(cache):
    assert key(openai(), cache, max_tokens=9) == key(openai(), cache, max_tokens=900)


def test_weights_count_by_their_bytes_wherever_they_lie(cache, tmp_path):
    here, there = model(tmp_path / "here"), model(tmp_path / "there")
    other = model(tmp_path / "other", b"other weights")
    assert key(vllm(here), cache) == key(vllm(there), cache)
    assert key(vllm(other), cache) != key(vllm(here), cache)
    (here / "README.md").write_text("a card")
    assert key(vllm(here), cache) == key(vllm(there), cache)
    (here / "chat_template.jinja").write_text("{{ messages }}")
    assert key(vllm(here), cache) != key(vllm(there), cache)


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"dtype": "float32"}, True),
        ({"quantization": "fp8"}, True),
        ({"max_model_len": 512}, False),
        ({"servers": 2}, False),
        ({"tensor_parallel_size": 2}, False),
        ({"args": ["--max-num-seqs", "8", "--enforce-eager", "--gpu_memory_utilization=0.5"]}, False),
        ({"args": ["--reasoning-parser", "qwen3"]}, True),
        ({"args": ["--enforce-eager", "stray"]}, True),
        ({"args": ["--chat-template", "{{ messages }}"]}, True),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "1", "NCCL_DEBUG": "INFO"}}, False),
        ({"env": {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}}, True),
        ({"concurrency": 2}, False),
        ({"start_timeout_s": 5}, False),
    ],
    ids=str,
)
def test_of_the_engine_only_what_shapes_the_output_counts(cache, tmp_path, change, counts):
    folder = model(tmp_path / "model")
    assert (key(vllm(folder, **change), cache) != key(vllm(folder), cache)) is counts


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"args": ["--max-num-seqs", "8", "--enforce-eager"], "env": {"OMP_NUM_THREADS": "2"}}, False),
        ({"args": ["--reasoning-parser", "qwen3"]}, True),
        ({"env": {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}}, True),
        ({"max_model_len": 512}, True),
    ],
    ids=str,
)
def test_a_step_counts_the_flags_of_the_engine_that_may_change_answers(change, counts):
    assert (identity(vllm(Path("/m"), **change)) != identity(vllm(Path("/m")))) is counts


def test_the_way_in_which_a_flag_is_written_does_not_count():
    written = [
        ["--rope-theta", "5", "--seed", "1"],
        ["--seed=1", "--rope_theta=5", "--block-size", "16"],
    ]
    one, other = (identity(vllm(Path("/m"), args=args)) for args in written)
    assert one == other
    assert identity(vllm(Path("/m"), args=["--seed", "2", "--seed", "1"])) != identity(
        vllm(Path("/m"), args=["--seed", "1", "--seed", "2"])
    ), "the last one wins"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--quantization", "fp8"], "`quantization`"),
        (["--max_model_len=64"], "`max_model_len`"),
        (["-tp", "2"], "`tensor_parallel_size`"),
        (["--port", "1"], "chooses the address"),
        (["--config", "more.yaml"], "would not count"),
        (["--chat-template", "x.jinja"], "would not count"),
    ],
    ids=str,
)
def test_what_is_a_field_or_a_file_is_refused_among_the_arguments(args, says):
    with pytest.raises(ValidationError, match=says):
        vllm(Path("/m"), args=args)


@pytest.mark.parametrize("name", ["HF_TOKEN", "VLLM_API_KEY", "AWS_SECRET_ACCESS", "DB_PASSWORD"])
def test_a_secret_is_exported_and_not_written_into_a_config(name):
    with pytest.raises(ValidationError, match="export it"):
        vllm(Path("/m"), env={name: "canary-value"})
    assert vllm(Path("/m"), env={"TOKENIZERS_PARALLELISM": "false"}).env


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("LICENSE", False),
        ("LICENSE.txt", False),
        ("train.log", False),
        ("pytorch_model.bin", False),
        ("original/params.json", False),
        ("merges.txt", True),
        ("model-00002.safetensors", True),
        ("tokenizer/spiece.model", True),
        ("modeling_new.py", True),
    ],
)
def test_of_a_model_folder_only_what_a_loader_reads_counts(cache, tmp_path, name, counts):
    folder = model(tmp_path / "model")
    before = teacher_identity(vllm(folder), cache)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("more")
    assert (teacher_identity(vllm(folder), cache) != before) is counts


def test_weights_in_an_older_format_count_where_there_are_no_others(cache, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    before = teacher_identity(vllm(tmp_path), cache)
    (tmp_path / "pytorch_model.bin").write_bytes(b"other")
    assert teacher_identity(vllm(tmp_path), cache) != before


def test_a_temperature_that_is_not_sent_is_another_question(cache):
    assert len({key(openai(), cache, temperature=value) for value in (None, 0.0, 1.0)}) == 3


def test_replayed_completions_count_by_origin_and_bytes(cache, tmp_path):
    def replay(name: str, text: str, origin: str = "people") -> str:
        path = tmp_path / name
        path.write_text(text)
        teacher = ReplayTeacher.model_validate({"kind": "replay", "path": path, "origin": origin})
        return teacher_identity(teacher, cache)

    assert replay("a.jsonl", "x") == replay("b.jsonl", "x")
    assert len({replay("a.jsonl", "x"), replay("c.jsonl", "y"), replay("d.jsonl", "x", "others")}) == 3


def test_a_missing_model_folder_is_a_usage_error(cache, tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        teacher_identity(vllm(tmp_path / "nowhere"), cache)


@pytest.mark.parametrize(
    "url",
    ["http://api.example.com/v1", "http://10.0.0.1/v1", "http://169.254.169.254/v1", "http://localhost.evil.com/v1"],
)
def test_keys_and_prompts_do_not_travel_in_the_clear(url):
    with pytest.raises(ValidationError, match="plain http"):
        openai(base_url=url)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1/"])
def test_plain_http_is_fine_on_this_machine(url):
    assert openai(base_url=url).base_url == url.rstrip("/")


def test_a_url_holds_no_password():
    with pytest.raises(ValidationError, match="api_key"):
        openai(base_url="https://user:secret@api.example.com/v1")


HUB = """
import sys
import os
import subprocess
import sys
from pathlib import Path
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.lineage import DigestCache
from pipeline.teacher.request import teacher_identity
teacher = VllmTeacher.model_validate({"kind": "vllm", "model": "org/tiny", "revision": "1" * 40})
print(teacher_identity(teacher, DigestCache(Path(sys.argv[1]))))
"""


def test_a_hub_model_is_known_by_the_bytes_of_its_files_like_a_local_copy(cache, tmp_path):
    snapshot = model(tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / ("1" * 40))
    (snapshot / "pytorch_model.bin").write_bytes(b"what another program fetched does not count")
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-c", HUB, str(tmp_path / "other-digests.json")]
    printed = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == teacher_identity(vllm(model(tmp_path / "local")), cache)
