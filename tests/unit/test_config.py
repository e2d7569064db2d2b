"""The config models: which knobs count, that the schema is the exported one, that every shipped config is valid."""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.core.config import FilterConfig, RunConfig, TrainStep
from pipeline.core.config_base import BYTES_OR_NAME, OPERATIONAL, ConfigModel, LocalModel, identity
from pipeline.core.config_teacher import GenerateConfig, VllmTeacher
from pipeline.core.load import load_config
from pipeline.runner.steps import STAGES
from tests.support import POLICY, minimal_config

MARKS = (OPERATIONAL, BYTES_OR_NAME)


def models(kind: Any = RunConfig) -> Iterator[type[BaseModel]]:
    """All config models reachable from a type, through fields, containers, unions and annotations."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)
    for argument in get_args(kind):
        yield from models(argument)


def buried_marks(annotation: Any, *, inside: bool = False) -> Iterator[str]:
    """Marks that stand on a part of an annotation, where `identity` does not look, instead of on the field."""
    if inside:
        yield from (mark for mark in getattr(annotation, "__metadata__", ()) if mark in MARKS)
    inside = inside or get_origin(annotation) in (Union, types.UnionType, tuple, list, dict)
    for argument in get_args(annotation):
        yield from buried_marks(argument, inside=inside)


def fields() -> dict[str, FieldInfo]:
    return {f"{model.__name__}.{name}": field for model in models() for name, field in model.model_fields.items()}


class TestMarks:
    def test_each_stands_on_the_field_itself(self) -> None:
        annotations = {
            f"{model.__name__}.{name}": model.__annotations__[name]
            for model in models()
            for name in model.__annotations__
            if name in model.model_fields
        }
        assert len(annotations) >= 90, f"found {len(annotations)} fields"
        assert {name: marks for name, kind in annotations.items() if (marks := [*buried_marks(kind)])} == {}

    def test_the_check_above_sees_a_buried_mark(self) -> None:
        assert [*buried_marks(Annotated[int, OPERATIONAL] | None)] == [OPERATIONAL]
        assert [*buried_marks(Annotated[int | None, OPERATIONAL])] == []

    def test_pydantic_keeps_those_that_are_written(self) -> None:
        written = {
            f"{model.__name__}.{name}"
            for model in models()
            for name, kind in model.__annotations__.items()
            if OPERATIONAL in getattr(kind, "__metadata__", ())
        }
        kept = {name for name, field in fields().items() if OPERATIONAL in field.metadata}
        assert written <= kept
        assert len(kept) >= 20, f"found {len(kept)} marked fields"

    def test_what_does_not_count_is_exactly_this(self) -> None:
        """A mark on a field that shapes rows is a stale result one day: read a change of this list twice."""
        assert {name for name, field in fields().items() if OPERATIONAL in field.metadata} == {
            "AnthropicTeacher.api_key",
            "LogprobsConfig.accept_scaled",
            "LogprobsConfig.api_limit",
            "Limits.output_tokens_per_minute",
            "Limits.input_tokens_per_minute",
            "Limits.requests_per_minute",
            "OpenAITeacher.limits",
            "GeminiTeacher.limits",
            "AnthropicTeacher.limits",
            "AnthropicTeacher.base_url",
            "AnthropicTeacher.on_fingerprint_change",
            "AnthropicTeacher.on_model_change",
            "AnthropicTeacher.concurrency",
            "AnthropicTeacher.price",
            "DatasetConfig.shard_rows",
            "EvaluateConfig.batch_size",
            "EvaluateConfig.speed_passes",
            "EvaluateConfig.speed_prompts",
            "EvaluateConfig.threads",
            "FileSource.path",
            "GeminiTeacher.api_key",
            "GeminiTeacher.base_url",
            "GeminiTeacher.on_fingerprint_change",
            "GeminiTeacher.on_model_change",
            "GenerateConfig.canaries",
            "GenerateConfig.mode",
            "GenerateConfig.batch",
            "BatchConfig.job_requests",
            "BatchConfig.job_bytes",
            "BatchConfig.open_jobs",
            "BatchConfig.poll_s",
            "BatchConfig.rounds",
            "BatchConfig.stragglers",
            "BatchConfig.online_after_s",
            "GenerateConfig.seeds",
            "JsonSchemaResponse.path",
            "OpenAITeacher.structured_outputs",
            "ServerTeacher.structured_outputs",
            "GeminiTeacher.concurrency",
            "GeminiTeacher.price",
            "OpenAITeacher.api_key",
            "OpenAITeacher.base_url",
            "OpenAITeacher.on_fingerprint_change",
            "OpenAITeacher.on_model_change",
            "OpenAITeacher.replicas",
            "OpenAITeacher.concurrency",
            "OpenAITeacher.max_tokens_field",
            "OpenAITeacher.price",
            "PolicyConfig.overrides",
            "PolicyConfig.registry",
            "PolicyConfig.texts",
            "PromptSet.card",
            "PromptSet.template",
            "ReplayTeacher.path",
            "Retry.budget_s",
            "Retry.first_wait_s",
            "Retry.max_wait_s",
            "Retry.timeout_s",
            "RunConfig.budget",
            "RunConfig.fanout",
            "ServerTeacher.base_path",
            "ServerTeacher.concurrency",
            "ServerTeacher.gpus_per_server",
            "ServerTeacher.health",
            "ServerTeacher.operational_args",
            "ServerTeacher.price",
            "ServerTeacher.restarts",
            "ServerTeacher.servers",
            "ServerTeacher.start_timeout_s",
            "ServerTeacher.version_path",
            "StudentModel.base_models",
            "StudentModel.family",
            "StudentModel.license",
            "TrainConfig.accelerate",
            "TrainConfig.checkpoint",
            "TrainConfig.accept_findings",
            "TrainConfig.attention",
            "TrainConfig.gradient_checkpointing",
            "TrainConfig.liger",
            "TrainConfig.log_steps",
            "TrainConfig.micro_batch_size",
            "TrainConfig.packing",
            "TrainConfig.processes",
            "TrainConfig.threads",
            "TrainConfig.trackers",
            "VllmTeacher.concurrency",
            "VllmTeacher.price",
            "VllmTeacher.restarts",
            "VllmTeacher.servers",
            "VllmTeacher.start_timeout_s",
            "VllmTeacher.tensor_parallel_size",
        }

    def test_every_path_is_marked_or_identity_refuses_it(self) -> None:
        paths = [name for name, field in fields().items() if Path in {field.annotation, *get_args(field.annotation)}]
        assert len(paths) >= 5
        assert [name for name in paths if OPERATIONAL not in fields()[name].metadata] == []


class TestIdentity:
    def test_an_unmarked_path_has_no_identity(self) -> None:
        class Forgotten(ConfigModel):
            path: Path

        with pytest.raises(TypeError, match="mark the field OPERATIONAL"):
            identity(Forgotten(path=Path("x")))

    def test_a_default_that_is_written_out_counts_like_one_that_is_not(self) -> None:
        assert identity(FilterConfig(min_chars=1)) == identity(FilterConfig())

    def test_a_whole_number_written_for_a_float_is_the_float(self) -> None:
        whole, decimal = (
            GenerateConfig.model_validate({"teacher": "t", "sampling": {"temperature": value}}) for value in (1, 1.0)
        )
        assert json.dumps(identity(whole)) == json.dumps(identity(decimal))

    def test_operational_fields_are_not_in_it_however_deep(self) -> None:
        steps = TrainStep.model_validate(
            {"train": {"processes": 2, "threads": 2}, "student": {"model": "./x"}, "policy": POLICY}
        )
        plain = TrainStep.model_validate({"train": {}, "student": {"model": "./x"}, "policy": POLICY})
        assert identity(steps) == identity(plain)

    def test_a_folder_counts_by_its_bytes_and_not_by_its_place(self) -> None:
        assert identity(LocalModel(model="./a")) == identity(LocalModel(model="/b/c"))

    def test_a_hub_id_counts_as_text_with_its_revision(self) -> None:
        names = [("org/a", "1"), ("org/b", "1"), ("org/a", "2")]
        seen = {json.dumps(identity(LocalModel(model=model, revision=revision))) for model, revision in names}
        assert len(seen) == 3

    def test_a_hub_id_is_never_taken_for_a_folder(self) -> None:
        """A folder's identity says "local"; so might a hub id, but a hub id always has a revision."""
        assert identity(LocalModel(model="local", revision="1")) != identity(LocalModel(model="./local"))

    def test_the_order_in_which_teachers_are_written_does_not_count(self) -> None:
        teacher = {"kind": "vllm", "model": "./x"}
        one, two = ({"a": teacher, "b": teacher}, {"b": teacher, "a": teacher})
        runs = [
            RunConfig.model_validate(minimal_config(teachers=each, generate={"teacher": "a"})) for each in (one, two)
        ]
        assert identity(runs[0]) == identity(runs[1])


class TestWhatEachStageIsGiven:
    """A stage's key moves with its own section and nothing else: an edit elsewhere must not rerun it."""

    SECTIONS: dict[str, set[str]] = {  # noqa: RUF012 (a table)
        "prompts": {"prompts"},
        "generate": {"generate", "teachers", "checks", "spending"},
        "filter": {"filter"},
        "dedup": {"dedup"},
        "dataset": {"dataset", "policy", "declared"},
        "train": {"train", "student", "policy"},
        "evaluate": {"evaluate", "teacher", "student", "retry", "greedy_teacher", "outbound", "spending"},
        "report": {"report", "name"},
    }

    def test_the_stages_are_these_in_the_order_in_which_data_flows(self) -> None:
        assert [spec.kind for spec in STAGES] == [*self.SECTIONS]

    def test_no_stage_reads_one_that_comes_later(self) -> None:
        seen: set[str] = set()
        for spec in STAGES:
            assert set(spec.after) <= seen
            seen.add(spec.kind)

    @pytest.mark.parametrize("kind", list(SECTIONS))
    def test_each_is_given_its_sections(self, kind: str) -> None:
        run = RunConfig.model_validate(minimal_config())
        spec = next(spec for spec in STAGES if spec.kind == kind)
        assert set(type(spec.config(run)).model_fields) == self.SECTIONS[kind]

    def test_the_teacher_is_the_one_that_generate_names(self) -> None:
        teachers = {name: {"kind": "vllm", "model": f"./{name}"} for name in ("one", "two")}
        run = RunConfig.model_validate(minimal_config(teachers=teachers, generate={"teacher": "two"}))
        for kind in ("generate", "evaluate"):
            step = next(spec for spec in STAGES if spec.kind == kind).config(run)
            teacher = step.teachers["two"] if kind == "generate" else step.teacher  # type: ignore[attr-defined]
            assert isinstance(teacher, VllmTeacher)
            assert teacher.model == "./two"


class TestSchema:
    def test_the_exported_one_is_the_models(self, root: Path) -> None:
        exported = json.loads((root / "configs" / "schema.json").read_text("utf-8"))
        assert exported == RunConfig.model_json_schema(), "refresh it: python -m pipeline schema > configs/schema.json"

    def test_every_field_is_explained(self) -> None:
        """Stage sections of a run are explained by their own models."""
        silent = [name for name, field in fields().items() if not field.description]
        assert [name for name in silent if not name.startswith("RunConfig.")] == []


def config_files(root: Path) -> list[Path]:
    """Every runnable YAML; those of Accelerate are its own format."""
    return sorted(path for path in (root / "configs").rglob("*.y*ml") if "accelerate" not in path.parts)


class TestShippedConfigs:
    def test_all_are_found(self, root: Path) -> None:
        files = config_files(root)
        assert len(files) >= 6, f"found {[path.name for path in files]}"

    def test_all_are_valid_and_say_how_to_run_them(self, root: Path) -> None:
        for path in config_files(root):
            load_config(path)
            first = path.read_text("utf-8").splitlines()[0]
            command = f"python -m pipeline run {path.relative_to(root).as_posix()}"
            assert first.startswith("# "), f"line 1 of {path.name}: {first}"
            assert first.partition(" --")[0].endswith(command), f"line 1 of {path.name}: {first}"

    def test_each_has_a_name_of_its_own(self, root: Path) -> None:
        names = [load_config(path).config.name for path in config_files(root)]
        assert len(set(names)) == len(names)
