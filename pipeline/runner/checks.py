"""What is checked before the first step, so that it is not said hours later, when much has been paid for."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_base import LocalModel
from pipeline.core.config_budget import Spending
from pipeline.core.config_refusals import thinking_refusals
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.errors import UsageError
from pipeline.core.lineage import CODE_FILES, OTHER_WEIGHTS, Manifest
from pipeline.core.load import read_yaml, require_test_answers
from pipeline.runner.plan import plan
from pipeline.runner.session import Session
from pipeline.runner.steps import Step, plan_steps
from pipeline.student.needed import lacking
from pipeline.teacher.prices import price_of
from pipeline.teacher.spending import check_priced

logger = logging.getLogger(__name__)

WEIGHTS: Final = ("*.safetensors", *OTHER_WEIGHTS)
TOKENIZERS: Final = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "spiece*"),
    *CODE_FILES,
)
"""Names of tokenizer files; code of its own may hold one too."""
TEMPLATES: Final = ("chat_template*", "additional_chat_templates", "tekken.json", *CODE_FILES)
"""Where a chat template may be, beside `tokenizer_config.json`."""


def check_before_start(session: Session, steps: Sequence[Step], *, force: bool = False) -> None:
    """Check what the steps need outside the data folder and whether that can be written; starts and changes nothing.

    Not covered: hub models, a tokenizer that is there and broken, a key that is set and wrong.

    Raises:
        UsageError: something is missing.
    """
    kinds = {step.kind for step in steps}
    config, path = session.loaded.config, session.loaded.path
    _check_folders(session)
    if "evaluate" in kinds:
        require_test_answers(session.loaded)
    if kinds & {"generate", "evaluate"}:
        name = config.generate.teacher
        teacher = config.teachers[name]
        if isinstance(teacher, VllmTeacher):
            own_template = any(arg.startswith(("--chat-template", "--tokenizer-mode")) for arg in teacher.args)
            check_model(teacher, f"{path}: teachers.{name}.model", own_template=own_template)
        if isinstance(teacher, ApiTeacher):
            _check_key(session, teacher, steps, force=force)
            check_priced(Spending(teacher=name, budget=config.budget), price_of(teacher))
        if "evaluate" in kinds:
            for refusal in thinking_refusals(teacher, config.evaluate.max_tokens, "evaluate.max_tokens"):
                todo = "raise it, or stop before the evaluation: --until train"
                raise UsageError(refusal, where=f"{path}: teachers.{name}.thinking_tokens", todo=todo)
    if kinds & {"train", "evaluate"}:
        check_model(config.student, f"{path}: student.model")
    if "train" in kinds:
        _check_accelerate(config.train.accelerate)
        _check_training(session, steps, force=force)


def warn_of_refusal(session: Session, steps: Sequence[Step] | None = None, *, force: bool = False) -> None:
    """Log why a run of these steps (all of them if None) would refuse to start, if it would."""
    try:
        check_before_start(session, plan_steps() if steps is None else steps, force=force)
    except UsageError as error:
        logger.warning("run would refuse to start: %s (%s)", error.what, error.where)


def check_test_rows(session: Session, steps: Sequence[Step], prompts: Manifest) -> None:
    """Check after the step `prompts` that an evaluation would have something to ask.

    Raises:
        UsageError: the test split is empty, and it is among the steps to evaluate on it.
    """
    splits = prompts.metrics.get("splits")
    if any(step.kind == "evaluate" for step in steps) and isinstance(splits, dict) and not splits.get("test"):
        share = session.loaded.config.prompts.test
        todo = "give more prompts or a larger share, or stop before the evaluation: --until train"
        what = f"none of {prompts.rows_in:,} prompts is in the test split, so nothing could be evaluated"
        raise UsageError(what, where=f"{session.loaded.path}: prompts.test: {share:g}", todo=todo)


def check_model(model: LocalModel, where: str, *, own_template: bool = False) -> None:
    """Check that a local model folder holds what a loader needs, by the names of its files.

    Args:
        where: file and key that name the folder.
        own_template: the chat template comes from elsewhere.

    Raises:
        UsageError: config, weights, tokenizer or chat template are missing.
    """
    folder = model.folder
    if folder is None or not folder.exists():  # a hub id; or nothing, which `checked_input_files` refuses
        return
    where = f"{where}: {folder}"
    if not folder.is_dir():
        raise UsageError("not a folder", where=where, todo="name the folder that holds the model's config.json")
    for what, patterns, todo in (
        ("config.json", ("config.json", "params.json"), "name the folder that holds the model's config.json"),
        ("weights", WEIGHTS, "copy the model's *.safetensors into it"),
        ("tokenizer", TOKENIZERS, "copy tokenizer.json and tokenizer_config.json of the model it came from into it"),
    ):
        if not _has(folder, patterns):
            raise UsageError(f"the model folder has no {what}", where=where, todo=todo)
    if not (own_template or _has(folder, TEMPLATES) or _has_inner_template(folder)):
        todo = "take an instruct model, or put a chat_template.jinja into the folder"
        raise UsageError("the model folder has no chat template", where=where, todo=todo)


def _has(folder: Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _has_inner_template(folder: Path) -> bool:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _check_folders(session: Session) -> None:
    """Refuse a data folder, or a folder for the lock file, that cannot be written."""
    data, lock = session.data, session.loaded.lock_path
    try:
        str(data).encode("utf-8")  # Arrow opens no other paths
    except UnicodeEncodeError as error:
        todo = "choose another folder with --data"
        raise UsageError("the folder's path is not UTF-8 text", where=f"--data {data}", todo=todo) from error
    todo = "give write access, or choose another folder with --data"
    for folder in (data, *(data / name for name in ("runs", "store", "work", "responses"))):
        _check_writable(folder, f"--data {data}: {folder}" if folder != data else f"--data {data}", todo)
    for path in (data / "store" / kind for kind in sorted({step.kind for step in plan_steps()})):
        if os.path.lexists(path) and not os.path.isdir(path):  # noqa: PTH112 (as in _check_writable)
            todo = "move it away, then run the same command again"
            raise UsageError("a file where the results of a stage belong", where=str(path), todo=todo)
    if lock is not None:
        todo = "give write access, or copy the config to a folder of your own: the lock file is written beside it"
        _check_writable(lock.parent, str(lock), todo)


def _check_writable(folder: Path, where: str, todo: str) -> None:
    """Refuse a folder that neither is nor can be made a folder that we can write; makes nothing."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises where a folder above is closed to us)
        raise UsageError("not a folder", where=where, todo=todo.replace("give write access, or ", ""))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("the folder cannot be written", where=where, todo=todo)


def _check_key(session: Session, teacher: ApiTeacher, steps: Sequence[Step], *, force: bool) -> None:
    """Refuse to start without the teacher's key where it is needed for certain; warn where it may be."""
    variable = teacher.key_variable
    if variable is None or os.environ.get(variable, "").strip():
        return
    cached = _cached(session, force=force)
    if all(step in cached for step in steps if step.kind in ("generate", "evaluate")):
        return
    what = f"the environment variable {variable} is not set"
    if any(_has(session.data / "responses" / folder, ["*"]) for folder in ("answers", "segments")):
        logger.warning("%s: only what is answered already can be used", what)
        return
    where = f"{session.loaded.path}: teachers.{session.loaded.config.generate.teacher}.api_key"
    raise UsageError(what, where=where, todo=f"export {variable}=… in this shell, then run the same command again")


def _cached(session: Session, *, force: bool) -> set[Step]:
    """The steps that have a result already."""
    if force or not session.store.root.exists():
        return set()
    return {each.step for each in plan(session) if each.state == "cached"}


def _check_training(session: Session, steps: Sequence[Step], *, force: bool) -> None:
    """Refuse a training that would refuse to begin, unless there is nothing to train any more."""
    config = session.loaded.config
    errors = lacking(config.train, config.student)
    if errors and not any(step.kind == "train" for step in _cached(session, force=force)):
        error = errors[0]
        todo = error.todo if len(steps) == 1 else f"{error.todo}; or stop before the training: --until dataset"
        raise UsageError(error.what, where=f"{session.loaded.path}: {error.where}", todo=todo)


def _check_accelerate(path: Path) -> None:
    settings = read_yaml(path)
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        todo = "write `distributed_type: 'NO'` into it, or take one of configs/accelerate/"
        raise UsageError("Accelerate's config has no `distributed_type`", where=str(path), todo=todo)
