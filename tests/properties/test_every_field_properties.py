"""Every field of every config model, found through the models: the keys of the steps move if and only if it counts."""

import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipeline.core.config import RunConfig
from pipeline.core.config_base import BYTES_OR_NAME, OPERATIONAL, CountedBy
from pipeline.core.config_train import CHECK_IDS, CheckId
from pipeline.core.lineage import Manifest, step_key
from pipeline.core.load import Loaded
from pipeline.core.stage import Result
from pipeline.core.store import Artefact
from pipeline.runner.keys import step_parts
from pipeline.runner.session import Session, open_session
from pipeline.runner.steps import plan_steps, spec_of
from tests.examples import examples
from tests.support import POLICY

# ------------------------------------------------------------------------------------- runs that have every field

FILES = ("rows.jsonl", "card.yaml", "template.jinja", "accelerate.yaml", "completions.jsonl")
FOLDERS = ("student", "teacher")
COPY = "copy-of-"
"""Every file and folder lies there twice, with equal bytes: a path that leads to the copy is another path only."""

COMMON = {
    "name": "small",
    "policy": {**POLICY, "competes_with": {"p": {"value": "no"}}, "choose": {"MIT OR Apache-2.0": "MIT"}},
    "student": {"model": "org/student", "revision": "r"},
    "generate": {"teacher": "t"},
    "dataset": {"title": "Small"},
    "train": {"accelerate": "accelerate.yaml", "batch_size": 27_720, "micro_batch_size": 1},  # divisible by 1 to 12
}
FILE_SET = {
    "source": {"kind": "jsonl", "path": "rows.jsonl"},
    "card": "card.yaml",
    "template": "template.jinja",
}
PRICE = {"input": 1, "output": 2}
API = {"kind": "openai", "base_url": "https://a.example/v1", "provider": "p", "model": "m", "price": PRICE}
RUNS: dict[str, dict[str, Any]] = {
    "local": {
        **COMMON,
        "student": {"model": "./student"},
        "teachers": {"t": {"kind": "vllm", "model": "./teacher"}},
        "generate": {**COMMON["generate"], "response": {"kind": "regex", "pattern": "a"}},  # type: ignore[dict-item]
        "prompts": {"sets": {"s": FILE_SET}},
        "train": {**COMMON["train"], "tuning": {"kind": "lora"}},  # type: ignore[dict-item]
        "fanout": {"kind": "processes"},
    },
    "server": {
        **COMMON,
        "teachers": {
            "t": {"kind": "server", "model": "org/teacher", "revision": "r", "command": ["serve", "{port}"]},
        },
        "generate": {**COMMON["generate"], "canaries": {}},  # type: ignore[dict-item]
        "prompts": {"sets": {"s": FILE_SET}},
        "train": {**COMMON["train"], "evaluation": {"keep": "best", "generate": {}}},  # type: ignore[dict-item]
    },
    "hub": {
        **COMMON,
        "teachers": {"t": {"kind": "vllm", "model": "org/teacher", "revision": "r"}},
        "student": {**COMMON["student"], "init": {"from_teacher_layers": [0]}},  # type: ignore[dict-item]
        "generate": {**COMMON["generate"], "logprobs": {"top_k": 5}},  # type: ignore[dict-item]
        "train": {**COMMON["train"], "tuning": {"kind": "qlora"}},  # type: ignore[dict-item]
        "prompts": {"sets": {"s": {"source": {"kind": "hub", "dataset": "org/d", "revision": "r"}}}},
    },
    "api": {
        **COMMON,
        "teachers": {"t": API},
        "generate": {
            **COMMON["generate"],  # type: ignore[dict-item]
            "response": {"kind": "json_schema", "json_schema": {}},
            "batch": {"stragglers": "online"},
        },
        "prompts": {"sets": {"s": FILE_SET}},
    },
    "anthropic": {
        **COMMON,
        "teachers": {"t": {"kind": "anthropic", "model": "m"}},
        "generate": {"teacher": "t", "sampling": {"temperature": None, "top_p": None, "max_tokens": 4096}},
        "evaluate": {"max_tokens": 4096},
        "prompts": {"sets": {"s": FILE_SET}},
    },
    "gemini": {
        **COMMON,
        "teachers": {"t": {"kind": "gemini", "model": "m"}},
        "generate": {**COMMON["generate"], "response": {"kind": "choice", "choices": ["a"]}},  # type: ignore[dict-item]
        "budget": {"teachers": {"t": {}}},
        "prompts": {"sets": {"s": FILE_SET}},
    },
    "raise": {
        **COMMON,
        "teachers": {"t": API, "u": {**API, "model": "n"}},
        "generate": {
            **COMMON["generate"],  # type: ignore[dict-item]
            "on_length": {"kind": "raise", "caps": [1024]},
            "route": {"kind": "sets", "sets": {"s": "t"}},
            "accept": {"rows": 10, "max_candidates": 2000},
            "allow_missing": {"share": 0.5},
            "sampling": {"temperature": 1},
        },
        "prompts": {"sets": {"s": FILE_SET}},
    },
    "continue": {
        **COMMON,
        "teachers": {"t": {"kind": "vllm", "model": "org/teacher", "revision": "r"}},
        "generate": {
            **COMMON["generate"],  # type: ignore[dict-item]
            "on_length": {"kind": "continue"},
            "route": {"kind": "weights", "weights": {"t": 1}},
        },
        "prompts": {"sets": {"s": FILE_SET}},
    },
    "drop": {
        **COMMON,
        "teachers": {"t": API},
        "generate": {
            **COMMON["generate"],  # type: ignore[dict-item]
            "on_length": {"kind": "drop"},
            "route": {"kind": "all", "teachers": ["t"]},
        },
        "prompts": {"sets": {"s": FILE_SET}},
    },
    "replay": {
        **COMMON,
        "teachers": {"t": {"kind": "replay", "path": "completions.jsonl", "origin": "people"}},
        "prompts": {"sets": {"s": FILE_SET}},
    },
}


@dataclass(frozen=True)
class Place:
    """A field of a model somewhere in a run.

    Attributes:
        run: name of the run.
        path: keys from the top of its config.
        model: whose field it is.
        marks: of this field and of those above it, from the top.
    """

    run: str
    path: tuple[str, ...]
    model: type[BaseModel]
    marks: tuple[Any, ...]

    @property
    def field(self) -> str:
        return f"{self.model.__name__}.{self.path[-1]}"


def places(run: str, value: Any, path: tuple[str, ...] = (), marks: tuple[Any, ...] = ()) -> Iterator[Place]:
    """All fields below a value, models and mappings of models opened."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from places(run, item, (*path, name), marks)
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            place = Place(run, (*path, name), type(value), (*marks, *field.metadata))
            yield place
            yield from places(run, getattr(value, name), place.path, place.marks)


def models_in(annotation: Any) -> set[type[BaseModel]]:
    """The models that an annotation can hold, with those in their fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = (models_in(field.annotation) for field in annotation.model_fields.values())
        return {annotation}.union(*inner)
    return set().union(*map(models_in, get_args(annotation)))


EVERY_PLACE = [place for name, data in RUNS.items() for place in places(name, RunConfig.model_validate(data))]
PLACES = {place.field: place for place in EVERY_PLACE} | {
    place.field: place
    for place in EVERY_PLACE
    if place.run == "api"
    and (place.model.__name__ in ("OutboundConfig", "BatchConfig") or place.field == "GenerateConfig.mode")
}
PLACES |= {place.field: place for place in EVERY_PLACE if place.run == "server" and "evaluation" in place.path[1:-1]}
"""One place of each field; of a field that two runs have, the last one's, but the guard and jobs need an API, and how
the student is measured counts only where that decides something."""
FIELDS = sorted(PLACES)
ANNOTATIONS = {name: PLACES[name].model.model_fields[PLACES[name].path[-1]].annotation for name in FIELDS}
LEAVES = [name for name in FIELDS if not models_in(ANNOTATIONS[name])]
TAGS = {name for name in LEAVES if get_origin(ANNOTATIONS[name]) is Literal and len(get_args(ANNOTATIONS[name])) == 1}
"""Fields of one value, which say what kind of model theirs is."""
TOGETHER = {"GenerateConfig.teacher", "BySet.sets", "ByWeight.weights", "ToAll.teachers"}
"""Fields that cannot change alone: they name entries of `teachers`."""
OTHER_PARTS_COUNT = {
    *("VllmTeacher.args", "VllmTeacher.env", "StudentModel.model", "VllmTeacher.model"),
    *("ServerTeacher.command", "ServerTeacher.env", "ServerTeacher.model"),
    *("JsonSchemaResponse.json_schema", "JsonSchemaResponse.path"),
    *("PolicyConfig.registry", "PolicyConfig.texts", "PolicyConfig.overrides", "PolicyConfig.choose"),
    *("PolicyConfig.territory", "VllmTeacher.base_models", "ServerTeacher.base_models"),
    *("DatasetConfig.exclude_teachers", "DatasetConfig.exclude_prompt_sets"),
}
"""Fields of which a part counts: below, they have tests of their own."""


def test_the_runs_have_every_field_of_every_model() -> None:
    everything = {f"{model.__name__}.{name}" for model in models_in(RunConfig) for name in model.model_fields}
    assert everything == set(FIELDS)
    assert len(LEAVES) >= 100, f"found {len(LEAVES)} fields that hold values"


# ------------------------------------------------------------------------------------------------- keys of a run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: every file that the runs name, twice."""
    folder, before = tmp_path_factory.mktemp("project"), Path.cwd()
    for name in FILES:
        for copy in ("", COPY):
            (folder / f"{copy}{name}").write_text(name, "utf-8")
    for name in FOLDERS:
        for copy in ("", COPY):
            (folder / f"{copy}{name}").mkdir()
            (folder / f"{copy}{name}" / "config.json").write_text(name, "utf-8")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def keys(project: Path, config: RunConfig) -> dict[str, str]:
    """The key of each step, all steps before it having made the same as ever."""
    session = open_session(Loaded(config, project / "run.yaml", (), config.name), project / "data")
    return {step.name: step_key(step_parts(session, step, upstream(session))) for step in plan_steps()}


def upstream(session: Session) -> dict[str, Artefact]:
    manifest = Manifest.of("any", "k" * 64, {}, Result(0, 0, {}, "c" * 64), {})
    return {step.name: Artefact(session.data, manifest) for step in plan_steps()}


def moved(project: Path, one: RunConfig, other: RunConfig) -> set[str]:
    """The steps whose keys differ."""
    before, after = keys(project, one), keys(project, other)
    return {name for name in before if before[name] != after[name]}


def changed(config: RunConfig, path: tuple[str, ...], value: Any) -> RunConfig:
    """The config with another value at a path."""
    data = config.model_dump()
    target = data
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    return RunConfig.model_validate(data)


def changed_if_valid(config: RunConfig, path: tuple[str, ...], value: Any) -> RunConfig | None:
    try:
        return changed(config, path, value)
    except ValidationError:
        return None


def given_to(config: RunConfig) -> dict[str, dict[tuple[str, ...], Any]]:
    """What each step is given that counts, found without `identity`: the values that lie under no operational mark."""
    return {
        step.name: {
            place.path: value
            for place in places("", spec_of(step).config(config))
            if OPERATIONAL not in place.marks
            and not isinstance(value := value_at(spec_of(step).config(config), place.path), BaseModel | dict)
        }
        for step in plan_steps()
    }


def value_at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


# ------------------------------------------------------------------------------------------------- other values

TEXTS = st.sampled_from(["a", "b-c", "x1", "${env:ONE}", "https://one.example/v1", "https://two.example/v1", "/v2"])


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a type, many of them valid where a field asks for more than the type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if annotation == CheckId:
        return st.sampled_from(CHECK_IDS)
    if origin is Annotated:
        return values(arguments[0])
    if origin in (Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    return {
        bool: st.booleans(),
        int: st.integers(1, 12) | st.integers(100, 120) | st.integers(1100, 1120),
        float: st.integers(1, 99).map(lambda number: number / 100),
        str: TEXTS,
        Path: st.sampled_from([f"{copy}{name}" for name in FILES for copy in ("", COPY)]),
        type(None): st.none(),
    }[annotation]


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in TAGS | TOGETHER | OTHER_PARTS_COUNT])
@settings(
    parent=examples(5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(data=st.data())
def test_keys_move_exactly_where_the_field_counts(name: str, project: Path, data: st.DataObject) -> None:
    place = PLACES[name]
    config = RunConfig.model_validate(RUNS[place.run])
    other = data.draw(values(ANNOTATIONS[name]).map(lambda value: changed_if_valid(config, place.path, value)))
    assume(other is not None and value_at(other, place.path) != value_at(config, place.path))
    assert other is not None
    before, after = given_to(config), given_to(other)
    expected = {step for step in before if repr(before[step]) != repr(after[step])}
    if ANNOTATIONS[name] in (Path, Path | None):
        expected = where_bytes_differ(name, value_at(config, place.path), value_at(other, place.path))
    assert moved(project, config, other) == expected
    if OPERATIONAL not in place.marks:
        assert expected, f"{name} is not marked operational, yet no step is given it"


def where_bytes_differ(name: str, before: Path | None, after: Path | None) -> set[str]:
    """The steps that read the file of a path field, if the two paths lead to different bytes."""
    if before is not None and after is not None and before.name.removeprefix(COPY) == after.name.removeprefix(COPY):
        return set()
    return {
        "FileSource.path": {"prompts"},
        "PromptSet.card": {"prompts"},
        "PromptSet.template": {"prompts"},
        "ReplayTeacher.path": {"generate", "evaluate"},
        "TrainConfig.accelerate": {"train"},
    }[name]


@pytest.mark.parametrize("name", sorted({*FIELDS} - {*LEAVES, "CourseEvaluation.generate"}))
def test_another_kind_of_model_moves_the_same_keys(name: str, project: Path) -> None:
    """Sections and unions, whole: the value that another run has there."""
    for run in RUNS:
        for place in places(run, RunConfig.model_validate(RUNS[run])):
            if place.field != name:
                continue
            config = RunConfig.model_validate(RUNS[run])
            for donor in map(RunConfig.model_validate, RUNS.values()):
                try:
                    other = changed_if_valid(config, place.path, value_at(donor.model_dump(), place.path))
                except (KeyError, TypeError):  # the other run has no such place
                    continue
                if other is None:
                    continue
                before, after = given_to(config), given_to(other)
                steps = {step for step in before if repr(before[step]) != repr(after[step])}
                if OPERATIONAL in place.marks:
                    assert moved(project, config, other) == set()
                else:
                    assert moved(project, config, other) == steps


# ------------------------------------------------------------------------------------- fields of which a part counts


@pytest.mark.parametrize(("name", "steps"), [("teacher", {"generate", "evaluate"}), ("student", {"train", "evaluate"})])
class TestLocalModels:
    """A local folder counts by its bytes, a hub id by its name."""

    def path(self, name: str) -> tuple[str, ...]:
        return ("teachers", "t", "model") if name == "teacher" else ("student", "model")

    def test_another_path_to_equal_bytes_moves_nothing(self, project: Path, name: str, steps: set[str]) -> None:
        config = RunConfig.model_validate(RUNS["local"])
        assert moved(project, config, changed(config, self.path(name), f"./{COPY}{name}")) == set()

    def test_other_bytes_move_who_reads_them(self, project: Path, name: str, steps: set[str]) -> None:
        config = RunConfig.model_validate(RUNS["local"])
        other = {"teacher": "student", "student": "teacher"}[name]
        assert moved(project, config, changed(config, self.path(name), f"./{other}")) == steps

    def test_another_hub_id_moves_who_reads_it(self, project: Path, name: str, steps: set[str]) -> None:
        config = RunConfig.model_validate(RUNS["hub"])
        other = changed(config, self.path(name), "org/other")
        assert moved(project, config, other) == {*steps, "dataset"}, "whose manifest names it"


@pytest.mark.parametrize(
    ("name", "value"),
    [("territory", ["DE"]), ("choose", {"MIT OR Apache-2.0": "Apache-2.0"}), ("competes_with", {"p": "yes"})],
)
def test_the_policy_moves_the_data_set_and_no_answer_or_training(project: Path, name: str, value: Any) -> None:
    config = RunConfig.model_validate(RUNS["hub"])
    assert moved(project, config, changed(config, ("policy", name), value)) == {"dataset"}


@pytest.mark.parametrize(("name", "value"), [("exclude_teachers", ["t"]), ("exclude_prompt_sets", ["s"])])
def test_what_is_excluded_moves_the_data_set(project: Path, name: str, value: list[str]) -> None:
    config = RunConfig.model_validate(RUNS["hub"])
    assert moved(project, config, changed(config, ("dataset", name), value)) == {"dataset"}
    assert moved(project, config, changed(config, ("dataset", name), [])) == set()


def test_measuring_moves_the_training_only_where_it_decides(project: Path) -> None:
    config = RunConfig.model_validate(RUNS["hub"])
    watched = changed(config, ("train", "evaluation"), {"rows": 8, "steps": 2, "generate": {"prompts": 3}})
    best = changed(config, ("train", "evaluation"), {"keep": "best"})
    patient = changed(config, ("train", "evaluation"), {"patience": 2})
    assert moved(project, config, watched) == set()
    assert moved(project, config, best) == moved(project, config, patient) == {"train"}
    more = changed(best, ("train", "evaluation", "generate"), {"prompts": 3})
    assert moved(project, best, more) == {"train"}


def test_models_that_a_teacher_was_made_from_count_with_their_licences(project: Path) -> None:
    path = ("teachers", "t", "base_models")
    runs = [
        changed(RunConfig.model_validate(RUNS["hub"]), path, models)
        for models in (None, {}, {"org/base": "MIT"}, {"org/base": "llama3.3"})
    ]
    steps = {"generate", "evaluate", "dataset"}
    assert [moved(project, runs[0], other) for other in runs[1:]] == [set(), steps, steps]
    assert moved(project, runs[2], runs[3]) == steps


COMMANDS = [
    ["serve", "--port", "{port}"],
    ["./bin/serve", "--host", "{host}", "--listen={port}"],
    ["serve", "--ctx", "8", "--port", "{port}"],
    ["other", "{port}"],
]


@pytest.mark.parametrize("name", ["VllmTeacher.args", "VllmTeacher.env", "ServerTeacher.command", "ServerTeacher.env"])
@settings(parent=examples(10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_of_a_servers_flags_and_variables_what_may_change_answers_counts(
    name: str, project: Path, data: st.DataObject
) -> None:
    place = PLACES[name]
    mark = next(mark for mark in place.marks if isinstance(mark, CountedBy))
    flags = st.lists(st.sampled_from(["--seed=1", "--seed=2", "--enforce-eager", "--block-size=16"]), max_size=3)
    names = st.sampled_from(["VLLM_USE_V1", "OMP_NUM_THREADS", "NCCL_DEBUG"])
    drawn = {"VllmTeacher.args": flags, "ServerTeacher.command": st.sampled_from(COMMANDS)}.get(
        name, st.dictionaries(names, st.sampled_from("01"))
    )
    config = RunConfig.model_validate(RUNS[place.run])
    one, other = (changed(config, place.path, data.draw(drawn)) for _ in range(2))
    parts = [mark.part(value_at(each, place.path)) for each in (one, other)]
    assert moved(project, one, other) == (set() if parts[0] == parts[1] else {"generate", "evaluate"})


def test_a_schema_counts_with_the_order_of_its_properties(project: Path) -> None:
    path = ("generate", "response", "json_schema")
    schemas = ({}, {"type": "object"}, {"properties": {"a": {}, "b": {}}}, {"properties": {"b": {}, "a": {}}})
    runs = [changed(RunConfig.model_validate(RUNS["api"]), path, schema) for schema in schemas]
    assert len({keys(project, run)["generate"] for run in runs}) == len(runs)
    assert moved(project, runs[2], runs[3]) == {"generate"}


def test_the_name_of_a_teacher_counts_where_rows_carry_it(project: Path) -> None:
    data = {**RUNS["api"], "teachers": {"u": RUNS["api"]["teachers"]["t"]}, "generate": {"teacher": "u"}}
    one, other = RunConfig.model_validate(RUNS["api"]), RunConfig.model_validate(data)
    assert moved(project, one, other) == {"generate", "dataset"}


def test_the_name_of_a_prompt_set_counts(project: Path) -> None:
    data = {**RUNS["hub"], "prompts": {"sets": {"other": RUNS["hub"]["prompts"]["sets"]["s"]}}}
    one, other = RunConfig.model_validate(RUNS["hub"]), RunConfig.model_validate(data)
    assert moved(project, one, other) == {"prompts"}


def test_only_these_marks_are_known() -> None:
    """A new kind of mark needs a property of its own."""
    kinds = {
        type(mark) for place in PLACES.values() for mark in place.marks if mark not in (OPERATIONAL, BYTES_OR_NAME)
    }
    assert CountedBy in kinds and str not in kinds


def test_other_contents_upstream_move_the_key(project: Path) -> None:
    config = RunConfig.model_validate(RUNS["api"])
    session = open_session(Loaded(config, project / "run.yaml", (), "small"), project / "data")
    artefacts = upstream(session)
    for step in plan_steps():
        for name in step.inputs:
            other = replace(artefacts[name].manifest, content="d" * 64)
            inputs = {**artefacts, name: Artefact(session.data, other)}
            assert step_key(step_parts(session, step, inputs)) != step_key(step_parts(session, step, artefacts))
