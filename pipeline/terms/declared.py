"""What a config declares of its models: their licences, those of the models they were made from, and what they are."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pipeline.core.config import DeclaredSource
from pipeline.core.config_api import ApiTeacher
from pipeline.core.config_base import LocalModel, local_folder
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_server import LocalServer
from pipeline.core.config_teacher import Teacher
from pipeline.core.config_train import StudentModel
from pipeline.core.errors import UsageError, boundary
from pipeline.core.load import parse_yaml
from pipeline.core.log import safe_text
from pipeline.core.stage import Json
from pipeline.terms.licenses import UNKNOWN, parse_license
from pipeline.terms.records import Registry, load_registry, resolve
from pipeline.terms.statement import Source

CARD: Final = "README.md"
LONGEST_CARD: Final = 1 << 20
"""Bytes of a model's card; of a longer one nothing is read."""
UNREADABLE: Final = "unreadable card"
"""Stands for the models that a card may name which cannot be read."""

Model = TypeVar("Model", bound=LocalModel)
Api = TypeVar("Api", bound=ApiTeacher)

logger = logging.getLogger(__name__)


def declared_teacher(name: str, teacher: Teacher) -> DeclaredSource:
    """A teacher as its config declares it."""
    if isinstance(teacher, ApiTeacher):
        facts: dict[str, Json] = {"provider": teacher.provider, "model": teacher.model}
        licenses = (teacher.license, *teacher.terms)
        return _declared("teacher", name, f"{teacher.provider}:{teacher.model}", licenses, facts)
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
    """The teacher with all the licences that its answers come under: the terms of its provider's API beside what the
    config names, unless it names API terms itself; and of each model that its folder's card names and the config does
    not, an unknown one."""
    if isinstance(teacher, ApiTeacher):
        return _with_api_terms(teacher, policy)
    if isinstance(teacher, LocalServer):
        return with_ancestors(teacher, policy)
    return teacher


def _with_api_terms(teacher: Api, policy: PolicyConfig) -> Api:
    registry = load_registry(policy.registry)
    record = registry.of_provider(teacher.provider)
    if record is None or any(_are_api_terms(name, registry, policy) for name in (teacher.license, *teacher.terms)):
        return teacher
    if teacher.license == UNKNOWN:
        return teacher.model_copy(update={"license": record.id})
    return teacher.model_copy(update={"terms": (*teacher.terms, record.id)})


def _are_api_terms(name: str, registry: Registry, policy: PolicyConfig) -> bool:
    """Whether API terms are among what holds, whichever alternative is taken."""
    kinds = {each.id: each.kind for each in registry.records.values()}
    options = resolve(name, registry, policy.choose)
    return all(any(kinds.get(each) == "api_terms" for each in option) for option in options)


def with_family(student: StudentModel, policy: PolicyConfig) -> StudentModel:
    """The student's base with the models its card names, and the family that its licence is of where none is told."""
    student = with_ancestors(student, policy)
    record = None if student.family is not None else load_registry(policy.registry).find(student.license)
    return student if record is None else student.model_copy(update={"family": record.family})


def with_ancestors(model: Model, policy: PolicyConfig) -> Model:
    """The model with the models that its folder's card names; those that the config does not name are unknown."""
    if model.folder is None:
        if model.base_models is None:
            _warn_once(
                f"{safe_text(model.model)}: cards of hub ids are not read; if it was made from other models, name them "
                "in base_models ({} says that there are none)"
            )
        return model
    card = read_card(model.folder)
    _compare(model, card, policy)
    given = model.base_models or {}
    known = {name.strip().casefold() for name in given}
    missing = [name for name in card.base_models if name.strip().casefold() not in known]
    if not missing:
        return model
    return model.model_copy(update={"base_models": {**given, **dict.fromkeys(missing, UNKNOWN)}})


def _compare(model: LocalModel, card: "Card", policy: PolicyConfig) -> None:
    if card.license is None or _is_same(model.license, card.license, load_registry(policy.registry)):
        return
    said = f"its card says {safe_text(card.license)[:200]}, the config says {safe_text(model.license)}"
    _warn_once(f"{name_of(model)}: {said}; the config's licence is judged")


def _is_same(one: str, other: str, registry: Registry) -> bool:
    try:
        return resolve(one, registry, {}) == resolve(other, registry, {})
    except UsageError:  # more alternatives than are judged
        return False


@functools.lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    """Several steps declare one model; a person reads it once."""
    logger.warning("%s", text)


def source_of(declared: DeclaredSource) -> Source:
    """The same for the gates.

    Raises:
        UsageError: a licence is blank, too long or not printable; it names the place.
    """
    licenses = tuple(dict.fromkeys(_license(name, declared) for name in declared.licenses))
    return Source(declared.role, declared.name, shown(declared.what), licenses, declared.family, declared.facts)


def _license(name: str, declared: DeclaredSource) -> str:
    try:
        return parse_license(name).name
    except ValueError as error:
        place = "student" if declared.role == "student_base" else f"teachers.{declared.name}"
        more = "base_models" if "base_models" in declared.facts else "terms"
        where = f"{place}.{'license' if name == declared.licenses[0] else more}"
        todo = "write an SPDX expression such as MIT or Apache-2.0, the name of the terms, or leave it out"
        raise UsageError(str(error), where=where, todo=todo) from error


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


@dataclass(frozen=True, slots=True)
class Card:
    """What a model's card says in its front matter.

    Attributes:
        base_models: names of the models that it was made from; `unreadable card` where that cannot be read.
        license: as it stands there; None: it says none.
    """

    base_models: tuple[str, ...] = ()
    license: str | None = None


def read_card(folder: Path) -> Card:
    """The card in a model's folder; an empty one where there is none. Whatever is wrong with it, models that it may
    name count as unknown.

    Not covered: hub ids, whose cards are not here to be read before anything was asked; `base_models` names theirs.
    """
    path = folder / CARD
    place = f"{folder.resolve().name}/{CARD}"
    try:
        with boundary(UsageError, "the card cannot be read", where=place, todo="correct its front matter"):
            return _card(path)
    except UsageError as error:
        _warn_once(f"{place}: models that it may name stay unknown: {safe_text(error.what)}")
        return Card((UNREADABLE,))


def _front_matter(path: Path) -> str | None:
    """What stands between the first two lines `---`; None: there is no card, or nothing between such lines.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too long, or its front matter does not end.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        raw = file.read(LONGEST_CARD + 1)
    if len(raw) > LONGEST_CARD:
        raise ValueError("it is larger than 1 MB")
    lines = [line.rstrip() for line in raw.decode("utf-8", "replace").lstrip("\ufeff \t\r\n").splitlines()]
    if not lines or lines[0] != "---":
        return None
    if "---" not in lines[1:]:
        raise ValueError("its front matter has no closing line `---`")
    return "\n".join(lines[1 : lines.index("---", 1)])


def _card(path: Path) -> Card:
    """Raises: ValueError: `base_model` is neither a name nor a list of names. All else that YAML and files raise."""
    head = _front_matter(path)
    said = None if head is None else parse_yaml(head, path)
    if not isinstance(said, dict):
        return Card()
    named = said.get("base_model")
    given = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError("base_model is neither a name nor a list of names")
    names = tuple(dict.fromkeys(name for name in given if name.strip() != ""))
    key = "license_name" if said.get("license") == "other" else "license"
    license_said = said.get(key, said.get("license"))
    return Card(names, license_said if isinstance(license_said, str) and license_said.strip() != "" else None)
