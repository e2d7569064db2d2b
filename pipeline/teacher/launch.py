"""How each kind of local server is started: its command line, and the routes by which it is known to work."""

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.config_server import HOST, MODEL, PORT, LocalServer, ServerTeacher, program_name
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.lineage import digest_json
from pipeline.teacher.request import model_folder
from pipeline.teacher.watchdog import names_of

VLLM_NAME = "teacher"
"""What vLLM calls the served model in requests; no path leaves this machine."""
LOOPBACK = "127.0.0.1"
WHOLE_PROMPTS = ("--no-enable-chunked-prefill",)
CHUNKING_FLAGS = frozenset({"--enable-chunked-prefill", "--no-enable-chunked-prefill", "--max-num-batched-tokens"})
"""Whoever gives one of these decides on his own how prompts are taken in."""
VLLM_COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


@dataclass(frozen=True, slots=True)
class Launch:
    """One way to start a server.

    Attributes:
        label: the server in messages ("the vLLM server").
        command: program and arguments, with `{port}` and `{host}` in them.
        served_name: name of the model in requests.
        health: route that answers with 200 once the server is ready.
        base_path: path before `/chat/completions`.
        engine: name of the engine, recorded with each answer.
        version_path: route that tells the engine's version; None: there is none.
    """

    label: str
    command: tuple[str, ...]
    served_name: str
    health: str
    base_path: str
    engine: str
    version_path: str | None

    def command_at(self, port: int) -> list[str]:
        """The command line of a server that listens at `port`."""
        return [filled(arg, {PORT: str(port), HOST: LOOPBACK}) for arg in self.command]


def launch_of(teacher: LocalServer, *, seeded_on_cpu: bool = False) -> Launch:
    """How a teacher's servers are started; fetches a hub model that is not here yet.

    Args:
        seeded_on_cpu: requests will carry seeds, and vLLM runs on a CPU. There it ends over a seeded request whose
            prompt it takes in parts (version 0.32: "CPU Generator does not use offset"), so it is told not to.

    Raises:
        UsageError: the model cannot be found.
    """
    model = str(model_folder(teacher).absolute())
    if isinstance(teacher, ServerTeacher):
        name = engine_name(teacher.command)
        return Launch(
            label=f"the server {name}",
            command=tuple(filled(arg, {MODEL: model}) for arg in (*teacher.command, *teacher.operational_args)),
            served_name=filled(teacher.served_name, {MODEL: model}),
            health=teacher.health,
            base_path=teacher.base_path.rstrip("/"),
            engine=name,
            version_path=teacher.version_path,
        )
    assert isinstance(teacher, VllmTeacher)
    return Launch(
        label="the vLLM server",
        command=(*vllm_command(teacher, model), *(WHOLE_PROMPTS if seeded_on_cpu else ())),
        served_name=VLLM_NAME,
        health="/health",
        base_path="/v1",
        engine="vllm",
        version_path="/version",
    )


def engine_name(command: Sequence[str]) -> str:
    """Name of the engine that a command starts: its program, or what Python runs."""
    return next(iter(names_of(list(command))), program_name(command))


def vllm_command(teacher: VllmTeacher, model: str) -> tuple[str, ...]:
    """vLLM's command line. Sampling defaults come from our config, not from the model's generation config; its
    end-of-turn tokens are still honoured."""
    command = [*VLLM_COMMAND, "--model", model, "--served-model-name", VLLM_NAME, "--host", HOST, "--port", PORT]
    command += ["--generation-config", "vllm", "--dtype", teacher.dtype]
    command += ["--tensor-parallel-size", str(teacher.tensor_parallel_size)]
    if teacher.max_model_len is not None:
        command += ["--max-model-len", str(teacher.max_model_len)]
    if teacher.quantization is not None:
        command += ["--quantization", teacher.quantization]
    return (*command, *teacher.args)


def sets_chunking(teacher: LocalServer) -> bool:
    """Whether a vLLM teacher's own arguments say how prompts are taken in."""
    given = teacher.args if isinstance(teacher, VllmTeacher) else ()
    return not CHUNKING_FLAGS.isdisjoint(arg.partition("=")[0].replace("_", "-") for arg in given)


def filled(arg: str, values: dict[str, str]) -> str:
    """An argument with its placeholders replaced, in one pass; other braces (a JSON argument's) are left alone."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found.group()], arg)


def installed_engine(teacher: LocalServer) -> str:
    """The engine as it is installed, without starting it: the program's name and a digest that another version changes
    (size and time of the program's file and, for a Python program, time of the packages beside it).

    A digest that changes for another reason costs one more try of what ended the engine before.
    """
    command: Sequence[str] = teacher.command if isinstance(teacher, ServerTeacher) else VLLM_COMMAND
    found = shutil.which(command[0])
    if found is None:
        return engine_name(command)
    packages = sorted(Path(found).parent.parent.glob("lib/python3*/site-packages"))
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) for path in (Path(found), *packages)]
    return f"{engine_name(command)} {digest_json([list(each) for each in stats])[:12]}"
