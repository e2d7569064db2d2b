"""What makes a step's key: its stage, its config, the files it names and the contents it builds on."""

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.config_base import identity
from pipeline.core.errors import UsageError, boundary
from pipeline.core.lineage import Manifest, path_digest
from pipeline.core.stage import Json
from pipeline.core.store import Artefact
from pipeline.runner.session import Session
from pipeline.runner.steps import Step, spec_of, stage_module


def step_parts(session: Session, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Json]:
    """Everything that makes a step's key.

    Args:
        inputs: the artefact of each step in `step.inputs`; others are ignored.

    Raises:
        UsageError: a file that the config names is missing or cannot be read.
    """
    recipe = step_recipe(session, step)
    return {**recipe, "inputs": {name: _counted(step, inputs[name].manifest) for name in step.inputs}}


def step_recipe(session: Session, step: Step) -> dict[str, Json]:
    """The part of `step_parts` that needs no artefact: what the config, its files and our code say.

    Raises:
        UsageError: a file that the config names is missing or cannot be read.
    """
    digests: dict[str, Json] = {}
    for name, path in sorted(checked_input_files(session, step).items()):
        where = f"{session.loaded.path}: {name}: {path}"
        with boundary(UsageError, "cannot read", where=where, todo="give read access"):
            digests[name] = path_digest(path, session.digests)
    return {
        "stage": step.kind,
        "version": stage_module(step.kind).VERSION,
        "config": identity(session.config_of(step)),
        "files": digests,
    }


def _counted(step: Step, upstream: Manifest) -> str:
    """What of an upstream step counts in the key: its content, so that a rerun with equal rows changes nothing here."""
    return f"{upstream.content} {upstream.key}" if spec_of(step).shows_manifests else upstream.content


def checked_input_files(session: Session, step: Step) -> dict[str, Path]:
    """The files outside the store that a step names.

    Raises:
        UsageError: one is missing.
    """
    files = stage_module(step.kind).input_files(session.config_of(step))
    for name, path in files.items():
        if not os.path.exists(path):  # noqa: PTH110 (Path.exists raises where a folder above is closed to us)
            where = f"{session.loaded.path}: {name}: {path}"
            raise UsageError("no such file or folder", where=where, todo="correct the path (it is relative to here)")
        if not (path.is_file() or path.is_dir()):
            where = f"{session.loaded.path}: {name}: {path}"
            todo = "save it as a file: its bytes count, and resuming reads it again"
            raise UsageError("a stream, not a file", where=where, todo=todo)
    return files
