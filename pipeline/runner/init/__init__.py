"""`init`: a folder to start from, with a commented config, prompts, their card and Accelerate's file."""

import errno
import json
import os
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from pipeline.core.errors import UsageError, disk_errors
from pipeline.core.log import safe_text

TEMPLATES: Final = Path(__file__).parent
CHECKOUT: Final = TEMPLATES.parent.parent.parent
TINY: Final = "data/models/tiny-{}"
"""Folder of a tiny model in the checkout."""
TINY_NAMES: Final = {"teacher": "teacher", "student": "base"}
CONFIG, PROMPTS, CARD, ACCELERATE = "config.yaml", "prompts.jsonl", "prompts.card.yaml", "accelerate.yaml"
_UNFIT_FOR_YAML: Final = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Model:
    """A model as a config names it.

    Attributes:
        model: local folder (starts with `.`, `/` or `~`) or hub id.
        revision: of a hub id; None for a folder.
        is_tiny: one of the two that come with this program.
    """

    model: str
    revision: str | None
    is_tiny: bool


@dataclass(frozen=True, slots=True)
class Started:
    """What `init` wrote.

    Attributes:
        run: the run's name.
        config: the config file; `files` holds it too.
        files: all files that were written.
        prompts: number of prompts.
        is_toy: teacher and student are the tiny models that come with this program.
        name_taken: the data folder holds a run of this name already.
    """

    run: str
    config: Path
    files: tuple[Path, ...]
    prompts: int
    is_toy: bool
    name_taken: bool


def init(folder: Path, data: Path, teacher: str | None = None, student: str | None = None) -> Started:
    """Write a folder from which `run` works at once. Nothing that exists is overwritten, and nothing half is left.

    Args:
        folder: made if missing, with its parents. Where it is absolute the config's paths are too, so that it works
            from any current folder; else they are taken from the one in which this was called.
        data: the data folder, to see whether the run's name is free; not touched.
        teacher, student: a model's folder, or `HUB_ID@REVISION`; None: the tiny one.

    Raises:
        UsageError: the folder's name is not fit, one of the files is there already, or a model is not.
        Incomplete: the folder cannot be written.
    """
    _refuse_odd_name(folder)
    models = [_model(role, given, folder) for role, given in (("teacher", teacher), ("student", student))]
    run = run_name(folder)
    texts = {name: (TEMPLATES / name).read_text("utf-8") for name in (PROMPTS, CARD, ACCELERATE)}
    texts[CONFIG] = render_config(folder, run, *models)
    with disk_errors(str(folder), "make room, or name a folder in which you may write"), _impossible(folder):
        files = _write(folder, texts)
        name_taken = (data / "runs" / run).is_dir()
    is_toy = all(model.is_tiny for model in models)
    return Started(run, folder / CONFIG, files, texts[PROMPTS].count("\n"), is_toy, name_taken)


def run_name(folder: Path) -> str:
    """The name of the run in a folder: the folder's own, without what such a name cannot hold."""
    own = unicodedata.normalize("NFKD", Path(os.path.normpath(folder.absolute())).name)
    letters = "".join(letter for letter in own if not unicodedata.combining(letter))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", letters).strip("-._")[:100] or "first-run"


def render_config(folder: Path, run: str, teacher: Model, student: Model) -> str:
    """The commented config."""
    from jinja2 import Environment, StrictUndefined  # not needed by the other commands

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["scalar"] = _scalar
    template = environment.from_string((TEMPLATES / "config.yaml.jinja").read_text("utf-8"))
    return template.render(
        command=shlex.join(["python", "-m", "pipeline", "run", str(folder / CONFIG)]),
        name=run,
        title=f"Answers of {run}",
        prompts=str(folder / PROMPTS),
        card=str(folder / CARD),
        accelerate=str(folder / ACCELERATE),
        teacher=teacher,
        student=student,
    )


def _scalar(text: str) -> str:
    """A text as YAML, plain where YAML reads it as this text anywhere, else quoted."""
    is_plain = re.fullmatch(r"[A-Za-z0-9._/-]+( [A-Za-z0-9._/-]+)*", text) is not None
    return text if is_plain and yaml.safe_load(text) == text else json.dumps(text, ensure_ascii=False)


def _refuse_odd_name(folder: Path) -> None:
    """Refuse a path that cannot be typed again or written into a config.

    Raises:
        UsageError: it is such a path.
    """
    text = str(folder)
    if safe_text(text) != text or "\n" in text or "\t" in text or _UNFIT_FOR_YAML.search(text) is not None:
        what = "the folder's name holds control characters, or is not UTF-8"
        raise UsageError(what, where=ascii(text), todo="choose another name")
    if text.startswith(("-", "~")):
        todo = "choose another name, or write the path out"
        raise UsageError(f"the folder's name begins with {text[0]!r}", where=text, todo=todo)


def _model(role: str, given: str | None, folder: Path) -> Model:
    """The model that `--teacher` or `--student` names; a path is written so that it works from where `folder` does.

    Raises:
        UsageError: there is no such model folder, or a hub id has no revision.
    """
    if given is None:
        return Model(_local(_tiny(role), folder), None, is_tiny=True)
    where = f"--{role} {given}"
    path = Path(given).expanduser() if given.startswith("~") else Path(given)
    if given.startswith((".", "/", "~")) or path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError("no model lies here: config.json is missing", where=where, todo="correct the path")
        return Model(_local(path, folder), None, is_tiny=False)
    name, _, revision = given.partition("@")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is None or re.fullmatch(r"[\w./-]+", revision) is None:
        todo = f"--{role} ./FOLDER, or --{role} HUB_ID@REVISION (a commit, or a branch such as main)"
        raise UsageError("neither a model's folder nor a hub id with its revision", where=where, todo=todo)
    return Model(name, revision, is_tiny=False)


def _tiny(role: str) -> Path:
    """The folder of a tiny model, seen from the current folder or beside this package.

    Raises:
        UsageError: this installation does not have it.
    """
    found = [root / TINY.format(TINY_NAMES[role]) for root in (Path(), CHECKOUT)]
    for path in found:
        if (path / "config.json").is_file():
            return path
    what = "the tiny models are not here: they come with a checkout of this project, not with the installed package"
    todo = "name models of your own, --teacher and --student (./FOLDER or HUB_ID@REVISION), or call it in a checkout"
    raise UsageError(what, where=str(found[0]), todo=todo)


def _local(path: Path, folder: Path) -> str:
    """A model's path as the config names it, with the beginning that marks a folder."""
    if path.is_absolute() or folder.is_absolute():
        return os.path.normpath(path.absolute())
    return str(path) if str(path).startswith(".") else f"./{path}"


def _write(folder: Path, texts: Mapping[str, str]) -> tuple[Path, ...]:
    """Write the files, all or none.

    Raises:
        UsageError: one of them exists.
        OSError: the folder or a file cannot be written.
    """
    present = [name for name in texts if os.path.lexists(folder / name)]
    if present:
        todo = "choose another folder; nothing was written"
        raise UsageError(f"not overwritten: {', '.join(present)}", where=str(folder), todo=todo)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                written.append(folder / name)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for undo in (*(path.unlink for path in written), *(each.rmdir for each in made)):
            with suppress(OSError):  # the error that is on its way says more
                undo()
        raise
    return tuple(written)


@contextmanager
def _impossible(folder: Path) -> Iterator[None]:
    """Say as a user's mistake what no free space or right would mend."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT):
            raise
        what, where = f"the folder cannot be made: {error.strerror}", str(error.filename or folder)
        raise UsageError(what, where=where, todo="choose another name") from error
