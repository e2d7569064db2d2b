"""What a person means by the name of a source, in each result: one name may be different things in different runs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.mistakes import nearest
from pipeline.core.stage import Json
from pipeline.runner.catalogue import Catalogue, Held, inputs_of, part
from pipeline.runner.provenance import Provenance


@dataclass(frozen=True, slots=True)
class Meant:
    """What an id means for the rows of a result.

    Attributes:
        teachers, prompt_sets: their names, sorted.
        licenses: as rows have them in `license_set`, sorted.
    """

    teachers: tuple[str, ...] = ()
    prompt_sets: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()

    @classmethod
    def union(cls, some: "Iterable[Meant]") -> "Meant":
        """All of some."""
        teachers: set[str] = set()
        sets: set[str] = set()
        licenses: set[str] = set()
        for each in some:
            teachers.update(each.teachers)
            sets.update(each.prompt_sets)
            licenses.update(each.licenses)
        return cls(tuple(sorted(teachers)), tuple(sorted(sets)), tuple(sorted(licenses)))


@dataclass(frozen=True, slots=True)
class _Known:
    """A source as a result names it, with all words that one may call it by, in lower case."""

    role: str
    name: str
    words: frozenset[str]
    licenses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Meanings:
    """What an id means in each result.

    Attributes:
        catalogue: the results.
        own: stage and key -> what it means by what that result itself says of its sources.
        bases: stage and key of the trainings whose student's base it is.
        whole: all of it.
    """

    catalogue: Catalogue
    own: Mapping[tuple[str, str], Meant]
    bases: frozenset[tuple[str, str]]
    whole: Meant

    @classmethod
    def of(cls, catalogue: Catalogue, wanted: str) -> "Meanings":
        """Look an id up in all results.

        Raises:
            UsageError: nothing in the data folder has that name.
        """
        known = {held.place: [*_known(held)] for held in catalogue.results}
        every = [each for some in known.values() for each in some]
        word = wanted.casefold()
        licenses: set[str] = set()
        if not any(word in each.words for each in every):
            licenses = _licenses_meant(wanted, {name for each in every for name in each.licenses})
        hit = {
            place: [each for each in some if word in each.words or licenses & {*each.licenses}]
            for place, some in known.items()
        }
        if not any(hit.values()):
            names = sorted({each.name for each in every if each.role != "student_base"})
            names += sorted({name for each in every for name in each.licenses})
            what = f"nothing in {catalogue.data} came from {wanted!r}; {nearest(wanted, names)}"
            todo = "give a teacher, a prompt set, a model, a data set of the hub, or a licence"
            raise UsageError(what, where=f"drop-source {wanted}", todo=todo)
        own = {place: _meant(some, licenses) for place, some in hit.items()}
        bases = {place for place, some in hit.items() if any(each.role == "student_base" for each in some)}
        return cls(catalogue, own, frozenset(bases), Meant.union(own.values()))

    def scope(self, held: Held) -> Meant:
        """What it means for the rows of a result: what that result and those that it was made of say. Where one of them
        is gone, every meaning counts."""
        if held.manifest.stage == "evaluate":  # its rows are test prompts
            before = self.catalogue.input_of(held, "prompts")
            return self.whole if before is None else self.scope(before)
        parts = [self.own[held.place]]
        for name in inputs_of(held.manifest):
            before = self.catalogue.input_of(held, name)
            parts.append(self.whole if before is None else self.scope(before))
        return Meant.union(parts)


def _meant(known: Iterable[_Known], licenses: set[str]) -> Meant:
    found = [*known]
    return Meant(
        teachers=tuple(sorted({each.name for each in found if each.role == "teacher"})),
        prompt_sets=tuple(sorted({each.name for each in found if each.role == "prompt"})),
        licenses=tuple(sorted(licenses)),
    )


def _known(held: Held) -> Iterator[_Known]:
    """The sources that a result itself names."""
    metrics: Json = held.manifest.metrics
    match held.manifest.stage:
        case "prompts":
            for name, facts in _objects(part(metrics, "sources")):
                words = _words(name, facts.get("source"))
                yield _Known("prompt", name, words, (str(facts.get("license", "unknown")),))
        case "generate":
            for name, facts in _objects(part(metrics, "teachers")):
                licenses = facts.get("licenses") or [facts.get("license", "unknown")]
                words = _words(name, *(facts.get(key) for key in ("model", "origin", "identity")))
                yield _Known("teacher", name, words, tuple(map(str, licenses)))
        case "dataset":
            for name, facts in _objects(part(metrics, "sources", "teachers")):
                yield _Known("teacher", name, _words(name), tuple(map(str, facts.get("licenses", ()))))
            for name, facts in _objects(part(metrics, "sources", "prompt_sets")):
                words = _words(name, facts.get("source"))
                yield _Known("prompt", name, words, (str(facts.get("license", "unknown")),))
            provenance = Provenance.of(held.manifest)
            for source in () if provenance is None else provenance.sources:
                if source.get("role") in ("teacher", "prompt"):
                    words = _words(source.get("name"), source.get("what"))
                    licenses = tuple(map(str, source.get("licenses", ())))
                    yield _Known(str(source["role"]), str(source.get("name")), words, licenses)
        case "train":
            base = part(metrics, "student", "model")
            words = _words(base if base != "local" else None, part(held.manifest.parts, "files", "student.model"))
            yield _Known("student_base", "student", words, (str(part(metrics, "student", "license") or "unknown"),))


def _words(*names: object) -> frozenset[str]:
    return frozenset(str(name).casefold() for name in names if name is not None)


def _objects(value: Json) -> list[tuple[str, dict[str, Any]]]:
    found = value.items() if isinstance(value, dict) else ()
    return [(name, facts) for name, facts in found if isinstance(facts, dict)]


def _licenses_meant(wanted: str, known: set[str]) -> set[str]:
    """Those of the licences that are, name or come with the wanted one, by any of its names."""
    from pipeline.terms.records import load_registry, resolve  # reads all records

    registry = load_registry()
    record = registry.find(wanted)
    meant = wanted.casefold() if record is None else record.id.casefold()
    found = set()
    for expression in known:
        for name in {name for alternative in resolve(expression, registry, {}) for name in alternative}:
            its = registry.find(name)
            together = () if its is None else registry.together(its)
            if meant in {name.casefold(), expression.casefold(), *(each.id.casefold() for each in together)}:
                found.add(expression)
    return found
