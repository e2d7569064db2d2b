"""`init` writes a folder from which `run` works at once; it overwrites nothing and leaves nothing half."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli
from pipeline.core.config import RunConfig
from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.load import load_config
from pipeline.runner.init import TEMPLATES, init, run_name
from pipeline.text.split import split_of
from tests.support import cli_env

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = {"config.yaml", "prompts.jsonl", "prompts.card.yaml", "accelerate.yaml"}
DATA = Path("data")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, outside of the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked_out(folder: Path) -> None:
    """Put the tiny models where a checkout has them."""
    (folder / "data").mkdir()
    (folder / "data/models").symlink_to(ROOT / "data/models")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestWhatIsWritten:
    def test_the_files_a_run_needs_and_no_others(self, here: Path) -> None:
        started = init(Path("mine"), DATA)
        assert names(here) == {"mine"}
        assert names(here / "mine") == FILES
        assert {path.name for path in started.files} == FILES
        assert (started.run, started.config, started.prompts) == ("mine", Path("mine/config.yaml"), 720)

    @pytest.mark.parametrize(
        "name", ["mine", "a/b/c", "with spaces", "größe-数", "it's", 'a "b" {c}: #d', "null", "123"]
    )
    def test_the_config_is_valid_and_every_file_that_it_names_is_there(self, name: str) -> None:
        config = load_config(init(Path(name), DATA).config).config
        prompt_set = config.prompts.sets["mine"]
        assert prompt_set.card is not None
        assert config.student.folder is not None
        for path in (prompt_set.source.path, prompt_set.card, config.train.accelerate, config.student.folder):
            assert path.exists(), path
        assert prompt_set.source.path == Path(name) / "prompts.jsonl"

    def test_it_plans_from_the_folder_where_init_was_called(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["init", "my runs/first"]) == 0
        assert cli.main(["plan", "my runs/first/config.yaml"]) == 0
        assert "never ran" in capsys.readouterr().out

    def test_an_absolute_folder_works_from_every_folder(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checked_out(here)
        config = init(here / "mine", DATA).config
        (here / "elsewhere").mkdir()
        monkeypatch.chdir(here / "elsewhere")
        assert cli.main(["plan", str(config)]) == 0

    def test_in_a_checkout_the_models_are_named_relative_to_it(self, here: Path) -> None:
        checked_out(here)
        assert load_config(init(Path("mine"), DATA).config).config.student.model == "./data/models/tiny-base"

    def test_the_first_line_is_the_command_that_runs_it(self) -> None:
        first = init(Path("my run"), DATA).config.read_text("utf-8").splitlines()[0]
        assert first == "# python -m pipeline run 'my run/config.yaml'"

    def test_every_section_of_a_config_is_in_it(self) -> None:
        written = yaml.safe_load(init(Path("mine"), DATA).config.read_text("utf-8"))
        assert set(written) == set(RunConfig.model_fields)

    def test_every_section_is_explained(self) -> None:
        lines = init(Path("mine"), DATA).config.read_text("utf-8").splitlines()
        sections = [at for at, line in enumerate(lines) if re.match(r"\w+:", line)]
        assert len(sections) == len(RunConfig.model_fields)
        for at, end in zip(sections, [*sections[1:], len(lines)], strict=True):
            explained = lines[at - 1].startswith("# ") or any("#" in line for line in lines[at:end])
            assert explained, lines[at]

    def test_no_line_is_longer_than_120_characters(self) -> None:
        lines = init(Path("mine"), DATA).config.read_text("utf-8").splitlines()
        assert [line for line in lines if len(line) > 120] == []


def alternatives(text: str) -> list[tuple[str, str]]:
    """The commented-out blocks of a config: (section they belong to, YAML)."""
    section, block, found = "", [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#   "):
            block.append(line.removeprefix("# "))
            continue
        if block:
            found.append((section, "\n".join(block)))
            block = []
        if re.match(r"\w+:", line):
            section = line.partition(":")[0]
    return found


class TestAlternatives:
    """What stands in comments is taken by taking the "# " away."""

    def test_each_is_valid_where_it_stands(self) -> None:
        text = init(Path("mine"), DATA).config.read_text("utf-8")
        found = alternatives(text)
        assert [section for section, _ in found] == [*["teachers"] * 4, "prompts", "train"]
        for section, block in found:
            config: dict[str, Any] = yaml.safe_load(text)
            config[section] |= yaml.safe_load(block)
            RunConfig.model_validate(config)

    @pytest.mark.parametrize("kind", ["vllm", "openai", "anthropic", "gemini", "replay"])
    def test_there_is_one_of_every_kind_of_teacher(self, kind: str) -> None:
        blocks = [block for section, block in alternatives(init(Path("m"), DATA).config.read_text("utf-8"))]
        teachers = [teacher for block in blocks[:4] for teacher in yaml.safe_load(block).values()]
        assert kind in [teacher["kind"] for teacher in teachers]

    def test_the_replayed_answers_run_without_any_model(self, here: Path) -> None:
        config = init(Path("mine"), DATA).config
        text = config.read_text("utf-8")
        block = next(block for _, block in alternatives(text) if "replay" in block)
        config.write_text(text.replace("# " + block.replace("\n", "\n# "), block), "utf-8")
        assert cli.main(["run", str(config), "--until", "dataset", "--set", "generate.teacher=replay"]) == 0


ROWS = [json.loads(line) for line in (TEMPLATES / "prompts.jsonl").read_text("utf-8").splitlines()]


class TestPrompts:
    """They are questions that the tiny models know, with the splits that the models were made for."""

    def test_each_is_one_of_the_quickstarts(self) -> None:
        known = set((ROOT / "prompts/quickstart.jsonl").read_text("utf-8").splitlines())
        assert {json.dumps(row) for row in ROWS} <= known
        assert len(ROWS) == 720

    def test_no_test_fact_was_in_what_the_base_has_read(self) -> None:
        """The shares are the quickstart's, so a group is in the split in which the tiny models' recipes had it."""
        mine, quickstart = init(Path("mine"), DATA).config, ROOT / "configs/quickstart.yaml"
        prompts = [load_config(path).config.prompts for path in (mine, quickstart)]
        shares = [(each.validation, each.test) for each in prompts]
        assert shares[0] == shares[1]
        splits = [split_of(row["group_id"], validation=shares[0][0], test=shares[0][1]) for row in ROWS]
        assert {split: splits.count(split) for split in set(splits)} == {"train": 617, "validation": 28, "test": 75}

    def test_every_answer_is_a_number_so_that_any_model_can_be_the_teacher(self) -> None:
        assert all(row["answer"].isdigit() for row in ROWS)

    def test_accelerates_file_says_what_the_projects_own_says(self) -> None:
        ours = yaml.safe_load((ROOT / "configs/accelerate/cpu.yaml").read_text("utf-8"))
        assert yaml.safe_load((TEMPLATES / "accelerate.yaml").read_text("utf-8")) == ours


class TestNames:
    @pytest.mark.parametrize(
        ("folder", "name"),
        [
            ("mine", "mine"),
            ("a/b", "b"),
            ("with spaces", "with-spaces"),
            ("crème brûlée", "creme-brulee"),
            ("数", "first-run"),
            ("..", None),
            ("x" * 200, "x" * 100),
            ("_.hidden", "hidden"),
        ],
    )
    def test_the_run_is_named_after_the_folder(self, here: Path, folder: str, name: str | None) -> None:
        assert run_name(Path(folder)) == (name if name is not None else run_name(here.parent))

    @pytest.mark.parametrize("odd", ["-x", "~/x", "a\nb", "a\x1b[31m", "a\u202eb", "a\udcffb", "a\u2028b", "a\tb"])
    def test_what_cannot_be_typed_again_is_refused(self, here: Path, odd: str) -> None:
        with pytest.raises(UsageError, match="name"):
            init(Path(odd), DATA)
        assert names(here) == set()

    def test_a_name_that_another_run_has_is_told(self, here: Path) -> None:
        assert not init(Path("a/mine"), DATA).name_taken
        (here / "data/runs/mine").mkdir(parents=True)
        assert init(Path("b/mine"), DATA).name_taken


class TestNothingIsOverwritten:
    @pytest.mark.parametrize("name", sorted(FILES))
    def test_a_file_of_that_name_stays_and_nothing_is_written(self, here: Path, name: str) -> None:
        (here / "mine").mkdir()
        (here / "mine" / name).write_text("precious")
        with pytest.raises(UsageError, match=f"not overwritten: {re.escape(name)}"):
            init(Path("mine"), DATA)
        assert names(here / "mine") == {name}
        assert (here / "mine" / name).read_text() == "precious"

    def test_not_even_through_a_broken_link(self, here: Path) -> None:
        (here / "mine").mkdir()
        (here / "mine/config.yaml").symlink_to(here / "elsewhere.yaml")
        with pytest.raises(UsageError, match="not overwritten"):
            init(Path("mine"), DATA)
        assert not (here / "elsewhere.yaml").exists()

    def test_an_empty_folder_and_files_of_other_names_are_fine(self, here: Path) -> None:
        (here / "mine").mkdir()
        (here / "mine/notes.txt").write_text("mine")
        init(Path("mine"), DATA)
        assert names(here / "mine") == {*FILES, "notes.txt"}

    @pytest.mark.parametrize("folder", ["file", "file/below", "x" * 300])
    def test_a_folder_that_cannot_be_is_a_mistake_of_the_command_line(self, here: Path, folder: str) -> None:
        (here / "file").write_text("a file")
        with pytest.raises(UsageError, match="cannot be made"):
            init(Path(folder), DATA)
        assert names(here) == {"file"}


FULL_DISK = """
import errno, os, sys
from pathlib import Path
from pipeline import cli

real, left = os.fsync, int(sys.argv.pop(1))

def fsync(descriptor):
    global left
    if left == 0:
        raise OSError(int(os.environ["ERRNO"]), os.strerror(int(os.environ["ERRNO"])))
    left -= 1
    real(descriptor)

os.fsync = fsync
sys.exit(cli.main())
"""


class TestDisk:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
    @pytest.mark.parametrize("written", [0, 1, 3])
    def test_an_error_of_the_disk_exits_3_and_leaves_nothing(self, here: Path, number: int, written: int) -> None:
        """The operating system's call fails after so many files."""
        (here / "kept").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(written), "init", "kept/new/mine"],
            env=cli_env({"ERRNO": str(number)}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3, done.stderr
        assert [line[:7] for line in done.stderr.splitlines()] == ["error: ", "   at: ", "   do: "]
        assert os.strerror(number) in done.stderr
        assert done.stdout == ""
        assert names(here / "kept") == set()

    def test_a_folder_without_write_access_exits_3(self, here: Path) -> None:
        if os.geteuid() == 0:
            pytest.skip("needs another user than root, who may write everywhere")
        (here / "locked").mkdir(mode=0o555)
        with pytest.raises(Incomplete, match="Permission denied"):
            init(Path("locked/mine"), DATA)


class TestOtherModels:
    def test_folders_and_hub_ids_are_taken(self, here: Path) -> None:
        shutil.copytree(ROOT / "data/models/tiny-base", here / "models/small")
        config = load_config(init(Path("mine"), DATA, "Org/Big@main", "models/small").config).config
        teacher = config.teachers["mine"]
        assert (config.generate.teacher, teacher.model, teacher.revision) == ("mine", "Org/Big", "main")
        assert (config.student.model, config.student.license) == ("./models/small", "unknown")

    def test_one_of_them_can_stay_tiny(self) -> None:
        config = load_config(init(Path("mine"), DATA, teacher="Org/Big@0123abc").config).config
        assert config.train.max_length == 128
        assert config.student.model.endswith("data/models/tiny-base")

    @pytest.mark.parametrize("model", ["Org/Big", "Org/Big@", "a b@main", "./nothing-here", "", "a/b/c@main", "@main"])
    def test_what_is_neither_is_refused_before_anything_is_written(self, here: Path, model: str) -> None:
        with pytest.raises(UsageError) as caught:
            init(Path("mine"), DATA, teacher=model)
        assert caught.value.where == f"--teacher {model}"
        assert names(here) == set()

    def test_an_installation_without_the_tiny_models_says_what_to_give(self, here: Path) -> None:
        """The package alone, as a wheel installs it."""
        shutil.copytree(ROOT / "pipeline", here / "site/pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        environment = {**os.environ, "PYTHONPATH": str(here / "site")}
        command = [sys.executable, "-m", "pipeline", "init", "mine"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "the tiny models are not here" in done.stderr
        assert "--teacher and --student" in done.stderr
        assert not (here / "mine").exists()


class TestCommand:
    def test_the_last_lines_say_what_to_type_next(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["init", "my run", "--data", "my data"]) == 0
        last = [line.split("#")[0].strip() for line in capsys.readouterr().out.splitlines()[-3:]]
        given = "'my run/config.yaml' --data 'my data'"
        assert last == [f"python -m pipeline {name} {given}" for name in ("doctor", "plan", "run")]

    def test_json_names_the_files_and_the_next_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["init", "mine", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert {Path(path).name for path in told["files"]} == FILES
        assert told["next"]["run"] == "python -m pipeline run mine/config.yaml"

    @pytest.mark.parametrize("arguments", [["init"], ["init", ""], ["init", "a", "b"], ["init", "a", "--nonsense"]])
    def test_a_wrong_command_line_exits_2(self, here: Path, arguments: list[str]) -> None:
        assert cli.main(arguments) == 2
        assert names(here) == set()
