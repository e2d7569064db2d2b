"""What a config declares of its models: their licences, those of the models they were made from, and what they are."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import yaml

from pipeline.core.config import DeclaredSource, StudentModel
from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_base import LocalModel, local_folder
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import Teacher
from pipeline.core.stage import Json
from pipeline.terms.licenses import UNKNOWN, parse_license
from pipeline.terms.records import load_registry
from pipeline.terms.statement import Source

CARD = "README.md"
LONGEST_CARD = 1 << 20
"""Bytes of a model's card that are read for its front matter."""

Model = TypeVar("Model", bound=LocalModel)

logger = logging.getLogger(__name__)


def declared_teacher(name: str, teacher: Teacher) -> DeclaredSource:
    """A teacher as its config declares it."""
    if isinstance(teacher, ApiTeacher):
        facts: dict[str, Json] = {"provider": teacher.provider, "model": teacher.model}
        return _declared("teacher", name, f"{teacher.provider}:{teacher.model}", (teacher.license,), facts)
    if isinstance(teacher, LocalServer):
        return _declared("teacher", name, teacher.model, licenses_of_model(teacher), facts_of_model(teacher))
    return _declared("teacher", name, teacher.origin, (teacher.license,), {"origin": teacher.origin})


def declared_student(student: StudentModel) -> DeclaredSource:
    """The student's base as its config declares it."""
    licenses, facts = licenses_of_model(student), facts_of_model(student)
    return _declared("student_base", "student", student.model, licenses, facts, student.family)


def _declared(
    role: str, name: str, what: str, licenses: tuple[str, ...], facts: Mapping[str, Json], family: str | None = None
) -> DeclaredSource:
    return DeclaredSource.model_validate(
        {"role": role, "name": name, "what": what, "licenses": licenses, "family": family, "facts": {**facts}}
    )


def with_terms(teacher: Teacher, policy: PolicyConfig) -> Teacher:
    """The teacher with all the licences that its answers come under: where the config names none, those of its
    provider's API terms; and of each model that its folder's card names and the config does not, an unknown one."""
    if isinstance(teacher, ApiTeacher) and teacher.license == UNKNOWN:
        terms = load_registry(policy.registry).of_provider(teacher.provider)
        return teacher if terms is None else teacher.model_copy(update={"license": terms.id})
    if isinstance(teacher, LocalServer):
        return with_ancestors(teacher)
    return teacher


def with_family(student: StudentModel, policy: PolicyConfig) -> StudentModel:
    """The student's base with the models its card names, and the family that its licence is of where none is told."""
    student = with_ancestors(student)
    record = None if student.family is not None else load_registry(policy.registry).find(student.license)
    return student if record is None else student.model_copy(update={"family": record.family})


def with_ancestors(model: Model) -> Model:
    """The model with the models that its folder's card names, where the config does not name any."""
    if model.base_models is not None or not (named := base_models_of(model.folder)):
        return model
    return model.model_copy(update={"base_models": dict.fromkeys(named, UNKNOWN)})


def source_of(declared: DeclaredSource) -> Source:
    """The same for the gates.

    Raises:
        ValueError: a licence is blank, too long or not printable.
    """
    licenses = tuple(dict.fromkeys(parse_license(name).name for name in declared.licenses))
    return Source(declared.role, declared.name, shown(declared.what), licenses, declared.family, declared.facts)


def licenses_of_model(model: LocalModel) -> tuple[str, ...]:
    """A model's licence and those of all models that it was made from; all of them hold."""
    return (model.license, *(model.base_models or {}).values())


def name_of(model: LocalModel) -> str:
    """A hub id, or a folder's name. No path: it may hold a user's name."""
    return shown(model.model)


def shown(what: str) -> str:
    """What a source is, without the path of a folder."""
    folder = local_folder(what)
    return what if folder is None else folder.resolve().name


def facts_of_model(model: LocalModel) -> dict[str, Json]:
    """What is declared of a model besides, for a manifest."""
    return {"revision": model.revision, "base_models": {**(model.base_models or {})}}


def base_models_of(folder: Path | None) -> tuple[str, ...]:
    """Names of the models that a folder's card says it was made from; none where there is no card.

    Not covered: hub ids, whose cards are not here to be read before anything was asked; `base_models` names theirs.
    """
    path = None if folder is None else folder / CARD
    if path is None or not path.is_file() or path.stat().st_size > LONGEST_CARD:
        return ()
    head, ended, _ = path.read_text("utf-8", "replace").removeprefix("---\n").partition("\n---")
    try:
        said = yaml.safe_load(head) if ended else None
    except yaml.YAMLError as error:
        logger.warning("%s: the front matter cannot be read, so its base models stay unknown: %s", path, error)
        return ("unreadable card",)
    named = said.get("base_model") if isinstance(said, dict) else None
    given = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return tuple(str(name) for name in given)
