"""`doctor` says of each thing that a run needs whether it is there, and what to do; it changes nothing."""

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from pipeline import cli
from pipeline.core.config_base import LocalModel
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.load import Loaded, load_config
from pipeline.core.machine import cgroup_memory
from pipeline.runner.doctor import examine, folder, machine, needs, software, usable_gpus
from pipeline.runner.doctor.finding import Finding
from pipeline.runner.doctor.machine import GIB, Gpu
from tests.support import cli_env, write_project

ROOT = Path(__file__).resolve().parent.parent.parent
TINY_BASE = ROOT / "data/models/tiny-base"
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 0, "570.1")
SECRET = "sk-CANARY-0123456789abcdef"


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def config(project: Path, **sections: Any) -> Loaded:
    return load_config(write_project(project, **sections))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as current folder, with a student that is complete."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_BASE, tmp_path / "student")
    (tmp_path / "accelerate.yaml").write_text("use_cpu: true\n")
    return tmp_path


class TestEveryFinding:
    def test_one_that_is_not_ok_says_what_to_do(self, project: Path) -> None:
        loaded = config(
            project,
            teachers={"big": {"kind": "vllm", "model": "Org/Big", "revision": "main"}},
            generate={"teacher": "big"},
        )
        found = examine(project / "data", loaded, {"HF_HUB_OFFLINE": "1"}, project)
        assert len(found) >= 20
        assert "fail" in states(found).values()
        assert [finding for finding in found if (finding.todo is None) != (finding.state == "ok")] == []

    def test_looking_changes_nothing(self, project: Path) -> None:
        loaded = config(project)
        before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
        examine(project / "data", loaded, {}, project)
        after = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
        assert set(after) == set(before)


class TestCores:
    @pytest.mark.parametrize(
        ("usable", "quota", "detail"), [(8, None, "8"), (2, None, "2 of 8"), (8, 1.5, "1.5 of 8"), (2, 4.0, "2 of 8")]
    )
    def test_the_tightest_limit_counts(self, usable: int, quota: float | None, detail: str) -> None:
        assert machine.check_cores(usable, quota, 8).detail == detail

    @pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None)])
    def test_a_cgroups_limit_is_read(self, tmp_path: Path, text: str, cores: float | None) -> None:
        (tmp_path / "cpu.max").write_text(text)
        assert machine.cgroup_cores(tmp_path) == cores


class TestMemory:
    MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n"

    def test_what_is_free_is_told(self) -> None:
        assert machine.check_memory(self.MEMINFO, None) == Finding("memory", "ok", "16.0 GiB, 8.0 GiB of it free")

    def test_a_containers_limit_is_the_memory(self, tmp_path: Path) -> None:
        (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
        found = machine.check_memory(self.MEMINFO, cgroup_memory(tmp_path))
        assert (found.state, found.detail) == ("warn", "2.0 GiB, 2.0 GiB of it free")

    def test_no_limit_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "memory.max").write_text("max\n")
        assert cgroup_memory(tmp_path) is None


def nvidia_smi(folder: Path, script: str) -> tuple[str]:
    """A program in the place of nvidia-smi."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return (str(path),)


class TestGpus:
    def test_none_without_the_tool(self) -> None:
        assert machine.find_gpus(["no-such-nvidia-smi"]) == []
        assert machine.check_gpus([]).state == "ok"

    def test_the_tools_lines_are_read(self, tmp_path: Path) -> None:
        line = "NVIDIA H100 80GB HBM3, 81920, 0, 570.1"
        assert machine.find_gpus(nvidia_smi(tmp_path, f"echo '{line}'; echo '{line}'")) == [H100, H100]
        assert machine.check_gpus([H100, H100]).detail == "2 × NVIDIA H100 80GB HBM3, 80 GiB, driver 570.1"

    def test_memory_that_is_shared_with_the_cpu_has_no_size(self, tmp_path: Path) -> None:
        (gpu,) = machine.find_gpus(nvidia_smi(tmp_path, "echo 'NVIDIA GB10, [N/A], [N/A], 580.1'"))
        assert (gpu.total, gpu.used) == (0, 0)
        assert machine.check_gpus([gpu]).state == "ok"

    @pytest.mark.parametrize(
        ("script", "said"),
        [
            ("echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", "could not communicate"),
            ("echo gibberish", "not understood"),
            ("sleep 60", "did not answer"),
        ],
    )
    def test_a_tool_that_fails_is_a_warning_and_says_how(self, tmp_path: Path, script: str, said: str) -> None:
        found = machine.check_gpus(machine.find_gpus(nvidia_smi(tmp_path, script), timeout_s=0.5))
        assert found.state == "warn"
        assert said in found.detail

    def test_memory_that_somebody_uses_is_a_warning(self) -> None:
        found = machine.check_gpus([H100, Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 20 * GIB, "570.1")])
        assert found.state == "warn"
        assert "GPU 1: 20.0 GiB" in found.detail

    @pytest.mark.parametrize(("variable", "count"), [(None, 4), ("", 0), ("1,2", 2), ("GPU-0f3a", 1), ("0,-1,2", 1)])
    def test_those_that_we_may_not_use_do_not_count(self, variable: str | None, count: int) -> None:
        environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
        assert len(usable_gpus([H100] * 4, environment)) == count


class TestClock:
    def test_one_before_the_installation_is_wrong(self) -> None:
        assert machine.check_clock(now=1e9, written=1e9, installed=1.7e9).state == "warn"

    def test_one_that_differs_from_the_file_systems_is_wrong(self) -> None:
        assert machine.check_clock(now=1.8e9, written=1.8e9 + 60, installed=1.7e9).state == "warn"

    def test_ours_is_right(self, tmp_path: Path) -> None:
        _, written = folder.check_folder(tmp_path)
        assert machine.check_clock(time.time(), written, installed=1.7e9).state == "ok"


class TestDataFolder:
    def test_a_local_disk_is_fine_and_nothing_stays_on_it(self, tmp_path: Path) -> None:
        found, written = folder.check_folder(tmp_path / "not/made/yet")
        assert written is not None
        assert {name: state for name, state in states(found).items() if state == "fail"} == {}
        assert states(found)["locks"] == states(found)["SQLite"] == "ok"
        assert [*tmp_path.iterdir()] == []

    def test_a_file_in_its_place_fails(self, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("")
        found, _ = folder.check_folder(tmp_path / "data")
        assert states(found)["data folder"] == states(found)["writing"] == "fail"

    def test_one_that_cannot_be_written_fails(self) -> None:
        found, written = folder.check_folder(Path("/proc/self"))
        assert states(found)["writing"] == "fail"
        assert written is None

    @pytest.mark.parametrize(("free", "state"), [(100 * GIB, "ok"), (5 * GIB, "warn"), (GIB // 10, "fail")])
    def test_room_is_judged(self, free: int, state: str) -> None:
        assert folder.judge_room(free, 1000 * GIB).state == state

    @pytest.mark.parametrize(
        ("free", "total", "state"), [(10**6, 10**7, "ok"), (5000, 10**7, "warn"), (0, 10**7, "fail"), (0, 0, "ok")]
    )
    def test_inodes_are_judged(self, free: int, total: int, state: str) -> None:
        assert folder.judge_inodes(free, total).state == state

    MOUNTS = (
        "rootfs / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n/dev/sdb /home/me/fast\\040disk xfs rw 0 0\n"
        "me@host: /mnt/far fuse.sshfs rw 0 0\ntmpfs /mnt/ram tmpfs rw 0 0\n"
    )

    @pytest.mark.parametrize(
        ("place", "kind", "state"),
        [
            ("/srv", "ext4", "ok"),
            ("/home/me", "nfs4", "warn"),
            ("/home/me/fast disk/data", "xfs", "ok"),
            ("/homes", "ext4", "ok"),
            ("/mnt/far/x", "fuse.sshfs", "warn"),
            ("/mnt/ram", "tmpfs", "warn"),
        ],
    )
    def test_a_network_and_memory_are_warned_of(self, place: str, kind: str, state: str) -> None:
        found = folder.check_file_system(Path(place), self.MOUNTS)
        assert found.detail.startswith(kind)
        assert found.state == state

    @pytest.mark.parametrize("error", [None, OSError(errno.ENOLCK, "No locks available")], ids=["granted", "unknown"])
    def test_locks_that_do_not_exclude_fail(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
    ) -> None:
        """The system's call grants every lock, as some file systems do, or knows none."""

        def flock(file: object, operation: int) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(fcntl, "flock", flock)
        assert folder.check_locks(tmp_path).state == "fail"

    def test_a_file_system_without_a_wal_fails(self, tmp_path: Path) -> None:
        (tmp_path / "wal.sqlite").write_bytes(b"no database at all" * 100)
        assert folder.check_sqlite(tmp_path).state == "fail"

    def test_a_server_that_was_left_behind_is_told_and_not_ended(self, tmp_path: Path) -> None:
        record = tmp_path / "a.json"
        record.write_text(json.dumps({"group": os.getpgid(0), "boot": "x", "started": 1}))
        assert folder.check_servers(tmp_path).state == "warn"
        assert record.exists()

    def test_a_server_that_runs_is_no_warning(self, tmp_path: Path) -> None:
        with (tmp_path / "a.json").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert folder.check_servers(tmp_path) == Finding("vLLM servers", "ok", "1 running")


class TestPackages:
    ASKED = (Requirement("click>=8"), Requirement("pydantic>=2"))

    def test_a_group_that_is_as_asked_is_one_line(self) -> None:
        (found,) = software.check_group("core", self.ASKED, needed=True)
        assert found.state == "ok"
        assert found.detail.startswith("click 8")

    @pytest.mark.parametrize(("needed", "state"), [(True, "fail"), (False, "warn")])
    def test_a_missing_one_is_named(self, needed: bool, state: str) -> None:
        found = software.check_group("train", [*self.ASKED, Requirement("no-such-package>=1")], needed=needed)
        assert states(found) == {"train": "ok", "no-such-package": state}
        assert found[1].todo == "pip install 'no-such-package>=1'"

    def test_one_that_is_too_old_says_what_is_asked(self) -> None:
        (found,) = software.check_group("core", [Requirement("click>=99")], needed=True)
        assert found.state == "warn"
        assert found.detail.endswith("asked: >=99")

    def test_a_group_that_nobody_needs_is_one_warning(self) -> None:
        (found,) = software.check_group("train", [Requirement("no-such-a"), Requirement("no-such-b")], needed=False)
        assert (found.state, found.detail) == ("warn", "not installed: no-such-a, no-such-b")

    def test_the_checkouts_requirements_are_read(self) -> None:
        project = software.read_project(ROOT)
        assert project is not None
        assert {"core", "train", "vllm", "vllm-cpu"} <= set(project.requirements)
        assert "torch" in [each.name for each in project.requirements["train"]]

    def test_an_installed_packages_requirements_are_read_from_its_metadata(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = tmp_path / "distill_pipeline-9.9.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", "Name: distill-pipeline", "Version: 9.9", "Requires-Python: >=3.11"]
        lines += ["Requires-Dist: click>=8", 'Requires-Dist: torch<3,>=2; extra == "train"']
        (info / "METADATA").write_text("\n".join([*lines, ""]))
        monkeypatch.syspath_prepend(str(tmp_path))
        project = software.read_project(tmp_path)
        assert project is not None
        assert (project.version, project.python) == ("9.9", ">=3.11")
        assert {group: list(map(str, asked)) for group, asked in project.requirements.items()} == {
            "core": ["click>=8"],
            "train": ["torch<3,>=2"],
        }

    @pytest.mark.parametrize(("version", "state"), [("3.11.7", "ok"), ("3.10.0", "fail"), ("3.14.0", "fail")])
    def test_another_python_fails(self, version: str, state: str) -> None:
        project = software.Project("1", ">=3.11,<3.13", {})
        assert software.check_python(version, project).state == state


class TestTorch:
    CPU, CUDA = software.TorchBuild("2.13.0+cpu", "CPU"), software.TorchBuild("2.13.0", "CUDA 13.0")

    def test_the_build_is_read_without_importing_it(self) -> None:
        code = """
import sys
from pipeline.runner.doctor.software import read_torch
print(read_torch())
assert "torch" not in sys.modules
"""
        done = subprocess.run([sys.executable, "-c", code], env=cli_env(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "None" or "TorchBuild" in done.stdout

    def test_a_cpu_build_is_fine_without_a_gpu_and_a_warning_with_one(self) -> None:
        assert software.check_torch(self.CPU, [], visible=None).state == "ok"
        assert software.check_torch(self.CPU, [H100], visible=None).state == "warn"

    @pytest.mark.parametrize(("visible", "state"), [(1, "ok"), (0, "warn"), ("cannot be imported: OSError", "warn")])
    def test_a_cuda_build_has_to_see_the_gpu(self, visible: int | str, state: str) -> None:
        assert software.check_torch(self.CUDA, [H100], visible=visible).state == state


class TestHub:
    def test_the_cache_is_where_the_variables_say(self) -> None:
        home = Path("/home/me")
        assert software.hub_folder({}, home) == Path("/home/me/.cache/huggingface/hub")
        assert software.hub_folder({"HF_HOME": "/big"}, home) == Path("/big/hub")
        assert software.hub_folder({"HF_HOME": "~/big"}, home) == Path("/home/me/big/hub")
        assert software.hub_folder({"HF_HUB_CACHE": "/hub", "HF_HOME": "/big"}, home) == Path("/hub")

    def test_a_model_in_the_cache_is_found_by_branch_and_by_commit(self, tmp_path: Path) -> None:
        stored = tmp_path / "models--Org--Big"
        for part in ("refs", "snapshots/0123abc"):
            (stored / part).mkdir(parents=True)
        (stored / "refs/main").write_text("0123abc")
        (stored / "snapshots/0123abc/config.json").write_text("{}")
        for revision in ("main", "0123abc"):
            model = LocalModel(model="Org/Big", revision=revision)
            assert needs.check_hub_model("teacher", model, tmp_path, ["HF_HUB_OFFLINE"]).state == "ok"

    @pytest.mark.parametrize(("offline", "state"), [([], "warn"), (["HF_HUB_OFFLINE"], "fail")])
    def test_one_that_is_not_there_must_be_fetched(self, tmp_path: Path, offline: list[str], state: str) -> None:
        model = LocalModel(model="Org/Big", revision="main")
        assert needs.check_hub_model("teacher", model, tmp_path, offline).state == state


class TestModelFolder:
    def test_a_whole_one_is_fine(self) -> None:
        found = needs.check_model_folder("student", TINY_BASE)
        assert found.state == "ok"
        assert "520,032 parameters" in found.detail

    @pytest.mark.parametrize(
        ("missing", "lacking"),
        [
            ("config.json", "config.json"),
            ("tokenizer.json", "a tokenizer"),
            ("chat_template.jinja", "a chat template"),
            ("model.safetensors", "weights"),
        ],
    )
    def test_what_is_missing_is_named(self, tmp_path: Path, missing: str, lacking: str) -> None:
        shutil.copytree(TINY_BASE, tmp_path / "model")
        (tmp_path / "model" / missing).unlink()
        found = needs.check_model_folder("student", tmp_path / "model")
        assert found.state == "fail"
        assert found.detail.endswith(f"lacks {lacking}")

    def test_a_chat_template_in_the_tokenizers_config_counts(self, tmp_path: Path) -> None:
        shutil.copytree(TINY_BASE, tmp_path / "model")
        template = tmp_path / "model/chat_template.jinja"
        (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({"chat_template": template.read_text()}))
        template.unlink()
        assert needs.check_model_folder("student", tmp_path / "model").state == "ok"

    def test_torn_weights_fail_and_others_than_safetensors_are_warned_of(self, tmp_path: Path) -> None:
        shutil.copytree(TINY_BASE, tmp_path / "model")
        weights = tmp_path / "model/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        assert needs.check_model_folder("student", tmp_path / "model").state == "fail"
        weights.rename(weights.with_name("pytorch_model.bin"))
        assert needs.check_model_folder("student", tmp_path / "model").state == "warn"

    def test_a_shard_that_was_not_copied_is_named(self, tmp_path: Path) -> None:
        shutil.copytree(TINY_BASE, tmp_path / "model")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (tmp_path / "model/model.safetensors").rename(tmp_path / "model/model-1.safetensors")
        (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
        assert needs.check_model_folder("student", tmp_path / "model").detail.endswith("lacks model-2.safetensors")


API: dict[str, Any] = {
    "teachers": {
        "api": {
            "kind": "openai",
            "base_url": "http://127.0.0.1:9/v1",
            "provider": "p",
            "model": "m",
            "api_key": "${env:EXAMPLE_KEY}",
        }
    },
    "generate": {"teacher": "api"},
}


class TestKeys:
    @pytest.mark.parametrize(
        ("value", "state"), [(None, "fail"), ("", "fail"), (SECRET, "ok"), (f"{SECRET}\n", "warn")]
    )
    def test_a_key_is_known_by_its_name_and_never_shown(
        self,
        project: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        value: str | None,
        state: str,
    ) -> None:
        write_project(project, **API)
        monkeypatch.delenv("EXAMPLE_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("EXAMPLE_KEY", value)
        cli.main(["doctor", "run.yaml", "--json"])
        shown = capsys.readouterr()
        found = next(each for each in json.loads(shown.out)["findings"] if each["name"] == "key")
        assert found["state"] == state
        assert "EXAMPLE_KEY" in found["detail"]
        assert SECRET not in shown.out + shown.err

    def test_without_a_config_the_well_known_ones_are_listed(self) -> None:
        (found,) = needs.check_keys(needs.WELL_KNOWN_KEYS, {"OPENAI_API_KEY": SECRET, "HF_TOKEN": ""}, needed=False)
        assert (found.state, found.detail) == ("ok", "set: OPENAI_API_KEY")


class TestHost:
    def test_one_that_listens_is_reached_and_told_nothing(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
            assert needs.check_host(url).state == "ok"
            connection, _ = server.accept()
            assert connection.recv(1) == b""
            connection.close()

    def test_one_that_does_not_fails(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        found = needs.check_host(f"http://127.0.0.1:{port}/v1")
        assert found.state == "fail"
        assert f"127.0.0.1:{port} cannot be reached" in found.detail


class TestLaunch:
    @pytest.mark.parametrize(
        ("text", "processes", "gpus", "state"),
        [
            ("use_cpu: true", 1, 0, "ok"),
            ("use_cpu: true", 1, 1, "warn"),
            ("use_cpu: false", 1, 0, "fail"),
            ("use_cpu: false", 2, 2, "ok"),
            ("use_cpu: false", 2, 1, "fail"),
            ("- a list", 1, 0, "fail"),
            ("{", 1, 0, "fail"),
        ],
    )
    def test_accelerates_file_must_fit_the_machine(
        self, project: Path, text: str, processes: int, gpus: int, state: str
    ) -> None:
        train = {"accelerate": "accelerate.yaml", "processes": processes}
        run = config(project, train=train).config
        (project / "accelerate.yaml").write_text(text)
        (found,) = needs.check_launch(run, [H100] * gpus)
        assert found.state == state

    @pytest.mark.parametrize(
        ("servers", "each", "gpus", "state"), [(1, 1, 0, "ok"), (1, 2, 0, "fail"), (2, 2, 4, "ok"), (2, 2, 3, "fail")]
    )
    def test_each_server_needs_its_gpus(self, servers: int, each: int, gpus: int, state: str) -> None:
        teacher = VllmTeacher(kind="vllm", model="./m", servers=servers, tensor_parallel_size=each)
        assert needs.check_servers_fit(teacher, [H100] * gpus).state == state

    def test_a_student_that_cannot_fit_is_told_before_training(self, project: Path) -> None:
        run = config(project).config
        small = Gpu("small", 4 * 2**20, 0, "1")
        found = [*needs.check_training_fits(run, [small], free_disk=2**20)]
        assert states(found) == {"training": "warn", "checkpoints": "warn"}
        assert [*needs.check_training_fits(run, [H100], free_disk=GIB)] == []


class TestConfig:
    def test_every_missing_file_is_named_once(self, project: Path) -> None:
        loaded = config(project)
        (project / "rows.jsonl").unlink()
        shutil.rmtree(project / "student")
        found = needs.check_files(loaded)
        assert [finding.detail.split(":")[0] for finding in found] == [
            "prompts.sets.facts.source.path",
            "student.model",
        ]

    def test_an_evaluation_without_answers_is_told(self, project: Path) -> None:
        (found,) = needs.check_answers(config(project))
        assert found.state == "warn"

    def test_vllm_is_asked_for_only_where_the_config_starts_it(self, project: Path) -> None:
        assert not needs.needs_engine(config(project).config)
        assert needs.needs_engine(config(project, evaluate={"engine": "vllm"}).config)


class TestCommand:
    def test_all_is_well_for_what_init_writes(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["init", "mine"]) == 0
        code = cli.main(["doctor", "mine/config.yaml"])
        shown = capsys.readouterr()
        failed = [line for line in shown.out.splitlines() if line.startswith("FAIL")]
        assert (code, failed) == (0, []) or all("not installed" in line for line in failed)

    def test_what_fails_exits_2_and_the_last_line_counts(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_project(project)
        (project / "rows.jsonl").unlink()
        assert cli.main(["doctor", "run.yaml"]) == 2
        shown = capsys.readouterr()
        assert "FAIL files named" in shown.out
        assert "do: correct the path" in shown.out
        assert " failed, " in shown.out.splitlines()[-1]
        assert shown.err.startswith("error: not ready: ")
        assert "files named" in shown.err

    def test_json_has_a_verdict_and_the_findings(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code = cli.main(["doctor", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] == (code == 0)
        assert {"name", "state", "detail", "todo"} == set(told["findings"][0])

    @pytest.mark.parametrize(
        "arguments", [["missing.yaml"], ["rows.jsonl"], ["--set", "a=b"], ["run.yaml", "--set", "x"]]
    )
    def test_a_wrong_command_line_exits_2(self, project: Path, arguments: list[str]) -> None:
        write_project(project)
        assert cli.main(["doctor", *arguments]) == 2

    def test_a_package_that_is_broken_fails_without_a_traceback(self, project: Path) -> None:
        write_project(project)
        (project / "site/pyarrow").mkdir(parents=True)
        (project / "site/pyarrow/__init__.py").write_text('raise ImportError("libarrow.so.2300: not found")')
        environment = {**os.environ, "PYTHONPATH": f"{project / 'site'}:{ROOT}"}
        command = [sys.executable, "-m", "pipeline", "doctor", "run.yaml"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "libarrow.so.2300: not found" in done.stdout
        assert "Traceback" not in done.stderr

    def test_a_data_folder_that_is_a_file_fails_without_a_traceback(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_project(project)
        assert cli.main(["doctor", "run.yaml", "--data", "rows.jsonl"]) == 2
        shown = capsys.readouterr()
        assert "FAIL data folder" in shown.out
        assert "Traceback" not in shown.err
