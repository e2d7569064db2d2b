"""What a config needs: its files and models, keys, hosts, GPUs, memory and room on the disk."""

import json
import re
import shutil
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from pipeline.core.config import RunConfig
from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_base import LocalModel
from pipeline.core.config_prompts import HubSource
from pipeline.core.config_server import LocalServer, ServerTeacher
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.config_train import FullTuning
from pipeline.core.errors import PipelineError
from pipeline.core.lineage import OTHER_WEIGHTS
from pipeline.core.load import Loaded, require_test_answers
from pipeline.runner.doctor.finding import Finding
from pipeline.runner.doctor.folder import is_there
from pipeline.runner.doctor.machine import GIB, Gpu
from pipeline.runner.doctor.software import hub_folder, offline_variables
from pipeline.runner.steps import plan_steps, spec_of, stage_module
from pipeline.student.needed import lacking
from pipeline.student.weights import stored_weights

WELL_KNOWN_KEYS: Final = (
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "GEMINI_API_KEY",
    "OPENROUTER_API_KEY",
    "TOGETHER_API_KEY",
    "HF_TOKEN",
)
TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
CONNECT_S: Final = 2.0
TRAINED_BYTES: Final = 16
"""Bytes a parameter while all weights are trained: weights, gradients and AdamW's two moments in float32."""
CHECKPOINT_BYTES: Final = 12
"""Bytes a parameter of a checkpoint: weights and the two moments."""


def needs_engine(config: RunConfig) -> bool:
    """Whether the config starts vLLM."""
    return isinstance(config.teachers[config.generate.teacher], VllmTeacher) or config.evaluate.engine == "vllm"


def check_needs(
    loaded: Loaded, gpus: Sequence[Gpu], environment: Mapping[str, str], home: Path, free_disk: int
) -> list[Finding]:
    """All checks of this module. Asks no model and sends no key."""
    config = loaded.config
    teacher = config.teachers[config.generate.teacher]
    findings = [*check_files(loaded), *check_answers(loaded)]
    if isinstance(teacher, ApiTeacher):
        findings += [*check_keys(key_names(teacher), environment, needed=True), *map(check_host, teacher.urls)]
    models: dict[str, LocalModel] = {"student": config.student}
    if isinstance(teacher, LocalServer):
        findings += [check_loopback(), check_servers_fit(teacher, gpus)]
    if isinstance(teacher, ServerTeacher):
        findings.append(check_program(teacher))
    if isinstance(teacher, VllmTeacher):
        models["teacher"] = teacher
    for role, model in models.items():
        if model.folder is None:
            findings.append(check_hub_model(role, model, hub_folder(environment, home), offline_variables(environment)))
        elif is_there(model.folder):
            findings.append(check_model_folder(role, model.folder))
    findings += check_hub_prompts(config, offline_variables(environment))
    findings += check_training_needs(config)
    return [*findings, *check_launch(config, gpus), *check_training_fits(config, gpus, free_disk)]


def check_files(loaded: Loaded) -> list[Finding]:
    """Whether the files and folders that the config names exist."""
    named: dict[Path, str] = {}
    for step in plan_steps():
        for name, path in stage_module(step.kind).input_files(spec_of(step).config(loaded.config)).items():
            named.setdefault(path, name)
    todo = "correct the path; it is taken from the current folder"
    missing = [(name, path) for path, name in named.items() if not is_there(path)]
    if not missing:
        return [Finding("files named", "ok", f"all {len(named)} are there")]
    return [Finding("files named", "fail", f"{name}: {path} does not exist", todo) for name, path in missing]


def check_answers(loaded: Loaded) -> Iterator[Finding]:
    """Whether an evaluation has something to compare answers with."""
    try:
        require_test_answers(loaded)
    except PipelineError as error:
        yield Finding("evaluation", "warn", error.what, error.todo)


def key_names(teacher: ApiTeacher) -> list[str]:
    """The environment variable that the teacher's key is in."""
    return [] if teacher.key_variable is None else [teacher.key_variable]


def check_keys(names: Sequence[str], environment: Mapping[str, str], *, needed: bool) -> list[Finding]:
    """Which keys are set, by the names of their variables; no value is shown."""
    if needed:
        return [_check_key(name, environment.get(name, "")) for name in names]
    present = ", ".join(name for name in names if environment.get(name, ""))
    return [Finding("keys", "ok", f"set: {present}" if present else "none of the well-known ones is set")]


def _check_key(name: str, value: str) -> Finding:
    if not value:
        return Finding("key", "fail", f"{name} is not set", f"export {name}=… in this shell")
    if value != value.strip() or not value.isprintable():
        detail = f"{name} begins or ends with white space, or holds control characters"
        return Finding("key", "warn", detail, f"export {name} anew")
    return Finding("key", "ok", f"{name} is set")


def check_host(base_url: str, timeout_s: float = CONNECT_S) -> Finding:
    """Whether the teacher's host takes a connection; nothing is sent."""
    url = urlsplit(base_url)
    port = url.port or (443 if url.scheme == "https" else 80)
    refusals: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((url.hostname or "", port), timeout_s).close()
            refusals.append(None)
        except OSError as error:
            refusals.append(error.strerror or str(error))

    # In a thread, since looking a name up knows no time-out.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s + 0.5)
    refusal = refusals[0] if refusals else f"no answer within {timeout_s:g} s"
    if refusal is not None:
        todo = "start the server, or correct base_url; proxies of the environment are not used"
        return Finding("teacher's host", "fail", f"{url.hostname}:{port} cannot be reached: {refusal}", todo)
    return Finding("teacher's host", "ok", f"{url.hostname}:{port} takes connections")


def check_loopback() -> Finding:
    """Whether a local server can listen."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen()
    except OSError as error:
        todo = "allow this process to listen on 127.0.0.1"
        return Finding("local ports", "fail", f"127.0.0.1: {error.strerror}", todo)
    return Finding("local ports", "ok", "127.0.0.1 can be listened on")


def check_model_folder(role: str, folder: Path) -> Finding:
    """Whether a model's folder holds what loaders read."""
    if not folder.is_dir():
        return Finding(role, "fail", f"{folder} is not a folder", "name the folder that holds the model's files")
    lacking = [*_lacking(folder)]
    if lacking:
        todo = "copy the whole model folder" if len(lacking) > 1 else "complete the folder"
        if lacking == ["a chat template"]:
            todo = "take an instruct model, or add a chat_template.jinja"
        return Finding(role, "fail", f"{folder}: lacks {', '.join(lacking)}", todo)
    try:
        weights = stored_weights(folder)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return Finding(role, "fail", f"{folder}: its safetensors cannot be read", "copy the weights again")
    if weights is None:
        todo = "safetensors cannot run code when they are loaded; convert it"
        return Finding(role, "warn", f"{folder}: its weights are no safetensors", todo)
    size = f"{weights.parameters:,} parameters"
    return Finding(role, "ok", f"{folder}: {size}, tokenizer, chat template")


def _lacking(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "config.json"
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", *OTHER_WEIGHTS)):
        yield "weights"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = re.findall(r'"([^"]+\.safetensors)"', index.read_text("utf-8", "replace"))
        yield from sorted({name for name in names if not (folder / name).is_file()})
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        yield "a tokenizer"
    elif not _has_chat_template(folder):
        yield "a chat template"


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def check_hub_model(role: str, model: LocalModel, cache: Path, offline: Sequence[str]) -> Finding:
    """Whether a hub model is in the cache, or may be fetched. The hub is not asked."""
    name = f"{model.model}@{model.revision}"
    folder = cache / f"models--{model.model.replace('/', '--')}"
    try:
        commit = (folder / "refs" / f"{model.revision}").read_text("utf-8").strip()
    except OSError:
        commit = f"{model.revision}"
    if is_there(folder / "snapshots" / commit / "config.json"):
        return Finding(role, "ok", f"{name}: in the hub cache")
    if offline:
        todo = f"fetch it on a machine with a network, or unset {offline[0]}"
        return Finding(role, "fail", f"{name}: not in the hub cache, and {offline[0]} forbids to fetch it", todo)
    detail = f"{name}: not in the hub cache; the first run fetches it"
    return Finding(role, "warn", detail, "see that the disk has room for it")


def check_hub_prompts(config: RunConfig, offline: Sequence[str]) -> Iterator[Finding]:
    """Whether prompts from the hub may be fetched."""
    for name, prompt_set in config.prompts.sets.items():
        if isinstance(prompt_set.source, HubSource) and offline:
            todo = f"fine if it is in the cache already; else unset {offline[0]}"
            detail = f"{name}: {prompt_set.source.dataset} comes from the hub, and {offline[0]} is set"
            yield Finding("prompts", "warn", detail, todo)


def check_program(teacher: ServerTeacher) -> Finding:
    """Whether the program of a server's command line is there; it is not started."""
    if shutil.which(teacher.command[0]) is None:
        todo = "install it, or give its path in the teacher's `command`"
        return Finding("teacher's server", "fail", f"no such program: {teacher.command[0]}", todo)
    return Finding("teacher's server", "ok", f"{teacher.command[0]} is there")


def check_servers_fit(teacher: LocalServer, gpus: Sequence[Gpu]) -> Finding:
    """Whether there are GPUs for all servers."""
    wanted = teacher.servers * teacher.gpus_each
    detail = f"wanted: {teacher.servers} × {teacher.gpus_each}, here: {len(gpus)}"
    if len(gpus) < wanted and (gpus or (wanted > 1 and isinstance(teacher, VllmTeacher))):
        todo = "lower the teacher's `servers` or the GPUs of each (`tensor_parallel_size`, `gpus_per_server`)"
        return Finding("teacher's GPUs", "fail", detail, todo)
    return Finding("teacher's GPUs", "ok", detail if gpus else "none here; the CPU is used")


def check_launch(config: RunConfig, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Whether Accelerate's file can be read and fits this machine."""
    file, wanted = config.train.accelerate, config.train.processes
    if not is_there(file):
        return  # said by `check_files`
    try:
        launch: Any = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        launch = None
    if not isinstance(launch, dict):
        todo = "give a file that `accelerate config` wrote, or one of configs/accelerate/"
        yield Finding("accelerate", "fail", f"{file}: no YAML mapping", todo)
    elif launch.get("use_cpu", False) and gpus:
        todo = "to use it: use_cpu: false in that file"
        yield Finding("accelerate", "warn", f"{file}: on the CPU, though there is a GPU", todo)
    elif launch.get("use_cpu", False):
        yield Finding("accelerate", "ok", f"{file}: on the CPU, processes: {wanted}")
    elif len(gpus) < wanted:
        todo = "lower train.processes, or name a file with use_cpu: true"
        yield Finding("accelerate", "fail", f"{file}: GPUs wanted: {wanted}, here: {len(gpus)}", todo)
    else:
        yield Finding("accelerate", "ok", f"{file}: GPUs: {wanted} of {len(gpus)}")


def check_training_needs(config: RunConfig) -> Iterator[Finding]:
    """Whether the packages that the training's options need are installed, and the layers that it begins with there."""
    for error in lacking(config.train, config.student):
        yield Finding("training", "fail", f"{error.where}: {error.what}", error.todo)


def check_training_fits(config: RunConfig, gpus: Sequence[Gpu], free_disk: int) -> Iterator[Finding]:
    """Whether the student's training has room in the GPUs' memory and its checkpoints on the disk. Activations come on
    top, so this only finds what certainly does not fit."""
    folder = config.student.folder
    try:
        weights = None if folder is None else stored_weights(folder)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return  # said by `check_model_folder`
    if weights is None or not isinstance(config.train.tuning, FullTuning):
        return
    memory, wanted = sum(gpu.total for gpu in gpus), weights.parameters * TRAINED_BYTES
    if 0 < memory < wanted:
        detail = f"all weights need {wanted / GIB:.1f} GiB, the GPUs have {memory / GIB:.1f}"
        yield Finding("training", "warn", detail, "tuning: {kind: lora}, a smaller student, or more GPUs with FSDP2")
    count = config.train.checkpoint.keep + 1  # while one is written the oldest is still there
    disk = weights.parameters * CHECKPOINT_BYTES * count
    if free_disk < disk:
        detail = f"{count} checkpoints take {disk / GIB:.1f} GiB, {free_disk / GIB:.1f} are free"
        yield Finding("checkpoints", "warn", detail, "make room, or lower train.checkpoint.keep")
